// Error feedback of the encoder: docs/FORMAT.md's fp32 definition. A half-warp rounds its tokens again channel by channel; a channel's
// error goes from the lane that holds the channel to the lanes that hold the channels still to come.
#pragma once

#include "numbers.cuh"
#include "primitives.cuh"

namespace kvarn::cuda {

// Of one operand. K: rows are channels; V: rows are tokens.
struct FeedbackArrays {
  const float* factor;  // [head_dim][head_dim], read above the diagonal
  // In shared memory: of rows, then (V only) of channels. x = balanced value - mean is rounded to the grid code * scale + zero.
  const float *row_zero, *row_scale, *row_inverse;
  const float *channel_scale, *channel_weight;
  uint8_t* codes;  // K [tokens][head_dim + 4], V [head_dim][tokens + 4]
  int head_dim, tokens;
  float levels;
};

// clip(rint((x - zero) * inverse), 0, levels), as 12582912 + code: rounding happens in the addition, and the code is the low byte.
__device__ __forceinline__ float biased_code(float x, float zero, float inverse, float levels) {
  return __fadd_rn(fminf(fmaxf(__fmul_rn(__fsub_rn(x, zero), inverse), 0.0f), levels), 12582912.0f);
}

// x[j][i]: token first_token + 16j, channel `lane` + 16i; channels past head_dim do not exist.
template <bool kIsK, int NJ, int NI>
__device__ __forceinline__ void feed_back(const FeedbackArrays& f, float (&x)[NJ][NI], int first_token, int lane) {
  float zero[NJ], scale[NJ], inverse[NJ];
  const auto load_grid = [&](int j, int row) {
    zero[j] = f.row_zero[row];
    scale[j] = f.row_scale[row];
    inverse[j] = f.row_inverse[row];
  };
  if constexpr (!kIsK) {
#pragma unroll
    for (int j = 0; j < NJ; ++j) load_grid(j, first_token + 16 * j);
  }
#pragma unroll
  for (int i = 0; i < NI; ++i) {
    if (16 * i >= f.head_dim) break;
#pragma unroll 1
    for (int owner = 0; owner < 16; ++owner) {
      const int channel = owner + 16 * i;
      const float* const shares = f.factor + static_cast<int64_t>(channel) * f.head_dim + lane;
      if constexpr (kIsK) load_grid(0, channel);
      float error[NJ];
#pragma unroll
      for (int j = 0; j < NJ; ++j) {
        const int row = kIsK ? 0 : j;
        const float biased = biased_code(x[j][i], zero[row], inverse[row], f.levels);
        error[j] = __fsub_rn(__fmaf_rn(__fsub_rn(biased, 12582912.0f), scale[row], zero[row]), x[j][i]);
        if constexpr (!kIsK) error[j] = __fmul_rn(error[j], f.channel_scale[channel]);
        error[j] = __shfl_sync(kFullWarp, error[j], owner, 16);
        if (lane == owner) {
          const int token = first_token + 16 * j;
          f.codes[kIsK ? token * (f.head_dim + 4) + channel : channel * (f.tokens + 4) + token] =
              static_cast<uint8_t>(__float_as_int(biased) & 255);
        }
      }
#pragma unroll
      for (int later = i; later < NI; ++later) {
        if (16 * later >= f.head_dim) break;
        float share = shares[16 * later];
        if constexpr (!kIsK) share = __fmul_rn(share, f.channel_weight[lane + 16 * later]);
#pragma unroll
        for (int j = 0; j < NJ; ++j) {
          const float fed = __fmaf_rn(share, error[j], x[j][later]);
          x[j][later] = later > i || lane > owner ? fed : x[j][later];
        }
      }
    }
  }
}

}  // namespace kvarn::cuda
