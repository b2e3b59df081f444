// Folding: sum_i a_i * (code_i * scale_i + zero_i) = step * sum_i n_i * code_i + offset
//
//   x_i = a_i * scale_i, step = max |x| / query_limit, n_i = round(x_i / step), offset = sum a_i * zero_i + middle * sum (x_i - step * n_i)
//
// The sum over the integers n_i is exact. `middle`, half the largest code, takes the mean of the codes out of the rounding error.
// For scores a = q, scale = k_scale, zero = k_zero over the channels; for the output a = p, scale = v_scale, zero = v_zero over the tokens.
#pragma once

#include "cpu/attend_scratch.h"
#include "cpu/attend_simd.h"

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

struct FoldSums {
  float largest;   // max |x|
  float products;  // sum of x
  float zeros;     // sum of a * zero
};

// x[i] = a[i] * scale[i].
KVARN_INLINE FoldSums fold_values(const float* a, const float* scale, const float* zeros, int n, float* x) {
  F32 largest = zero(), products = zero(), offsets = zero();
  for (int i = 0; i < n; i += kLanes) {
    const F32 value = load(a + i);
    const F32 product = value * load(scale + i);
    store(x + i, product);
    largest = max(largest, abs(product));
    products = products + product;
    offsets = fma(value, load(zeros + i), offsets);
  }
  return {reduce_max(largest), reduce_add(products), reduce_add(offsets)};
}

// Writes round(x / step) and returns the sum of these integers, exact in fp32.
KVARN_INLINE float round_values(const float* x, int n, float inverse_step, RowIntegers& integers) {
  const F32 inverse = broadcast(inverse_step);
  I32 sum = zero_i32();
  for (int i = 0; i < n; i += kLanes) {
    const I32 rounded = to_i32(load(x + i) * inverse);
    sum = sum + rounded;
    store_query(integers.low, integers.high, i, rounded);
  }
  return reduce_add(to_f32(sum));
}

// What rounding left: x[i] -= step * n[i], where n[i] is computed as round_values did. Returns max |x|.
KVARN_INLINE float subtract_rounded(float* x, int n, float step, float inverse_step) {
  const F32 inverse = broadcast(inverse_step), minus_step = broadcast(-step);
  F32 largest = zero();
  for (int i = 0; i < n; i += kLanes) {
    const F32 value = load(x + i);
    const F32 rest = fma(minus_step, to_f32(to_i32(value * inverse)), value);
    store(x + i, rest);
    largest = max(largest, abs(rest));
  }
  return reduce_max(largest);
}

// A step below this cannot change a result; x is taken as zero.
inline constexpr float kSmallestLargest = 1e-30f;

KVARN_INLINE float step_of(float largest, int limit) { return largest < kSmallestLargest ? 0.0f : largest / static_cast<float>(limit); }
KVARN_INLINE float inverse_step_of(float largest, int limit) {
  return largest < kSmallestLargest ? 0.0f : static_cast<float>(limit) / largest;
}

// Brings the integers into the order of a plane's steps. Step s of row `row` in a group of `group` rows goes to
// out + ((s * group + row) * kQueryPlanes) * 16, with VNNI the high plane before the low one.
template <int kBits>
KVARN_INLINE void arrange_plane(const RowIntegers& integers, int codes, int row, int group, uint8_t* out) {
  constexpr int kSteps = chunk_steps(kBits);
  constexpr int kPlaneChunkBytes = kSteps * kStepBytes;  // of one query plane in row order
  const int stride = group * kQueryPlanes * kStepBytes;
  const int chunks = (codes * kBits + 127) / 128;
  out += row * kQueryPlanes * kStepBytes;
  for (int c = 0; c < chunks; ++c) {
    if constexpr (kQueryPlanes == 2) arrange_chunk<kSteps>(integers.high + c * kPlaneChunkBytes, out + c * kSteps * stride, stride);
    arrange_chunk<kSteps>(integers.low + c * kPlaneChunkBytes, out + c * kSteps * stride + (kQueryPlanes - 1) * kStepBytes, stride);
  }
}

KVARN_INLINE void arrange(int bits, const RowIntegers& integers, int codes, int row, int group, uint8_t* out) {
  switch (bits) {
    case 1:
      return arrange_plane<1>(integers, codes, row, group, out);
    case 2:
      return arrange_plane<2>(integers, codes, row, group, out);
    case 4:
      return arrange_plane<4>(integers, codes, row, group, out);
    case 8:
      return arrange_plane<8>(integers, codes, row, group, out);
    default:
      return;
  }
}

KVARN_INLINE void arrange_row(const CodePlanes& planes, const RowIntegers& integers, int row, int group, GroupQuery& query) {
  arrange(planes.low->bits, integers, planes.low->codes, row, group, query.low);
  if (planes.high->bits != 0) arrange(planes.high->bits, integers, planes.high->codes, row, group, query.high);
}

// Zeros behind the last code, where short chunks are arranged whole.
KVARN_INLINE void clear_padding(int codes, RowIntegers& integers) {
  const int end = padded_codes(codes);
  for (int i = codes; i < end; i += kLanes) store_query(integers.low, integers.high, i, zero_i32());
}

// One row of a group: folds, rounds and arranges. `x` keeps a * scale.
KVARN_INLINE Folded fold_row(const CodePlanes& planes, const FoldSums& sums, const float* x, int row, int group, RowIntegers& integers,
                             GroupQuery& query) {
  const int n = planes.low->codes;
  const float step = step_of(sums.largest, planes.limit);
  const float rounded = round_values(x, n, inverse_step_of(sums.largest, planes.limit), integers);
  arrange_row(planes, integers, row, group, query);
  const float middle = static_cast<float>((1 << planes.bits) - 1) * 0.5f;
  return {step, sums.zeros + middle * (sums.products - step * rounded)};
}

}  // namespace
}  // namespace kvarn::cpu
