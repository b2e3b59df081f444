// What a plan of this backend holds: chosen kernels, device limits, the schedule's counters.
#pragma once

#include <cstdint>
#include <string>

#include "attend.h"
#include "counter_sets.h"
#include "encode.h"
#include "gpu_rt.h"
#include "rows.h"

namespace kvarn::cuda {

// One way to launch attention.
struct AttendLaunch {
  AttendKernel kernel;
  bool tensor_cores = false;
  int row_groups = 1;
  int group_rows = 0;
  int block_rows = 0;
  int tile_owners = 0;
  int k_stages = 0, k_stage_bytes = 0, num_k_stages = 0;
  int v_stages = 0, v_stage_bytes = 0, num_v_stages = 0;
  int shared_bytes = 0;
  int blocks = 0;
};

struct Plan {
  kvarn_config config{};
  RecordLayout layout{};
  Rotation rotation{};
  int device = 0;
  int multiprocessors = 0;
  int shared_limit = 0;  // of one block
  int num_q_heads = 0, group = 0;
  int max_num_seqs = 0, max_tiles = 0;
  int64_t max_q_tokens = 0;
  bool batch_invariant = false;
  int run_tiles = 0;  // batch invariant: tiles of one run
  const void* hadamard = nullptr;
  const void* append = nullptr;
  const void* decode = nullptr;
  EncodeKernel encode, encode_feedback;
  int64_t slots = 0;  // of partial results
  int max_block_rows = 0;
  int64_t workspace_bytes = 0;
  CounterSets sets;
  std::string description;

  // The launch for `rows` query rows a sequence and KV head.
  AttendLaunch attend_launch(int64_t rows) const;
};

kvarn_status make_plan(const kvarn_plan_params& params, Plan** plan);
void destroy_plan(Plan* plan);

}  // namespace kvarn::cuda
