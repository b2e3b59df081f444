// Codes of a record as matrix fragments of fp16.
//
// A code c lands in the mantissa of 1024 = 0x6400, at the bit where it is worth F: the fragment holds 1024 + F*c, exactly. The constant
// comes off again as one product with a constant matrix (-(1024 + F*middle)), which also centres the codes, so that rounding the other
// operand to fp16 costs in proportion to the code's distance from the middle. The higher the bit, the smaller the constant beside the
// codes.
//
// A quad is 4 consecutive codes; in a word they are one field of each byte. Its even codes {0, 2} are the low and high half of `even`, its
// odd ones {1, 3} of `odd`.
#pragma once

#include "kvarn/format.h"
#include "primitives.cuh"

namespace kvarn::cuda {

template <int BITS>
struct Codes;

template <>
struct Codes<8> {
  static constexpr int kScale = 1;  // F of the sums; a position with another F has its other operand multiplied by kScale / F
  static constexpr int kMiddle = 128;
  static __device__ __forceinline__ void quad(const uint32_t* words, const uint32_t*, int q, uint32_t& even, uint32_t& odd) {
    even = __byte_perm(words[q], 0x64646464u, 0x4240);
    odd = __byte_perm(words[q], 0x64646464u, 0x4341);
  }
  static constexpr __device__ uint32_t even_constant(int) { return 0xe480e480u; }  // -1152 = -(1024 + 128)
  static constexpr __device__ uint32_t odd_constant(int) { return 0xe480e480u; }
  static constexpr __device__ int even_scale(int) { return kScale; }
  static constexpr __device__ int odd_scale(int) { return kScale; }
  static constexpr bool kUniform = true;
  static constexpr __device__ uint32_t even_factor(int) { return 0x3c003c00u; }
  static constexpr __device__ uint32_t odd_factor(int) { return 0x3c003c00u; }
};

template <>
struct Codes<4> {
  static constexpr int kScale = 16;  // bits 4 to 7 of each half
  static constexpr float kMiddle = 7.5f;
  static __device__ __forceinline__ void quad(const uint32_t* words, const uint32_t*, int q, uint32_t& even, uint32_t& odd) {
    const uint32_t w = words[q / 2];
    even = and_or(q % 2 == 0 ? w << 4 : w, 0x00f000f0u, 0x64006400u);
    odd = and_or(q % 2 == 0 ? w >> 4 : w >> 8, 0x00f000f0u, 0x64006400u);
  }
  static constexpr __device__ uint32_t even_constant(int) { return 0xe478e478u; }  // -1144 = -(1024 + 16 * 7.5)
  static constexpr __device__ uint32_t odd_constant(int) { return 0xe478e478u; }
  static constexpr __device__ int even_scale(int) { return kScale; }
  static constexpr __device__ int odd_scale(int) { return kScale; }
  static constexpr bool kUniform = true;
  static constexpr __device__ uint32_t even_factor(int) { return 0x3c003c00u; }
  static constexpr __device__ uint32_t odd_factor(int) { return 0x3c003c00u; }
};

template <>
struct Codes<2> {
  static constexpr int kScale = 16;  // F is 16, 64 or 256: three of four positions need no shift of their own
  static constexpr float kMiddle = 1.5f;
  static constexpr bool kUniform = false;
  static __device__ __forceinline__ void quad(const uint32_t* words, const uint32_t*, int q, uint32_t& even, uint32_t& odd) {
    const uint32_t w = words[q / 4];
    switch (q % 4) {
      case 0:  // bits 0 and 8
        even = and_or(w << 6, 0x00c000c0u, 0x64006400u);
        odd = and_or(w, 0x03000300u, 0x64006400u);
        break;
      case 1:  // bits 2 and 10
        even = and_or(w << 6, 0x03000300u, 0x64006400u);
        odd = and_or(w >> 6, 0x00300030u, 0x64006400u);
        break;
      case 2:  // bits 4 and 12
        even = and_or(w, 0x00300030u, 0x64006400u);
        odd = and_or(w >> 6, 0x00c000c0u, 0x64006400u);
        break;
      default:  // bits 6 and 14
        even = and_or(w, 0x00c000c0u, 0x64006400u);
        odd = and_or(w >> 6, 0x03000300u, 0x64006400u);
        break;
    }
  }
  // -(1024 + F * 1.5): -1048, -1120, -1408
  static constexpr __device__ uint32_t constant(int scale) { return scale == 16 ? 0xe418e418u : scale == 64 ? 0xe460e460u : 0xe580e580u; }
  // 16 / F
  static constexpr __device__ uint32_t factor(int scale) { return scale == 16 ? 0x3c003c00u : scale == 64 ? 0x34003400u : 0x2c002c00u; }
  // F of a quad's positions
  static constexpr __device__ int even_scale(int q) { return q % 4 == 0 ? 64 : q % 4 == 1 ? 256 : q % 4 == 2 ? 16 : 64; }
  static constexpr __device__ int odd_scale(int q) { return q % 4 == 0 ? 256 : q % 4 == 1 ? 16 : q % 4 == 2 ? 64 : 256; }
  static constexpr __device__ uint32_t even_constant(int q) { return constant(even_scale(q)); }
  static constexpr __device__ uint32_t odd_constant(int q) { return constant(odd_scale(q)); }
  static constexpr __device__ uint32_t even_factor(int q) { return factor(even_scale(q)); }
  static constexpr __device__ uint32_t odd_factor(int q) { return factor(odd_scale(q)); }
};

template <>
struct Codes<3> {
  static constexpr int kScale = 128;  // low bits at 7 and 8, the high bit at 9
  static constexpr float kMiddle = 3.5f;
  static __device__ __forceinline__ uint32_t shift_to(uint32_t w, int from, int to) {
    return to >= from ? w << (to - from) : w >> (from - to);
  }
  static __device__ __forceinline__ void quad(const uint32_t* words, const uint32_t* high, int q, uint32_t& even, uint32_t& odd) {
    const uint32_t w = words[q / 4], h = high[q / 8];
    even = and_or(shift_to(w, q % 4 * 2, 7), 0x01800180u, and_or(shift_to(h, q % 8, 9), 0x02000200u, 0x64006400u));
    odd = and_or(shift_to(w, 8 + q % 4 * 2, 7), 0x01800180u, and_or(shift_to(h, 8 + q % 8, 9), 0x02000200u, 0x64006400u));
  }
  static constexpr __device__ uint32_t even_constant(int) { return 0xe5c0e5c0u; }  // -1472 = -(1024 + 128 * 3.5)
  static constexpr __device__ uint32_t odd_constant(int) { return 0xe5c0e5c0u; }
  static constexpr __device__ int even_scale(int) { return kScale; }
  static constexpr __device__ int odd_scale(int) { return kScale; }
  static constexpr bool kUniform = true;
  static constexpr __device__ uint32_t even_factor(int) { return 0x3c003c00u; }
  static constexpr __device__ uint32_t odd_factor(int) { return 0x3c003c00u; }
};

// WORDS consecutive words of row `row_in_line` of a line, starting at word `first`; WORDS is 1, 2, 4 or 8 and `first` a multiple of it.
template <int ROW_BYTES, int WORDS>
__device__ __forceinline__ void load_words(const uint8_t* line, int row_in_line, int first, uint32_t* words) {
  static_assert(ROW_BYTES % kChunkBytes == 0 || ROW_BYTES < kChunkBytes, "whole chunks, or one short one");
  constexpr int kChunk = ROW_BYTES < kChunkBytes ? ROW_BYTES : kChunkBytes;
  if constexpr (WORDS == 8) {
    load_words<ROW_BYTES, 4>(line, row_in_line, first, words);
    load_words<ROW_BYTES, 4>(line, row_in_line, first + 4, words + 4);
  } else {
    const uint8_t* at = line + first / 4 * (kLineRows * kChunkBytes) + row_in_line * kChunk + first % 4 * 4;
    if constexpr (WORDS == 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(at);
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else if constexpr (WORDS == 2) {
      const uint2 v = *reinterpret_cast<const uint2*>(at);
      words[0] = v.x, words[1] = v.y;
    } else {
      words[0] = *reinterpret_cast<const uint32_t*>(at);
    }
  }
}

// The `codes` (16 or 32) codes of run `run` of a row, of either plane, ready for Codes<BITS>::quad.
template <int BITS, int ROW_CODES, int CODES>
struct RowRun {
  static constexpr int kLowBits = low_plane_bits(BITS);
  static constexpr int kLowRowBytes = ROW_CODES * kLowBits / 8;
  static constexpr int kHighRowBytes = ROW_CODES / 8;
  uint32_t low[CODES * kLowBits / 32];
  uint32_t high[1];

  // low_line, high_line: the line of the row in either plane.
  __device__ __forceinline__ void load(const uint8_t* low_line, const uint8_t* high_line, int row_in_line, int run) {
    constexpr int kWords = CODES * kLowBits / 32;
    load_words<kLowRowBytes, kWords>(low_line, row_in_line, run * kWords, low);
    if constexpr (BITS == 3) {
      if constexpr (CODES == 32) {
        load_words<kHighRowBytes, 1>(high_line, row_in_line, run, high);
      } else {  // half a word: four of its eight fields
        load_words<kHighRowBytes, 1>(high_line, row_in_line, run / 2, high);
        high[0] >>= run % 2 * 4;
      }
    }
  }
};

}  // namespace kvarn::cuda
