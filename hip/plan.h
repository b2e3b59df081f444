// What a plan of this backend holds: its chosen kernels.
#pragma once

#include <cstdint>

#include "gpu/plan.h"
#include "hip_rt.h"

namespace kvarn::hip {

using namespace kvarn::cuda;  // what kernels and launches agree on

// One way to launch attention.
struct AttendLaunch {
  hipFunction_t function = nullptr;
  bool matrix = false;  // through matrix instructions (gfx1030: dot products)
  int threads = 0;
  int block_rows = 0;
  int shared_bytes = 0;
  int blocks = 0;
};

struct Plan : PlanBase {
  int wave = 0;  // lanes
  hipFunction_t hadamard = nullptr, append = nullptr, decode = nullptr, encode = nullptr;
  AttendLaunch generic, few_rows, many_rows;  // matrix kernels for up to 8 rows a block, and for 16; none: function is null

  // The launch for `rows` query rows a sequence and KV head.
  const AttendLaunch& attend_launch(int64_t rows) const;
};

// Chooses the kernels for what the parameters say, and takes device memory.
kvarn_status fill_plan(const kvarn_plan_params& params, Plan& plan);
// Gives it back.
void empty_plan(Plan& plan);

}  // namespace kvarn::hip
