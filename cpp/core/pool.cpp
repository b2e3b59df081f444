// The block pool: references, handles, and the C entry points that concern no single operation of a sequence.
#include "core/pool.h"

#include <atomic>
#include <memory>

#include "core/format.h"
#include "core/status.h"
#include "core/structs.h"

namespace kvarn {
namespace {

// A handle is serial << 24 | index. Serials come from one counter for the whole process and are never used again: a handle that was freed
// or that belongs to another pool matches no live sequence. 2^40 of them last for 34 years of a thousand sequences a second.
constexpr int kIndexBits = 24;
constexpr int64_t kMaxSequences = int64_t{1} << kIndexBits;
constexpr uint64_t kMaxSerial = (uint64_t{1} << (64 - kIndexBits)) - 1;

std::atomic<uint64_t> g_last_serial{0};

}  // namespace

References::References(int32_t size) : counts_(static_cast<size_t>(size), 0) {
  free_.reserve(static_cast<size_t>(size));
  for (int32_t i = size - 1; i >= 0; --i) free_.push_back(i);
}

int32_t References::take() {
  const int32_t i = free_.back();
  free_.pop_back();
  counts_[static_cast<size_t>(i)] = 1;
  return i;
}

bool References::release(int32_t i) {
  if (--counts_[static_cast<size_t>(i)] > 0) return false;
  free_.push_back(i);
  return true;
}

BlockPool::BlockPool(const kvarn_pool_params& params)
    : tile_tokens_(params.tile_tokens),
      sink_tiles_(params.sink_tokens / params.tile_tokens),
      recent_tokens_(params.recent_tokens),
      blocks_(params.num_blocks),
      slots_(params.num_slots),
      block_of_slot_(static_cast<size_t>(params.num_slots), -1),
      slot_of_block_(static_cast<size_t>(params.num_blocks), -1) {}

const SequenceState* BlockPool::find(const char* operation, kvarn_sequence handle) const {
  const size_t index = static_cast<size_t>(handle & (kMaxSequences - 1));
  const uint64_t serial = handle >> kIndexBits;
  if (serial != 0 && index < sequences_.size() && sequences_[index].serial == serial) return &sequences_[index];
  fail(KVARN_STALE_HANDLE, "[kvarn.%s] sequence: expected a live sequence of this pool, got handle %#llx", operation,
       static_cast<unsigned long long>(handle));
  return nullptr;
}

SequenceState* BlockPool::find(const char* operation, kvarn_sequence handle) {
  return const_cast<SequenceState*>(static_cast<const BlockPool*>(this)->find(operation, handle));
}

kvarn_status BlockPool::add(const char* operation, const SequenceState* source, int64_t num_tokens, int64_t num_committed,
                            kvarn_sequence* handle) {
  if (handle == nullptr) return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] result: expected a pointer, got NULL", operation);
  SequenceState added;
  added.num_tokens = num_tokens;
  added.num_committed = num_committed;
  added.first_staged = sink_tiles_;
  if (source != nullptr) {
    const int64_t tiles = tiles_of(num_tokens);
    added.table.assign(source->table.begin(), source->table.begin() + tiles);
    added.first_staged = source->first_staged < tiles ? source->first_staged : (tiles > sink_tiles_ ? tiles : sink_tiles_);
  }
  // From here on `source` may dangle: the sequences move when their vector grows.
  if (free_sequences_.empty()) {
    if (static_cast<int64_t>(sequences_.size()) == kMaxSequences) {
      return fail(KVARN_OUT_OF_MEMORY, "[kvarn.%s] sequences: expected fewer than %lld live ones", operation,
                  static_cast<long long>(kMaxSequences));
    }
    // Room to free every sequence without allocating.
    if (free_sequences_.capacity() <= sequences_.size()) free_sequences_.reserve(2 * sequences_.size() + 16);
    sequences_.emplace_back();
    free_sequences_.push_back(static_cast<int32_t>(sequences_.size()) - 1);
  }
  const uint64_t serial = g_last_serial.fetch_add(1, std::memory_order_relaxed) + 1;
  if (serial > kMaxSerial) return fail(KVARN_INTERNAL, "[kvarn.%s] sequences: this process has used up every handle", operation);
  const int32_t index = free_sequences_.back();
  free_sequences_.pop_back();
  for (const int32_t entry : added.table) entry >= 0 ? blocks_.share(entry) : slots_.share(~entry);
  added.serial = serial;
  sequences_[static_cast<size_t>(index)] = std::move(added);
  *handle = serial << kIndexBits | static_cast<uint64_t>(index);
  return KVARN_OK;
}

void BlockPool::forget_block_of(int32_t slot) {
  int32_t& block = block_of_slot_[static_cast<size_t>(slot)];
  if (block >= 0) slot_of_block_[static_cast<size_t>(block)] = -1;
  block = -1;
}

void BlockPool::release_slot(int32_t slot) {
  if (slots_.release(slot)) forget_block_of(slot);
}

void BlockPool::release_block(int32_t block) {
  if (!blocks_.release(block)) return;
  const int32_t slot = slot_of_block_[static_cast<size_t>(block)];
  if (slot >= 0) forget_block_of(slot);
}

void BlockPool::release_tiles(SequenceState& sequence, int64_t first) {
  for (size_t t = static_cast<size_t>(first); t < sequence.table.size(); ++t) release_entry(sequence.table[t]);
  sequence.table.resize(static_cast<size_t>(first));
  if (sequence.first_staged > first) sequence.first_staged = first > sink_tiles_ ? first : sink_tiles_;
}

kvarn_pool_info BlockPool::info() const {
  kvarn_pool_info info{};
  info.struct_size = sizeof info;
  info.num_blocks = blocks_.size();
  info.free_blocks = blocks_.free_count();
  info.num_slots = slots_.size();
  info.free_slots = slots_.free_count();
  info.num_sequences = static_cast<int32_t>(sequences_.size() - free_sequences_.size());
  return info;
}

kvarn_sequence_info BlockPool::info(const SequenceState& sequence) const {
  kvarn_sequence_info info{};
  info.struct_size = sizeof info;
  info.num_tokens = sequence.num_tokens;
  info.num_committed = sequence.num_committed;
  info.num_tiles = static_cast<int32_t>(sequence.table.size());
  for (const int32_t entry : sequence.table) entry >= 0 ? ++info.num_blocks : ++info.num_slots;
  return info;
}

namespace {

kvarn_status create_pool(const kvarn_pool_params* given, kvarn_pool** pool) {
  constexpr const char* kOperation = "pool_create";
  kvarn_pool_params p;
  if (const kvarn_status status = adopt_struct(kOperation, given, p); status != KVARN_OK) return status;
  if (pool == nullptr) return fail(KVARN_INVALID_ARGUMENT, "[kvarn.pool_create] pool: expected a pointer, got NULL");
  if (!is_supported_tile_tokens(p.tile_tokens)) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.pool_create] tile_tokens: expected 32, 64, 128 or 256, got %d", p.tile_tokens);
  }
  if (p.num_blocks < 0) return fail(KVARN_INVALID_ARGUMENT, "[kvarn.pool_create] num_blocks: expected at least 0, got %d", p.num_blocks);
  if (p.num_slots < 1) return fail(KVARN_INVALID_ARGUMENT, "[kvarn.pool_create] num_slots: expected at least 1, got %d", p.num_slots);
  if (p.sink_tokens < 0 || p.sink_tokens % p.tile_tokens != 0) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.pool_create] sink_tokens: expected a multiple of tile_tokens = %d, got %d", p.tile_tokens,
                p.sink_tokens);
  }
  if (p.recent_tokens < 0)
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.pool_create] recent_tokens: expected at least 0, got %d", p.recent_tokens);
  *pool = new kvarn_pool{BlockPool(p)};
  return KVARN_OK;
}

}  // namespace
}  // namespace kvarn

extern "C" {

kvarn_status kvarn_pool_create(const kvarn_pool_params* params, kvarn_pool** pool) {
  return kvarn::guarded("pool_create", [&] { return kvarn::create_pool(params, pool); });
}

void kvarn_pool_destroy(kvarn_pool* pool) { delete pool; }

kvarn_status kvarn_pool_get_info(const kvarn_pool* pool, kvarn_pool_info* info) {
  if (pool == nullptr) return kvarn::fail(KVARN_INVALID_ARGUMENT, "[kvarn.pool_get_info] pool: expected a pointer, got NULL");
  if (const kvarn_status status = kvarn::check_out_struct("pool_get_info", "info", info); status != KVARN_OK) return status;
  kvarn::give_struct(pool->pool.info(), info);
  return KVARN_OK;
}

}  // extern "C"
