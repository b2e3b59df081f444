// The generic attention of cuda/attend_generic.cuh: a block walks through its runs.
#include <amd.h>

#include "attend_ends.h"
#include "attend_generic.cuh"
#include "attend_walk.h"

namespace kvarn::cuda {

extern "C" __global__ void __launch_bounds__(kGenericThreads) kvarn_attend_generic(AttendArgs) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ Share share;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x < kWave) {
    const Share s = share_of(kernel_args<AttendArgs>(), blockIdx.x, gridDim.x, lane);
    if (threadIdx.x == 0) share = s;
  }
  __syncthreads();  // the share is written
#pragma unroll 1
  while (share.unit < share.end) {
    {
      const AttendArgs& a = kernel_args<AttendArgs>();
      const GenericShared s = generic_shared(a, shared);
      __syncthreads();  // everyone has seen that there is a run and is done with the one before
      if (warp == 0) {
        Share next = share;
        next_run(a, next, blockIdx.x, lane, s.head->run);
        if (lane == 0) share.unit = next.unit;
      }
      __syncthreads();  // the run is described
      // One row a warp; rows past the last repeat it.
      float* const row = s.metadata + warp * a.head_dim;
      load_q(a, s.head->run, s.head->run.first_row + min(warp, s.head->run.rows - 1), lane, row);
      for (int d = lane; d < a.head_dim; d += 32) s.q[d * kRows + warp] = row[d];
      if (lane == 0) s.head->sums[warp] = make_float2(-INFINITY, 0.0f);
      __syncthreads();  // q is written
    }
    {
      const AttendArgs& a = kernel_args<AttendArgs>();
      attend_tiles(a, generic_shared(a, shared), warp, lane);
    }
    {
      const AttendArgs& a = kernel_args<AttendArgs>();
      const GenericShared s = generic_shared(a, shared);
      end_run(a, s.head->run, s.q, a.head_dim, s.head->sums, &s.head->flag, warp, kGenericWarps, lane);
    }
  }
}

}  // namespace kvarn::cuda
