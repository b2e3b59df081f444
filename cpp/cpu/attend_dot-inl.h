// sums[r][row] = sum_i n[r][i] * code[row][i]: a group of query rows against every row of a code array, exact 32-bit integers.
// The high plane of a two-plane width is summed first and shifted up, then the low plane joins the same accumulators.
#pragma once

#include "cpu/attend_fold-inl.h"

namespace kvarn::cpu {
namespace {

// Bytes that will be wanted soon: a few cache lines are requested per block of code rows.
struct Prefetch {
  const uint8_t* next;
  const uint8_t* end;
  int lines_per_block;

  KVARN_INLINE void advance() {
    for (int i = 0; i < lines_per_block && next < end; ++i, next += 64) __builtin_prefetch(next, 0, 3);
  }
};

// Vectors of codes that are multiplied while a query vector is in a register.
constexpr int block_vectors(int group_rows) {
  if (kVectorRows == 1) return 4;  // a block starts at a line
  const int accumulators = kLanes == 16 ? 16 : 8;
  return group_rows * kQueryPlanes * 4 <= accumulators ? 4 : 2;
}

// acc[row][v] += over one plane; `first`: the first byte of the block's first line.
template <int kBits, int kRows, int kVectors>
KVARN_INLINE void accumulate_plane(I32 (&acc)[kRows * kQueryPlanes][kVectors], const uint8_t* first, const Plane& plane,
                                   const uint8_t* query) {
  constexpr int kQueries = kRows * kQueryPlanes;
  constexpr int kSteps = chunk_steps(kBits);
  const int line_bytes = kLineRows * plane.row_bytes;  // from one group of four rows to the next
  const auto steps = [&](const I32(&raw)[kVectors]) {
    unroll<0, kSteps>([&]<int kStep>() {
      I32 codes[kVectors];
      for (int v = 0; v < kVectors; ++v) codes[v] = unpack<kBits, kStep>(raw[v]);
      for (int r = 0; r < kQueries; ++r) {
        const I32 q = load_query(query + (kStep * kQueries + r) * kStepBytes);
        for (int v = 0; v < kVectors; ++v) acc[r][v] = dot(acc[r][v], codes[v], q);
      }
    });
    query += kSteps * kQueries * kStepBytes;
  };
  const int full = plane.full_chunks();
  for (int c = 0; c < full; ++c) {
    I32 raw[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      raw[v] = load_codes(first + v / kLineVectors * line_bytes + c * (kLineRows * kChunkBytes) +
                          v % kLineVectors * (kVectorRows * kChunkBytes));
    }
    steps(raw);
  }
  if (const int tail = plane.tail_bytes(); tail != 0) {
    I32 raw[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      raw[v] = load_tail(first + v / kLineVectors * line_bytes + full * (kLineRows * kChunkBytes) + v % kLineVectors * (kVectorRows * tail),
                         tail / 4);
    }
    steps(raw);
  }
}

// Sums of kLanes rows of codes from `row` on, for every row of the group.
template <int kWidth, int kRows>
KVARN_INLINE void dot_block(const CodePlanes& planes, const uint8_t* low, const uint8_t* high, int row, const GroupQuery& query,
                            int32_t* sums, int sums_stride) {
  constexpr int kVectors = block_vectors(kRows);
  constexpr int kQueries = kRows * kQueryPlanes;
  constexpr int kLow = low_plane_bits(kWidth), kHigh = high_plane_bits(kWidth);
  constexpr int kParts = 4 / kVectors;
  I32 pairs[kRows][2];
  for (int part = 0; part < kParts; ++part) {
    const int first = row + part * kVectors * kVectorRows;
    I32 acc[kQueries][kVectors];
    for (auto& of_query : acc) {
      for (I32& a : of_query) a = zero_i32();
    }
    if constexpr (kHigh != 0) {
      accumulate_plane<kHigh, kRows, kVectors>(acc, high + first * planes.high->row_bytes, *planes.high, query.high);
      for (auto& of_query : acc) {
        for (I32& a : of_query) a = a << kLow;
      }
    }
    accumulate_plane<kLow, kRows, kVectors>(acc, low + first * planes.low->row_bytes, *planes.low, query.low);
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

using DotFunction = void (*)(const CodePlanes& planes, const uint8_t* low, const uint8_t* high, const GroupQuery& query, int32_t* sums,
                             int sums_stride, Prefetch& prefetch);

template <int kWidth, int kRows>
__attribute__((noinline)) void dot_rows(const CodePlanes& planes, const uint8_t* low, const uint8_t* high, const GroupQuery& query,
                                        int32_t* sums, int sums_stride, Prefetch& prefetch) {
  for (int row = 0; row < planes.low->rows; row += kLanes) {
    prefetch.advance();
    dot_block<kWidth, kRows>(planes, low, high, row, query, sums, sums_stride);
  }
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
