// Number formats and scalar functions of AMD's vector and scalar units, as the ISA documents define them.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace amdsim {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
inline T load(const u8* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
inline void store(u8* to, T value) {
  memcpy(to, &value, sizeof value);
}

// ---- register bits to numbers and back ----------------------------------------------------------------------------

inline float f32(u32 bits) { return bit_cast<float>(bits); }
inline double f64(u64 bits) { return bit_cast<double>(bits); }
inline float f16(u32 bits) { return _cvtsh_ss(static_cast<u16>(bits)); }
inline float bf16(u32 bits) { return f32(bits << 16); }
inline u32 bits(float value) { return bit_cast<u32>(value); }
inline u64 bits64(double value) { return bit_cast<u64>(value); }
// In the current rounding mode.
inline u16 half(float value) { return _cvtss_sh(value, _MM_FROUND_CUR_DIRECTION); }

// One rounding from double: through a float whose last bit remembers that something was cut off (rounding to odd).
inline u16 half(double value) {
  const float near = static_cast<float>(value);
  u32 odd = bits(near);
  if (static_cast<double>(near) != value && value == value) {
    if (std::fabs(static_cast<double>(near)) > std::fabs(value)) --odd;
    odd |= 1;
  }
  return half(f32(odd));
}

inline u16 half_toward_zero(float value) {
  const u16 near = half(value);
  if (std::isnan(value)) return near;
  const float back = f16(near);
  const bool overshot = (std::isinf(back) && !std::isinf(value)) || std::fabs(back) > std::fabs(value);
  return overshot ? near - 1 : near;
}

inline u16 bfloat(float value) {
  if (std::isnan(value)) return static_cast<u16>(bits(value) >> 16 | 0x40);
  return static_cast<u16>((bits(value) + 0x7fff + (bits(value) >> 16 & 1)) >> 16);
}

// 8-bit floats with 4 exponent bits: fnuz (CDNA3: bias 8, NaN is 0x80, no infinities) or OCP e4m3fn (bias 7, NaN is 0x7f).
inline float fp8(u8 code, bool fnuz) {
  const int exponent = code >> 3 & 15, mantissa = code & 7, bias = fnuz ? 11 : 10;
  const float sign = code & 128 ? -1.f : 1.f;
  if (fnuz ? code == 128 : (code & 127) == 127) return std::numeric_limits<float>::quiet_NaN();
  return sign * (exponent ? std::ldexp(8.f + mantissa, exponent - bias) : std::ldexp(static_cast<float>(mantissa), 1 - bias));
}

// Saturating, to the nearest code, ties to the even one.
inline u8 to_fp8(float value, bool fnuz) {
  if (std::isnan(value)) return fnuz ? 128 : 127;
  const float size = std::min(std::fabs(value), fnuz ? 240.f : 448.f);
  int best = 0;
  double distance = std::numeric_limits<double>::infinity();
  for (int code = 0; code < (fnuz ? 128 : 127); ++code) {
    const double d = std::fabs(static_cast<double>(fp8(code, fnuz)) - size);
    if (d < distance || (d == distance && !(code & 1))) distance = d, best = code;
  }
  const bool negative = std::signbit(value) && !(fnuz && best == 0);
  return static_cast<u8>(best | (negative ? 128 : 0));
}

// ---- comparisons and conversions ----------------------------------------------------------------------------------

// IEEE minimumNumber and maximumNumber with -0 < +0; a NaN operand loses.
template <class T>
inline T min_num(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}

template <class T>
inline T max_num(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}

inline float median(float a, float b, float c) {
  if (std::isnan(a) || std::isnan(b) || std::isnan(c)) return min_num(min_num(a, b), c);
  return max_num(min_num(a, b), min_num(max_num(a, b), c));
}

template <class T>
inline T median(T a, T b, T c) {
  return std::max(std::min(a, b), std::min(std::max(a, b), c));
}

inline float clamp01(float value) { return std::isnan(value) || value < 0 ? 0.f : value > 1 ? 1.f : value; }

// Truncation toward zero, saturating; NaN becomes 0.
template <class Int>
inline Int to_int(double value) {
  if (std::isnan(value)) return 0;
  if (value <= static_cast<double>(std::numeric_limits<Int>::min())) return std::numeric_limits<Int>::min();
  if (value >= static_cast<double>(std::numeric_limits<Int>::max())) return std::numeric_limits<Int>::max();
  return static_cast<Int>(value);
}

inline i32 saturate(i64 value) {
  return static_cast<i32>(std::clamp<i64>(value, std::numeric_limits<i32>::min(), std::numeric_limits<i32>::max()));
}

// v_cmp_class: one bit per class of the value.
inline bool is_class(double a, u32 mask, bool subnormal) {
  if (std::isnan(a)) return mask & 3;
  const bool negative = std::signbit(a);
  if (std::isinf(a)) return mask & (negative ? 4 : 512);
  if (a == 0) return mask & (negative ? 32 : 64);
  if (subnormal) return mask & (negative ? 16 : 128);
  return mask & (negative ? 8 : 256);
}

// ---- transcendentals: rounded from double; the hardware's last bit may differ ---------------------------------------

inline float flush(float value) { return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.f, value) : value; }
inline float reciprocal(float x) { return static_cast<float>(1.0 / static_cast<double>(x)); }
inline float reciprocal_sqrt(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float exp2_flushed(float x) { return flush(static_cast<float>(std::exp2(static_cast<double>(x)))); }
inline float log2_flushed(float x) { return static_cast<float>(std::log2(static_cast<double>(flush(x)))); }
inline float sin_turns(float x) { return static_cast<float>(std::sin(6.283185307179586 * static_cast<double>(x))); }
inline float cos_turns(float x) { return static_cast<float>(std::cos(6.283185307179586 * static_cast<double>(x))); }

inline float mantissa_of(float x) {
  int exponent;
  return std::frexp(x, &exponent);
}

inline u32 exponent_of(float x) {
  int exponent = 0;
  std::frexp(x, &exponent);
  return std::isfinite(x) ? static_cast<u32>(exponent) : 0;
}

// ---- division: v_div_scale, v_div_fmas, v_div_fixup -------------------------------------------------------------------
// Where the ISA documents disagree with themselves (scaling a huge denominator up, an overflowing quotient), what makes the compiler's
// sequence round every quotient correctly.

constexpr int kHugeQuotient = 96;  // as a power of two

inline int exponent_difference(float numerator, float denominator) {
  int n, d;
  std::frexp(numerator, &n);
  std::frexp(denominator, &d);
  return n - d;
}

inline float div_scale(float source, float denominator, float numerator, bool& scaled) {
  scaled = false;
  if (numerator == 0 || denominator == 0) return std::numeric_limits<float>::quiet_NaN();
  if (!std::isfinite(denominator) || !std::isfinite(numerator)) return source;
  if (exponent_difference(numerator, denominator) >= kHugeQuotient) {
    scaled = true;
    return source == denominator ? std::ldexp(source, 64) : source;
  }
  if (std::fpclassify(denominator) == FP_SUBNORMAL) return std::ldexp(source, 64);
  const bool tiny_reciprocal = std::fpclassify(static_cast<float>(1.0 / static_cast<double>(denominator))) == FP_SUBNORMAL;
  const bool tiny_quotient = std::fpclassify(static_cast<float>(static_cast<double>(numerator) / denominator)) == FP_SUBNORMAL;
  if (tiny_reciprocal && tiny_quotient) {
    scaled = true;
    return source == denominator ? std::ldexp(source, -64) : source;
  }
  if (tiny_reciprocal) return std::ldexp(source, -64);
  if (tiny_quotient) {
    scaled = true;
    return source == numerator ? std::ldexp(source, 64) : source;
  }
  return std::fabs(numerator) < 0x1p-103f ? std::ldexp(source, 64) : source;
}

// (a * b + c) * 2^64 or 2^-64 with one rounding: the sum is rounded to odd in double first.
inline float div_fmas(float a, float b, float c, bool scaled) {
  if (!scaled) return std::fmaf(a, b, c);
  const double product = static_cast<double>(a) * b, addend = c;
  double sum = product + addend;
  const double part = sum - product, error = (product - (sum - part)) + (addend - part);
  if (error != 0 && std::isfinite(sum) && !(bits64(sum) & 1)) sum = std::nextafter(sum, std::copysign(HUGE_VAL, error));
  return static_cast<float>(std::ldexp(sum, std::fabs(c) >= 2 ? 64 : -64));
}

inline float div_fixup(float quotient, float denominator, float numerator) {
  const float sign = std::signbit(denominator) != std::signbit(numerator) ? -1.f : 1.f;
  const float infinity = std::numeric_limits<float>::infinity();
  if (std::isnan(numerator)) return numerator;
  if (std::isnan(denominator)) return denominator;
  if ((numerator == 0 && denominator == 0) || (std::isinf(numerator) && std::isinf(denominator))) {
    return std::numeric_limits<float>::quiet_NaN();
  }
  if (denominator == 0 || std::isinf(numerator)) return sign * infinity;
  if (numerator == 0 || std::isinf(denominator)) return sign * 0.f;
  // A quotient so large overflows on the way.
  if (std::isnan(quotient) && exponent_difference(numerator, denominator) >= kHugeQuotient) return sign * infinity;
  return std::copysign(quotient, sign);
}

// ---- bit operations --------------------------------------------------------------------------------------------------

// v_perm_b32: selectors 0..7 take bytes of the second and first source, 8..11 replicate a sign bit, 12 is 0x00, above it 0xff.
inline u32 permute_bytes(u32 a, u32 b, u32 selectors) {
  const u64 bytes = static_cast<u64>(a) << 32 | b;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 s = selectors >> 8 * i & 255;
    u32 byte;
    if (s < 8) {
      byte = bytes >> 8 * s & 255;
    } else if (s < 12) {
      byte = bytes >> (16 * (s - 8) + 15) & 1 ? 255 : 0;
    } else {
      byte = s == 12 ? 0 : 255;
    }
    result |= byte << 8 * i;
  }
  return result;
}

inline u32 extract(u32 a, u32 offset, u32 width) {
  offset &= 31, width &= 31;
  return width ? a >> offset & ((1u << width) - 1) : 0;
}

inline u32 extract_signed(u32 a, u32 offset, u32 width) {
  offset &= 31, width &= 31;
  if (!width) return 0;
  if (offset + width >= 32) return static_cast<u32>(static_cast<i32>(a) >> offset);
  return static_cast<u32>(static_cast<i32>(a << (32 - offset - width)) >> (32 - width));
}

inline u64 extract64(u64 a, u32 offset, u32 width) {
  offset &= 63, width &= 127;
  if (!width) return 0;
  return width >= 64 ? a >> offset : a >> offset & ((1ull << width) - 1);
}

inline u32 leading_zeros(u32 a) { return a ? __builtin_clz(a) : ~0u; }
inline u32 trailing_zeros(u32 a) { return a ? __builtin_ctz(a) : ~0u; }

inline u32 leading_signs(u32 a) {
  return a == 0 || a == ~0u ? ~0u : static_cast<u32>(__builtin_clz(a ^ static_cast<u32>(static_cast<i32>(a) >> 31)));
}

inline u32 reverse_bits(u32 a) {
  u32 result = 0;
  for (int i = 0; i < 32; ++i) result |= (a >> i & 1) << (31 - i);
  return result;
}

}  // namespace amdsim
