// One tile to one record: VarN, rounding to nearest, metadata. docs/FORMAT.md, "Encoding", numbers the steps as this file does.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kvarn/encode_constants.h"
#include "ref/ref.h"

namespace kvarn::ref {
namespace {

// The constants as fp32 defines them, or to the precision of the mathematics.
template <class Real>
struct Constants;
template <>
struct Constants<float> {
  static constexpr float kScaleLow = kScaleMin, kScaleHigh = kScaleMax, kStdLow = kStdMin, kStdHigh = kStdMax;
  static constexpr float kFloorOfImbalance = kImbalanceFloor, kFloorOfRange = kRangeFloor;
};
template <>
struct Constants<double> {
  static constexpr double kScaleLow = 0.74081822068171786607, kScaleHigh = 22026.465794806716517, kStdLow = 1e-3, kStdHigh = 1e3;
  static constexpr double kFloorOfImbalance = 1e-8, kFloorOfRange = 1e-10;
};

// Sixteen partial sums, then halves added to halves: the order every backend can reproduce at full width.
// step(p, i) is the partial sum p with term i added.
template <class Real, class Step>
Real sum16(int n, Step step) {
  Real p[16] = {};
  for (int i = 0; i < n; ++i) p[i % 16] = step(p[i % 16], i);
  for (int h = 8; h >= 1; h /= 2) {
    for (int l = 0; l < h; ++l) p[l] = p[l] + p[l + h];
  }
  return p[0];
}

template <class Real>
Real clip(Real x, Real low, Real high) {
  return std::min(std::max(x, low), high);
}

// Standard deviation (divided by n - 1) of at(i) * weight(i).
template <class Real, class At, class Weight>
Real spread(int n, At at, Weight weight) {
  const Real mean = sum16<Real>(n, [&](Real p, int i) { return std::fma(at(i), weight(i), p); }) / static_cast<Real>(n);
  const Real squares = sum16<Real>(n, [&](Real p, int i) {
    const Real t = std::fma(at(i), weight(i), -mean);
    return std::fma(t, t, p);
  });
  return std::sqrt(squares / static_cast<Real>(n - 1));
}

// The matrix of one operand with its scales; step 2.
template <class Real>
struct Balance {
  const Real* m;
  int rows, columns;
  std::vector<Real> column_scale, row_scale;    // S_c, S_r
  std::vector<Real> column_weight, row_weight;  // their reciprocals
  std::vector<Real> column_spread, row_spread;  // col_raw, row_raw

  Real at(int r, int c) const { return m[r * columns + c]; }
  void measure_columns() {
    for (int c = 0; c < columns; ++c) {
      column_spread[c] = spread<Real>(rows, [&](int r) { return at(r, c); }, [&](int r) { return row_weight[r]; });
    }
  }
  void measure_rows() {
    for (int r = 0; r < rows; ++r) {
      row_spread[r] = spread<Real>(columns, [&](int c) { return at(r, c); }, [&](int c) { return column_weight[c]; });
    }
  }
  static Real ratio(const std::vector<Real>& spreads, const std::vector<Real>& weights) {
    Real least = spreads[0] * weights[0];
    Real most = least;
    for (size_t i = 1; i < spreads.size(); ++i) {
      least = std::min(least, spreads[i] * weights[i]);
      most = std::max(most, spreads[i] * weights[i]);
    }
    return most / std::max(least, Constants<Real>::kFloorOfImbalance);
  }
  Real imbalance() const { return ratio(column_spread, column_weight) + ratio(row_spread, row_weight); }
};

template <class Real>
void update_scales(const std::vector<Real>& spreads, Real low, Real high, std::vector<Real>& scales, std::vector<Real>& weights) {
  using C = Constants<Real>;
  for (size_t i = 0; i < scales.size(); ++i) {
    scales[i] = clip(scales[i] * clip(spreads[i] * weights[i], C::kStdLow, C::kStdHigh), low, high);
    weights[i] = Real{1} / scales[i];
  }
}

template <class Real>
struct Rounding {  // of one row
  Real scale, zero;
  std::vector<uint8_t> codes;
  Real mean = 0, centred_zero = zero;  // what feedback needs: zero = mean + centred_zero
};

// What the fits need to know about the codes of a row.
template <class Real>
struct CodeSums {
  Real c1, c2, cx;  // sum of codes, of their squares, of code * x
};

template <class Real>
Real code_of(Real x, Real zero, Real inverse, int levels) {
  return clip(std::nearbyint((x - zero) * inverse), Real{0}, static_cast<Real>(levels));
}

template <class Real>
void round_row(const std::vector<Real>& x, Real scale, Real zero, int levels, std::vector<uint8_t>& codes) {
  const Real inverse = Real{1} / scale;
  for (size_t i = 0; i < x.size(); ++i) codes[i] = static_cast<uint8_t>(code_of(x[i], zero, inverse, levels));
}

template <class Real>
CodeSums<Real> sums_of(const std::vector<Real>& x, const std::vector<uint8_t>& codes) {
  int c1 = 0, c2 = 0;  // at most 512 * 255^2: exact
  for (const int c : codes) {
    c1 += c;
    c2 += c * c;
  }
  const Real cx = sum16<Real>(static_cast<int>(x.size()), [&](Real p, int i) { return std::fma(static_cast<Real>(codes[i]), x[i], p); });
  return {static_cast<Real>(c1), static_cast<Real>(c2), cx};
}

// Least squares from a clipped grid; then the scale is stretched so that the error does not correlate with the value. `fed`: widened for
// feedback.
template <class Real>
Rounding<Real> round_unbiased(const std::vector<Real>& u, Real lo, Real hi, Real grid, int levels, bool fed) {
  const int count = static_cast<int>(u.size());
  const Real n = static_cast<Real>(count);
  const Real mean = sum16<Real>(count, [&](Real p, int i) { return p + u[i]; }) / n;
  std::vector<Real> x(u.size());
  for (int i = 0; i < count; ++i) x[i] = u[i] - mean;
  const Real sxx = sum16<Real>(count, [&](Real p, int i) { return std::fma(x[i], x[i], p); });
  const Real middle = (lo + hi) * Real{0.5} - mean;

  Rounding<Real> row{static_cast<Real>(unbiased_clip(levels)) * grid, 0, std::vector<uint8_t>(u.size())};
  row.zero = middle - row.scale * (static_cast<Real>(levels) * Real{0.5});
  for (int refit = 0; refit < kUnbiasedRefits; ++refit) {
    round_row(x, row.scale, row.zero, levels, row.codes);
    const auto [c1, c2, cx] = sums_of(x, row.codes);
    const Real n_c2 = n * c2;
    const Real c1_c1 = c1 * c1;
    const Real variance = n_c2 - c1_c1;
    if (variance > 0 && cx > 0) {
      row.scale = cx * n / variance;
      row.zero = -(row.scale * c1 / n);
    }
  }
  round_row(x, row.scale, row.zero, levels, row.codes);
  const auto [c1, c2, cx] = sums_of(x, row.codes);
  row.mean = mean;
  row.centred_zero = row.zero;
  if (cx > 0) {
    row.scale = sxx / cx;
    row.centred_zero = -(row.scale * c1 / n);
  }
  if (fed) {
    row.centred_zero = row.centred_zero - row.scale * static_cast<Real>(feedback_low_shift(levels));
    row.scale = row.scale * static_cast<Real>(feedback_widening(levels));
  }
  row.zero = row.mean + row.centred_zero;
  return row;
}

// The channel that each step of feedback takes, which is what the factor's diagonal says; empty unless every channel has its step.
std::vector<int> channel_order(const float* factor, int channels) {
  std::vector<int> order;
  std::vector<bool> taken(channels, false);
  for (int k = 0; k < channels; ++k) {
    const float channel = factor[k * channels + k];
    if (!(channel >= 0 && channel < static_cast<float>(channels) && channel == std::floor(channel))) return {};
    order.push_back(static_cast<int>(channel));
    if (taken[order.back()]) return {};
    taken[order.back()] = true;
  }
  return order;
}

// Codes of u again, channel by channel: each channel's error is spread over the token's channels still to come.
// row(r), column_scale and column_weight are those of step 3.
template <class Real>
void feed_back(const std::vector<Real>& u, const std::vector<Rounding<Real>>& row, const std::vector<Real>& column_scale,
               const std::vector<Real>& column_weight, int levels, const Feedback& feedback, std::vector<uint8_t>& codes) {
  const int rows = static_cast<int>(row.size());
  const int columns = static_cast<int>(column_scale.size());
  const bool by_rows = feedback.channels == Axis::kRows;
  const int channels = by_rows ? rows : columns;
  const int tokens = by_rows ? columns : rows;
  const std::vector<int> order = channel_order(feedback.factor, channels);
  for (int t = 0; t < tokens; ++t) {
    std::vector<Real> x(channels);
    const auto at = [&](int d) { return by_rows ? d * columns + t : t * columns + d; };
    const auto row_of = [&](int d) -> const Rounding<Real>& { return row[by_rows ? d : t]; };
    for (int d = 0; d < channels; ++d) x[d] = u[at(d)] - row_of(d).mean;
    for (int k = 0; k < channels; ++k) {
      const int d = order[k];
      const Rounding<Real>& grid = row_of(d);
      const Real code = code_of(x[d], grid.centred_zero, Real{1} / grid.scale, levels);
      codes[at(d)] = static_cast<uint8_t>(code);
      Real error = std::fma(code, grid.scale, grid.centred_zero) - x[d];
      if (!by_rows) error = error * column_scale[d];
      for (int l = k + 1; l < channels; ++l) {
        Real share = static_cast<Real>(feedback.factor[k * channels + l]);
        if (!by_rows) share = share * column_weight[order[l]];
        x[order[l]] = std::fma(share, error, x[order[l]]);
      }
    }
  }
}

template <class Real>
void store_operand(const EncodedOperand<Real>& operand, const RecordLayout& layout, bool is_k, int normalisation, uint8_t* record) {
  const Metadata row_scale = is_k ? kKScale : kVScale;
  const Metadata row_zero = is_k ? kKZero : kVZero;
  const Metadata column_scale = is_k ? kKTokenScale : kVChannelScale;
  const int rows = static_cast<int>(operand.row_scale.size());
  const int columns = static_cast<int>(operand.column_scale.size());
  if (!operand.finite) {
    for (const Metadata which : {row_scale, row_zero, column_scale}) set_metadata_nan(record, layout, which);
    return;  // codes stay 0
  }
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      const int code = operand.codes[r * columns + c];
      if (is_k) {
        set_k_code(record, layout, c, r, code);
      } else {
        set_v_code(record, layout, r, c, code);
      }
    }
  }
  // Step 4: the tile's size is shared between the row and the column scales, so that both stay inside fp16's range.
  const int e = normalisation == KVARN_PUBLISHED ? 0 : std::ilogb(operand.size) >> 1;
  const auto store = [&](Metadata which, const std::vector<Real>& values, int exponent) {
    std::vector<float> scaled(values.size());
    for (size_t i = 0; i < values.size(); ++i) scaled[i] = static_cast<float>(std::ldexp(values[i], exponent)) + 0.0f;
    set_metadata(record, layout, which, scaled.data());
  };
  store(row_scale, operand.row_scale, -e);
  store(row_zero, operand.row_zero, -e);
  store(column_scale, operand.column_scale, e);
}

template <class Real>
void encode_tile_as(const Real* k, const Real* v, const Format& format, int head_dim, const EncodeOptions& options, uint8_t* record) {
  const RecordLayout layout = make_layout(format, head_dim);
  const int g = format.tile_tokens;
  std::memset(record, 0, static_cast<size_t>(layout.record_bytes));
  std::vector<Real> k_rows(static_cast<size_t>(g) * head_dim);  // channels as rows
  for (int t = 0; t < g; ++t) {
    for (int d = 0; d < head_dim; ++d) k_rows[d * g + t] = k[t * head_dim + d];
  }
  const auto encode = [&](const Real* m, int rows, int columns, int bits, const Feedback& feedback) {
    return encode_operand(m, rows, columns, bits, options, BestSoFar::kKeep, feedback);
  };
  store_operand(encode(k_rows.data(), head_dim, g, format.k_bits, {options.k_feedback, Axis::kRows}), layout, true, options.normalisation,
                record);
  store_operand(encode(v, g, head_dim, format.v_bits, {options.v_feedback, Axis::kColumns}), layout, false, options.normalisation, record);
}

}  // namespace

template <class Real>
EncodedOperand<Real> encode_operand(const Real* m, int rows, int columns, int bits, const EncodeOptions& options, BestSoFar best_so_far,
                                    const Feedback& feedback) {
  using C = Constants<Real>;
  EncodedOperand<Real> out;
  out.codes.assign(static_cast<size_t>(rows) * columns, 0);
  out.row_scale.assign(rows, 0);
  out.row_zero.assign(rows, 0);
  out.column_scale.assign(columns, 0);

  // Step 0: what no finite scale can hold, and factors that do not say what to do.
  if (feedback.factor != nullptr && channel_order(feedback.factor, feedback.channels == Axis::kRows ? rows : columns).empty()) {
    out.finite = false;
    return out;
  }
  for (int i = 0; i < rows * columns; ++i) {
    if (!(std::fabs(m[i]) <= static_cast<Real>(kLargestValue))) {
      out.finite = false;
      return out;
    }
  }

  // Step 1: the tile's size t.
  if (options.normalisation == KVARN_SCALE_INVARIANT) {
    std::vector<Real> row_squares(rows);
    for (int r = 0; r < rows; ++r) {
      row_squares[r] = sum16<Real>(columns, [&](Real p, int c) { return std::fma(m[r * columns + c], m[r * columns + c], p); });
    }
    const Real squares = sum16<Real>(rows, [&](Real p, int r) { return p + row_squares[r]; });
    const Real size = std::sqrt(squares / static_cast<Real>(rows * columns)) * static_cast<Real>(kSizeShare);
    if (size >= static_cast<Real>(kSmallestSize)) out.size = size;
  }
  const Real t = out.size;

  // Step 2: VarN. The best scales so far are kept, because the last iterate may be worse than an earlier one.
  Balance<Real> b{m, rows, columns, {}, {}, {}, {}, {}, {}};
  b.column_scale.assign(columns, 1);
  b.column_weight.assign(columns, 1);
  b.row_scale.assign(rows, t);
  b.row_weight.assign(rows, Real{1} / t);
  b.column_spread.assign(columns, 0);
  b.row_spread.assign(rows, 0);
  b.measure_columns();
  b.measure_rows();
  Real best = b.imbalance();
  out.first_imbalance = best;
  std::vector<Real> column_scale = b.column_scale;
  std::vector<Real> row_scale = b.row_scale;
  for (int iteration = 0; iteration < kVarNIterations; ++iteration) {
    update_scales(b.column_spread, C::kScaleLow, C::kScaleHigh, b.column_scale, b.column_weight);
    b.measure_rows();
    update_scales(b.row_spread, t * C::kScaleLow, t * C::kScaleHigh, b.row_scale, b.row_weight);
    b.measure_columns();
    out.last_imbalance = b.imbalance();
    if (out.last_imbalance <= best || best_so_far == BestSoFar::kTakeLast) {
      best = out.last_imbalance;
      column_scale = b.column_scale;
      row_scale = b.row_scale;
    }
  }
  out.best_imbalance = best;
  out.column_scale = column_scale;

  // Step 3: rounding, row by row.
  const int levels = (1 << bits) - 1;
  const bool unbiased = options.rounding == KVARN_UNBIASED || (options.rounding == KVARN_ROUNDING_AUTO && bits <= 3);
  std::vector<Real> weight(columns);
  for (int c = 0; c < columns; ++c) weight[c] = Real{1} / column_scale[c];
  std::vector<Real> balanced(static_cast<size_t>(rows) * columns);
  std::vector<Rounding<Real>> rounded;
  for (int r = 0; r < rows; ++r) {
    std::vector<Real> u(columns);
    for (int c = 0; c < columns; ++c) u[c] = m[r * columns + c] * weight[c];
    std::copy(u.begin(), u.end(), balanced.begin() + static_cast<ptrdiff_t>(r) * columns);
    const Real lo = *std::min_element(u.begin(), u.end());
    const Real hi = *std::max_element(u.begin(), u.end());
    const Real floor = C::kFloorOfRange * row_scale[r];
    Rounding<Real> row{std::max((hi - lo) / static_cast<Real>(levels), floor), lo, std::vector<uint8_t>(u.size())};
    if (unbiased && row.scale > floor) {
      row = round_unbiased(u, lo, hi, row.scale, levels, feedback.factor != nullptr);
    } else {
      round_row(u, row.scale, row.zero, levels, row.codes);
    }
    std::copy(row.codes.begin(), row.codes.end(), out.codes.begin() + static_cast<ptrdiff_t>(r) * columns);
    out.row_scale[r] = row.scale;
    out.row_zero[r] = row.zero;
    rounded.push_back(std::move(row));
  }
  if (feedback.factor != nullptr) feed_back(balanced, rounded, column_scale, weight, levels, feedback, out.codes);
  return out;
}

template EncodedOperand<float> encode_operand(const float*, int, int, int, const EncodeOptions&, BestSoFar, const Feedback&);
template EncodedOperand<double> encode_operand(const double*, int, int, int, const EncodeOptions&, BestSoFar, const Feedback&);

void encode_tile(const float* k, const float* v, const Format& format, int head_dim, const EncodeOptions& options, uint8_t* record) {
  encode_tile_as(k, v, format, head_dim, options, record);
}

void encode_tile_exact(const double* k, const double* v, const Format& format, int head_dim, const EncodeOptions& options,
                       uint8_t* record) {
  encode_tile_as(k, v, format, head_dim, options, record);
}

}  // namespace kvarn::ref
