// One tile of staging to one record; docs/FORMAT.md, "Encoding", gives every operation and its order.
//
// Both operands are matrices of rows x columns, rows being the axis that gets scale and zero (K: channels, V: tokens). Each is kept twice,
// once with rows and once with columns in the lanes, so that every reduction runs over memory in steps and needs no sum across lanes. Per
// iteration: two reductions of 3 fma a value, from L2 (a 128 x 128 operand takes 2 x 64 KiB).
#pragma once

#include "cpu/feedback-inl.h"
#include "cpu/kernels.h"
#include "cpu/metadata-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/round-inl.h"
#include "cpu/scratch.h"
#include "cpu/sums-inl.h"
#include "kvarn/encode_constants.h"

namespace kvarn::cpu {
namespace {

struct Operand {
  int rows, columns;
  float* row_lanes;     // rows in lanes, columns as steps
  float* column_lanes;  // columns in lanes, rows as steps
};

// The vectors of VarN, [rows] or [columns].
struct Balance {
  float* scale;
  float* weight;  // 1 / scale
  float* spread;
  float* best;  // scale of the best iterate
};

// [tokens][channels] of Dtype -> channels in lanes and tokens in lanes. False when a value is beyond kLargestValue or not a number.
template <int Dtype>
inline bool load_operand(const void* values, int tokens, int channels, float* channel_lanes, float* token_lanes) {
  const F32 largest = broadcast(kLargestValue);
  bool finite = true;
  for (int t = 0; t < tokens; t += kLanes) {
    for (int d = 0; d < channels; d += kLanes) {
      F32 block[kLanes];
      Mask fits = less_equal(zero(), zero());
      for (int i = 0; i < kLanes; ++i) {
        block[i] = load_values<Dtype>(values, static_cast<int64_t>(t + i) * channels + d);
        fits = fits & less_equal(abs(block[i]), largest);
      }
      finite = finite && all(fits);
      float* const by_channel = block_at(channel_lanes, d, tokens) + t * kLanes;
      for (int i = 0; i < kLanes; ++i) store(by_channel + i * kLanes, block[i]);
      transpose(block);
      float* const by_token = block_at(token_lanes, t, channels) + d * kLanes;
      for (int i = 0; i < kLanes; ++i) store(by_token + i * kLanes, block[i]);
    }
  }
  return finite;
}

// t: a share of the root mean square of the operand; 1 where that is too small to divide by.
inline float operand_size(const Operand& m, float* row_squares) {
  for (int r = 0; r < m.rows; r += kLanes) store(row_squares + r, sum_of_squares(block_at(m.row_lanes, r, m.columns), m.columns));
  const float squares = sum16_of(row_squares, m.rows);
  const float size = __builtin_sqrtf(squares / static_cast<float>(m.rows * m.columns)) * kSizeShare;
  return size >= kSmallestSize ? size : 1.0f;
}

// scale <- clip(scale * clip(spread / scale), low, high).
inline void update_scales(const Balance& b, int n, float low, float high) {
  const F32 one = broadcast(1.0f);
  for (int i = 0; i < n; i += kLanes) {
    const F32 s = load(b.scale + i);
    const F32 change = clamp(load(b.spread + i) * load(b.weight + i), broadcast(kStdMin), broadcast(kStdMax));
    const F32 next = clamp(s * change, broadcast(low), broadcast(high));
    store(b.scale + i, next);
    store(b.weight + i, one / next);
  }
}

// Largest over smallest spread of the balanced matrix along one axis.
inline float imbalance_of(const Balance& b, int n) {
  F32 least = load(b.spread) * load(b.weight);
  F32 most = least;
  for (int i = kLanes; i < n; i += kLanes) {
    const F32 x = load(b.spread + i) * load(b.weight + i);
    least = min(least, x);
    most = max(most, x);
  }
  const float floor = kImbalanceFloor;
  const float smallest = reduce_min(least);
  return reduce_max(most) / (smallest > floor ? smallest : floor);
}

inline void fill(float* p, int n, float value) {
  for (int i = 0; i < n; i += kLanes) store(p + i, broadcast(value));
}
inline void copy(float* to, const float* from, int n) {
  for (int i = 0; i < n; i += kLanes) store(to + i, load(from + i));
}

// Leaves the chosen scales in row.best and column.best.
inline void balance_operand(const Operand& m, float size, const Balance& row, const Balance& column) {
  fill(row.scale, m.rows, size);
  fill(row.weight, m.rows, 1.0f / size);
  fill(column.scale, m.columns, 1.0f);
  fill(column.weight, m.columns, 1.0f);
  measure_spread(m.column_lanes, m.columns, m.rows, row.weight, column.spread, m.row_lanes);
  measure_spread(m.row_lanes, m.rows, m.columns, column.weight, row.spread, m.column_lanes);
  float best = imbalance_of(column, m.columns) + imbalance_of(row, m.rows);
  copy(row.best, row.scale, m.rows);
  copy(column.best, column.scale, m.columns);
  for (int iteration = 0; iteration < kVarNIterations; ++iteration) {
    update_scales(column, m.columns, kScaleMin, kScaleMax);
    measure_spread(m.row_lanes, m.rows, m.columns, column.weight, row.spread, m.column_lanes);
    update_scales(row, m.rows, size * kScaleMin, size * kScaleMax);
    measure_spread(m.column_lanes, m.columns, m.rows, row.weight, column.spread, m.row_lanes);
    const float imbalance = imbalance_of(column, m.columns) + imbalance_of(row, m.rows);
    if (imbalance <= best) {
      best = imbalance;
      copy(row.best, row.scale, m.rows);
      copy(column.best, column.scale, m.columns);
    }
  }
}

// Power of two that moves half of the tile's size from the row scales into the column scales, so that both stay inside fp16's range.
inline int shared_exponent(float size) {
  int32_t bits;
  __builtin_memcpy(&bits, &size, 4);
  return ((bits >> 23) - 127) >> 1;  // size is a normal positive number
}
inline float power_of_two(int exponent) {
  const int32_t bits = (exponent + 127) << 23;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

struct OperandRecord {
  const Plane *low, *high;
  uint8_t *low_out, *high_out;
  int row_scale, row_zero, column_scale;  // Metadata
};

template <bool kIsK>
inline void encode_operand(const EncodeTile& tile, const Operand& m, int bits, bool unbiased, const float* factor, const OperandRecord& out,
                           const EncodeScratch& s) {
  const RecordLayout& layout = *tile.layout;
  const float size = tile.normalisation == KVARN_SCALE_INVARIANT ? operand_size(m, s.row_spread) : 1.0f;
  const Balance row{s.row_scale, s.row_weight, s.row_spread, s.row_best};
  const Balance column{s.column_scale, s.column_weight, s.column_spread, s.column_best};
  balance_operand(m, size, row, column);

  for (int i = 0; i < m.columns; i += kLanes) store(column.weight + i, broadcast(1.0f) / load(column.best + i));
  // Code rows are the record's rows: one per column of the operand, codes along the operand's rows.
  const int64_t stride = code_row_stride(m.rows);
  for (int c = 0; c < m.columns && stride > m.rows; ++c)
    __builtin_memset(s.codes + c * stride + m.rows, 0, static_cast<size_t>(stride - m.rows));
  float* const row_scale = row.scale;
  float* const row_zero = row.spread;
  for (int r = 0; r < m.rows; r += kLanes) {
    const RoundedRows rows = round_rows(block_at(m.row_lanes, r, m.columns), column.weight, s.balanced, m.columns, (1 << bits) - 1,
                                        unbiased, factor != nullptr, load(row.best + r), s.codes + r, stride);
    store(row_scale + r, rows.scale);
    store(row_zero + r, rows.zero);
    store(s.row_mean + r, rows.mean);
    store(s.row_zero + r, rows.centred_zero);
  }
  if (factor != nullptr) {
    // The copy with channels in lanes has served.
    feed_back<kIsK>({layout.head_dim, layout.format.tile_tokens, factor, s.order, s.token_lanes, s.row_mean, row_scale, s.row_zero,
                     column.best, column.weight, static_cast<float>((1 << bits) - 1), s.panels, s.channel_lanes, s.codes, stride});
  }
  pack_codes(*out.low, *out.high, s.codes, stride, out.low_out, out.high_out);

  const int e = tile.normalisation == KVARN_SCALE_INVARIANT ? shared_exponent(size) : 0;
  store_metadata(tile.record, layout, out.row_scale, row_scale, power_of_two(-e));
  store_metadata(tile.record, layout, out.row_zero, row_zero, power_of_two(-e));
  store_metadata(tile.record, layout, out.column_scale, column.best, power_of_two(e));
}

inline void encode_nan(const EncodeTile& tile, const OperandRecord& out) {
  __builtin_memset(out.low_out, 0, static_cast<size_t>(out.low->bytes));
  __builtin_memset(out.high_out, 0, static_cast<size_t>(out.high->bytes));
  store_metadata_nan(tile.record, *tile.layout, out.row_scale);
  store_metadata_nan(tile.record, *tile.layout, out.row_zero);
  store_metadata_nan(tile.record, *tile.layout, out.column_scale);
}

inline void encode_tile(const EncodeTile& tile) {
  const RecordLayout& layout = *tile.layout;
  const int channels = layout.head_dim;
  const int tokens = layout.format.tile_tokens;
  const EncodeScratch s = encode_scratch(tile.scratch, channels, tokens);
  const auto load_from = [&](const void* values, const float* factor) {
    bool finite = false;
    with_dtype(tile.dtype, [&]<int Dtype>() { finite = load_operand<Dtype>(values, tokens, channels, s.channel_lanes, s.token_lanes); });
    return finite && (factor == nullptr || read_order(factor, channels, s.order));
  };

  const OperandRecord k_out{&layout.k_low, &layout.k_high, tile.record + layout.k_low_offset, tile.record + layout.k_high_offset, kKScale,
                            kKZero,        kKTokenScale};
  if (load_from(tile.k, tile.k_feedback)) {
    const Operand k{channels, tokens, s.channel_lanes, s.token_lanes};
    encode_operand<true>(tile, k, layout.format.k_bits, tile.k_unbiased, tile.k_feedback, k_out, s);
  } else {
    encode_nan(tile, k_out);
  }

  const OperandRecord v_out{&layout.v_low, &layout.v_high, tile.record + layout.v_low_offset, tile.record + layout.v_high_offset, kVScale,
                            kVZero,        kVChannelScale};
  if (load_from(tile.v, tile.v_feedback)) {
    const Operand v{tokens, channels, s.token_lanes, s.channel_lanes};
    encode_operand<false>(tile, v, layout.format.v_bits, tile.v_unbiased, tile.v_feedback, v_out, s);
  } else {
    encode_nan(tile, v_out);
  }

  const int end = layout.metadata_range_offset + (layout.format.metadata_bits == 8 ? kMetadataCount * 4 : 0);
  __builtin_memset(tile.record + end, 0, static_cast<size_t>(layout.record_bytes - end));
}

}  // namespace
}  // namespace kvarn::cpu
