// The query side of the score product: rows of q times the scales of the channels, as two fp16 numbers each.
#pragma once

#include "attend_operands.h"

namespace kvarn::cuda {

// The largest magnitude of kCount fp16 numbers, as bits; all lanes of a wave call it and get it. NaN counts as larger than infinity.
template <int kCount>
__device__ __forceinline__ uint32_t largest_magnitude(GlobalBytes halves, int lane) {
  constexpr int kWords = kCount / 2 / kWave;  // of a lane
  uint32_t most = 0;
  if constexpr (kWords == 0) {
    most = ((Global<uint16_t>)halves)[lane] & 0x7fffu;
  } else {
    using Pair = uint16_t __attribute__((ext_vector_type(2)));
    struct Words {
      uint32_t of[kWords];
    };
    const Words words = load_as<Words>(halves + lane * (4 * kWords));
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      most = bits_as<uint32_t>(__builtin_elementwise_max(bits_as<Pair>(most), bits_as<Pair>(words.of[i] & 0x7fff7fffu)));
    }
    most = max(most & 0xffffu, most >> 16);
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

// The B operands of a wave of 32 lanes in shared memory: columns of fp16 numbers, first the high parts of each of kRows rows, then the low
// parts. Probabilities of a whole tile take the place of the queries, which then are used up; those of fewer tokens lie beside them.
template <int D, int kRows>
struct Columns {
  static constexpr bool kHoldWeights = kWave == 32;
  static constexpr int kQueries = kHoldWeights && D < kMatrixTile ? kMatrixTile : D;
  static constexpr int kSomeTokens = !kHoldWeights ? 0 : kBlocksAtOnce < kMatrixTile / 16 ? 16 * kBlocksAtOnce : 16;
  static constexpr int kHalves = kQueries + kSomeTokens + 8;  // of a column; the last ones keep columns in different banks
  static constexpr int kBytes = 2 * kRows * kHalves * 2;
  // Where the probabilities of kCount blocks begin.
  template <int kCount>
  static constexpr int kWeights = kCount == kMatrixTile / 16 ? 0 : kQueries;

  uint8_t* bytes;

  // Puts kWords words into part 0 (high) or 1 (low) of a row, at value `at`.
  template <int kWords>
  __device__ __forceinline__ void put(int part, int row, int at, const uint32_t (&words)[kWords]) const {
    __builtin_memcpy(__builtin_assume_aligned(bytes + ((part * kRows + row) * kHalves + at) * 2, 4 * kWords), words, sizeof words);
  }
  // Values [at, at + kDepth) of this lane's column. operand: 0; with 16 rows 1 for the low parts.
  __device__ __forceinline__ Fragment get(int operand, int at, int lane) const {
    Fragment f;
    constexpr int kAlignment = sizeof(Fragment) < 16 ? sizeof(Fragment) : 16;
    __builtin_memcpy(&f, __builtin_assume_aligned(bytes + ((operand * 16 + lane % 16) * kHalves + at) * 2, kAlignment), sizeof f);
    return f;
  }
};

// The queries times the scales of the channels: 16 columns, of kRows rows. With 8 rows columns 0 to 7 are the high parts and 8 to 15 the
// low parts of the same rows, so that one product does for both; with 16 rows the low parts are an operand of their own.
template <int D, int kRows>
struct FoldedQueries {
  static constexpr int kOperands = kRows == 16 ? 2 : 1;
  static constexpr bool kInRegisters = kWave == 64;
  static constexpr int kLaneParts = kInRegisters ? kLaneGroups : kWave / kRows;  // lanes among which a row's channels are divided
  static constexpr int kLaneCodes = D / kLaneParts;                              // channels that a lane folds
  static constexpr int kKept = kept_scores(kRows);

  uint32_t words[kInRegisters ? kOperands : 1][kInRegisters ? kLaneCodes / 2 : 1];
  Columns<D, kRows> columns;
  float zero;     // of the lane's row: its product with the zeros of the channels
  float inverse;  // what the products must be multiplied by

  __device__ __forceinline__ Fragment step(int operand, int s, int lane) const {
    if constexpr (kInRegisters) {
      Fragment f;
#pragma unroll
      for (int w = 0; w < kDepth / 2; ++w) f.words[w] = words[operand][s * (kDepth / 2) + w];
      return f;
    } else {
      return columns.get(operand, depth_group(lane) * (D / kGroups) + s * kDepth, lane);
    }
  }
  // q: [kRows][D] floats below 1 in shared memory; scales and zeros: [D] fp16 numbers, read if kScaled, else 1 and 0.
  template <bool kScaled>
  __device__ __forceinline__ void fold(const float* q, GlobalBytes scales, GlobalBytes zeros, int lane) {
    const int row = lane % kRows, first = (kInRegisters ? lane / 16 : lane / kRows) * kLaneCodes;
    int at = row * D + first;
    const HalfScale scale = HalfScale::of(kScaled ? largest_magnitude<D>(scales, lane) : 0x3c00u);
    inverse = scale.inverse;
    zero = 0.0f;
    if constexpr (!kInRegisters) __syncwarp();  // what the columns held is used up
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
      const uint32_t high[2] = {pack(x0, x2), pack(x1, x3)};
      const uint32_t rest[2] = {pack_rest(high[0], x0, x2), pack_rest(high[1], x1, x3)};
      if constexpr (!kInRegisters) {
        columns.put(0, row, first + 4 * i, high);
        columns.put(1, row, first + 4 * i, rest);
      } else {
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          words[0][2 * i + w] = kOperands == 1 && (lane & 8) != 0 ? rest[w] : high[w];
          if constexpr (kOperands == 2) words[1][2 * i + w] = rest[w];
        }
      }
      if (i % 2 == 1) {
        in_order();
        // Not all of q at once.
        if constexpr (kWave == 32) at = again(at);
      }
    }
    if constexpr (kLaneParts > kLaneGroups) zero += across_eight(zero);
    zero = over_groups(zero, [](float a, float b) { return a + b; });
    if constexpr (!kInRegisters) __syncwarp();
  }
  // c += codes or values of step s times the folded queries.
  __device__ __forceinline__ void multiply(Accumulator& c, const Fragment& a, int s, int lane) const {
    multiply_add(c, a, step(0, s, lane));
    if constexpr (kOperands == 2) multiply_add(c, a, step(1, s, lane));
  }
  // Sums of a finished product: with 8 rows the high and the low part meet.
  static __device__ __forceinline__ void sums(const Accumulator& c, float (&kept)[kKept]) {
    float held[kHeld];
    finish(c, held);
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if constexpr (kKept < kHeld) {
        kept[i] = sum_across_eight(held[i], held[kKept + i]);
      } else {
        kept[i] = kOperands == 1 ? held[i] + across_eight(held[i]) : held[i];
      }
    }
  }
};

// The probabilities' side of the output product, likewise: kCount blocks of 16 tokens.
template <int D, int kRows, int kCount>
struct Weights {
  static constexpr int kOperands = kRows == 16 ? 2 : 1;
  static constexpr bool kInRegisters = !Columns<D, kRows>::kHoldWeights;
  static constexpr int kKept = kept_scores(kRows);
  static constexpr int kWeights = Columns<D, kRows>::template kWeights<kCount>;

  Fragment parts[kInRegisters ? kCount : 1][kInRegisters ? kOperands : 1];
  Columns<D, kRows> columns;

  __device__ __forceinline__ explicit Weights(const Columns<D, kRows>& to) : columns(to) {
    if constexpr (!kInRegisters) __syncwarp();  // what the columns held is used up
  }
  // p: what the lane keeps of block n of the scores, already times the scales of the tokens.
  __device__ __forceinline__ void set(int n, const float (&p)[kKept], int lane) {
    uint32_t high[kKept / 2], rest[kKept / 2];
#pragma unroll
    for (int i = 0; i < kKept / 2; ++i) {
      high[i] = pack(p[2 * i], p[2 * i + 1]);
      rest[i] = pack_rest(high[i], p[2 * i], p[2 * i + 1]);
    }
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < kKept / 2; ++i) {
        parts[n][0].words[i] = kOperands == 1 && (lane & 8) != 0 ? rest[i] : high[i];
        if constexpr (kOperands == 2) parts[n][1].words[i] = rest[i];
      }
    } else {
      const int at = kWeights + held_tokens<kCount>(n, lane / 16) + first_kept<kRows>(lane);
      columns.put(0, lane % kRows, at, high);
      columns.put(1, lane % kRows, at, rest);
    }
  }
  // All blocks are set.
  __device__ __forceinline__ void finish_setting() const {
    if constexpr (!kInRegisters) __syncwarp();
  }
  __device__ __forceinline__ void multiply(Accumulator& c, const Fragment& a, int n, int lane) const {
#pragma unroll
    for (int operand = 0; operand < kOperands; ++operand) {
      if constexpr (kInRegisters) {
        multiply_add(c, a, parts[n][operand]);
      } else {
        multiply_add(c, a, columns.get(operand, kWeights + depth_tokens<kCount>(n, depth_group(lane)), lane));
      }
    }
  }
};

}  // namespace kvarn::cuda
