// The operands of the matrix products of attention: codes of a record, values of a staging slot, folded queries and probabilities.
//
// Both products contract along the rows of a code array (K: channels, V: tokens). Of a row, group g of lanes takes the codes
// [g*C, (g+1)*C), C = length / kGroups, kDepth at a time. Codes leave a word four at a time, as two words with codes (0, 2) and (1, 3) of
// the quad; the other operand is made in the same order. Tokens are assigned to the rows of the score products in such a way that what a
// lane holds of the scores is what it needs of the probabilities; waves of 32 lanes exchange them through shared memory all the same,
// because lanes that hold the high and the low part of a score share its tokens.
#pragma once

#include "attend_shared.h"
#include "kvarn/format.h"
#include "kvarn/kvarn.h"
#include "matrix.h"

namespace kvarn::cuda {

// Place `e` of a lane's part of the contraction holds code quad_order(e) of it: 0 2 1 3, 4 6 5 7, ...
__device__ __forceinline__ constexpr int quad_order(int e) { return (e & ~3) | (e & 1) << 1 | (e >> 1 & 1); }

// The first of the kHeld consecutive tokens, of 16 * kCount, whose scores a lane of group `group` holds of score block `n`; value i is
// token quad_order(i) of them.
template <int kCount = kMatrixTile / 16>
__device__ __forceinline__ constexpr int held_tokens(int n, int group) {
  return kGroups == 1 ? 16 * n + kHeld * group : (group * kCount + n) * kHeld;
}
// The token in row `row` of score block n.
__device__ __forceinline__ int token_of_row(int n, int row) { return held_tokens(n, group_of_row(row)) + quad_order(held_of_row(row)); }
// How many scores of a block a lane keeps of those it holds. With 8 rows, lanes 8 places apart hold the high and the low part of the same
// scores: waves of 32 lanes add them up into half of the scores each, those of 64 lanes into all of them twice.
__device__ __forceinline__ constexpr int kept_scores(int rows) { return kWave == 32 && rows == 8 ? kHeld / 2 : kHeld; }
// The first of them among those that the lane holds.
template <int kRows>
__device__ __forceinline__ int first_kept(int lane) {
  return kept_scores(kRows) < kHeld ? kept_scores(kRows) * (lane / 8 % 2) : 0;
}
// The first of the kDepth tokens that a lane contracts in step n of the output product.
template <int kCount = kMatrixTile / 16>
__device__ __forceinline__ constexpr int depth_tokens(int n, int depth_group) {
  return kGroups == 1 ? 16 * n : (depth_group * kCount + n) * kDepth;
}

// The channel in row `row` of a block of 16 channels: value i of what a lane holds is channel kHeld * group + i.
__device__ __forceinline__ int channel_of_row(int row) { return kHeld * group_of_row(row) + held_of_row(row); }

__device__ __forceinline__ uint32_t pack(float x, float y) {  // rounds towards zero; what is lost goes into the low part
  return bits_as<uint32_t>(__builtin_amdgcn_cvt_pkrtz(x, y));
}
__device__ __forceinline__ float low_half(uint32_t x) { return static_cast<float>(bits_as<Half2>(x).x); }
__device__ __forceinline__ float high_half(uint32_t x) { return static_cast<float>(bits_as<Half2>(x).y); }
__device__ __forceinline__ uint32_t pack_rest(uint32_t packed, float x, float y) {
  return pack(x - low_half(packed), y - high_half(packed));
}

// A number in a register, so that an instruction can have it beside another one: gfx9 reads one scalar register or constant an instruction.
__device__ __forceinline__ uint32_t scalar_constant(uint32_t x) {
  asm("" : "+s"(x));
  return x;
}
__device__ __forceinline__ uint32_t second_constant(uint32_t x) {
#if defined(__GFX9__)
  asm("" : "+v"(x));
#else
  asm("" : "+s"(x));
#endif
  return x;
}
constexpr uint32_t half_pair(uint32_t half) { return half | half << 16; }

// (0, 2) and (1, 3) of four codes, at bits [shift, shift + kBits) of four bytes, as fp16 numbers: 1024 + 2^shift code is a bit pattern,
// and taking 1024 away and dividing by 2^shift is exact. shift: a constant after unrolling.
template <int kBits>
__device__ __forceinline__ void codes_to_halves(uint32_t word, int shift, uint32_t& even, uint32_t& odd) {
  const uint32_t mask = scalar_constant(half_pair(((1u << kBits) - 1u) << shift)), pattern = second_constant(0x64006400u);
  const Half2 high = bits_as<Half2>((word & mask) | pattern), low = bits_as<Half2>((word >> 8 & mask) | pattern);
  if (shift == 0) {
    const Half2 bias = bits_as<Half2>(scalar_constant(half_pair(0xe400u)));  // -1024
    even = bits_as<uint32_t>(high + bias);
    odd = bits_as<uint32_t>(low + bias);
  } else {
    const Half2 scale = bits_as<Half2>(scalar_constant(half_pair(0x3c00u - (static_cast<uint32_t>(shift) << 10))));
    const Half2 bias = bits_as<Half2>(second_constant(half_pair(0xe400u - (static_cast<uint32_t>(shift) << 10))));
    even = bits_as<uint32_t>(__builtin_elementwise_fma(high, scale, bias));
    odd = bits_as<uint32_t>(__builtin_elementwise_fma(low, scale, bias));
  }
}

// kCodes consecutive codes of one row of a plane with kBits bits a code and kLength codes a row.
template <int kBits, int kLength, int kCodes>
struct PlanePart {
  static constexpr int kRowBytes = kLength * kBits / 8;
  static constexpr int kWords = kCodes * kBits >= 32 ? kCodes * kBits / 32 : 1;
  static constexpr int kChunkStride = kRowBytes < kChunkBytes ? kRowBytes : kChunkBytes;
  uint32_t words[kWords];

  // `plane`: the plane's first byte. `first`: a multiple of kCodes; a part of less than a word gets its first quad shifted to the bottom.
  __device__ __forceinline__ void load(GlobalBytes plane, int row, int first) {
    const int word = first / (32 / kBits);
    const GlobalBytes at = plane + row / kLineRows * (kLineRows * kRowBytes) + row % kLineRows * kChunkStride +
                           word / 4 * (kLineRows * kChunkBytes) + word % 4 * 4;
    if constexpr (kWords >= 4) {
#pragma unroll
      for (int c = 0; c < kWords / 4; ++c) {
        const uint4 chunk = load_as<uint4>(at + c * (kLineRows * kChunkBytes));
        words[4 * c] = chunk.x, words[4 * c + 1] = chunk.y, words[4 * c + 2] = chunk.z, words[4 * c + 3] = chunk.w;
      }
    } else if constexpr (kWords == 2) {
      const uint2 pair = load_as<uint2>(at);
      words[0] = pair.x, words[1] = pair.y;
    } else {
      words[0] = load_as<uint32_t>(at);
      if constexpr (kCodes * kBits < 32) words[0] >>= first % (32 / kBits) / 4 * kBits;
    }
  }
  // The word with quad `q`, whose codes lie at bits [quad_shift(q), quad_shift(q) + kBits) of its bytes.
  __device__ __forceinline__ uint32_t word_of_quad(int q) const { return words[q / (8 / kBits)]; }
  static constexpr int quad_shift(int q) { return q % (8 / kBits) * kBits; }
  // Codes of quad `q` in the low kBits bits of four bytes, with other bits above them.
  __device__ __forceinline__ uint32_t quad(int q) const { return word_of_quad(q) >> quad_shift(q); }
};

// kCodes consecutive codes of one row of codes: the record's planes of a width.
template <int kBits, int kLength, int kCodes>
struct CodePart {
  PlanePart<kBits, kLength, kCodes> low;
  __device__ __forceinline__ void load(GlobalBytes planes, int, int row, int first) { low.load(planes, row, first); }
  // The codes of step `step` of the contraction.
  __device__ __forceinline__ Fragment fragment(int step) const {
    Fragment f;
#pragma unroll
    for (int q = 0; q < kDepth / 4; ++q) {
      const int quad = step * (kDepth / 4) + q;
      codes_to_halves<kBits>(low.word_of_quad(quad), low.quad_shift(quad), f.words[2 * q], f.words[2 * q + 1]);
    }
    return f;
  }
};
template <int kLength, int kCodes>
struct CodePart<3, kLength, kCodes> {
  PlanePart<2, kLength, kCodes> low;
  PlanePart<1, kLength, kCodes> high;
  // plane_rows: rows of the array; the second plane follows the first.
  __device__ __forceinline__ void load(GlobalBytes planes, int plane_rows, int row, int first) {
    low.load(planes, row, first);
    high.load(planes + plane_rows * PlanePart<2, kLength, kCodes>::kRowBytes, row, first);
  }
  __device__ __forceinline__ Fragment fragment(int step) const {
    Fragment f;
#pragma unroll
    for (int q = 0; q < kDepth / 4; ++q) {
      const int quad = step * (kDepth / 4) + q;
      const uint32_t codes = (low.quad(quad) & 0x03030303u) | (high.quad(quad) & 0x01010101u) << 2;
      codes_to_halves<3>(codes, 0, f.words[2 * q], f.words[2 * q + 1]);
    }
    return f;
  }
};

// Calls f with the width as a constant.
template <class F>
__device__ __forceinline__ void with_width(int bits, F f) {
  if (bits == 4) {
    f.template operator()<4>();
  } else if (bits == 2) {
    f.template operator()<2>();
  } else if (bits == 3) {
    f.template operator()<3>();
  } else {
    f.template operator()<8>();
  }
}

// A value of fp16 or bf16 staging.
__device__ __forceinline__ float load_half(GlobalBytes p, int64_t at, bool bfloat16) {
  const uint16_t bits = ((Global<uint16_t>)p)[at];
  return bfloat16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16) : __half2float(bits_as<_Float16>(bits));
}

// 4 or 8 consecutive fp16 numbers.
template <int kCount>
struct Halves {
  uint32_t words[kCount / 2];
  static __device__ __forceinline__ Halves load(GlobalBytes p) { return load_as<Halves>(p); }
  __device__ __forceinline__ float operator[](int i) const { return i % 2 == 0 ? low_half(words[i / 2]) : high_half(words[i / 2]); }
};

// Where registers are few, what comes after is not started before what comes before it is done.
__device__ __forceinline__ void in_order() {
#if !defined(__GFX9__)
  __builtin_amdgcn_sched_barrier(0);
#endif
}

}  // namespace kvarn::cuda
