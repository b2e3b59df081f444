// Sums in the order that docs/FORMAT.md fixes ("sum16"): sixteen partial sums p[i % 16], then halves added to halves.
//
// Here one lane holds one sum, so the sixteen partials are taken one pair (l, l + 8) after the other, in an order that lets each finished
// pair be added to its neighbours at once: at most four levels of sums wait, instead of sixteen.
#pragma once

#include "cpu/simd.h"

namespace kvarn::cpu {
namespace {

// sum[b] = the total of block b. chain.operator()<l>(sum) gives p[l] + p[l + 8], l = 0 .. 7.
template <int Blocks, class Chain, int Level = 4, int Start = 0>
KVARN_INLINE void sum_tree(const Chain& chain, F32 (&sum)[Blocks]) {
  if constexpr (Level == 1) {
    chain.template operator()<Start>(sum);
  } else {
    F32 other[Blocks];
    sum_tree<Blocks, Chain, Level - 1, Start>(chain, sum);
    sum_tree<Blocks, Chain, Level - 1, Start + (16 >> Level)>(chain, other);
    KVARN_UNROLL for (int b = 0; b < Blocks; ++b) sum[b] = sum[b] + other[b];
  }
}

constexpr int kCacheLineFloats = 16;
KVARN_INLINE void prefetch(const float* p) { __builtin_prefetch(p); }

// An operand stored for reductions: blocks of kLanes lanes, each [steps][kLanes], and one vector of padding after each. Without the padding
// the blocks that are read together would lie at the same place within a page, where their loads meet in the same bank of the cache.
KVARN_INLINE int64_t block_stride(int steps) { return static_cast<int64_t>(steps + 1) * kLanes; }
// The block of lanes lane .. lane + kLanes - 1.
template <class Float>
KVARN_INLINE Float* block_at(Float* lanes, int lane, int steps) {
  return lanes + lane / kLanes * block_stride(steps);
}

// The sum of one vector of n floats, n a multiple of 16.
KVARN_INLINE float sum16_of(const float* values, int n) {
  constexpr int kParts = 16 / kLanes;
  F32 p[kParts];
  KVARN_UNROLL for (int j = 0; j < kParts; ++j) p[j] = zero();
  for (int i = 0; i < n; i += 16) {
    KVARN_UNROLL for (int j = 0; j < kParts; ++j) p[j] = p[j] + load(values + i + j * kLanes);
  }
  float s[16];
  KVARN_UNROLL for (int j = 0; j < kParts; ++j) store(s + j * kLanes, p[j]);
  for (int h = 8; h >= 1; h /= 2) {
    for (int l = 0; l < h; ++l) s[l] = s[l] + s[l + h];
  }
  return s[0];
}

// spread[lane] = standard deviation of x[step] * weight[step] over the steps, for Blocks blocks of lanes from `x` on.
//
// Partial sums start with their first term instead of 0 + term; that changes at most the sign of a zero, which the result does not show.
// Meanwhile the blocks from `next` on are fetched into the first-level cache.
template <int Blocks>
__attribute__((noinline)) void spread_blocks(const float* x, int steps, const float* weight, float* spread, const float* next) {
  const int64_t stride = block_stride(steps);
  const float* const end = weight + steps;

  F32 sum[Blocks];
  sum_tree<Blocks>(
      [&]<int L>(F32(&p)[Blocks]) {
        F32 q[Blocks];
        const float* at = x + L * kLanes;
        const float* w = weight + L;
        KVARN_UNROLL for (int b = 0; b < Blocks; ++b) p[b] = load(at + b * stride) * broadcast(w[0]);
        KVARN_UNROLL for (int b = 0; b < Blocks; ++b) q[b] = load(at + b * stride + 8 * kLanes) * broadcast(w[8]);
#pragma GCC unroll 1
        for (w += 16, at += 16 * kLanes; w < end; w += 16, at += 16 * kLanes) {
          const F32 w0 = broadcast(w[0]);
          const F32 w1 = broadcast(w[8]);
          KVARN_UNROLL for (int b = 0; b < Blocks; ++b) p[b] = fma(load(at + b * stride), w0, p[b]);
          KVARN_UNROLL for (int b = 0; b < Blocks; ++b) q[b] = fma(load(at + b * stride + 8 * kLanes), w1, q[b]);
        }
        KVARN_UNROLL for (int b = 0; b < Blocks; ++b) p[b] = p[b] + q[b];
      },
      sum);
  F32 minus_mean[Blocks];
  const F32 n = broadcast(static_cast<float>(steps));
  KVARN_UNROLL for (int b = 0; b < Blocks; ++b) minus_mean[b] = negate(sum[b] / n);

  sum_tree<Blocks>(
      [&]<int L>(F32(&p)[Blocks]) {
        F32 q[Blocks];
        const float* at = x + L * kLanes;
        const float* w = weight + L;
        KVARN_UNROLL for (int b = 0; b < Blocks; ++b) {
          const F32 t = fma(load(at + b * stride), broadcast(w[0]), minus_mean[b]);
          const F32 u = fma(load(at + b * stride + 8 * kLanes), broadcast(w[8]), minus_mean[b]);
          p[b] = t * t;
          q[b] = u * u;
        }
#pragma GCC unroll 1
        for (w += 16, at += 16 * kLanes; w < end; w += 16, at += 16 * kLanes) {
          const F32 w0 = broadcast(w[0]);
          const F32 w1 = broadcast(w[8]);
          // Every pass of this loop consumes 2 * Blocks vectors.
          for (int line = 0; line < 2 * Blocks * kLanes; line += kCacheLineFloats) prefetch(next + line);
          next += 2 * Blocks * kLanes;
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
      },
      sum);
  const F32 n_minus_1 = broadcast(static_cast<float>(steps - 1));
  KVARN_UNROLL for (int b = 0; b < Blocks; ++b) store(spread + b * kLanes, sqrt(sum[b] / n_minus_1));
}

// The same for `lanes` lanes, a multiple of 16. `then`: what will be measured next.
inline void measure_spread(const float* x, int lanes, int steps, const float* weight, float* spread, const float* then) {
  constexpr int kGroup = 4 * kLanes;
  int lane = 0;
  for (; lane + kGroup <= lanes; lane += kGroup) {
    const float* const next = lane + 2 * kGroup <= lanes ? block_at(x, lane + kGroup, steps) : then;
    spread_blocks<4>(block_at(x, lane, steps), steps, weight, spread + lane, next);
  }
  for (; lane < lanes; lane += kLanes) spread_blocks<1>(block_at(x, lane, steps), steps, weight, spread + lane, then);
}

// sum16 of x * x over the steps, for one block of lanes.
KVARN_INLINE F32 sum_of_squares(const float* x, int steps) {
  F32 sum[1];
  sum_tree<1>(
      [&]<int L>(F32(&p)[1]) {
        F32 q = zero();
        p[0] = zero();
        for (int i = L; i < steps; i += 16) {
          const F32 a = load(x + i * kLanes);
          const F32 b = load(x + (i + 8) * kLanes);
          p[0] = fma(a, a, p[0]);
          q = fma(b, b, q);
        }
        p[0] = p[0] + q;
      },
      sum);
  return sum[0];
}

// sum16 of x over the steps, for one block of lanes.
KVARN_INLINE F32 sum_of_values(const float* x, int steps) {
  F32 sum[1];
  sum_tree<1>(
      [&]<int L>(F32(&p)[1]) {
        F32 q = zero();
        p[0] = zero();
        for (int i = L; i < steps; i += 16) {
          p[0] = p[0] + load(x + i * kLanes);
          q = q + load(x + (i + 8) * kLanes);
        }
        p[0] = p[0] + q;
      },
      sum);
  return sum[0];
}

}  // namespace
}  // namespace kvarn::cpu
