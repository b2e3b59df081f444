// Rounding of kLanes rows to codes: minmax, or the least-squares fit whose error does not correlate with the value ("unbiased").
// One lane holds one row; docs/FORMAT.md gives the order of every operation.
#pragma once

#include "cpu/sums-inl.h"
#include "kvarn/encode_constants.h"

namespace kvarn::cpu {
namespace {

// Sums over the codes c of a row: c, c * c, c * x. The first two are integers; each half holds at most 256 terms of at most 255 * 255,
// which fp32 adds exactly, so that their one last addition rounds the exact sum.
struct CodeSums {
  F32 c1, c2, cx;
};

struct Grid {
  F32 scale, zero;
};

// Codes of x [steps][kLanes] on the grid, and their sums; with Store also the codes themselves, `code_stride` bytes between steps.
template <bool Store>
__attribute__((noinline)) void round_with(const float* x, int steps, const Grid& grid, F32 levels, CodeSums& sums, uint8_t* codes,
                                          int64_t code_stride) {
  const F32 inverse = broadcast(1.0f) / grid.scale;
  const F32 offset = grid.zero;
  const auto code_of = [&](F32 value) { return clamp(round_even((value - offset) * inverse), zero(), levels); };
  F32 c1[2] = {zero(), zero()};
  F32 c2[2] = {zero(), zero()};
  F32 cx[1];
  sum_tree<1>(
      [&]<int L>(F32(&p)[1]) {
        F32 q = zero();
        p[0] = zero();
#pragma GCC unroll 1
        for (int i = L; i < steps; i += 16) {
          const F32 a = load(x + i * kLanes);
          const F32 b = load(x + (i + 8) * kLanes);
          const F32 code_a = code_of(a);
          const F32 code_b = code_of(b);
          c1[0] = c1[0] + code_a;
          c1[1] = c1[1] + code_b;
          c2[0] = fma(code_a, code_a, c2[0]);
          c2[1] = fma(code_b, code_b, c2[1]);
          p[0] = fma(code_a, a, p[0]);
          q = fma(code_b, b, q);
          if constexpr (Store) {
            store_u8(codes + i * code_stride, to_i32(code_a));
            store_u8(codes + (i + 8) * code_stride, to_i32(code_b));
          }
        }
        p[0] = p[0] + q;
      },
      cx);
  sums = {c1[0] + c1[1], c2[0] + c2[1], cx[0]};
}

struct RoundedRows {
  F32 scale, zero;
  F32 mean, centred_zero;  // zero = mean + centred_zero
};

// m [steps][kLanes]: rows of the operand; times weight[step] they are the balanced rows, for which u is scratch of the same size.
// row_scale: VarN's scale of each row; fed: feedback follows. The codes of step i go to codes + i * code_stride.
inline RoundedRows round_rows(const float* m, const float* weight, float* u, int steps, int levels_int, bool unbiased, bool fed,
                              F32 row_scale, uint8_t* codes, int64_t code_stride) {
  const F32 levels = broadcast(static_cast<float>(levels_int));
  F32 least[4], most[4];
  KVARN_UNROLL for (int j = 0; j < 4; ++j) least[j] = most[j] = load(m) * broadcast(weight[0]);
#pragma GCC unroll 1
  for (int i = 0; i < steps; i += 4) {
    KVARN_UNROLL for (int j = 0; j < 4; ++j) {
      const F32 value = load(m + (i + j) * kLanes) * broadcast(weight[i + j]);
      store(u + (i + j) * kLanes, value);
      least[j] = min(least[j], value);
      most[j] = max(most[j], value);
    }
  }
  const F32 lo = min(min(least[0], least[1]), min(least[2], least[3]));
  const F32 hi = max(max(most[0], most[1]), max(most[2], most[3]));
  const F32 floor = broadcast(kRangeFloor) * row_scale;
  const F32 grid = max((hi - lo) / levels, floor);
  // Rows without a range keep their minmax grid.
  const Mask fitted = less(floor, grid);
  if (!unbiased || !any(fitted)) {
    CodeSums unused;
    round_with<true>(u, steps, {grid, lo}, levels, unused, codes, code_stride);
    return {grid, lo, zero(), lo};
  }

  const F32 n = broadcast(static_cast<float>(steps));
  const F32 mean = select(fitted, sum_of_values(u, steps) / n, zero());
  for (int i = 0; i < steps; ++i) store(u + i * kLanes, load(u + i * kLanes) - mean);
  const F32 sxx = sum_of_squares(u, steps);
  const F32 middle = (lo + hi) * broadcast(0.5f) - mean;

  Grid best;
  best.scale = broadcast(unbiased_clip(levels_int)) * grid;
  best.zero = middle - best.scale * (levels * broadcast(0.5f));
  CodeSums sums;
  for (int refit = 0; refit < kUnbiasedRefits; ++refit) {
    round_with<false>(u, steps, best, levels, sums, nullptr, 0);
    const F32 variance = n * sums.c2 - sums.c1 * sums.c1;
    const Mask valid = less(zero(), variance) & less(zero(), sums.cx);
    const F32 scale = (sums.cx * n) / variance;
    const F32 offset = negate((scale * sums.c1) / n);
    best.scale = select(valid, scale, best.scale);
    best.zero = select(valid, offset, best.zero);
  }
  best.scale = select(fitted, best.scale, grid);
  best.zero = select(fitted, best.zero, lo);
  round_with<true>(u, steps, best, levels, sums, codes, code_stride);
  const F32 stretched = sxx / sums.cx;
  const Mask stretch = fitted & less(zero(), sums.cx);
  RoundedRows rows;
  rows.scale = select(stretch, stretched, best.scale);
  rows.mean = mean;
  rows.centred_zero = select(stretch, negate((stretched * sums.c1) / n), best.zero);
  if (fed) {
    const F32 moved = rows.centred_zero - rows.scale * broadcast(feedback_low_shift(levels_int));
    rows.centred_zero = select(fitted, moved, rows.centred_zero);
    rows.scale = select(fitted, rows.scale * broadcast(feedback_widening(levels_int)), rows.scale);
  }
  rows.zero = rows.mean + rows.centred_zero;
  return rows;
}

}  // namespace
}  // namespace kvarn::cpu
