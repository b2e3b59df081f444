// AVX2 + FMA + F16C: 8 lanes. Included through simd.h only.
#pragma once

#include <immintrin.h>

namespace kvarn::cpu {
namespace {

inline constexpr int kLanes = 8;

struct F32 {
  __m256 v;
};
struct I32 {
  __m256i v;
};
struct Mask {
  __m256 v;
};

KVARN_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
KVARN_INLINE void store(float* p, F32 a) { _mm256_storeu_ps(p, a.v); }
KVARN_INLINE F32 broadcast(float a) { return {_mm256_set1_ps(a)}; }
KVARN_INLINE F32 zero() { return {_mm256_setzero_ps()}; }
KVARN_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
KVARN_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
KVARN_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
KVARN_INLINE F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
KVARN_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
KVARN_INLINE F32 fms(F32 a, F32 b, F32 c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
KVARN_INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
KVARN_INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
KVARN_INLINE F32 sqrt(F32 a) { return {_mm256_sqrt_ps(a.v)}; }
KVARN_INLINE F32 round_even(F32 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
KVARN_INLINE F32 abs(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }

KVARN_INLINE Mask less(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
KVARN_INLINE Mask less_equal(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
KVARN_INLINE Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.v, b.v)}; }
KVARN_INLINE F32 select(Mask m, F32 yes, F32 no) { return {_mm256_blendv_ps(no.v, yes.v, m.v)}; }
KVARN_INLINE bool any(Mask m) { return _mm256_movemask_ps(m.v) != 0; }
KVARN_INLINE bool all(Mask m) { return _mm256_movemask_ps(m.v) == 0xff; }

KVARN_INLINE I32 load(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
KVARN_INLINE void store(int32_t* p, I32 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
KVARN_INLINE I32 broadcast(int32_t a) { return {_mm256_set1_epi32(a)}; }
KVARN_INLINE I32 zero_i32() { return {_mm256_setzero_si256()}; }
KVARN_INLINE I32 operator+(I32 a, I32 b) { return {_mm256_add_epi32(a.v, b.v)}; }
KVARN_INLINE I32 operator-(I32 a, I32 b) { return {_mm256_sub_epi32(a.v, b.v)}; }
KVARN_INLINE I32 operator&(I32 a, I32 b) { return {_mm256_and_si256(a.v, b.v)}; }
KVARN_INLINE I32 operator|(I32 a, I32 b) { return {_mm256_or_si256(a.v, b.v)}; }
KVARN_INLINE I32 operator^(I32 a, I32 b) { return {_mm256_xor_si256(a.v, b.v)}; }
KVARN_INLINE I32 operator<<(I32 a, int n) { return {_mm256_slli_epi32(a.v, n)}; }
KVARN_INLINE I32 operator>>(I32 a, int n) { return {_mm256_srli_epi32(a.v, n)}; }  // logical
KVARN_INLINE F32 to_f32(I32 a) { return {_mm256_cvtepi32_ps(a.v)}; }
KVARN_INLINE I32 to_i32(F32 a) { return {_mm256_cvtps_epi32(a.v)}; }  // nearest even
KVARN_INLINE F32 as_f32(I32 a) { return {_mm256_castsi256_ps(a.v)}; }
KVARN_INLINE I32 as_i32(F32 a) { return {_mm256_castps_si256(a.v)}; }

KVARN_INLINE I32 load_u8(const uint8_t* p) { return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))}; }
// The low byte of every lane; lanes hold 0..255.
KVARN_INLINE void store_u8(uint8_t* p, I32 a) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

KVARN_INLINE F32 load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
KVARN_INLINE void store_f16(uint16_t* p, F32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
KVARN_INLINE F32 load_bf16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
// The low 16 bits of every lane; lanes hold 0..65535.
KVARN_INLINE void store_u16(uint16_t* p, I32 a) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words);
}

// Sums and extremes over the lanes; the sum adds lane l and l + h for h = 4, 2, 1.
KVARN_INLINE float reduce_add(F32 a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
KVARN_INLINE float reduce_max(F32 a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
KVARN_INLINE float reduce_min(F32 a) {
  __m128 x = _mm_min_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_min_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_min_ss(x, _mm_movehdup_ps(x)));
}

// Butterfly of lanes `Stride` apart: (p, q) -> (p + q, p - q). The product with +-1 is exact, so the sum rounds once.
template <int Stride>
KVARN_INLINE F32 butterfly(F32 a) {
  static_assert(Stride == 1 || Stride == 2 || Stride == 4);
  if constexpr (Stride == 1) {
    return {_mm256_fmadd_ps(a.v, _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), _mm256_permute_ps(a.v, 0xb1))};
  } else if constexpr (Stride == 2) {
    return {_mm256_fmadd_ps(a.v, _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1), _mm256_permute_ps(a.v, 0x4e))};
  } else {
    return {_mm256_fmadd_ps(a.v, _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1), _mm256_permute2f128_ps(a.v, a.v, 1))};
  }
}

// rows[i][j] -> rows[j][i].
KVARN_INLINE void transpose(F32 (&rows)[kLanes]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
  }
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    rows[i + 4].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

}  // namespace
}  // namespace kvarn::cpu
