// AVX-512 F, BW, VL, DQ: 16 lanes. Included through simd.h only.
#pragma once

#include <immintrin.h>

namespace kvarn::cpu {
namespace {

inline constexpr int kLanes = 16;

struct F32 {
  __m512 v;
};
struct I32 {
  __m512i v;
};
struct Mask {
  __mmask16 v;
};

KVARN_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
KVARN_INLINE void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
KVARN_INLINE F32 broadcast(float a) { return {_mm512_set1_ps(a)}; }
KVARN_INLINE F32 zero() { return {_mm512_setzero_ps()}; }
KVARN_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
KVARN_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
KVARN_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
KVARN_INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
KVARN_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
KVARN_INLINE F32 fms(F32 a, F32 b, F32 c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
KVARN_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
KVARN_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
KVARN_INLINE F32 sqrt(F32 a) { return {_mm512_sqrt_ps(a.v)}; }
KVARN_INLINE F32 round_even(F32 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
KVARN_INLINE F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }

KVARN_INLINE Mask less(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
KVARN_INLINE Mask less_equal(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
KVARN_INLINE Mask operator&(Mask a, Mask b) { return {static_cast<__mmask16>(a.v & b.v)}; }
KVARN_INLINE F32 select(Mask m, F32 yes, F32 no) { return {_mm512_mask_blend_ps(m.v, no.v, yes.v)}; }
KVARN_INLINE bool any(Mask m) { return m.v != 0; }
KVARN_INLINE bool all(Mask m) { return m.v == 0xffff; }

KVARN_INLINE I32 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
KVARN_INLINE void store(int32_t* p, I32 a) { _mm512_storeu_si512(p, a.v); }
KVARN_INLINE I32 broadcast(int32_t a) { return {_mm512_set1_epi32(a)}; }
KVARN_INLINE I32 zero_i32() { return {_mm512_setzero_si512()}; }
KVARN_INLINE I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
KVARN_INLINE I32 operator-(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
KVARN_INLINE I32 operator&(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
KVARN_INLINE I32 operator|(I32 a, I32 b) { return {_mm512_or_si512(a.v, b.v)}; }
KVARN_INLINE I32 operator^(I32 a, I32 b) { return {_mm512_xor_si512(a.v, b.v)}; }
KVARN_INLINE I32 operator<<(I32 a, int n) { return {_mm512_slli_epi32(a.v, static_cast<unsigned>(n))}; }
KVARN_INLINE I32 operator>>(I32 a, int n) { return {_mm512_srli_epi32(a.v, static_cast<unsigned>(n))}; }  // logical
KVARN_INLINE F32 to_f32(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
KVARN_INLINE I32 to_i32(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }  // nearest even
KVARN_INLINE F32 as_f32(I32 a) { return {_mm512_castsi512_ps(a.v)}; }
KVARN_INLINE I32 as_i32(F32 a) { return {_mm512_castps_si512(a.v)}; }

KVARN_INLINE I32 load_u8(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
// The low byte of every lane; lanes hold 0..255.
KVARN_INLINE void store_u8(uint8_t* p, I32 a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v)); }

KVARN_INLINE F32 load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
KVARN_INLINE void store_f16(uint16_t* p, F32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
KVARN_INLINE F32 load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
// The low 16 bits of every lane; lanes hold 0..65535.
KVARN_INLINE void store_u16(uint16_t* p, I32 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v)); }

// Sums and extremes over the lanes; the sum adds lane l and l + h for h = 8, 4, 2, 1.
KVARN_INLINE float reduce_add(F32 a) {
  const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
KVARN_INLINE float reduce_max(F32 a) { return _mm512_reduce_max_ps(a.v); }
KVARN_INLINE float reduce_min(F32 a) { return _mm512_reduce_min_ps(a.v); }

// Butterfly of lanes `Stride` apart: (p, q) -> (p + q, p - q). The product with +-1 is exact, so the sum rounds once.
template <int Stride>
KVARN_INLINE F32 butterfly(F32 a) {
  static_assert(Stride == 1 || Stride == 2 || Stride == 4 || Stride == 8);
  constexpr float kA = (Stride & 1) != 0 ? -1.0f : 1.0f;  // sign of lane 1, 2, 4, 8; the others' signs are products
  constexpr float kB = (Stride & 2) != 0 ? -1.0f : 1.0f;
  constexpr float kC = (Stride & 4) != 0 ? -1.0f : 1.0f;
  constexpr float kD = (Stride & 8) != 0 ? -1.0f : 1.0f;
  const __m512 signs = _mm512_setr_ps(1, kA, kB, kA * kB, kC, kA * kC, kB * kC, kA * kB * kC, kD, kA * kD, kB * kD, kA * kB * kD, kC * kD,
                                      kA * kC * kD, kB * kC * kD, kA * kB * kC * kD);
  __m512 swapped;
  if constexpr (Stride == 1) swapped = _mm512_permute_ps(a.v, 0xb1);
  if constexpr (Stride == 2) swapped = _mm512_permute_ps(a.v, 0x4e);
  if constexpr (Stride == 4) swapped = _mm512_shuffle_f32x4(a.v, a.v, 0xb1);
  if constexpr (Stride == 8) swapped = _mm512_shuffle_f32x4(a.v, a.v, 0x4e);
  return {_mm512_fmadd_ps(a.v, signs, swapped)};
}

// rows[i][j] -> rows[j][i].
KVARN_INLINE void transpose(F32 (&rows)[kLanes]) {
  __m512 t[16], u[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
  }
  // u[4i + j], 128-bit lane L: column 4L + j of rows 4i .. 4i + 3.
  for (int i = 0; i < 4; ++i) {
    u[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512 low0 = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88);       // lanes 0, 2 of row groups 0, 1
    const __m512 low1 = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);  // lanes 0, 2 of row groups 2, 3
    const __m512 high0 = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);      // lanes 1, 3
    const __m512 high1 = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
    rows[j].v = _mm512_shuffle_f32x4(low0, low1, 0x88);
    rows[8 + j].v = _mm512_shuffle_f32x4(low0, low1, 0xdd);
    rows[4 + j].v = _mm512_shuffle_f32x4(high0, high1, 0x88);
    rows[12 + j].v = _mm512_shuffle_f32x4(high0, high1, 0xdd);
  }
}

}  // namespace
}  // namespace kvarn::cpu
