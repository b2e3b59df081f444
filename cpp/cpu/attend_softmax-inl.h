// One row against one tile: raw scores become weights 2^(score - peak), and the running softmax moves on.
#pragma once

#include "cpu/attend_simd.h"

namespace kvarn::cpu {
namespace {

// Applied to a raw score (q . k * softmax_scale, in log2 units unless capped) at token i of the tile.
struct ScoreRules {
  float soft_cap;      // 0: none
  float alibi_slope;   // log2 units per position; 0: none
  float first_offset;  // position of the tile's first token minus the query's
};

inline constexpr float kLog2E = 1.44269504f;

// cap * tanh(score / cap) in log2 units, tanh(y) = 1 - 2 / (e^2y + 1).
KVARN_INLINE F32 capped(F32 score, float cap) {
  const F32 size = abs(score) * broadcast(-2.0f * kLog2E / cap);
  const F32 e = exp2(size);  // e^-2|y|
  const F32 tanh = (broadcast(1.0f) - e) / (broadcast(1.0f) + e);
  const I32 sign = as_i32(score) & broadcast(static_cast<int32_t>(0x80000000u));
  return as_f32(as_i32(tanh * broadcast(cap * kLog2E)) | sign);
}

KVARN_INLINE F32 lane_numbers(int first) {
  alignas(64) static constexpr int32_t kCount[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return to_f32(load(kCount) + broadcast(int32_t{first}));
}

// Lanes whose token is in [begin, end).
KVARN_INLINE Mask between(F32 tokens, float begin, float end) {
  return less_equal(broadcast(begin), tokens) & less(tokens, broadcast(end));
}

KVARN_INLINE float exp2_of(float x) {
  float lanes[kLanes];
  store(lanes, exp2(broadcast(x)));
  return lanes[0];
}

struct RowState {
  float peak, sum;
};

// Turns raw_score(i), the raw scores of tokens i .. i + kLanes - 1, into weights and calls use(i, u, weights), u as in for_vectors, for all
// tokens of the tile; weights of tokens outside [begin, end), which is not empty, are exact zeros. `scores` is room for the tile's tokens;
// use may overwrite its own. Updates the row's state and returns the factor for what was accumulated before. kPlain: every token is seen
// and no rule applies.
template <bool kPlain, class RawScore, class Use>
KVARN_INLINE float softmax_row(const RawScore& raw_score, const Use& use, int tokens, int begin, int end, const ScoreRules& rules,
                               float* scores, RowState& state) {
  const F32 minus_infinity = broadcast(-__builtin_inff());
  F32 highest[2] = {minus_infinity, minus_infinity};
  for_vectors(tokens, [&](int i, int u) __attribute__((always_inline)) {
    F32 score = raw_score(i);
    if constexpr (!kPlain) {
      const F32 numbers = lane_numbers(i);
      if (rules.soft_cap > 0.0f) score = capped(score, rules.soft_cap);
      score = fma(broadcast(rules.alibi_slope), numbers + broadcast(rules.first_offset), score);
      score = select(between(numbers, static_cast<float>(begin), static_cast<float>(end)), score, minus_infinity);
    }
    store(scores + i, score);
    highest[u] = max(highest[u], score);
  });
  const float tile_peak = reduce_max(max(highest[0], highest[1]));
  float factor = 1.0f;
  if (tile_peak > state.peak) {
    factor = __builtin_isinf(state.peak) ? 0.0f : exp2_of(state.peak - tile_peak);
    state.peak = tile_peak;
  }
  const F32 peak = broadcast(state.peak);
  F32 sum[2] = {zero(), zero()};
  for_vectors(tokens, [&](int i, int u) __attribute__((always_inline)) {
    const F32 score = load(scores + i);
    F32 weight = exp2(score - peak);
    if constexpr (!kPlain) weight = select(less(minus_infinity, score), weight, zero());
    sum[u] = sum[u] + weight;
    use(i, u, weight);
  });
  state.sum = state.sum * factor + reduce_add(sum[0] + sum[1]);
  return factor;
}

}  // namespace
}  // namespace kvarn::cpu
