// Values of a kvarn_dtype in device memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kvarn/kvarn.h"

namespace kvarn::cuda {

__host__ __device__ constexpr int dtype_bytes(int dtype) { return dtype == KVARN_F32 ? 4 : 2; }

// Exact.
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }
// Exact.
__device__ __forceinline__ float load_value(const void* p, int64_t i, int dtype) {
  if (dtype == KVARN_F16) return __half2float(static_cast<const __half*>(p)[i]);
  if (dtype == KVARN_BF16) return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
  return static_cast<const float*>(p)[i];
}
// Round to nearest even; beyond the range: infinity.
__device__ __forceinline__ void store_value(void* p, int64_t i, int dtype, float x) {
  if (dtype == KVARN_F16) {
    static_cast<__half*>(p)[i] = __float2half_rn(x);
  } else if (dtype == KVARN_BF16) {
    static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(x);
  } else {
    static_cast<float*>(p)[i] = x;
  }
}

}  // namespace kvarn::cuda
