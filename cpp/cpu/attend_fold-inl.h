// Folding: sum_i a_i * (code_i * scale_i + zero_i) = step * sum_i n_i * code_i + offset
//
//   x_i = a_i * scale_i, step = max |x| / query_limit, n_i = round(x_i / step)
//   offset = sum a_i * (zero_i + middle * scale_i) - step * middle * sum n_i, middle = half the largest code
//
// The sum over the integers n_i is exact. `middle` takes the mean of the codes out of the rounding error.
// For scores a = q, scale = k_scale, zero = k_zero over the channels; for the output a = p, scale = v_scale, zero = v_zero over the tokens.
#pragma once

#include "cpu/attend_round-inl.h"

namespace kvarn::cpu {
namespace {

// |n| that both forms of the query can hold: 127 * 256 + 127.
inline constexpr int kQueryMax = 32639;
// ... and that keeps sums over `codes` codes of `bits` bits below 2^31.
constexpr int query_limit(int codes, int bits) {
  const int64_t largest = int64_t{0x7fffffff} / (static_cast<int64_t>(codes) * ((1 << bits) - 1));
  return largest < kQueryMax ? static_cast<int>(largest) : kQueryMax;
}
static_assert(query_limit(256, 8) == kQueryMax && query_limit(512, 8) == 16448);

// The code arrays of one operand of a record.
struct CodePlanes {
  const Plane* low;
  const Plane* high;
  int bits;
  int limit;     // query_limit
  float middle;  // half the largest code
};
KVARN_INLINE CodePlanes code_planes(const Plane& low, const Plane& high, int bits) {
  return {&low, &high, bits, query_limit(low.codes, bits), static_cast<float>((1 << bits) - 1) * 0.5f};
}

struct Folded {
  float step, offset;
};

struct FoldSums {
  float largest;  // max |x|
  float centres;  // sum of a * (zero + middle * scale)
};

// The same over lanes, while a row is folded.
struct FoldLanes {
  F32 largest[kUnrolled], centres[kUnrolled];

  KVARN_INLINE FoldLanes() {
    for (F32& x : largest) x = zero();
    for (F32& x : centres) x = zero();
  }
  // x for kLanes values; u as in for_vectors.
  KVARN_INLINE F32 fold(F32 a, const float* scale, const float* centre, int u) {
    const F32 x = a * load(scale);
    largest[u] = max(largest[u], abs(x));
    centres[u] = fma(a, load(centre), centres[u]);
    return x;
  }
  KVARN_INLINE FoldSums sums() const {
    if constexpr (kUnrolled == 1) return {reduce_max(largest[0]), reduce_add(centres[0])};
    return {reduce_max(max(largest[0], largest[kUnrolled - 1])), reduce_add(centres[0] + centres[kUnrolled - 1])};
  }
};

// x[i] = a[i] * scale[i].
KVARN_INLINE FoldSums fold_values(const float* a, const float* scale, const float* centre, int n, float* x) {
  FoldLanes lanes;
  for_vectors(n, [&](int i, int u) __attribute__((always_inline)) { store(x + i, lanes.fold(load(a + i), scale + i, centre + i, u)); });
  return lanes.sums();
}

KVARN_INLINE void clear_padding(float* x, int n) {
  const int end = padded_codes(n);
  for (int i = n; i < end; i += kLanes) store(x + i, zero());
}

// Values below this cannot change a result and are taken as zero.
inline constexpr float kSmallestLargest = 1e-30f;
KVARN_INLINE float inverse_step(float largest, int limit) {
  return largest < kSmallestLargest ? 0.0f : static_cast<float>(limit) / largest;
}

// Row `row` of the group: rounds x, [codes] and zeros up to padded_codes(codes), into the query of both planes.
KVARN_INLINE Folded fold_row(const CodePlanes& planes, const FoldSums& sums, const float* x, int row, GroupQuery& query) {
  const int codes = planes.low->codes;
  const float inverse = inverse_step(sums.largest, planes.limit);
  const int at = row * kQueryPlanes * kQueryStride;
  const float rounded = round_row(planes.low->bits, x, codes, inverse, query.low + at);
  if (planes.high->bits != 0) round_row(planes.high->bits, x, codes, inverse, query.high + at);
  const float step = sums.largest < kSmallestLargest ? 0.0f : sums.largest / static_cast<float>(planes.limit);
  return {step, sums.centres - step * (planes.middle * rounded)};
}

// What rounding left: x[i] -= step * n[i]. Returns max |x|.
KVARN_INLINE float subtract_rounded(float* x, int n, float step, float inverse) {
  F32 largest = zero();
  for (int i = 0; i < n; i += kLanes) {
    const F32 value = load(x + i);
    const F32 rest = fma(broadcast(-step), to_f32(to_i32(value * broadcast(inverse))), value);
    store(x + i, rest);
    largest = max(largest, abs(rest));
  }
  return reduce_max(largest);
}

}  // namespace
}  // namespace kvarn::cpu
