// Conversions between fp32 and the 16-bit types.
#include <bit>
#include <cmath>
#include <cstring>

#include "ref/ref.h"

namespace kvarn::ref {

float f16_to_f32(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = mantissa == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  }
  return std::copysign(magnitude, bits & 0x8000 ? -1.0f : 1.0f);
}

uint16_t f32_to_f16(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return sign | 0x7e00;
  const float magnitude = std::fabs(value);
  if (std::isinf(magnitude)) return sign | 0x7c00;
  if (magnitude == 0) return sign;
  // The spacing of fp16 numbers around the value: 2^-24 below the smallest normal number, else 2^(exponent - 10).
  const int spacing = std::max(std::ilogb(magnitude) - 10, -24);
  // Exact: the value has at most 24 significant bits. nearbyint rounds half to even in the default mode.
  const float units = std::nearbyint(std::ldexp(magnitude, -spacing));
  const float rounded = std::ldexp(units, spacing);
  if (rounded > 65504.0f) return sign | 0x7c00;
  if (rounded < 0x1p-14f) return static_cast<uint16_t>(sign | static_cast<int>(std::ldexp(rounded, 24)));
  const int exponent = std::ilogb(rounded);
  const int mantissa = static_cast<int>(std::ldexp(rounded, 10 - exponent)) - 1024;
  return static_cast<uint16_t>(sign | (exponent + 15) << 10 | mantissa);
}

float bf16_to_f32(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

uint16_t f32_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  const uint32_t odd = bits >> 16 & 1;  // halves go to the even neighbour
  return static_cast<uint16_t>((bits + 0x7fff + odd) >> 16);
}

int dtype_bytes(int dtype) { return dtype == KVARN_F32 ? 4 : 2; }

void load_values(const void* source, int dtype, int64_t values, float* out) {
  const auto* bytes = static_cast<const uint8_t*>(source);
  for (int64_t i = 0; i < values; ++i) {
    if (dtype == KVARN_F32) {
      std::memcpy(&out[i], bytes + 4 * i, 4);
      continue;
    }
    uint16_t half;
    std::memcpy(&half, bytes + 2 * i, 2);
    out[i] = dtype == KVARN_F16 ? f16_to_f32(half) : bf16_to_f32(half);
  }
}

void store_values(const float* values, int dtype, int64_t count, void* out) {
  auto* bytes = static_cast<uint8_t*>(out);
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == KVARN_F32) {
      std::memcpy(bytes + 4 * i, &values[i], 4);
      continue;
    }
    const uint16_t half = dtype == KVARN_F16 ? f32_to_f16(values[i]) : f32_to_bf16(values[i]);
    std::memcpy(bytes + 2 * i, &half, 2);
  }
}

}  // namespace kvarn::ref
