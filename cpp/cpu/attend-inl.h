// Attention of some query rows of one KV head over a run of tiles, records and staging alike.
//
//   score[t] = k_token_scale[t] * (sum_d (q[d] * k_scale[d]) * code[t, d] + sum_d q[d] * k_zero[d])
//   out[d]  += v_channel_scale[d] * (sum_t (p[t] * v_scale[t]) * code[t, d] + sum_t p[t] * v_zero[t])
//
// Everything happens in the rotated frame. Both sums over codes are exact integers (attend_fold-inl.h, attend_dot-inl.h); the rest is fp32.
// A tile's record is read once per kGroupRows rows, from cache after the first time; nothing is written but the state of the rows.
// The result of a row depends on its own tiles alone, not on the rows that share its group.
#pragma once

#include "cpu/attend.h"
#include "cpu/attend_dot-inl.h"
#include "cpu/attend_softmax-inl.h"
#include "cpu/attend_staging-inl.h"
#include "cpu/metadata-inl.h"

namespace kvarn::cpu {
namespace {

// ---- a tile's metadata ----

// Vectors as in the record, but for the zeros, which become zero + middle * scale.
struct TileMetadata {
  const float* values[kMetadataCount];
  float largest_token_scale;  // max |k_token_scale|
  bool k_finite, v_finite;
};

KVARN_INLINE TileMetadata load_tile_metadata(const uint8_t* record, const RecordLayout& layout, float k_middle, float v_middle,
                                             float* const* out) {
  TileMetadata metadata;
  F32 poison[2] = {zero(), zero()};  // becomes NaN with the first value that is not finite
  F32 largest = zero();
  const bool bytes = layout.format.metadata_bits == 8;
  for (int which = 0; which < kMetadataCount; ++which) {
    float* values = out[which];
    metadata.values[which] = values;
    if (bytes) load_metadata(record, layout, which, values);
    const auto* halves = reinterpret_cast<const uint16_t*>(record + layout.metadata_offset[which]);
    // Zeros come right behind their scales, and become centres.
    const bool is_k = which <= kKTokenScale;
    const float* scales = which == kKZero || which == kVZero ? out[which - 1] : nullptr;
    const F32 middle = broadcast(is_k ? k_middle : v_middle);
    F32& of_operand = poison[is_k ? 0 : 1];
    for_vectors(layout.metadata_count[which], [&](int i, int) __attribute__((always_inline)) {
      F32 value = bytes ? load(values + i) : load_f16(halves + i);
      of_operand = fma(value, zero(), of_operand);
      if (which == kKTokenScale) largest = max(largest, abs(value));
      if (scales != nullptr) value = fma(load(scales + i), middle, value);
      store(values + i, value);
    });
  }
  metadata.largest_token_scale = reduce_max(largest);
  metadata.k_finite = all(less_equal(poison[0], zero()));
  metadata.v_finite = all(less_equal(poison[1], zero()));
  return metadata;
}

// ---- what a unit needs all along ----

struct Kernel {
  const AttendUnit& unit;
  AttendScratch scratch;
  CodePlanes k_planes, v_planes;
  int head_dim, tile_tokens;
  float score_noise;  // standard deviation of a score's rounding error per step of the query's integers

  explicit Kernel(const AttendUnit& u);
  KVARN_INLINE float* acc(int row) const { return unit.state.acc + static_cast<int64_t>(row) * head_dim; }
  KVARN_INLINE const float* q(int row) const { return unit.q + static_cast<int64_t>(row) * head_dim; }
};

// Rounding errors are uniform over a step, codes about uniform around their middle.
inline Kernel::Kernel(const AttendUnit& u) : unit(u) {
  const RecordLayout& layout = *u.layout;
  head_dim = layout.head_dim;
  tile_tokens = layout.format.tile_tokens;
  scratch = attend_scratch(u.scratch, head_dim, tile_tokens);
  const int k_bits = layout.format.k_bits, v_bits = layout.format.v_bits;
  k_planes = code_planes(layout.k_low, layout.k_high, k_bits);
  v_planes = code_planes(layout.v_low, layout.v_high, v_bits);
  const auto levels = static_cast<float>(1 << k_bits);
  score_noise = __builtin_sqrtf(static_cast<float>(head_dim) * (levels * levels - 1.0f)) / 12.0f;
}

// Scores that are less exact than this, in log2 units, get a second set of integers for what rounding left.
inline constexpr float kScoreTolerance = 2.5e-4f;

// Folded values beyond this could overflow on the way to a score: no result.
inline constexpr float kLargestFolded = 1e30f;

// A group of rows against a tile.
struct Group {
  int first, rows;
  int begin[kGroupRows], end[kGroupRows];  // what row first + r sees of the tile; begin == end: nothing, or the row is NaN already
  float factor[kGroupRows];                // for what the row has accumulated

  KVARN_INLINE bool sees(int r) const { return begin[r] < end[r]; }
};

KVARN_INLINE bool find_visible(const Kernel& kernel, int tile, Group& group) {
  const AttendUnit& unit = kernel.unit;
  const int origin = tile * kernel.tile_tokens;
  bool any_visible = false;
  for (int r = 0; r < group.rows; ++r) {
    const int row = group.first + r;
    const int begin = unit.see_begin[row] - origin, end = unit.see_end[row] - origin;
    group.begin[r] = begin > 0 ? begin : 0;
    group.end[r] = end < kernel.tile_tokens ? end : kernel.tile_tokens;
    group.factor[r] = 1.0f;
    if ((unit.state.flags[row] & kRowIsNan) != 0) group.end[r] = group.begin[r];
    any_visible = any_visible || group.sees(r);
  }
  return any_visible;
}

KVARN_INLINE void give_up(const Kernel& kernel, Group& group, int r, int32_t flag) {
  kernel.unit.state.flags[group.first + r] |= flag;
  if (flag == kRowIsNan) group.end[r] = group.begin[r];
}

// use(i, u, weights) as in softmax_row; the weights are relative to the row's new peak. Sets the row's factor.
template <class RawScore, class Use>
KVARN_INLINE void softmax(const Kernel& kernel, int tile, Group& group, int r, float* scores, const RawScore& raw_score, const Use& use) {
  const AttendUnit& unit = kernel.unit;
  const int row = group.first + r;
  const int tokens = kernel.tile_tokens;
  RowState state{unit.state.peak[row], unit.state.sum[row]};
  ScoreRules rules{unit.soft_cap, 0.0f, 0.0f};
  if (unit.alibi_slopes != nullptr) {
    rules.alibi_slope = unit.alibi_slopes[row];
    rules.first_offset = static_cast<float>(tile * tokens - unit.positions[row]);
  }
  const bool plain = group.begin[r] == 0 && group.end[r] == tokens && rules.soft_cap == 0.0f && rules.alibi_slope == 0.0f;
  group.factor[r] = plain ? softmax_row<true>(raw_score, use, tokens, 0, tokens, rules, scores, state)
                          : softmax_row<false>(raw_score, use, tokens, group.begin[r], group.end[r], rules, scores, state);
  unit.state.peak[row] = state.peak;
  unit.state.sum[row] = state.sum;
}

// ---- a record ----

// A second set of integers, for what rounding left of the rows whose step is too coarse.
KVARN_INLINE void rest_scores(const Kernel& kernel, const uint8_t* record, const Group& group, DotFunction k_dot,
                              const bool (&coarse)[kGroupRows], Folded (&folded)[kGroupRows], const FoldSums (&sums)[kGroupRows],
                              float (&rest_step)[kGroupRows]) {
  const AttendScratch& s = kernel.scratch;
  const RecordLayout& layout = *kernel.unit.layout;
  const CodePlanes& planes = kernel.k_planes;
  for (int r = 0; r < group.rows; ++r) {
    if (!coarse[r]) continue;
    float* x = s.folded + r * s.stride;
    const float largest = subtract_rounded(x, kernel.head_dim, folded[r].step, inverse_step(sums[r].largest, planes.limit));
    const Folded rest = fold_row(planes, {largest, 0.0f}, x, r, *s.query);
    rest_step[r] = rest.step;
    folded[r].offset += rest.offset;
  }
  Prefetch nothing{nullptr, nullptr, 0};
  k_dot(planes, record + layout.k_low_offset, record + layout.k_high_offset, *s.query, s.rests, s.stride, nothing);
}

inline void record_group(const Kernel& kernel, int tile, const uint8_t* record, const TileMetadata& metadata, Group& group,
                         DotFunction k_dot, DotFunction v_dot, Prefetch& prefetch) {
  const AttendScratch& s = kernel.scratch;
  const RecordLayout& layout = *kernel.unit.layout;
  const int rows = group.rows, d = kernel.head_dim, tokens = kernel.tile_tokens;

  // Scores.
  Folded folded[kGroupRows] = {};
  FoldSums sums[kGroupRows] = {};
  bool coarse[kGroupRows] = {};
  bool any_coarse = false;
  for (int r = 0; r < rows; ++r) {
    if (!group.sees(r)) continue;
    float* x = s.folded + r * s.stride;
    sums[r] = fold_values(kernel.q(group.first + r), metadata.values[kKScale], metadata.values[kKZero], d, x);
    const float size = sums[r].largest + __builtin_fabsf(sums[r].centres);
    if (!(size * metadata.largest_token_scale < kLargestFolded && size < kLargestFolded)) {
      give_up(kernel, group, r, kRowIsNan);
      continue;
    }
    clear_padding(x, d);
    folded[r] = fold_row(kernel.k_planes, sums[r], x, r, *s.query);
    coarse[r] = folded[r].step * metadata.largest_token_scale * kernel.score_noise > kScoreTolerance;
    any_coarse = any_coarse || coarse[r];
  }
  k_dot(kernel.k_planes, record + layout.k_low_offset, record + layout.k_high_offset, *s.query, s.sums, s.stride, prefetch);
  float rest_step[kGroupRows] = {};
  if (any_coarse) rest_scores(kernel, record, group, k_dot, coarse, folded, sums, rest_step);

  // Weights, and their integers for V.
  Folded out_folded[kGroupRows] = {};
  for (int r = 0; r < rows; ++r) {
    if (!group.sees(r)) continue;
    const int32_t* integers = s.sums + r * s.stride;
    const int32_t* rests = s.rests + r * s.stride;
    const float* token_scale = metadata.values[kKTokenScale];
    const F32 step = broadcast(folded[r].step), offset = broadcast(folded[r].offset), fine = broadcast(rest_step[r]);
    float* x = s.folded + r * s.stride;
    FoldLanes lanes;
    const auto use = [&](int i, int u, F32 weights) __attribute__((always_inline)) {
      store(x + i, lanes.fold(weights, metadata.values[kVScale] + i, metadata.values[kVZero] + i, u));
    };
    if (coarse[r]) {
      softmax(
          kernel, tile, group, r, x,
          [&](int i) __attribute__((always_inline)) {
            return fma(to_f32(load(integers + i)), step, fma(to_f32(load(rests + i)), fine, offset)) * load(token_scale + i);
          },
          use);
    } else {
      softmax(
          kernel, tile, group, r, x,
          [&](int i) __attribute__((always_inline)) { return fma(to_f32(load(integers + i)), step, offset) * load(token_scale + i); }, use);
    }
    if (!metadata.v_finite) continue;
    clear_padding(x, tokens);
    out_folded[r] = fold_row(kernel.v_planes, lanes.sums(), x, r, *s.query);
  }
  if (!metadata.v_finite) return;
  v_dot(kernel.v_planes, record + layout.v_low_offset, record + layout.v_high_offset, *s.query, s.sums, s.stride, prefetch);

  // Output.
  for (int r = 0; r < rows; ++r) {
    if (!group.sees(r)) continue;
    const int32_t* integers = s.sums + r * s.stride;
    float* acc = kernel.acc(group.first + r);
    const F32 step = broadcast(out_folded[r].step), offset = broadcast(out_folded[r].offset), factor = broadcast(group.factor[r]);
    for_vectors(d, [&](int i, int) __attribute__((always_inline)) {
      const F32 value = fma(to_f32(load(integers + i)), step, offset);
      store(acc + i, fma(value, load(metadata.values[kVChannelScale] + i), load(acc + i) * factor));
    });
  }
}

// ---- a staging tile ----

// The visible rows r .. r + count - 1 of the group see the same tokens.
template <int Dtype>
KVARN_INLINE void staging_rows(const Kernel& kernel, int tile, const void* k, const void* v, Group& group, int first, int count) {
  const AttendScratch& s = kernel.scratch;
  const int d = kernel.head_dim, tokens = kernel.tile_tokens;
  const int begin = group.begin[first], end = group.end[first];
  // Scores, which become weights where they lie.
  float* scores = s.folded + first * s.stride;
  staging_scores<Dtype>(k, d, begin, end, kernel.q(group.first + first), count, scores, s.stride);
  for (int r = first; r < first + count; ++r) {
    float* row = s.folded + r * s.stride;
    float poison = 0.0f;
    for (int t = begin; t < end; ++t) poison += row[t] * 0.0f;
    if (poison == 0.0f) {
      softmax(
          kernel, tile, group, r, row, [&](int i) __attribute__((always_inline)) { return load(row + i); },
          [&](int i, int, F32 weights) __attribute__((always_inline)) { store(row + i, weights); });
    } else {
      give_up(kernel, group, r, kRowIsNan);
      for (int t = 0; t < tokens; ++t) row[t] = 0.0f;
    }
  }
  staging_output<Dtype>(v, d, begin, end, scores, s.stride, group.factor + first, count, kernel.acc(group.first + first));
}

template <int Dtype>
inline void staging_group(const Kernel& kernel, int tile, const void* k, const void* v, Group& group) {
  for (int r = 0; r < group.rows;) {
    int count = 1;
    if (group.sees(r)) {
      while (r + count < group.rows && group.begin[r + count] == group.begin[r] && group.end[r + count] == group.end[r]) ++count;
      staging_rows<Dtype>(kernel, tile, k, v, group, r, count);
    }
    r += count;
  }
}

// ---- a run of tiles ----

KVARN_INLINE int group_rows(int left) {
  if (left <= kGroupRows) return left;
  return left < 2 * kGroupRows ? (left + 1) / 2 : kGroupRows;
}

inline void attend_record(const Kernel& kernel, int tile, const uint8_t* record, Prefetch& prefetch) {
  const AttendUnit& unit = kernel.unit;
  const TileMetadata metadata =
      load_tile_metadata(record, *unit.layout, kernel.k_planes.middle, kernel.v_planes.middle, kernel.scratch.metadata);
  for (int first = 0; first < unit.rows;) {
    Group group{first, group_rows(unit.rows - first), {}, {}, {}};
    first += group.rows;
    if (!find_visible(kernel, tile, group)) continue;
    if (!metadata.k_finite || !metadata.v_finite) {
      for (int r = 0; r < group.rows; ++r) {
        if (group.sees(r)) give_up(kernel, group, r, metadata.k_finite ? kOutputIsNan : kRowIsNan);
      }
    }
    if (!metadata.k_finite) continue;
    record_group(kernel, tile, record, metadata, group, dot_function(kernel.k_planes.bits, group.rows),
                 dot_function(kernel.v_planes.bits, group.rows), prefetch);
  }
}

inline void attend_staging(const Kernel& kernel, int tile, int64_t slot) {
  const AttendUnit& unit = kernel.unit;
  const void* k = unit.staging_k + slot * unit.slot_bytes;
  const void* v = unit.staging_v + slot * unit.slot_bytes;
  for (int first = 0; first < unit.rows;) {
    Group group{first, group_rows(unit.rows - first), {}, {}, {}};
    first += group.rows;
    if (!find_visible(kernel, tile, group)) continue;
    with_dtype(unit.dtype, [&]<int Dtype>() { staging_group<Dtype>(kernel, tile, k, v, group); });
  }
}

inline void attend_run(const AttendUnit& unit) {
  const Kernel kernel(unit);
  const RecordLayout& layout = *unit.layout;
  // The next record is requested while this one's codes are multiplied, so that the requests are spread over the work.
  const int blocks = (kernel.head_dim + kernel.tile_tokens) / kLanes;
  const int block_bytes = (layout.record_bytes / 256 / blocks + 1) * 256;
  for (int tile = unit.first_tile; tile < unit.end_tile; ++tile) {
    const int32_t entry = unit.table[tile];
    if (entry < 0) {
      attend_staging(kernel, tile, ~static_cast<int64_t>(entry));
      continue;
    }
    Prefetch prefetch{nullptr, nullptr, block_bytes};
    if (tile + 1 < unit.end_tile && unit.table[tile + 1] >= 0) {
      prefetch.next = unit.records + unit.table[tile + 1] * unit.block_bytes;
      prefetch.end = prefetch.next + layout.record_bytes;
    }
    attend_record(kernel, tile, unit.records + entry * unit.block_bytes, prefetch);
  }
}

// ---- rows of q and out ----

inline void attend_load_rows(const void* in, int dtype, int64_t in_stride, int rows, int head_dim, float* out) {
  with_dtype(dtype, [&]<int Dtype>() {
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < head_dim; i += kLanes) store(out + r * head_dim + i, load_values<Dtype>(in, r * in_stride + i));
    }
  });
}

inline void attend_store_rows(const float* in, int dtype, int64_t out_stride, int rows, int head_dim, void* out) {
  with_dtype(dtype, [&]<int Dtype>() {
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < head_dim; i += kLanes) store_values<Dtype>(out, r * out_stride + i, load(in + r * head_dim + i));
    }
  });
}

inline void attend_begin(float* q, int rows, int head_dim, float scale, const AttendState& state) {
  for (int r = 0; r < rows; ++r) {
    float* row = q + static_cast<int64_t>(r) * head_dim;
    float* acc = state.acc + static_cast<int64_t>(r) * head_dim;
    F32 poison = zero();
    for (int i = 0; i < head_dim; i += kLanes) {
      const F32 value = load(row + i) * broadcast(scale);
      poison = fma(value, zero(), poison);
      store(row + i, value);
      store(acc + i, zero());
    }
    const bool finite = all(less_equal(poison, zero()));
    if (!finite) {
      for (int i = 0; i < head_dim; i += kLanes) store(row + i, zero());
    }
    state.flags[r] = finite ? 0 : kRowIsNan;
    state.peak[r] = -__builtin_inff();
    state.sum[r] = 0.0f;
  }
}

constexpr AttendKernels kAttendKernels = {attend_load_rows, attend_store_rows, attend_begin, attend_run};

}  // namespace
}  // namespace kvarn::cpu
