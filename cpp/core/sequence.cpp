// What changes a sequence: append, commit, rollback, truncate, fork, share_prefix, free; and their C entry points.
#include <algorithm>

#include "core/pool.h"
#include "core/status.h"
#include "core/structs.h"

namespace kvarn {
namespace {

long long ll(int64_t value) { return static_cast<long long>(value); }

// Room for `size` entries; doubles, so that growing tile by tile stays linear.
template <class T>
void make_room(std::vector<T>& vector, int64_t size) {
  const size_t wanted = static_cast<size_t>(size);
  if (vector.capacity() < wanted) vector.reserve(std::max(wanted, 2 * vector.capacity()));
}

kvarn_status check_count(const char* operation, int64_t num_tokens, int64_t most, const char* of) {
  if (num_tokens >= 0 && num_tokens <= most) return KVARN_OK;
  return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] num_tokens: expected 0 to %lld (%s), got %lld", operation, ll(most), of, ll(num_tokens));
}

}  // namespace

void BlockPool::start_work() {
  copies_.clear();
  decodes_.clear();
  encodes_.clear();
  slot_mapping_.clear();
}

kvarn_work BlockPool::work() const {
  kvarn_work work{};
  work.struct_size = sizeof work;
  work.copies = copies_.data();
  work.num_copies = static_cast<int64_t>(copies_.size());
  work.decodes = decodes_.data();
  work.num_decodes = static_cast<int64_t>(decodes_.size());
  work.slot_mapping = slot_mapping_.data();
  work.num_tokens = static_cast<int64_t>(slot_mapping_.size());
  work.encodes = encodes_.data();
  work.num_encodes = static_cast<int64_t>(encodes_.size());
  return work;
}

kvarn_status BlockPool::need_slots(const char* operation, int64_t needed, int64_t available) const {
  if (needed <= available) return KVARN_OK;
  return fail(KVARN_OUT_OF_BLOCKS, "[kvarn.%s] slots: expected %lld free staging slots, got %lld of %d", operation, ll(needed),
              ll(available), slots_.size());
}

kvarn_status BlockPool::create(const char* operation, kvarn_sequence* handle) { return add(operation, nullptr, 0, 0, handle); }

kvarn_status BlockPool::free(const char* operation, kvarn_sequence handle) {
  SequenceState* sequence = find(operation, handle);
  if (sequence == nullptr) return KVARN_STALE_HANDLE;
  release_tiles(*sequence, 0);
  free_sequences_.push_back(static_cast<int32_t>(sequence - sequences_.data()));
  *sequence = SequenceState{};
  return KVARN_OK;
}

kvarn_status BlockPool::append(const char* operation, kvarn_sequence handle, int64_t num_tokens) {
  start_work();
  SequenceState* sequence = find(operation, handle);
  if (sequence == nullptr) return KVARN_STALE_HANDLE;
  const int64_t old_tokens = sequence->num_tokens;
  if (const kvarn_status status = check_count(operation, num_tokens, INT32_MAX - old_tokens, "a sequence has 2^31 - 1 tokens at most");
      status != KVARN_OK) {
    return status;
  }
  if (num_tokens == 0) return KVARN_OK;

  const int64_t old_tiles = tiles_of(old_tokens);
  const int64_t new_tiles = tiles_of(old_tokens + num_tokens);
  // An unfinished last tile is always a slot.
  const bool unfinished = old_tokens % tile_tokens_ != 0;
  const int32_t last_slot = unfinished ? ~sequence->table.back() : -1;
  const bool copies = unfinished && slots_.count(last_slot) > 1;
  if (const kvarn_status status = need_slots(operation, new_tiles - old_tiles + (copies ? 1 : 0), slots_.free_count()); status != KVARN_OK)
    return status;
  make_room(sequence->table, new_tiles);
  make_room(slot_mapping_, num_tokens);
  make_room(copies_, 1);

  if (copies) {
    const int32_t own = slots_.take();
    copies_.push_back({last_slot, own});
    release_slot(last_slot);
    sequence->table.back() = ~own;
  } else if (unfinished) {
    forget_block_of(last_slot);
  }
  for (int64_t t = old_tiles; t < new_tiles; ++t) sequence->table.push_back(~slots_.take());
  for (int64_t i = old_tokens; i < old_tokens + num_tokens; ++i) {
    const int64_t slot = ~sequence->table[static_cast<size_t>(i / tile_tokens_)];
    slot_mapping_.push_back(slot * tile_tokens_ + i % tile_tokens_);
  }
  sequence->num_tokens = old_tokens + num_tokens;
  return KVARN_OK;
}

kvarn_status BlockPool::commit(const char* operation, kvarn_sequence handle, int64_t num_tokens) {
  start_work();
  SequenceState* sequence = find(operation, handle);
  if (sequence == nullptr) return KVARN_STALE_HANDLE;
  const int64_t uncommitted = sequence->num_tokens - sequence->num_committed;
  if (const kvarn_status status = check_count(operation, num_tokens, uncommitted, "the uncommitted ones"); status != KVARN_OK)
    return status;

  const int64_t committed = sequence->num_committed + num_tokens;
  // Tiles that end at or before the recent tokens.
  const int64_t end = std::max<int64_t>(committed - recent_tokens_, 0) / tile_tokens_;
  int64_t staged = 0, needed = 0;
  for (int64_t t = sequence->first_staged; t < end; ++t) {
    const int32_t entry = sequence->table[static_cast<size_t>(t)];
    if (entry >= 0) continue;
    ++staged;
    const int32_t slot = ~entry;
    if (block_of_slot_[static_cast<size_t>(slot)] < 0) ++needed;
  }
  if (needed > blocks_.free_count()) {
    return fail(KVARN_OUT_OF_BLOCKS, "[kvarn.%s] blocks: expected %lld free blocks, got %d of %d", operation, ll(needed),
                blocks_.free_count(), blocks_.size());
  }
  make_room(encodes_, needed);

  for (int64_t t = sequence->first_staged; staged > 0; ++t) {
    int32_t& entry = sequence->table[static_cast<size_t>(t)];
    if (entry >= 0) continue;
    --staged;
    const int32_t slot = ~entry;
    int32_t block = block_of_slot_[static_cast<size_t>(slot)];
    if (block >= 0) {
      blocks_.share(block);
    } else {
      block = blocks_.take();
      encodes_.push_back({slot, block});
      block_of_slot_[static_cast<size_t>(slot)] = block;
      slot_of_block_[static_cast<size_t>(block)] = slot;
    }
    entry = block;
    release_slot(slot);
  }
  sequence->first_staged = std::max(sequence->first_staged, end);
  sequence->num_committed = committed;
  return KVARN_OK;
}

kvarn_status BlockPool::rollback(const char* operation, kvarn_sequence handle, int64_t num_tokens) {
  SequenceState* sequence = find(operation, handle);
  if (sequence == nullptr) return KVARN_STALE_HANDLE;
  const int64_t uncommitted = sequence->num_tokens - sequence->num_committed;
  if (const kvarn_status status = check_count(operation, num_tokens, uncommitted, "the uncommitted ones"); status != KVARN_OK)
    return status;
  sequence->num_tokens -= num_tokens;
  release_tiles(*sequence, tiles_of(sequence->num_tokens));
  return KVARN_OK;
}

kvarn_status BlockPool::truncate(const char* operation, kvarn_sequence handle, int64_t num_tokens) {
  start_work();
  SequenceState* sequence = find(operation, handle);
  if (sequence == nullptr) return KVARN_STALE_HANDLE;
  if (const kvarn_status status = check_count(operation, num_tokens, sequence->num_tokens, "the tokens of the sequence");
      status != KVARN_OK)
    return status;

  const int64_t tiles = tiles_of(num_tokens);
  const bool decodes = num_tokens % tile_tokens_ != 0 && sequence->table[static_cast<size_t>(tiles - 1)] >= 0;
  if (decodes) {
    int64_t available = slots_.free_count();
    for (size_t t = static_cast<size_t>(tiles); t < sequence->table.size() && available == 0; ++t) {
      const int32_t entry = sequence->table[t];
      if (entry < 0 && slots_.count(~entry) == 1) ++available;
    }
    if (const kvarn_status status = need_slots(operation, 1, available); status != KVARN_OK) return status;
    make_room(decodes_, 1);
  }

  release_tiles(*sequence, tiles);
  if (decodes) {
    int32_t& entry = sequence->table.back();
    const int32_t slot = slots_.take();
    decodes_.push_back({entry, slot});
    release_block(entry);
    entry = ~slot;
    sequence->first_staged = std::min(sequence->first_staged, std::max(tiles - 1, sink_tiles_));
  }
  sequence->num_tokens = num_tokens;
  sequence->num_committed = std::min(sequence->num_committed, num_tokens);
  return KVARN_OK;
}

kvarn_status BlockPool::fork(const char* operation, kvarn_sequence handle, kvarn_sequence* fork) {
  const SequenceState* sequence = find(operation, handle);
  if (sequence == nullptr) return KVARN_STALE_HANDLE;
  return add(operation, sequence, sequence->num_tokens, sequence->num_committed, fork);
}

kvarn_status BlockPool::share_prefix(const char* operation, kvarn_sequence handle, int64_t num_tokens, kvarn_sequence* shared) {
  const SequenceState* sequence = find(operation, handle);
  if (sequence == nullptr) return KVARN_STALE_HANDLE;
  if (const kvarn_status status = check_count(operation, num_tokens, sequence->num_committed, "the committed ones"); status != KVARN_OK)
    return status;
  const int64_t tile = num_tokens / tile_tokens_;
  if (num_tokens % tile_tokens_ != 0 && sequence->table[static_cast<size_t>(tile)] >= 0) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] num_tokens: expected %lld or %lld, the ends of an encoded tile, got %lld inside it",
                operation, ll(tile * tile_tokens_), ll((tile + 1) * tile_tokens_), ll(num_tokens));
  }
  return add(operation, sequence, num_tokens, num_tokens, shared);
}

namespace {

// Checks the pool, runs body, and keeps exceptions in.
template <class PoolPointer, class Body>
kvarn_status with_pool(const char* operation, PoolPointer pool, Body&& body) {
  if (pool == nullptr) return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] pool: expected a pointer, got NULL", operation);
  return guarded(operation, [&]() -> kvarn_status { return body(pool->pool); });
}

// The same for calls that hand out work.
template <class Body>
kvarn_status with_work(const char* operation, kvarn_pool* pool, kvarn_work* work, Body&& body) {
  return with_pool(operation, pool, [&](BlockPool& p) -> kvarn_status {
    if (const kvarn_status status = check_out_struct(operation, "work", work); status != KVARN_OK) return status;
    const kvarn_status status = body(p);
    if (status == KVARN_OK) give_struct(p.work(), work);
    return status;
  });
}

}  // namespace
}  // namespace kvarn

extern "C" {

using kvarn::BlockPool;

kvarn_status kvarn_sequence_create(kvarn_pool* pool, kvarn_sequence* sequence) {
  return kvarn::with_pool("sequence_create", pool, [&](BlockPool& p) { return p.create("sequence_create", sequence); });
}

kvarn_status kvarn_sequence_free(kvarn_pool* pool, kvarn_sequence sequence) {
  return kvarn::with_pool("sequence_free", pool, [&](BlockPool& p) { return p.free("sequence_free", sequence); });
}

kvarn_status kvarn_sequence_append(kvarn_pool* pool, kvarn_sequence sequence, int64_t num_tokens, kvarn_work* work) {
  return kvarn::with_work("sequence_append", pool, work, [&](BlockPool& p) { return p.append("sequence_append", sequence, num_tokens); });
}

kvarn_status kvarn_sequence_commit(kvarn_pool* pool, kvarn_sequence sequence, int64_t num_tokens, kvarn_work* work) {
  return kvarn::with_work("sequence_commit", pool, work, [&](BlockPool& p) { return p.commit("sequence_commit", sequence, num_tokens); });
}

kvarn_status kvarn_sequence_rollback(kvarn_pool* pool, kvarn_sequence sequence, int64_t num_tokens) {
  return kvarn::with_pool("sequence_rollback", pool, [&](BlockPool& p) { return p.rollback("sequence_rollback", sequence, num_tokens); });
}

kvarn_status kvarn_sequence_truncate(kvarn_pool* pool, kvarn_sequence sequence, int64_t num_tokens, kvarn_work* work) {
  return kvarn::with_work("sequence_truncate", pool, work,
                          [&](BlockPool& p) { return p.truncate("sequence_truncate", sequence, num_tokens); });
}

kvarn_status kvarn_sequence_fork(kvarn_pool* pool, kvarn_sequence sequence, kvarn_sequence* fork) {
  return kvarn::with_pool("sequence_fork", pool, [&](BlockPool& p) { return p.fork("sequence_fork", sequence, fork); });
}

kvarn_status kvarn_sequence_share_prefix(kvarn_pool* pool, kvarn_sequence sequence, int64_t num_tokens, kvarn_sequence* shared) {
  return kvarn::with_pool("sequence_share_prefix", pool,
                          [&](BlockPool& p) { return p.share_prefix("sequence_share_prefix", sequence, num_tokens, shared); });
}

kvarn_status kvarn_sequence_get_info(const kvarn_pool* pool, kvarn_sequence sequence, kvarn_sequence_info* info) {
  return kvarn::with_pool("sequence_get_info", pool, [&](const BlockPool& p) -> kvarn_status {
    if (const kvarn_status status = kvarn::check_out_struct("sequence_get_info", "info", info); status != KVARN_OK) return status;
    const kvarn::SequenceState* found = p.find("sequence_get_info", sequence);
    if (found == nullptr) return KVARN_STALE_HANDLE;
    kvarn::give_struct(p.info(*found), info);
    return KVARN_OK;
  });
}

kvarn_status kvarn_sequence_table(const kvarn_pool* pool, kvarn_sequence sequence, int32_t* table, int64_t capacity) {
  return kvarn::with_pool("sequence_table", pool, [&](const BlockPool& p) -> kvarn_status {
    const kvarn::SequenceState* found = p.find("sequence_table", sequence);
    if (found == nullptr) return KVARN_STALE_HANDLE;
    const int64_t tiles = static_cast<int64_t>(found->table.size());
    if (capacity < tiles) {
      return kvarn::fail(KVARN_INVALID_ARGUMENT, "[kvarn.sequence_table] capacity: expected at least %lld entries, got %lld",
                         kvarn::ll(tiles), kvarn::ll(capacity));
    }
    if (tiles > 0 && table == nullptr)
      return kvarn::fail(KVARN_INVALID_ARGUMENT, "[kvarn.sequence_table] table: expected a pointer, got NULL");
    std::copy(found->table.begin(), found->table.end(), table);
    return KVARN_OK;
  });
}

}  // extern "C"
