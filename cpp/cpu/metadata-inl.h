// Metadata vectors of a record: fp16, or bytes with an fp16 (low, step) pair. docs/FORMAT.md, "Metadata".
#pragma once

#include "cpu/simd.h"

namespace kvarn::cpu {
namespace {

constexpr uint16_t kNan16 = 0x7e00;
constexpr float kLargestF16 = 65504.0f;

// Nearest fp16, saturating; -0 becomes +0.
KVARN_INLINE F32 to_f16_range(F32 x) { return clamp(x, broadcast(-kLargestF16), broadcast(kLargestF16)) + zero(); }

KVARN_INLINE uint16_t f16_of(float x) {
  uint16_t halves[kLanes];
  store_f16(halves, to_f16_range(broadcast(x)));
  return halves[0];
}
KVARN_INLINE float value_of_f16(uint16_t half) {
  uint16_t halves[kLanes];
  for (int i = 0; i < kLanes; ++i) halves[i] = half;
  float values[kLanes];
  store(values, load_f16(halves));
  return values[0];
}

KVARN_INLINE void store_range(uint8_t* record, const RecordLayout& layout, int which, uint16_t low, uint16_t step) {
  const uint16_t range[2] = {low, step};
  __builtin_memcpy(record + layout.metadata_range_offset + which * 4, range, sizeof(range));
}

// values * factor (a power of two) -> vector `which`.
inline void store_metadata(uint8_t* record, const RecordLayout& layout, int which, const float* values, float factor) {
  uint8_t* to = record + layout.metadata_offset[which];
  const int count = layout.metadata_count[which];
  const F32 f = broadcast(factor);
  if (layout.format.metadata_bits == 16) {
    for (int i = 0; i < count; i += kLanes) {
      uint16_t halves[kLanes];
      store_f16(halves, to_f16_range(load(values + i) * f));
      __builtin_memcpy(to + 2 * i, halves, sizeof(halves));
    }
    return;
  }
  F32 lo = load(values) * f + zero();
  F32 hi = lo;
  for (int i = kLanes; i < count; i += kLanes) {
    const F32 y = load(values + i) * f + zero();
    lo = min(lo, y);
    hi = max(hi, y);
  }
  const float least = reduce_min(lo);
  const float range = reduce_max(hi) - least;
  const uint16_t low16 = f16_of(least);
  const uint16_t step16 = f16_of(range / 255.0f);
  const float step = value_of_f16(step16);
  const F32 low = broadcast(value_of_f16(low16));
  const F32 inverse = broadcast(1.0f / step);
  for (int i = 0; i < count; i += kLanes) {
    const F32 y = load(values + i) * f + zero();
    const F32 units = clamp(round_even((y - low) * inverse), zero(), broadcast(255.0f));
    store_u8(to + i, step > 0 ? to_i32(units) : zero_i32());
  }
  store_range(record, layout, which, low16, step16);
}

inline void store_metadata_nan(uint8_t* record, const RecordLayout& layout, int which) {
  uint8_t* to = record + layout.metadata_offset[which];
  const int count = layout.metadata_count[which];
  if (layout.format.metadata_bits == 16) {
    for (int i = 0; i < count; ++i) __builtin_memcpy(to + 2 * i, &kNan16, 2);
    return;
  }
  __builtin_memset(to, 0, static_cast<size_t>(count));
  store_range(record, layout, which, kNan16, kNan16);
}

inline void load_metadata(const uint8_t* record, const RecordLayout& layout, int which, float* values) {
  const uint8_t* from = record + layout.metadata_offset[which];
  const int count = layout.metadata_count[which];
  if (layout.format.metadata_bits == 16) {
    for (int i = 0; i < count; i += kLanes) {
      uint16_t halves[kLanes];
      __builtin_memcpy(halves, from + 2 * i, sizeof(halves));
      store(values + i, load_f16(halves));
    }
    return;
  }
  uint16_t range[2];
  __builtin_memcpy(range, record + layout.metadata_range_offset + which * 4, sizeof(range));
  const F32 low = broadcast(value_of_f16(range[0]));
  const F32 step = broadcast(value_of_f16(range[1]));
  for (int i = 0; i < count; i += kLanes) store(values + i, low + to_f32(load_u8(from + i)) * step);
}

}  // namespace
}  // namespace kvarn::cpu
