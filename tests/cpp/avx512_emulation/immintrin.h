// The AVX-512 intrinsics that the kernels use, on machines without the instructions: SIMDe's, and those that its release lacks.
#pragma once

#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

using __mmask16 = simde__mmask16;
#undef _MM_FROUND_NO_EXC
#undef _MM_FROUND_TO_NEAREST_INT
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC
#define _MM_FROUND_TO_NEAREST_INT SIMDE_MM_FROUND_TO_NEAREST_INT
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int imm) {
  simde__m512_private x = simde__m512_to_private(a), y = simde__m512_to_private(b), out;
  for (int lane = 0; lane < 4; ++lane) {
    for (int i = 0; i < 4; ++i) out.f32[lane * 4 + i] = (lane < 2 ? x : y).f32[((imm >> (2 * lane)) & 3) * 4 + i];
  }
  return simde__m512_from_private(out);
}

inline __m512 _mm512_cvtepi32_ps(__m512i a) {
  simde__m512i_private in = simde__m512i_to_private(a);
  simde__m512_private out;
  for (int i = 0; i < 16; ++i) out.f32[i] = static_cast<float>(in.i32[i]);
  return simde__m512_from_private(out);
}
inline __m512i _mm512_cvtps_epi32(__m512 a) {
  simde__m512_private in = simde__m512_to_private(a);
  simde__m512i_private out;
  for (int i = 0; i < 16; ++i) out.i32[i] = _mm_cvtss_si32(_mm_set_ss(in.f32[i]));
  return simde__m512i_from_private(out);
}
inline __m512i _mm512_cvtepu8_epi32(__m128i a) {
  simde__m128i_private in = simde__m128i_to_private(a);
  simde__m512i_private out;
  for (int i = 0; i < 16; ++i) out.i32[i] = in.u8[i];
  return simde__m512i_from_private(out);
}
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  simde__m256i_private in = simde__m256i_to_private(a);
  simde__m512i_private out;
  for (int i = 0; i < 16; ++i) out.i32[i] = in.u16[i];
  return simde__m512i_from_private(out);
}
inline __m128i _mm512_cvtepi32_epi8(__m512i a) {
  simde__m512i_private in = simde__m512i_to_private(a);
  simde__m128i_private out;
  for (int i = 0; i < 16; ++i) out.u8[i] = static_cast<uint8_t>(in.i32[i]);
  return simde__m128i_from_private(out);
}
inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
  simde__m512i_private in = simde__m512i_to_private(a);
  simde__m256i_private out;
  for (int i = 0; i < 16; ++i) out.u16[i] = static_cast<uint16_t>(in.i32[i]);
  return simde__m256i_from_private(out);
}
inline __m512 _mm512_cvtph_ps(__m256i a) {
  simde__m512_private out;
  out.m256[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(a));
  out.m256[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1));
  return simde__m512_from_private(out);
}
#define _mm512_cvtps_ph(a, r) kvarn_emulated_cvtps_ph(a)
inline __m256i kvarn_emulated_cvtps_ph(__m512 a) {
  simde__m512_private in = simde__m512_to_private(a);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm256_cvtps_ph(in.m256[0], 0)), _mm256_cvtps_ph(in.m256[1], 0), 1);
}
inline __m256 _mm512_extractf32x8_ps(__m512 a, int i) { return simde__m512_to_private(a).m256[i]; }
inline __m512 _mm512_permute_ps(__m512 a, int imm) {
  simde__m512_private in = simde__m512_to_private(a), out;
  for (int i = 0; i < 16; ++i) out.f32[i] = in.f32[(i & ~3) | ((imm >> (2 * (i & 3))) & 3)];
  return simde__m512_from_private(out);
}
inline float _mm512_reduce_max_ps(__m512 a) {
  simde__m512_private in = simde__m512_to_private(a);
  float x = in.f32[0];
  for (int i = 1; i < 16; ++i) x = in.f32[i] > x ? in.f32[i] : x;
  return x;
}
inline float _mm512_reduce_min_ps(__m512 a) {
  simde__m512_private in = simde__m512_to_private(a);
  float x = in.f32[0];
  for (int i = 1; i < 16; ++i) x = in.f32[i] < x ? in.f32[i] : x;
  return x;
}
inline __m512i _mm512_maskz_loadu_epi32(__mmask16 m, const void* p) {
  simde__m512i_private out;
  for (int i = 0; i < 16; ++i) {
    out.i32[i] = 0;
    if (m >> i & 1) __builtin_memcpy(&out.i32[i], static_cast<const char*>(p) + 4 * i, 4);
  }
  return simde__m512i_from_private(out);
}

// The release's own are not fused, or ill-formed.
#undef _mm512_fmadd_ps
#undef _mm512_fmsub_ps
#undef _mm512_fnmadd_ps
#undef _mm512_madd_epi16
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  simde__m512_private x = simde__m512_to_private(a), y = simde__m512_to_private(b), z = simde__m512_to_private(c);
  for (int i = 0; i < 16; ++i) z.f32[i] = __builtin_fmaf(x.f32[i], y.f32[i], z.f32[i]);
  return simde__m512_from_private(z);
}
inline __m512 _mm512_fmsub_ps(__m512 a, __m512 b, __m512 c) {
  simde__m512_private x = simde__m512_to_private(a), y = simde__m512_to_private(b), z = simde__m512_to_private(c);
  for (int i = 0; i < 16; ++i) z.f32[i] = __builtin_fmaf(x.f32[i], y.f32[i], -z.f32[i]);
  return simde__m512_from_private(z);
}
inline __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
  simde__m512i_private x = simde__m512i_to_private(a), y = simde__m512i_to_private(b), z;
  for (int i = 0; i < 16; ++i) z.i32[i] = x.i16[2 * i] * y.i16[2 * i] + x.i16[2 * i + 1] * y.i16[2 * i + 1];
  return simde__m512i_from_private(z);
}
