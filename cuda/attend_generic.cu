// The kernel of attend_generic.cuh.
#include "attend_generic.cuh"

namespace kvarn::cuda {
namespace {

// The first warp walks through the block's runs; the others wait for each.
struct GenericSink {
  const AttendArgs& a;
  GenericShared s;
  int warp, lane;
  __device__ Run* open() { return &s.head->run; }
  __device__ void visit() {
    __syncthreads();  // the run is described
    if (s.head->run.end == 0) attend_run(a, s, warp, lane);
  }
};

__global__ void __launch_bounds__(kGenericThreads) attend_generic_kernel(const __grid_constant__ AttendArgs a) {
  extern __shared__ __align__(128) uint8_t shared[];
  GenericSink sink{a, generic_shared(a, shared), static_cast<int>(threadIdx.x / 32), static_cast<int>(threadIdx.x % 32)};
  if (sink.warp == 0) {
    for_each_run(a, blockIdx.x, gridDim.x, sink.lane, sink);
    return;
  }
  for (;;) {
    __syncthreads();
    if (sink.s.head->run.end != 0) return;
    attend_run(a, sink.s, sink.warp, sink.lane);
  }
}

}  // namespace

AttendKernel find_attend_generic() {
  return {reinterpret_cast<const void*>(&attend_generic_kernel), kGenericThreads, kGenericWarps, kGenericRows, nullptr};
}

}  // namespace kvarn::cuda
