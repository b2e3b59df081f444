// Folding: sum_i a_i * (code_i * scale_i + zero_i) = step * sum_i n_i * code_i + offset
//
//   x_i = a_i * scale_i, step = max |x| / query_limit, n_i = round(x_i / step), offset = sum a_i * zero_i + middle * sum (x_i - step * n_i)
//
// The sum over the integers n_i is exact. `middle`, half the largest code, takes the mean of the codes out of the rounding error.
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
  int limit;  // query_limit
};

struct Folded {
  float step, offset;
};

// Sums over a row of folded values; lanes are added up by fold_sums.
struct FoldLanes {
  F32 largest, products, zeros;

  // a[i] * scale[i] for kLanes values.
  KVARN_INLINE F32 fold(F32 a, const float* scale, const float* zero) {
    const F32 product = a * load(scale);
    largest = max(largest, abs(product));
    products = products + product;
    zeros = fma(a, load(zero), zeros);
    return product;
  }
};
KVARN_INLINE FoldLanes fold_nothing() { return {zero(), zero(), zero()}; }

struct FoldSums {
  float largest;   // max |x|
  float products;  // sum of x
  float zeros;     // sum of a * zero
};
KVARN_INLINE FoldSums fold_sums(const FoldLanes& lanes) {
  return {reduce_max(lanes.largest), reduce_add(lanes.products), reduce_add(lanes.zeros)};
}

// x[i] = a[i] * scale[i].
KVARN_INLINE FoldSums fold_values(const float* a, const float* scale, const float* zeros, int n, float* x) {
  FoldLanes lanes = fold_nothing();
  for (int i = 0; i < n; i += kLanes) store(x + i, lanes.fold(load(a + i), scale + i, zeros + i));
  return fold_sums(lanes);
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
  const float middle = static_cast<float>((1 << planes.bits) - 1) * 0.5f;
  return {step, sums.zeros + middle * (sums.products - step * rounded)};
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
