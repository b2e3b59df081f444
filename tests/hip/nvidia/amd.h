// What hip/amd.h is on AMD, for NVIDIA: the few names that the HIP backend's vendor-neutral kernels take from it and CUDA does not have.
// It stands first in the include path, so that hip/*.hip are compiled as they are.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace kvarn::cuda {

inline constexpr int kWave = 32;

// AMD's kernels find their arguments at an address that they can ask for; here the launch copies them into constant memory.
constexpr int kMostArgumentBytes = 4096;
static __constant__ uint4 kernel_arguments[kMostArgumentBytes / sizeof(uint4)];
template <class Args>
__device__ __forceinline__ const Args& kernel_args() {
  static_assert(sizeof(Args) <= kMostArgumentBytes);
  return *reinterpret_cast<const Args*>(kernel_arguments);
}

}  // namespace kvarn::cuda
