// What a plan of this backend holds: chosen kernels, device limits, the schedule's counters.
#pragma once

#include <cstdint>
#include <string>

#include "arguments.h"
#include "counter_sets.h"
#include "hip_rt.h"

namespace kvarn::hip {

// One way to launch attention.
struct AttendLaunch {
  hipFunction_t function = nullptr;
  bool matrix = false;  // through matrix instructions (gfx1030: dot products)
  int threads = 0;
  int block_rows = 0;
  int shared_bytes = 0;
  int blocks = 0;
};

struct Plan {
  kvarn_config config{};
  RecordLayout layout{};
  Rotation rotation{};
  int device = 0;
  int multiprocessors = 0;
  int wave = 0;  // lanes
  int group = 0;
  int max_num_seqs = 0, max_tiles = 0;
  int64_t max_q_tokens = 0;
  bool batch_invariant = false;
  int run_tiles = 0;  // batch invariant: tiles of one run
  hipFunction_t hadamard = nullptr, append = nullptr, decode = nullptr, encode = nullptr;
  AttendLaunch generic, few_rows, many_rows;  // matrix kernels for up to 8 rows a block, and for 16; none: function is null
  int64_t slots = 0;                          // of partial results
  int max_block_rows = 0;
  int64_t workspace_bytes = 0;
  CounterSets sets;
  std::string description;

  // The launch for `rows` query rows a sequence and KV head.
  const AttendLaunch& attend_launch(int64_t rows) const;
};

kvarn_status make_plan(const kvarn_plan_params& params, Plan** plan);
void destroy_plan(Plan* plan);

}  // namespace kvarn::hip
