// Correctly rounded quotients and roots without a branch, hence without the subroutine that the compiler's own calls in cases that do not
// occur here, and with it the registers. They begin as the compiler's do; docs/DESIGN.md says where each is exact.
#pragma once

#include "primitives.cuh"

namespace kvarn::cuda {

// 1 / x where neither is subnormal.
__device__ __forceinline__ float reciprocal(float x) {
  const float y = reciprocal_approx(x);
  return __fmaf_rn(y, -__fmaf_rn(y, x, -1.0f), y);
}
// x / y where neither y nor the quotient is subnormal.
__device__ __forceinline__ float quotient(float x, float y) {
  const bool small = x < 0x1p-60f;  // a remainder might be lost
  x = small ? __fmul_rn(x, 0x1p64f) : x;
  float r = reciprocal_approx(y);
  r = __fmaf_rn(r, __fmaf_rn(-y, r, 1.0f), r);
  const float q = __fmul_rn(x, r);
  const float corrected = __fmaf_rn(__fmaf_rn(-y, q, x), r, q);
  return small ? __fmul_rn(corrected, 0x1p-64f) : corrected;
}
// x / kDivisor for an odd divisor below 512, any x >= 0.
template <int kDivisor>
__device__ __forceinline__ float quotient(float x) {
  static_assert(kDivisor % 2 == 1 && kDivisor < 512, "tried for 31, 63, 127 and 255");
  constexpr float kDivisorFloat = static_cast<float>(kDivisor), kInverse = 1.0f / kDivisorFloat;
  const float q = __fmul_rn(x, kInverse);
  return __fmaf_rn(__fmaf_rn(-q, kDivisorFloat, x), kInverse, q);
}
// Of any x >= 0.
__device__ __forceinline__ float square_root(float x) {
  const bool small = x < 0x1p-60f;
  const float scaled = small ? __fmul_rn(x, 0x1p64f) : x;
  const float inverse = inverse_root_approx(fmaxf(scaled, 0x1p-100f));
  const float root = __fmul_rn(scaled, inverse);
  const float corrected = __fmaf_rn(__fmaf_rn(-root, root, scaled), __fmul_rn(inverse, 0.5f), root);
  return small ? __fmul_rn(corrected, 0x1p-32f) : corrected;
}

}  // namespace kvarn::cuda
