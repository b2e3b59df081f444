// The paged cache's bookkeeping: who owns which block and which staging slot. Numbers only; no K or V passes through here.
//
// Ownership. A block or slot is free or has one reference for every table entry that names it. Contents are shared by reference and never
// changed under another owner:
//  - a block is written once, by the encode that follows its `take`, and read from then on;
//  - a slot is written by an append only while one table names it; a shared one is copied first (copy-on-write).
//
// One tile, one encode. Two sequences that share a complete tile still in staging (inside recent_tokens, say) commit past it at different
// times. The first one encodes it into a fresh block and leaves the slot to the other, whose recent tokens keep full precision as long as
// it wants them. The pool remembers that the slot's contents are in that block, so that the second one only takes a reference. The memory
// of it ends with the block, with the slot, or with the next token written into the slot.
//
// Failure. Every call first counts what it needs and reserves its host memory, and only then changes anything.
#pragma once

#include <cstdint>
#include <vector>

#include "core/backend.h"

namespace kvarn {

// The numbers [0, size), handed out by reference count.
class References {
 public:
  explicit References(int32_t size);

  int32_t size() const { return static_cast<int32_t>(counts_.size()); }
  int32_t free_count() const { return static_cast<int32_t>(free_.size()); }
  int32_t count(int32_t i) const { return counts_[static_cast<size_t>(i)]; }
  // A free number, now with one reference. There must be one.
  int32_t take();
  void share(int32_t i) { ++counts_[static_cast<size_t>(i)]; }
  // Whether it became free.
  bool release(int32_t i);

 private:
  std::vector<int32_t> counts_;
  std::vector<int32_t> free_;  // as a stack: the number freed last is the one most likely in the caches
};

struct SequenceState {
  uint64_t serial = 0;  // 0: not in use
  int64_t num_tokens = 0;
  int64_t num_committed = 0;
  int64_t first_staged = 0;    // every tile from the sinks up to here is a block
  std::vector<int32_t> table;  // block, or ~slot
};

class BlockPool {
 public:
  explicit BlockPool(const kvarn_pool_params& params);

  kvarn_status create(const char* operation, kvarn_sequence* handle);
  kvarn_status free(const char* operation, kvarn_sequence handle);
  kvarn_status append(const char* operation, kvarn_sequence handle, int64_t num_tokens);
  kvarn_status commit(const char* operation, kvarn_sequence handle, int64_t num_tokens);
  kvarn_status rollback(const char* operation, kvarn_sequence handle, int64_t num_tokens);
  kvarn_status truncate(const char* operation, kvarn_sequence handle, int64_t num_tokens);
  kvarn_status fork(const char* operation, kvarn_sequence handle, kvarn_sequence* fork);
  kvarn_status share_prefix(const char* operation, kvarn_sequence handle, int64_t num_tokens, kvarn_sequence* shared);

  // Null, with the error set, when the handle is not live here.
  const SequenceState* find(const char* operation, kvarn_sequence handle) const;
  kvarn_pool_info info() const;
  kvarn_sequence_info info(const SequenceState& sequence) const;
  // What the last call that changed a sequence asks for.
  kvarn_work work() const;

 private:
  SequenceState* find(const char* operation, kvarn_sequence handle);
  int64_t tiles_of(int64_t tokens) const { return (tokens + tile_tokens_ - 1) / tile_tokens_; }
  void start_work();
  kvarn_status need_slots(const char* operation, int64_t needed, int64_t available) const;
  // A new sequence of the first `num_tokens` tokens of `source` (null: empty), sharing what its table names.
  kvarn_status add(const char* operation, const SequenceState* source, int64_t num_tokens, int64_t num_committed, kvarn_sequence* handle);
  void release_tiles(SequenceState& sequence, int64_t first);
  void release_slot(int32_t slot);
  void release_block(int32_t block);
  void release_entry(int32_t entry) { entry >= 0 ? release_block(entry) : release_slot(~entry); }
  // The slot's contents are no longer those of the block they were encoded into.
  void forget_block_of(int32_t slot);

  int64_t tile_tokens_;
  int64_t sink_tiles_;
  int64_t recent_tokens_;
  References blocks_;
  References slots_;
  std::vector<int32_t> block_of_slot_;  // the block that holds this slot's encoded contents, or -1
  std::vector<int32_t> slot_of_block_;  // the reverse
  std::vector<SequenceState> sequences_;
  std::vector<int32_t> free_sequences_;
  std::vector<kvarn_pair> copies_, decodes_, encodes_;
  std::vector<int64_t> slot_mapping_;
};

}  // namespace kvarn

struct kvarn_pool {
  kvarn::BlockPool pool;
};
