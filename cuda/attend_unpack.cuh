// Codes of a record as matrix fragments of fp16.
//
// Bits of a code among the ten mantissa bits of an fp16 number, and nothing else, are a subnormal number: code * F * 2^-24, F = 1 <<
// position, exactly. So a mask makes two operands of a 32-bit word, and the other operand takes 1 / F.
//
// A quad is 4 consecutive codes; in a word they are one field of each byte. Its even codes {0, 2} are the low and high half of `even`, its
// odd ones {1, 3} of `odd`.
#pragma once

#include "kvarn/format.h"
#include "primitives.cuh"

namespace kvarn::cuda {

constexpr float kCodeUnit = 0x1p-24f;

__device__ __forceinline__ uint32_t both_halves(uint32_t x) { return x | x << 16; }

template <int BITS>
struct Codes {
  static_assert(BITS == 2 || BITS == 3 || BITS == 4 || BITS == 8, "5 and 6 bits take the generic path");
  static constexpr int kLowBits = low_plane_bits(BITS);
  static constexpr int kWordQuads = 8 / kLowBits;
  static constexpr int kMiddle = 1 << (BITS - 1);
  // F of quad q of a word.
  static constexpr __host__ __device__ int scale(int q) { return 1 << q % kWordQuads * kLowBits; }

  // words: of the low plane; high: one word of the high plane, whose field of quad q is bit q % 8 of each byte.
  static __device__ __forceinline__ void quad(const uint32_t* words, const uint32_t* high, int q, uint32_t& even, uint32_t& odd) {
    const int position = q % kWordQuads * kLowBits;
    const uint32_t mask = ((1u << kLowBits) - 1u) << position;
    const uint32_t w = words[q / kWordQuads];
    even = w & both_halves(mask);
    odd = w >> 8 & both_halves(mask);
    if constexpr (BITS == 3) {
      const int from = q % 8, to = position + 2;
      const uint32_t high_mask = both_halves(1u << to), h = high[0];
      even |= (to >= from ? h << (to - from) : h >> (from - to)) & high_mask;
      odd |= (to >= from + 8 ? h << (to - from - 8) : h >> (from + 8 - to)) & high_mask;
    }
  }
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
