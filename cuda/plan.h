// What a plan of this backend holds: its chosen kernels.
#pragma once

#include <cstdint>

#include "attend.h"
#include "encode.h"
#include "gpu/plan.h"
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

struct Plan : PlanBase {
  const void* hadamard = nullptr;
  const void* append = nullptr;
  const void* decode = nullptr;
  EncodeKernel encode, encode_feedback;

  // The launch for `rows` query rows a sequence and KV head.
  AttendLaunch attend_launch(int64_t rows) const;
};

// Chooses the kernels for what the parameters say, and takes device memory.
kvarn_status fill_plan(const kvarn_plan_params& params, Plan& plan);
// Gives it back.
void empty_plan(Plan& plan);

}  // namespace kvarn::cuda
