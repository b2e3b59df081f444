// Sums in the order that docs/FORMAT.md fixes ("sum16"): sixteen partial sums p[i % 16], then halves added to halves.
//
// Here one lane holds one sum, so the sixteen partials are taken one pair (l, l + 8) after the other. Pairs follow in bit-reversed order,
// which lets each finished pair be added to its neighbours at once: four levels of waiting sums instead of sixteen.
#pragma once

#include "cpu/simd.h"

namespace kvarn::cpu {
namespace {

// Tree additions for Blocks independent vectors. push() takes p[l] + p[l + 8] for l = 0, 4, 2, 6, 1, 5, 3, 7; take() is the total.
template <int Blocks>
struct SumTree {
  F32 waiting[4][Blocks];
  int depth = 0;

  // `pair` counts the calls: 0 .. 7.
  KVARN_INLINE void push(int pair, const F32 (&sum)[Blocks]) {
    F32 s[Blocks];
    KVARN_UNROLL for (int b = 0; b < Blocks; ++b) s[b] = sum[b];
    for (int level = pair; (level & 1) != 0; level >>= 1) {
      --depth;
      KVARN_UNROLL for (int b = 0; b < Blocks; ++b) s[b] = waiting[depth][b] + s[b];
    }
    KVARN_UNROLL for (int b = 0; b < Blocks; ++b) waiting[depth][b] = s[b];
    ++depth;
  }
};

// First index of the pair-th pair: 0, 4, 2, 6, 1, 5, 3, 7.
KVARN_INLINE int pair_start(int pair) { return (pair & 1) << 2 | (pair & 2) | (pair & 4) >> 2; }

// sum16 over n values in memory, lane-free: the sum of one vector of n floats, n a multiple of 16.
KVARN_INLINE float sum16_of(const float* values, int n) {
  constexpr int kParts = 16 / kLanes;
  F32 p[kParts];
  for (int j = 0; j < kParts; ++j) p[j] = zero();
  for (int i = 0; i < n; i += 16) {
    for (int j = 0; j < kParts; ++j) p[j] = p[j] + load(values + i + j * kLanes);
  }
  float s[16];
  for (int j = 0; j < kParts; ++j) store(s + j * kLanes, p[j]);
  for (int h = 8; h >= 1; h /= 2) {
    for (int l = 0; l < h; ++l) s[l] = s[l] + s[l + h];
  }
  return s[0];
}

// An operand stored for reductions: blocks of kLanes lanes, each [steps][kLanes].
KVARN_INLINE const float* block_of(const float* lanes, int block, int steps) {
  return lanes + static_cast<int64_t>(block) * steps * kLanes;
}

// spread[lane] = standard deviation of x[step] * weight[step] over the steps, for Blocks blocks of lanes from `x` on.
template <int Blocks>
__attribute__((noinline)) void spread_blocks(const float* x, int steps, const float* weight, float* spread) {
  const int64_t stride = static_cast<int64_t>(steps) * kLanes;
  const float* const end = weight + steps;
  SumTree<Blocks> tree;
#pragma GCC unroll 1
  for (int pair = 0; pair < 8; ++pair) {
    F32 p[Blocks], q[Blocks];
    KVARN_UNROLL for (int b = 0; b < Blocks; ++b) p[b] = q[b] = zero();
    const float* at = x + pair_start(pair) * kLanes;
#pragma GCC unroll 1
    for (const float* w = weight + pair_start(pair); w < end; w += 16, at += 16 * kLanes) {
      const F32 w0 = broadcast(w[0]);
      const F32 w1 = broadcast(w[8]);
      KVARN_UNROLL for (int b = 0; b < Blocks; ++b) p[b] = fma(load(at + b * stride), w0, p[b]);
      KVARN_UNROLL for (int b = 0; b < Blocks; ++b) q[b] = fma(load(at + b * stride + 8 * kLanes), w1, q[b]);
    }
    KVARN_UNROLL for (int b = 0; b < Blocks; ++b) p[b] = p[b] + q[b];
    tree.push(pair, p);
  }
  F32 minus_mean[Blocks];
  const F32 n = broadcast(static_cast<float>(steps));
  KVARN_UNROLL for (int b = 0; b < Blocks; ++b) minus_mean[b] = negate(tree.waiting[0][b] / n);
  tree.depth = 0;
#pragma GCC unroll 1
  for (int pair = 0; pair < 8; ++pair) {
    F32 p[Blocks], q[Blocks];
    KVARN_UNROLL for (int b = 0; b < Blocks; ++b) p[b] = q[b] = zero();
    const float* at = x + pair_start(pair) * kLanes;
#pragma GCC unroll 1
    for (const float* w = weight + pair_start(pair); w < end; w += 16, at += 16 * kLanes) {
      const F32 w0 = broadcast(w[0]);
      const F32 w1 = broadcast(w[8]);
      KVARN_UNROLL for (int b = 0; b < Blocks; ++b) {
        const F32 t = fma(load(at + b * stride), w0, minus_mean[b]);
        p[b] = fma(t, t, p[b]);
      }
      KVARN_UNROLL for (int b = 0; b < Blocks; ++b) {
        const F32 t = fma(load(at + b * stride + 8 * kLanes), w1, minus_mean[b]);
        q[b] = fma(t, t, q[b]);
      }
    }
    KVARN_UNROLL for (int b = 0; b < Blocks; ++b) p[b] = p[b] + q[b];
    tree.push(pair, p);
  }
  const F32 n_minus_1 = broadcast(static_cast<float>(steps - 1));
  KVARN_UNROLL for (int b = 0; b < Blocks; ++b) store(spread + b * kLanes, sqrt(tree.waiting[0][b] / n_minus_1));
}

// The same for `lanes` lanes, a multiple of 16.
inline void measure_spread(const float* x, int lanes, int steps, const float* weight, float* spread) {
  const int blocks = lanes / kLanes;
  int b = 0;
  for (; b + 4 <= blocks; b += 4) spread_blocks<4>(block_of(x, b, steps), steps, weight, spread + b * kLanes);
  for (; b < blocks; ++b) spread_blocks<1>(block_of(x, b, steps), steps, weight, spread + b * kLanes);
}

// sum16 of x * x over the steps, for one block of lanes.
KVARN_INLINE F32 sum_of_squares(const float* x, int steps) {
  SumTree<1> tree;
  for (int pair = 0; pair < 8; ++pair) {
    F32 p[1] = {zero()};
    F32 q = zero();
    for (int i = pair_start(pair); i < steps; i += 16) {
      const F32 a = load(x + i * kLanes);
      const F32 b = load(x + (i + 8) * kLanes);
      p[0] = fma(a, a, p[0]);
      q = fma(b, b, q);
    }
    p[0] = p[0] + q;
    tree.push(pair, p);
  }
  return tree.waiting[0][0];
}

// sum16 of x over the steps, for one block of lanes.
KVARN_INLINE F32 sum_of_values(const float* x, int steps) {
  SumTree<1> tree;
  for (int pair = 0; pair < 8; ++pair) {
    F32 p[1] = {zero()};
    F32 q = zero();
    for (int i = pair_start(pair); i < steps; i += 16) {
      p[0] = p[0] + load(x + i * kLanes);
      q = q + load(x + (i + 8) * kLanes);
    }
    p[0] = p[0] + q;
    tree.push(pair, p);
  }
  return tree.waiting[0][0];
}

}  // namespace
}  // namespace kvarn::cpu
