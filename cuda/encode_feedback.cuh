// Error feedback of the encoder for any shape: docs/FORMAT.md's fp32 definition. A half-warp rounds a token again step by step; a
// step's error goes from the lane that holds its channel to the lanes that hold the channels still to come.
#pragma once

#include "encode_order.cuh"
#include "numbers.cuh"
#include "primitives.cuh"

namespace kvarn::cuda {

// Of one operand. K: rows are channels; V: rows are tokens.
struct FeedbackArrays {
  const float* factor;  // [head_dim][head_dim], read on and above the diagonal
  // In shared memory: of rows, then (V only) of steps' channels. x = balanced value - mean is rounded to the grid code * scale + zero.
  const float *row_zero, *row_scale, *row_inverse;
  const float *step_scale, *step_weight;
  uint8_t* codes;  // K [tokens][head_dim + 4], V [head_dim][tokens + 4]
  int head_dim, tokens;
  float levels;
};

// clip(rint((x - zero) * inverse), 0, levels), as 12582912 + code: rounding happens in the addition, and the code is the low byte.
__device__ __forceinline__ float biased_code(float x, float zero, float inverse, float levels) {
  return __fadd_rn(fminf(fmaxf(__fmul_rn(__fsub_rn(x, zero), inverse), 0.0f), levels), 12582912.0f);
}

// x[i]: the channel of step `lane` + 16i of a token; steps past head_dim do not exist.
template <bool kIsK, int NI>
__device__ __forceinline__ void feed_back(const FeedbackArrays& f, float (&x)[NI], int token, int lane) {
#pragma unroll
  for (int i = 0; i < NI; ++i) {
    if (16 * i >= f.head_dim) break;
#pragma unroll 1
    for (int owner = 0; owner < 16; ++owner) {
      const int step = owner + 16 * i, channel = step_channel(f.factor, f.head_dim, step), row = kIsK ? channel : token;
      const float* const shares = f.factor + static_cast<int64_t>(step) * f.head_dim + lane;
      const float biased = biased_code(x[i], f.row_zero[row], f.row_inverse[row], f.levels);
      float error = __fsub_rn(__fmaf_rn(__fsub_rn(biased, 12582912.0f), f.row_scale[row], f.row_zero[row]), x[i]);
      if constexpr (!kIsK) error = __fmul_rn(error, f.step_scale[step]);
      error = __shfl_sync(kFullWarp, error, owner, 16);
      if (lane == owner) {
        f.codes[kIsK ? token * (f.head_dim + 4) + channel : channel * (f.tokens + 4) + token] =
            static_cast<uint8_t>(__float_as_int(biased) & 255);
      }
#pragma unroll
      for (int later = i; later < NI; ++later) {
        if (16 * later >= f.head_dim) break;
        float share = shares[16 * later];
        if constexpr (!kIsK) share = __fmul_rn(share, f.step_weight[lane + 16 * later]);
        const float fed = __fmaf_rn(share, error, x[later]);
        x[later] = later > i || lane > owner ? fed : x[later];
      }
    }
  }
}

}  // namespace kvarn::cuda
