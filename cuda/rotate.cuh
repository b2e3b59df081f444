// The rotation of one row by one warp: docs/FORMAT.md's fp32 definition, operation by operation. Addition is commutative, so the order of
// the strides and of the sum over the odd factor is all that fixes the bits.
#pragma once

#include "primitives.cuh"
#include "rotation.h"

namespace kvarn::cuda {

// head_dim a power of two, 64 to 512: lane l holds values [l*E, (l+1)*E), E = head_dim/32. H is symmetric.
template <int E>
__device__ __forceinline__ void rotate_registers(float (&x)[E], int lane, float scale) {
#pragma unroll
  for (int stride = 1; stride < E; stride *= 2) {
#pragma unroll
    for (int i = 0; i < E; ++i) {
      if ((i & stride) != 0) continue;
      const float p = x[i], q = x[i + stride];
      x[i] = __fadd_rn(p, q);
      x[i + stride] = __fsub_rn(p, q);
    }
  }
#pragma unroll
  for (int stride = 1; stride < 32; stride *= 2) {
#pragma unroll
    for (int i = 0; i < E; ++i) {
      const float other = __shfl_xor_sync(kFullWarp, x[i], stride);
      x[i] = (lane & stride) != 0 ? __fsub_rn(other, x[i]) : __fadd_rn(x[i], other);
    }
  }
#pragma unroll
  for (int i = 0; i < E; ++i) x[i] = __fmul_rn(x[i], scale);
}

// Any head_dim: the row lies in shared memory and is rotated in place. The caller's writes must be ordered before (__syncwarp), and are
// ordered after it on return.
__device__ inline void rotate_shared(float* row, const Rotation& r, bool inverse, int lane) {
  const int power = r.head_dim / r.odd;
  for (int stride = 1; stride < power; stride *= 2) {
    for (int pair = lane; pair < r.head_dim / 2; pair += 32) {
      // Blocks have a power of two of values, so pairs never leave theirs.
      const int i = (pair / stride) * 2 * stride + pair % stride;
      const float p = row[i], q = row[i + stride];
      row[i] = __fadd_rn(p, q);
      row[i + stride] = __fsub_rn(p, q);
    }
    __syncwarp();
  }
  if (r.odd == 1) {
    for (int i = lane; i < r.head_dim; i += 32) row[i] = __fmul_rn(row[i], r.scale);
    __syncwarp();
    return;
  }
  constexpr int kMost = kMostOddHeadDim / 32;  // values of one lane
  float out[kMost];
#pragma unroll
  for (int n = 0; n < kMost; ++n) {
    const int i = n * 32 + lane;
    if (i >= r.head_dim) continue;
    const int b = i % power;
    const uint32_t signs = r.signs[inverse ? 1 : 0][i / power];
    float sum = (signs & 1u) != 0 ? -row[b] : row[b];
    for (int from = 1; from < r.odd; ++from) {
      const float term = row[from * power + b];
      sum = (signs >> from & 1u) != 0 ? __fsub_rn(sum, term) : __fadd_rn(sum, term);
    }
    out[n] = __fmul_rn(sum, r.scale);
  }
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kMost; ++n) {
    const int i = n * 32 + lane;
    if (i < r.head_dim) row[i] = out[n];
  }
  __syncwarp();
}

}  // namespace kvarn::cuda
