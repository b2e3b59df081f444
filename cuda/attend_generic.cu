// The kernel of attend_generic.cuh.
#include "attend_generic.cuh"
#include "attend_walk.cuh"

namespace kvarn::cuda {
namespace {

// All warps walk through the block's runs together; the first describes them.
__global__ void __launch_bounds__(kGenericThreads) attend_generic_kernel(const __grid_constant__ AttendArgs a) {
  extern __shared__ __align__(128) uint8_t shared[];
  const GenericShared s = generic_shared(a, shared);
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  Walk walk = begin_walk(a, blockIdx.x, gridDim.x, lane);
  while (walk.unit < walk.end) {
    next_run(a, walk, blockIdx.x, lane, warp == 0 ? &s.head->run : nullptr);
    __syncthreads();  // the run is described
    attend_run(a, s, warp, lane);
  }
}

}  // namespace

AttendKernel find_attend_generic() {
  return {reinterpret_cast<const void*>(&attend_generic_kernel), kGenericThreads, kGenericWarps, kGenericRows, nullptr};
}

}  // namespace kvarn::cuda
