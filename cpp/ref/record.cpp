// Codes and metadata of one record, and its decoding.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "ref/ref.h"

namespace kvarn::ref {
namespace {

constexpr uint16_t kNan16 = 0x7e00;

int plane_code(const uint8_t* bytes, const Plane& plane, int row, int i) {
  if (plane.bits == 0) return 0;
  uint32_t word = 0;
  const uint8_t* at = bytes + plane.word_offset(row, code_word(i, plane.bits));
  for (int b = 0; b < 4; ++b) word |= static_cast<uint32_t>(at[b]) << 8 * b;
  return static_cast<int>(word >> code_shift(i, plane.bits) & ((1u << plane.bits) - 1));
}

void set_plane_code(uint8_t* bytes, const Plane& plane, int row, int i, int code) {
  if (plane.bits == 0) return;
  const int shift = code_shift(i, plane.bits);
  uint8_t* at = bytes + plane.word_offset(row, code_word(i, plane.bits)) + shift / 8;
  *at = static_cast<uint8_t>(*at | (code & ((1 << plane.bits) - 1)) << shift % 8);
}

uint16_t load16(const uint8_t* at) { return static_cast<uint16_t>(at[0] | at[1] << 8); }
void store16(uint8_t* at, uint16_t value) {
  at[0] = static_cast<uint8_t>(value & 255);
  at[1] = static_cast<uint8_t>(value >> 8);
}

// fp16 nearest to a finite value; beyond the largest finite number: that number. -0 becomes +0.
uint16_t to_f16_saturating(float value) { return f32_to_f16(std::clamp(value, -65504.0f, 65504.0f) + 0.0f); }

uint8_t* range_of(uint8_t* record, const RecordLayout& layout, Metadata which) { return record + layout.metadata_range_offset + 4 * which; }

}  // namespace

int get_code(const uint8_t* low, const uint8_t* high, const Plane& low_plane, const Plane& high_plane, int row, int i) {
  return plane_code(low, low_plane, row, i) + (plane_code(high, high_plane, row, i) << low_plane.bits);
}

void set_code(uint8_t* low, uint8_t* high, const Plane& low_plane, const Plane& high_plane, int row, int i, int code) {
  set_plane_code(low, low_plane, row, i, code);
  set_plane_code(high, high_plane, row, i, code >> low_plane.bits);
}

int k_code(const uint8_t* record, const RecordLayout& layout, int token, int channel) {
  return get_code(record + layout.k_low_offset, record + layout.k_high_offset, layout.k_low, layout.k_high, token, channel);
}
int v_code(const uint8_t* record, const RecordLayout& layout, int token, int channel) {
  return get_code(record + layout.v_low_offset, record + layout.v_high_offset, layout.v_low, layout.v_high, channel, token);
}
void set_k_code(uint8_t* record, const RecordLayout& layout, int token, int channel, int code) {
  set_code(record + layout.k_low_offset, record + layout.k_high_offset, layout.k_low, layout.k_high, token, channel, code);
}
void set_v_code(uint8_t* record, const RecordLayout& layout, int token, int channel, int code) {
  set_code(record + layout.v_low_offset, record + layout.v_high_offset, layout.v_low, layout.v_high, channel, token, code);
}

double metadata_value(const uint8_t* record, const RecordLayout& layout, Metadata which, int i) {
  const uint8_t* at = record + layout.metadata_offset[which];
  if (layout.format.metadata_bits == 16) return f16_to_f32(load16(at + 2 * i));
  const uint8_t* range = record + layout.metadata_range_offset + 4 * which;
  const float low = f16_to_f32(load16(range));
  const float step = f16_to_f32(load16(range + 2));
  const float product = static_cast<float>(at[i]) * step;
  return low + product;
}

void set_metadata(uint8_t* record, const RecordLayout& layout, Metadata which, const float* values) {
  uint8_t* at = record + layout.metadata_offset[which];
  const int count = layout.metadata_count[which];
  if (layout.format.metadata_bits == 16) {
    for (int i = 0; i < count; ++i) store16(at + 2 * i, to_f16_saturating(values[i]));
    return;
  }
  float lo = values[0];
  float hi = values[0];
  for (int i = 1; i < count; ++i) {
    lo = std::min(lo, values[i]);
    hi = std::max(hi, values[i]);
  }
  const uint16_t low16 = to_f16_saturating(lo);
  const uint16_t step16 = to_f16_saturating((hi - lo) / 255.0f);
  uint8_t* range = range_of(record, layout, which);
  store16(range, low16);
  store16(range + 2, step16);
  const float low = f16_to_f32(low16);
  const float step = f16_to_f32(step16);
  const float inverse = 1.0f / step;
  for (int i = 0; i < count; ++i) {
    const float units = std::nearbyint((values[i] - low) * inverse);
    at[i] = step > 0 ? static_cast<uint8_t>(std::clamp(units, 0.0f, 255.0f)) : 0;
  }
}

void set_metadata_nan(uint8_t* record, const RecordLayout& layout, Metadata which) {
  uint8_t* at = record + layout.metadata_offset[which];
  const int count = layout.metadata_count[which];
  if (layout.format.metadata_bits == 16) {
    for (int i = 0; i < count; ++i) store16(at + 2 * i, kNan16);
    return;
  }
  std::memset(at, 0, static_cast<size_t>(count));
  store16(range_of(record, layout, which), kNan16);
  store16(range_of(record, layout, which) + 2, kNan16);
}

void decode_tile(const uint8_t* record, const Format& format, int head_dim, double* k, double* v) {
  const RecordLayout layout = make_layout(format, head_dim);
  const auto value = [&](Metadata which, int i) { return metadata_value(record, layout, which, i); };
  for (int t = 0; t < format.tile_tokens; ++t) {
    for (int d = 0; d < head_dim; ++d) {
      const int i = t * head_dim + d;
      if (k != nullptr) k[i] = (k_code(record, layout, t, d) * value(kKScale, d) + value(kKZero, d)) * value(kKTokenScale, t);
      if (v != nullptr) v[i] = (v_code(record, layout, t, d) * value(kVScale, t) + value(kVZero, t)) * value(kVChannelScale, d);
    }
  }
}

void decode_tile(const uint8_t* record, const Format& format, int head_dim, bool rotated, float* k, float* v) {
  const RecordLayout layout = make_layout(format, head_dim);
  const auto value = [&](Metadata which, int i) { return static_cast<float>(metadata_value(record, layout, which, i)); };
  const auto dequantise = [](int code, float scale, float zero, float other) {
    return std::fma(static_cast<float>(code), scale, zero) * other;
  };
  for (int t = 0; t < format.tile_tokens; ++t) {
    for (int d = 0; d < head_dim; ++d) {
      const int i = t * head_dim + d;
      if (k != nullptr) k[i] = dequantise(k_code(record, layout, t, d), value(kKScale, d), value(kKZero, d), value(kKTokenScale, t));
      if (v != nullptr) v[i] = dequantise(v_code(record, layout, t, d), value(kVScale, t), value(kVZero, t), value(kVChannelScale, d));
    }
    if (rotated) continue;
    if (k != nullptr) hadamard(k + t * head_dim, head_dim, true);
    if (v != nullptr) hadamard(v + t * head_dim, head_dim, true);
  }
}

}  // namespace kvarn::ref
