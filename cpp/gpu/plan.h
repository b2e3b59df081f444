// What a plan of every GPU backend holds: what its parameters say, and the memory in which attention's blocks leave partial results.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "attend.h"
#include "gpu/checks.h"
#include "gpu/counter_sets.h"
#include "kvarn/kvarn.h"
#include "rotation.h"

namespace kvarn::gpu {

struct PlanBase {
  kvarn_config config{};
  RecordLayout layout{};
  cuda::Rotation rotation{};
  int device = 0;
  int multiprocessors = 0;
  int shared_limit = 0;  // bytes of shared memory of one block
  int group = 0;         // query heads of a KV head
  int max_num_seqs = 0, max_tiles = 0;
  int64_t max_q_tokens = 0;
  bool batch_invariant = false;
  int run_tiles = 0;  // batch invariant: tiles of one run
  int64_t slots = 0;  // of partial results
  int max_block_rows = 0;
  int64_t workspace_bytes = 0;
  CounterSets sets;
  std::string description;

  // Takes the parameters over; refuses a device that is none of the machine's.
  kvarn_status set(const kvarn_plan_params& params, int devices);
  // Rows that the launch for `rows` query rows a sequence and KV head is chosen by.
  int64_t launch_rows(int64_t rows) const {
    // A result that depends on the sequence alone comes from a kernel that depends on the plan alone.
    return batch_invariant ? std::max<int64_t>(1, max_q_tokens / max_num_seqs) * group : rows;
  }
  // Blocks of a launch of generic attention.
  int generic_blocks() const;
  // Room for the partial results of a launch; called for all that the plan may lead to.
  void make_room(int block_rows, int blocks) {
    max_block_rows = std::max(max_block_rows, block_rows);
    slots = std::max<int64_t>(slots, 2 * blocks);
  }
  // The workspace and the size of the counter sets, when there is room for all launches. An item may be cut once a slot at most.
  void lay_out_workspace(int counters_per_item);
};

inline kvarn_status PlanBase::set(const kvarn_plan_params& params, int devices) {
  if (params.device >= devices) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.plan_create] device: expected 0 to %d, got %d", devices - 1, params.device);
  }
  config = params.config;
  const kvarn_format& f = params.config.format;
  layout = make_layout(Format{f.k_bits, f.v_bits, f.tile_tokens, f.metadata_bits}, config.head_dim);
  rotation = cuda::make_rotation(config.head_dim);
  device = params.device;
  group = params.num_q_heads / config.num_kv_heads;
  max_num_seqs = params.max_num_seqs;
  max_tiles = params.max_tiles;
  max_q_tokens = params.max_q_tokens;
  batch_invariant = params.batch_invariant != 0;
  return KVARN_OK;
}

inline int PlanBase::generic_blocks() const {
  constexpr int kMost = 4;              // of one multiprocessor
  constexpr int kReservedBytes = 1024;  // of shared memory, for each block
  const int bytes = cuda::attend_generic_bytes(config.head_dim, layout.format.tile_tokens) + kReservedBytes;
  return multiprocessors * std::max(1, std::min(kMost, shared_limit / bytes));
}

inline void PlanBase::lay_out_workspace(int counters_per_item) {
  constexpr int kInvariantRuns = 16;  // at most, of the longest sequence
  constexpr int kInvariantTiles = 8;  // at least, of a run
  if (batch_invariant) {
    run_tiles = std::max(kInvariantTiles, (max_tiles + kInvariantRuns - 1) / kInvariantRuns);
    const int64_t runs = (max_tiles + run_tiles - 1) / run_tiles;
    const int64_t row_blocks = max_q_tokens * group / max_block_rows + max_num_seqs;
    slots = config.num_kv_heads * row_blocks * runs;
  }
  const int64_t rows = slots * max_block_rows;
  workspace_bytes = (rows * config.head_dim * 4 + rows * 8 + 255) / 256 * 256;
  sets.per_set = (slots * counters_per_item + 31) / 32 * 32;
}

}  // namespace kvarn::gpu
