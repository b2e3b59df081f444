// The query side of the score product: rows of q times the scales of the channels, as two fp16 numbers each.
#pragma once

#include "attend_operands.h"

namespace kvarn::cuda {

// The largest magnitude of `count` fp16 numbers, as bits; all lanes of a wave call it and get it. NaN counts as larger than infinity.
__device__ __forceinline__ uint32_t largest_magnitude(GlobalBytes halves, int count, int lane) {
  uint32_t most = 0;
#pragma unroll 1
  for (int i = lane; i < count; i += kWave) {
    const uint32_t magnitude = ((Global<uint16_t>)halves)[i] & 0x7fffu;
    most = max(most, magnitude);
  }
  const auto rotated = [](uint32_t x, auto control) {
    return static_cast<uint32_t>(__builtin_amdgcn_mov_dpp(static_cast<int>(x), decltype(control)::kValue, 0xf, 0xf, true));
  };
  most = max(most, rotated(most, DppControl<0x128>{}));  // row_ror:8, 4, 2, 1
  most = max(most, rotated(most, DppControl<0x124>{}));
  most = max(most, rotated(most, DppControl<0x122>{}));
  most = max(most, rotated(most, DppControl<0x121>{}));
  most = max(most, across_sixteen(most));
  if constexpr (kWave == 64) most = max(most, from_lane(most, lane ^ 32));
  return static_cast<uint32_t>(__builtin_amdgcn_readfirstlane(static_cast<int>(most)));
}

// A power of two that brings numbers of at most `magnitude` (bits of an fp16 number) below 2^13, and near it where 2^15 suffices for that.
struct HalfScale {
  uint32_t pair;  // as two fp16 numbers
  float inverse;
  static __device__ __forceinline__ HalfScale of(uint32_t magnitude) {
    const int exponent = min(27 - static_cast<int>(magnitude >> 10), 15);
    return {static_cast<uint32_t>(exponent + 15) * 0x04000400u, __uint_as_float(static_cast<uint32_t>(127 - exponent) << 23)};
  }
  __device__ __forceinline__ uint32_t apply(uint32_t halves) const {
    return bits_as<uint32_t>(bits_as<Half2>(halves) * bits_as<Half2>(pair));
  }
};

// The folded queries of one wave: 16 columns, of kRows rows. With 8 rows columns 0 to 7 are the high parts and 8 to 15 the low parts of the
// same rows, so that one product does for both; with 16 rows the low parts are an operand of their own.
template <int D, int kRows>
struct FoldedQueries {
  static constexpr int kOperands = kRows == 16 ? 2 : 1;
  static constexpr int kLaneCodes = D / kLaneGroups;  // channels that a lane folds
  static constexpr int kLaneWords = kLaneCodes / 2;
  static constexpr bool kInRegisters = kGroups == kLaneGroups && kOperands * kLaneWords <= 16;
  static constexpr int kColumnHalves = D + 8;
  static constexpr int kSharedBytes = kInRegisters ? 16 : kOperands * 16 * kColumnHalves * 2;  // of one wave

  uint32_t words[kInRegisters ? kOperands : 1][kInRegisters ? kLaneWords : 1];
  uint8_t* shared;
  float zero;     // of the lane's row: its product with the zeros of the channels
  float inverse;  // what the products must be multiplied by

  __device__ __forceinline__ void put(int operand, int word, uint32_t x, int lane) {
    if constexpr (kInRegisters) {
      words[operand][word] = x;
    } else {
      const int column = lane % 16, at = lane / 16 * kLaneWords + word;
      reinterpret_cast<uint32_t*>(shared + (operand * 16 + column) * (kColumnHalves * 2))[at] = x;
    }
  }
  __device__ __forceinline__ Fragment step(int operand, int s, int lane) const {
    Fragment f;
    if constexpr (kInRegisters) {
#pragma unroll
      for (int w = 0; w < kDepth / 2; ++w) f.words[w] = words[operand][s * (kDepth / 2) + w];
    } else {
      const uint8_t* const column = shared + (operand * 16 + lane % 16) * (kColumnHalves * 2);
      __builtin_memcpy(&f, __builtin_assume_aligned(column + (depth_group(lane) * (D / kGroups) + s * kDepth) * 2, 8), sizeof f);
    }
    return f;
  }
  // q: [kRows][D] floats below 1 in shared memory; scales and zeros: [D] fp16 numbers, read if kScaled, else 1 and 0.
  template <bool kScaled>
  __device__ __forceinline__ void fold(const float* q, GlobalBytes scales, GlobalBytes zeros, int lane) {
    const int first = lane / 16 * kLaneCodes;
    int at = lane % kRows * D + first;
    const HalfScale scale = HalfScale::of(kScaled ? largest_magnitude(scales, D, lane) : 0x3c00u);
    inverse = scale.inverse;
    zero = 0.0f;
#pragma unroll
    for (int i = 0; i < kLaneCodes / 4; ++i) {
      const float4 x = *reinterpret_cast<const float4*>(q + at + 4 * i);
      uint2 s = {0x3c003c00u, 0x3c003c00u}, z = {0, 0};
      if constexpr (kScaled) {
        s = load_as<uint2>(scales + 2 * first + 8 * i);
        z = load_as<uint2>(zeros + 2 * first + 8 * i);
      }
      zero = fmaf(x.x, low_half(z.x), fmaf(x.y, high_half(z.x), fmaf(x.z, low_half(z.y), fmaf(x.w, high_half(z.y), zero))));
      const uint32_t s01 = scale.apply(s.x), s23 = scale.apply(s.y);
      const float x0 = x.x * low_half(s01), x1 = x.y * high_half(s01), x2 = x.z * low_half(s23), x3 = x.w * high_half(s23);
      const uint32_t even = pack(x0, x2), odd = pack(x1, x3);
      const uint32_t even_rest = pack_rest(even, x0, x2), odd_rest = pack_rest(odd, x1, x3);
      if constexpr (kOperands == 1) {
        const bool rest = (lane & 8) != 0;
        put(0, 2 * i, rest ? even_rest : even, lane);
        put(0, 2 * i + 1, rest ? odd_rest : odd, lane);
      } else {
        put(0, 2 * i, even, lane);
        put(0, 2 * i + 1, odd, lane);
        put(1, 2 * i, even_rest, lane);
        put(1, 2 * i + 1, odd_rest, lane);
      }
      if (i % 2 == 1) {
        in_order();
        // Not all of q at once.
        if constexpr (kWave == 32) at = again(at);
      }
    }
    zero = over_groups(zero, [](float a, float b) { return a + b; });
    if constexpr (!kInRegisters) __syncwarp();
  }
  // c += codes or values of step s times the folded queries.
  __device__ __forceinline__ void multiply(Accumulator& c, const Fragment& a, int s, int lane) const {
    multiply_add(c, a, step(0, s, lane));
    if constexpr (kOperands == 2) multiply_add(c, a, step(1, s, lane));
  }
  // Sums of a finished product: with 8 rows the high and the low part meet.
  static __device__ __forceinline__ void sums(const Accumulator& c, float (&held)[kHeld]) {
    finish(c, held);
    if constexpr (kOperands == 1) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) held[i] += across_eight(held[i]);
    }
  }
};

// The probabilities' side of the output product, likewise: 16 tokens.
template <int kRows>
struct Weights {
  static constexpr int kOperands = kRows == 16 ? 2 : 1;
  Fragment parts[kOperands];

  // p: what the lane holds of a block of scores, already times the scales of the tokens.
  __device__ __forceinline__ void set(const float (&p)[kHeld], int lane) {
    uint32_t high[kHeld / 2], rest[kHeld / 2];
#pragma unroll
    for (int i = 0; i < kHeld / 2; ++i) {
      high[i] = pack(p[2 * i], p[2 * i + 1]);
      rest[i] = pack_rest(high[i], p[2 * i], p[2 * i + 1]);
    }
    if constexpr (kOperands == 1) {
#pragma unroll
      for (int i = 0; i < kHeld / 2; ++i) high[i] = (lane & 8) != 0 ? rest[i] : high[i];
    }
    arrange(high, parts[0]);
    if constexpr (kOperands == 2) arrange(rest, parts[1]);
  }
  // What is held becomes what is contracted: the same, but on gfx11 all sixteen tokens in every lane.
  static __device__ __forceinline__ void arrange(const uint32_t (&own)[kHeld / 2], Fragment& f) {
    if constexpr (kDepth == kHeld) {
#pragma unroll
      for (int i = 0; i < kHeld / 2; ++i) f.words[i] = own[i];
    } else {
      const bool upper = wave_lane() >= 16;
#pragma unroll
      for (int i = 0; i < kHeld / 2; ++i) {
        const uint32_t other = across_sixteen(own[i]);
        f.words[i] = upper ? other : own[i];
        f.words[kHeld / 2 + i] = upper ? own[i] : other;
      }
    }
  }
  __device__ __forceinline__ void multiply(Accumulator& c, const Fragment& a) const {
    multiply_add(c, a, parts[0]);
    if constexpr (kOperands == 2) multiply_add(c, a, parts[1]);
  }
};

}  // namespace kvarn::cuda
