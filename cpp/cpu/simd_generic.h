// Portable: 4 lanes of the compiler's vector extension; exact without FMA or half-precision hardware. Included through simd.h only.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace kvarn::cpu {
namespace {

inline constexpr int kLanes = 4;

typedef float RawF32 __attribute__((vector_size(16)));
typedef int32_t RawI32 __attribute__((vector_size(16)));
typedef uint32_t RawU32 __attribute__((vector_size(16)));

struct F32 {
  RawF32 v;
};
struct I32 {
  RawI32 v;
};
struct Mask {
  RawI32 v;
};

KVARN_INLINE F32 load(const float* p) {
  F32 a;
  __builtin_memcpy(&a.v, p, sizeof(a.v));
  return a;
}
KVARN_INLINE void store(float* p, F32 a) { __builtin_memcpy(p, &a.v, sizeof(a.v)); }
KVARN_INLINE F32 broadcast(float a) { return {RawF32{a, a, a, a}}; }
KVARN_INLINE F32 zero() { return broadcast(0.0f); }
KVARN_INLINE F32 operator+(F32 a, F32 b) { return {a.v + b.v}; }
KVARN_INLINE F32 operator-(F32 a, F32 b) { return {a.v - b.v}; }
KVARN_INLINE F32 operator*(F32 a, F32 b) { return {a.v * b.v}; }
KVARN_INLINE F32 operator/(F32 a, F32 b) { return {a.v / b.v}; }
#if defined(__SSE2__) && !defined(__FMA__)
// Two lanes. In double the product is exact. The sum is rounded to odd (its last bit remembers whether anything was lost), so that rounding
// it to float rounds once.
KVARN_INLINE __m128 fma_half(__m128 a, __m128 b, __m128 c) {
  const __m128d product = _mm_mul_pd(_mm_cvtps_pd(a), _mm_cvtps_pd(b));
  const __m128d addend = _mm_cvtps_pd(c);
  const __m128d sum = _mm_add_pd(product, addend);
  const __m128d part = _mm_sub_pd(sum, product);
  const __m128d lost = _mm_add_pd(_mm_sub_pd(product, _mm_sub_pd(sum, part)), _mm_sub_pd(addend, part));
  const __m128i bits = _mm_castpd_si128(sum);
  const __m128i one = _mm_set1_epi64x(1);
  // Ordered and unequal: false where infinities or NaN leave nothing to correct.
  const __m128i inexact = _mm_castpd_si128(_mm_and_pd(_mm_cmpneq_pd(lost, _mm_setzero_pd()), _mm_cmpord_pd(lost, lost)));
  const __m128i even = _mm_sub_epi64(_mm_and_si128(bits, one), one);
  const __m128i other_sign = _mm_srli_epi64(_mm_xor_si128(_mm_castpd_si128(lost), bits), 63);
  const __m128i step = _mm_sub_epi64(one, _mm_slli_epi64(other_sign, 1));
  return _mm_cvtpd_ps(_mm_castsi128_pd(_mm_add_epi64(bits, _mm_and_si128(step, _mm_and_si128(inexact, even)))));
}
KVARN_INLINE F32 fma(F32 a, F32 b, F32 c) {
  const __m128 low = fma_half(a.v, b.v, c.v);
  const __m128 high = fma_half(_mm_movehl_ps(a.v, a.v), _mm_movehl_ps(b.v, b.v), _mm_movehl_ps(c.v, c.v));
  return {_mm_movelh_ps(low, high)};
}
#else
KVARN_INLINE F32 fma(F32 a, F32 b, F32 c) {
  return {RawF32{__builtin_fmaf(a.v[0], b.v[0], c.v[0]), __builtin_fmaf(a.v[1], b.v[1], c.v[1]), __builtin_fmaf(a.v[2], b.v[2], c.v[2]),
                 __builtin_fmaf(a.v[3], b.v[3], c.v[3])}};
}
#endif
KVARN_INLINE F32 fms(F32 a, F32 b, F32 c) { return fma(a, b, F32{-c.v}); }
KVARN_INLINE F32 min(F32 a, F32 b) { return {a.v < b.v ? a.v : b.v}; }
KVARN_INLINE F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }
KVARN_INLINE F32 sqrt(F32 a) {
  return {RawF32{__builtin_sqrtf(a.v[0]), __builtin_sqrtf(a.v[1]), __builtin_sqrtf(a.v[2]), __builtin_sqrtf(a.v[3])}};
}
KVARN_INLINE I32 as_i32(F32 a) { return {reinterpret_cast<RawI32>(a.v)}; }
KVARN_INLINE F32 as_f32(I32 a) { return {reinterpret_cast<RawF32>(a.v)}; }
KVARN_INLINE F32 abs(F32 a) { return {reinterpret_cast<RawF32>(as_i32(a).v & 0x7fffffff)}; }
// Adding and subtracting 2^23 leaves no fraction bits; larger values are integers already.
KVARN_INLINE F32 round_even(F32 a) {
  const RawF32 size = abs(a).v;
  const RawF32 rounded = (size + 0x1p23f) - 0x1p23f;
  const RawI32 sign = as_i32(a).v & static_cast<int32_t>(0x80000000u);
  const RawF32 with_sign = reinterpret_cast<RawF32>(reinterpret_cast<RawI32>(rounded) | sign);
  return {size < 0x1p23f ? with_sign : a.v};
}

KVARN_INLINE Mask less(F32 a, F32 b) { return {a.v < b.v}; }
KVARN_INLINE Mask less_equal(F32 a, F32 b) { return {a.v <= b.v}; }
KVARN_INLINE Mask operator&(Mask a, Mask b) { return {a.v & b.v}; }
KVARN_INLINE F32 select(Mask m, F32 yes, F32 no) { return {m.v ? yes.v : no.v}; }
KVARN_INLINE bool any(Mask m) { return (m.v[0] | m.v[1] | m.v[2] | m.v[3]) != 0; }
KVARN_INLINE bool all(Mask m) { return (m.v[0] & m.v[1] & m.v[2] & m.v[3]) != 0; }

KVARN_INLINE I32 load(const int32_t* p) {
  I32 a;
  __builtin_memcpy(&a.v, p, sizeof(a.v));
  return a;
}
KVARN_INLINE void store(int32_t* p, I32 a) { __builtin_memcpy(p, &a.v, sizeof(a.v)); }
KVARN_INLINE I32 broadcast(int32_t a) { return {RawI32{a, a, a, a}}; }
KVARN_INLINE I32 zero_i32() { return broadcast(int32_t{0}); }
KVARN_INLINE I32 from_u32(RawU32 a) { return {reinterpret_cast<RawI32>(a)}; }
KVARN_INLINE RawU32 to_u32(I32 a) { return reinterpret_cast<RawU32>(a.v); }
KVARN_INLINE I32 operator+(I32 a, I32 b) { return from_u32(to_u32(a) + to_u32(b)); }
KVARN_INLINE I32 operator-(I32 a, I32 b) { return from_u32(to_u32(a) - to_u32(b)); }
KVARN_INLINE I32 operator&(I32 a, I32 b) { return {a.v & b.v}; }
KVARN_INLINE I32 operator|(I32 a, I32 b) { return {a.v | b.v}; }
KVARN_INLINE I32 operator^(I32 a, I32 b) { return {a.v ^ b.v}; }
KVARN_INLINE I32 operator<<(I32 a, int n) { return from_u32(to_u32(a) << static_cast<uint32_t>(n)); }
KVARN_INLINE I32 operator>>(I32 a, int n) { return from_u32(to_u32(a) >> static_cast<uint32_t>(n)); }  // logical
KVARN_INLINE F32 to_f32(I32 a) { return {__builtin_convertvector(a.v, RawF32)}; }
KVARN_INLINE I32 to_i32(F32 a) { return {__builtin_convertvector(round_even(a).v, RawI32)}; }  // nearest even

KVARN_INLINE I32 load_u8(const uint8_t* p) { return {RawI32{p[0], p[1], p[2], p[3]}}; }
// The low byte of every lane; lanes hold 0..255.
KVARN_INLINE void store_u8(uint8_t* p, I32 a) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(a.v[i]);
}
// The low 16 bits of every lane; lanes hold 0..65535.
KVARN_INLINE void store_u16(uint16_t* p, I32 a) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint16_t>(a.v[i]);
}
KVARN_INLINE I32 load_u16(const uint16_t* p) { return {RawI32{p[0], p[1], p[2], p[3]}}; }

// Half to float: shift the fields into place; the multiplication by 2^112 rebases the exponent and is exact for subnormals too.
KVARN_INLINE F32 load_f16(const uint16_t* p) {
  const I32 h = load_u16(p);
  const I32 size = h & broadcast(int32_t{0x7fff});
  const I32 scaled = as_i32(as_f32(size << 13) * broadcast(0x1p112f));
  const RawI32 special = size.v >= 0x7c00;  // inf and NaN keep their fraction
  const RawI32 magnitude = special ? ((size << 13) | broadcast(int32_t{0x7f800000})).v : scaled.v;
  return {reinterpret_cast<RawF32>(magnitude | ((h & broadcast(int32_t{0x8000})) << 16).v)};
}
KVARN_INLINE void store_f16(uint16_t* p, F32 a) {
  const RawI32 sign = as_i32(a).v >> 16 & 0x8000;
  const RawI32 x = as_i32(abs(a)).v;
  const RawI32 nan = (x >> 13 & 0x3ff) | 0x7e00;  // made quiet
  const RawI32 normal = (x + (0xfff - (112 << 23)) + (x >> 13 & 1)) >> 13;
  // An addition rounds to a multiple of 2^-24.
  const RawI32 subnormal = reinterpret_cast<RawI32>(abs(a).v + 0.5f) - 0x3f000000;
  RawI32 half = x < 0x38800000 ? subnormal : normal;
  half = x >= 0x477ff000 ? RawI32{} + 0x7c00 : half;  // would round to 65536 or more
  half = x > 0x7f800000 ? nan : half;
  store_u16(p, I32{half | sign});
}
KVARN_INLINE F32 load_bf16(const uint16_t* p) { return as_f32(load_u16(p) << 16); }

// Sums and extremes over the lanes; the sum adds lane l and l + h for h = 2, 1.
KVARN_INLINE float reduce_add(F32 a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
KVARN_INLINE float larger(float a, float b) { return a > b ? a : b; }
KVARN_INLINE float smaller(float a, float b) { return a < b ? a : b; }
KVARN_INLINE float reduce_max(F32 a) { return larger(larger(a.v[0], a.v[2]), larger(a.v[1], a.v[3])); }
KVARN_INLINE float reduce_min(F32 a) { return smaller(smaller(a.v[0], a.v[2]), smaller(a.v[1], a.v[3])); }

// Butterfly of lanes `Stride` apart: (p, q) -> (p + q, p - q).
template <int Stride>
KVARN_INLINE F32 butterfly(F32 a) {
  const RawF32 v = a.v;
  if constexpr (Stride == 1) return {RawF32{v[0] + v[1], v[0] - v[1], v[2] + v[3], v[2] - v[3]}};
  static_assert(Stride == 1 || Stride == 2);
  return {RawF32{v[0] + v[2], v[1] + v[3], v[0] - v[2], v[1] - v[3]}};
}

// rows[i][j] -> rows[j][i].
KVARN_INLINE void transpose(F32 (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float t = rows[i].v[j];
      rows[i].v[j] = rows[j].v[i];
      rows[j].v[i] = t;
    }
  }
}

}  // namespace
}  // namespace kvarn::cpu
