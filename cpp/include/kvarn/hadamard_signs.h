// The fixed Hadamard matrices behind the rotation: H_D = H_m (x) H_2^k / sqrt(D), m = 1, 12, 20 or 28.
//
// H_2^k is Sylvester's (symmetric). H_12 and H_20 are Paley's first construction over q = 11 and 19, H_28 his second over q = 13. H_12 and
// H_20 are not symmetric: the inverse of x H is x H^T. With chi the quadratic character modulo q (chi(0) = 0):
//   first:   H = I + S, S = [[0, 1...1], [-1...-1, Q]], Q[i][j] = chi(j - i), order q + 1
//   second:  C = [[0, 1...1], [1...1, Q]]; each 0 of C becomes [[+,-],[-,-]], each s = +-1 becomes s*[[+,+],[+,-]]; order 2(q + 1)
#pragma once

#include <cstdint>

#include "kvarn/format.h"

namespace kvarn {

inline constexpr int kMaxHadamardOddOrder = 28;

// m of a supported head_dim; the other factor, head_dim / m, is a power of two.
KVARN_HD constexpr int hadamard_odd_order(int head_dim) {
  return head_dim == 96 || head_dim == 192 ? 12 : head_dim == 80 || head_dim == 160 ? 20 : head_dim == 112 ? 28 : 1;
}

// The fp32 value nearest to 1/sqrt(head_dim).
KVARN_HD constexpr float hadamard_scale(int head_dim) {
  switch (head_dim) {
    case 64:
      return 0.125f;
    case 80:
      return 0.11180339887498948482f;
    case 96:
      return 0.10206207261596575409f;
    case 112:
      return 0.094491118252306806803f;
    case 128:
      return 0.088388347648318440550f;
    case 160:
      return 0.079056941504209483299f;
    case 192:
      return 0.072168783648703220564f;
    case 256:
      return 0.0625f;
    case 512:
      return 0.044194173824159220275f;
    default:
      return 0.0f;
  }
}

// chi(x) modulo q for q = 11, 13, 19 and any -q < x < q: 0, 1 or -1.
KVARN_HD constexpr int quadratic_character(int x, int q) {
  // Bit r is set when r is a square modulo q.
  const uint32_t squares = q == 11 ? 0x0000023au : q == 13 ? 0x0000161au : 0x00030af2u;
  const int r = x < 0 ? x + q : x;
  return r == 0 ? 0 : (squares >> r & 1u) != 0 ? 1 : -1;
}

// Entry [row][column] of H_m, m = 1, 12, 20, 28: +1 or -1.
KVARN_HD constexpr int hadamard_sign(int m, int row, int column) {
  if (m == 1) return 1;
  if (m == 28) {
    const int i = row / 2, j = column / 2;
    const int c = i == j ? 0 : i == 0 || j == 0 ? 1 : quadratic_character(j - i, 13);
    const bool both_odd = row % 2 == 1 && column % 2 == 1;
    if (c == 0) return row % 2 == 0 && column % 2 == 0 ? 1 : -1;
    return both_odd ? -c : c;
  }
  if (row == column) return 1;
  if (row == 0) return 1;
  if (column == 0) return -1;
  return quadratic_character(column - row, m - 1);
}

// H_m as bits: bit c of rows[r] is set where the entry is -1; bit r of columns[c] is the same entry.
struct HadamardSigns {
  uint32_t rows[kMaxHadamardOddOrder];
  uint32_t columns[kMaxHadamardOddOrder];
};

constexpr HadamardSigns make_hadamard_signs(int m) {
  HadamardSigns s{};
  for (int r = 0; r < m; ++r) {
    for (int c = 0; c < m; ++c) {
      if (hadamard_sign(m, r, c) > 0) continue;
      s.rows[r] |= uint32_t{1} << c;
      s.columns[c] |= uint32_t{1} << r;
    }
  }
  return s;
}

inline constexpr HadamardSigns kHadamard12 = make_hadamard_signs(12);
inline constexpr HadamardSigns kHadamard20 = make_hadamard_signs(20);
inline constexpr HadamardSigns kHadamard28 = make_hadamard_signs(28);

namespace detail {
constexpr bool is_hadamard(int m) {
  for (int a = 0; a < m; ++a) {
    for (int b = 0; b < m; ++b) {
      int dot = 0;
      for (int c = 0; c < m; ++c) dot += hadamard_sign(m, a, c) * hadamard_sign(m, b, c);
      if (dot != (a == b ? m : 0)) return false;
    }
  }
  return true;
}
}  // namespace detail
static_assert(detail::is_hadamard(12) && detail::is_hadamard(20) && detail::is_hadamard(28));

}  // namespace kvarn
