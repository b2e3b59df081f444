// sums[r][row] = sum_i n[r][i] * code[row][i]: a group of query rows against every row of a code array, exact 32-bit integers.
// The high plane of a two-plane width is summed first and shifted up, then the low plane joins the same accumulators.
#pragma once

#include "cpu/attend_fold-inl.h"

namespace kvarn::cpu {
namespace {

// Bytes that will be wanted soon: a few cache lines are requested per block of code rows, whether they exist or not.
struct Prefetch {
  const uint8_t* next;
  const uint8_t* end;
  int block_bytes;  // a multiple of four lines
};

// Vectors of codes that are multiplied while a query vector is in a register.
constexpr int block_vectors(int group_rows) {
  if (kVectorRows == 1) return 4;  // a block starts at a line
  const int accumulators = kLanes == 16 ? 16 : 4;
  return group_rows * kQueryPlanes * 4 <= accumulators ? 4 : 2;
}

// A plane as the loops see it.
struct PlaneWalk {
  int line_bytes;  // from one group of four rows to the next
  int full_chunks;
  int tail_words;
};
KVARN_INLINE PlaneWalk walk_of(const Plane& plane) { return {kLineRows * plane.row_bytes, plane.full_chunks(), plane.tail_bytes() / 4}; }

template <int kBits, int kQueries, int kVectors, int kStep = 0>
KVARN_INLINE void multiply_chunk(I32 (&acc)[kQueries][kVectors], const I32 (&raw)[kVectors], const uint8_t* query) {
  if constexpr (kStep < chunk_steps(kBits)) {
    I32 codes[kVectors];
    for (int v = 0; v < kVectors; ++v) codes[v] = unpack<kBits, kStep>(raw[v]);
    for (int r = 0; r < kQueries; ++r) {
      const Query q = load_query(query + r * kQueryStride + kStep * kStepBytes);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = dot(acc[r][v], codes[v], q);
    }
    multiply_chunk<kBits, kQueries, kVectors, kStep + 1>(acc, raw, query);
  }
}

// acc[query][v] += over one plane of kVectors * kVectorRows rows, the first of which opens a line at `line`.
template <int kBits, int kQueries, int kVectors>
KVARN_INLINE void multiply_plane(I32 (&acc)[kQueries][kVectors], const uint8_t* line, const PlaneWalk& walk, const uint8_t* query) {
  constexpr int kVectorBytes = kVectorRows * kChunkBytes;
  I32 raw[kVectors];
  for (int c = 0; c < walk.full_chunks; ++c) {
    for (int v = 0; v < kVectors; ++v) raw[v] = load_codes(line + v / kLineVectors * walk.line_bytes + v % kLineVectors * kVectorBytes);
    multiply_chunk<kBits>(acc, raw, query);
    line += kLineRows * kChunkBytes;
    query += chunk_steps(kBits) * kStepBytes;
  }
  if (walk.tail_words != 0) {
    for (int v = 0; v < kVectors; ++v) {
      raw[v] = load_tail(line + v / kLineVectors * walk.line_bytes + v % kLineVectors * kVectorRows * 4 * walk.tail_words, walk.tail_words);
    }
    multiply_chunk<kBits>(acc, raw, query);
  }
}

using DotFunction = void (*)(const CodePlanes& planes, const uint8_t* low, const uint8_t* high, const GroupQuery& query, int32_t* sums,
                             int sums_stride, Prefetch& prefetch);

template <int kWidth, int kRows>
__attribute__((noinline)) void dot_rows(const CodePlanes& planes, const uint8_t* low, const uint8_t* high, const GroupQuery& query,
                                        int32_t* sums, int sums_stride, Prefetch& prefetch) {
  constexpr int kVectors = block_vectors(kRows);
  constexpr int kQueries = kRows * kQueryPlanes;
  constexpr int kLow = low_plane_bits(kWidth), kHigh = high_plane_bits(kWidth);
  constexpr int kParts = 4 / kVectors;
  constexpr int kPartLines = kVectors / kLineVectors;
  const PlaneWalk low_walk = walk_of(*planes.low), high_walk = walk_of(*planes.high);
  const int rows = planes.low->rows;
  const uint8_t* ahead = prefetch.next;
  for (int row = 0; row < rows; row += kLanes) {
    if (ahead < prefetch.end) {
      for (const uint8_t* const stop = ahead + prefetch.block_bytes; ahead < stop; ahead += 4 * 64) {
        for (int line = 0; line < 4; ++line) __builtin_prefetch(ahead + line * 64, 0, 3);
      }
    }
    I32 pairs[kRows][2];
    for (int part = 0; part < kParts; ++part) {
      I32 acc[kQueries][kVectors];
      for (auto& of_query : acc) {
        for (I32& a : of_query) a = zero_i32();
      }
      if constexpr (kHigh != 0) {
        multiply_plane<kHigh>(acc, high, high_walk, query.high);
        for (auto& of_query : acc) {
          for (I32& a : of_query) a = a << kLow;
        }
        high += kPartLines * high_walk.line_bytes;
      }
      multiply_plane<kLow>(acc, low, low_walk, query.low);
      low += kPartLines * low_walk.line_bytes;
      for (int r = 0; r < kRows; ++r) {
        I32 whole[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          whole[v] = kQueryPlanes == 2 ? (acc[r * kQueryPlanes][v] << 8) + acc[r * kQueryPlanes + kQueryPlanes - 1][v] : acc[r][v];
        }
        for (int v = 0; v < kVectors; v += 2) pairs[r][part * kVectors / 2 + v / 2] = add_pairs(whole[v], whole[v + 1]);
      }
    }
    for (int r = 0; r < kRows; ++r) store(sums + r * sums_stride + row, add_halves(pairs[r][0], pairs[r][1]));
  }
  prefetch.next = ahead;
}

template <int kWidth>
constexpr DotFunction dot_function(int rows) {
  constexpr DotFunction functions[kGroupRows] = {dot_rows<kWidth, 1>, dot_rows<kWidth, 2>, dot_rows<kWidth, 3>, dot_rows<kWidth, 4>};
  return functions[rows - 1];
}

inline DotFunction dot_function(int width, int rows) {
  switch (width) {
    case 2:
      return dot_function<2>(rows);
    case 3:
      return dot_function<3>(rows);
    case 4:
      return dot_function<4>(rows);
    case 5:
      return dot_function<5>(rows);
    case 6:
      return dot_function<6>(rows);
    default:
      return dot_function<8>(rows);
  }
}

}  // namespace
}  // namespace kvarn::cpu
