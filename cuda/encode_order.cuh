// The channel that each step of error feedback takes: the diagonal of its factor (docs/FORMAT.md, section 7, steps 0 and 3b).
#pragma once

#include <cstdint>

#include "kvarn/format.h"

namespace kvarn::cuda {

__device__ __forceinline__ float step_entry(const float* factor, int head_dim, int step) {
  return factor[static_cast<int64_t>(step) * (head_dim + 1)];
}
__device__ __forceinline__ int step_channel(const float* factor, int head_dim, int step) {
  return static_cast<int>(step_entry(factor, head_dim, step));
}

constexpr int kOrderWords = kMaxHeadDim / 32;
// Whether every channel has its step; the same in all threads. taken [kOrderWords], in shared memory.
template <int kThreads>
__device__ __forceinline__ bool orders_channels(const float* factor, int head_dim, unsigned* taken) {
  if (threadIdx.x < kOrderWords) taken[threadIdx.x] = 0;
  __syncthreads();  // nothing is taken
  bool good = true;
#pragma unroll 1
  for (int k = threadIdx.x; k < head_dim; k += kThreads) {
    const float entry = step_entry(factor, head_dim, k);
    const int channel = entry >= 0.0f && entry < static_cast<float>(head_dim) ? static_cast<int>(entry) : 0;
    const unsigned bit = 1u << channel % 32;
    good = good && static_cast<float>(channel) == entry && (atomicOr(taken + channel / 32, bit) & bit) == 0;
  }
  return __syncthreads_or(!good) == 0;
}

}  // namespace kvarn::cuda
