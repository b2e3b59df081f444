// Integer dot products of unpacked codes with a quantised query, and what else attend needs beside simd.h. Included after simd.h.
//
// A vector holds kVectorRows rows of one chunk position, 16 bytes each. Query values are 16-bit integers in two forms:
//   with VNNI   x = 256 * high + low, two planes of signed bytes; codes are unpacked to bytes (quads), vpdpbusd
//   otherwise   16-bit lanes; codes are unpacked to 16-bit lanes (the quad's values 0, 2 and 1, 3), vpmaddwd
// Both give the same integers: nothing saturates, and sums stay below 2^31 (query_limit in attend_fold-inl.h).
#pragma once

#include "cpu/simd.h"

#if defined(KVARN_TARGET_GENERIC) && defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace kvarn::cpu {
namespace {

inline constexpr int kVectorRows = kLanes / 4;
inline constexpr int kLineVectors = kLineRows / kVectorRows;  // vectors in a line

#if defined(KVARN_TARGET_VNNI)
inline constexpr int kQueryPlanes = 2;
#else
inline constexpr int kQueryPlanes = 1;
#endif
#if defined(KVARN_TARGET_AVX2)
inline constexpr int kStepBytes = 32;  // of a query plane: both halves of a vector, so that it can be an operand in memory
#else
inline constexpr int kStepBytes = 16;
#endif

// A step unpacks one plane of quads with VNNI, half of one otherwise. These are the steps that unpack a whole chunk of `bits`-wide codes.
constexpr int chunk_steps(int bits) { return 8 / bits * (3 - kQueryPlanes); }
// Without VNNI two planes of quads take turns, as attend_round-inl.h produces the query: planes 0, 1 with the quads' values 0, 2; planes 0,
// 1 with the values 1, 3; then planes 2, 3.
constexpr int step_plane(int bits, int step) {
  if (kQueryPlanes == 2) return step;
  return bits == 8 ? 0 : step / 4 * 2 + step % 2;
}
constexpr int step_odd(int bits, int step) {
  if (kQueryPlanes == 2) return 0;
  return bits == 8 ? step : step / 2 % 2;
}

// ---- loads ----

// Index and mask that spread rows of 1..3 words over 16-byte lanes.
struct TailShape {
  int32_t index[3][16];
};
inline constexpr TailShape kTailShape = [] {
  TailShape shape{};
  for (int words = 1; words <= 3; ++words) {
    for (int lane = 0; lane < 16; ++lane) shape.index[words - 1][lane] = lane % 4 < words ? lane / 4 * words + lane % 4 : 0;
  }
  return shape;
}();

#if defined(KVARN_TARGET_AVX512)
KVARN_INLINE I32 load_codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
// kVectorRows rows of `words` (1..3) words, zeros behind them.
KVARN_INLINE I32 load_tail(const uint8_t* p, int words) {
  const auto present = static_cast<__mmask16>((1u << (4 * words)) - 1);
  const auto kept = static_cast<__mmask16>(((1u << words) - 1) * 0x1111u);
  const __m512i index = _mm512_loadu_si512(kTailShape.index[words - 1]);
  return {_mm512_maskz_permutexvar_epi32(kept, index, _mm512_maskz_loadu_epi32(present, p))};
}
using Query = I32;  // a step of a query plane, repeated for every row of a vector
KVARN_INLINE Query load_query(const uint8_t* p) { return {_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(p)))}; }
template <int kShift>
KVARN_INLINE I32 shift_words(I32 a) {
  if constexpr (kShift == 0) return a;
  return {_mm512_srli_epi16(a.v, kShift)};
}
#elif defined(KVARN_TARGET_AVX2)
KVARN_INLINE I32 load_codes(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
KVARN_INLINE I32 load_tail(const uint8_t* p, int words) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i present = _mm256_cmpgt_epi32(_mm256_set1_epi32(2 * words), lanes);
  const __m256i kept = _mm256_cmpgt_epi32(_mm256_set1_epi32(words), _mm256_and_si256(lanes, _mm256_set1_epi32(3)));
  const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kTailShape.index[words - 1]));
  const __m256i packed = _mm256_maskload_epi32(reinterpret_cast<const int*>(p), present);
  return {_mm256_and_si256(_mm256_permutevar8x32_epi32(packed, index), kept)};
}
struct Query {
  const __m256i* at;
};
KVARN_INLINE Query load_query(const uint8_t* p) { return {reinterpret_cast<const __m256i*>(p)}; }
template <int kShift>
KVARN_INLINE I32 shift_words(I32 a) {
  if constexpr (kShift == 0) return a;
  return {_mm256_srli_epi16(a.v, kShift)};
}
#else
KVARN_INLINE I32 load_codes(const uint8_t* p) {
  I32 a;
  __builtin_memcpy(&a.v, p, sizeof(a.v));
  return a;
}
KVARN_INLINE I32 load_tail(const uint8_t* p, int words) {
  I32 a = zero_i32();
  __builtin_memcpy(&a.v, p, static_cast<unsigned>(words) * 4);
  return a;
}
using Query = I32;
KVARN_INLINE Query load_query(const uint8_t* p) { return load_codes(p); }
typedef uint16_t RawU16 __attribute__((vector_size(16)));
template <int kShift>
KVARN_INLINE I32 shift_words(I32 a) {
  return {reinterpret_cast<RawI32>(reinterpret_cast<RawU16>(a.v) >> kShift)};
}
#endif

// ---- codes of one step, and their product with the query ----

#if defined(KVARN_TARGET_VNNI)
template <int kBits, int kStep>
KVARN_INLINE I32 unpack(I32 raw) {
  if constexpr (kBits == 8) {
    return raw;
  } else {
    return shift_words<step_plane(kBits, kStep) * kBits>(raw) & broadcast(int32_t{((1 << kBits) - 1) * 0x01010101});
  }
}
KVARN_INLINE I32 dot(I32 sum, I32 codes, Query query) { return {_mm512_dpbusd_epi32(sum.v, codes.v, query.v)}; }
#else
template <int kBits, int kStep>
KVARN_INLINE I32 unpack(I32 raw) {
  constexpr int kShift = step_odd(kBits, kStep) * 8 + step_plane(kBits, kStep) * kBits;
  const I32 shifted = shift_words<kShift>(raw);
  if constexpr (kShift + kBits == 16) return shifted;  // nothing above the code
  return shifted & broadcast(int32_t{((1 << kBits) - 1) * 0x00010001});
}
// Compilers know that integer sums may be reordered, and keep whole chains of products for later, in memory. An empty statement stops that.
#if defined(KVARN_EMULATED_INSTRUCTIONS)
#define KVARN_KEEP_IN_ORDER(constraint, value)
#else
#define KVARN_KEEP_IN_ORDER(constraint, value) asm("" : constraint(value))
#endif
#if defined(KVARN_TARGET_AVX512)
KVARN_INLINE I32 dot(I32 sum, I32 codes, Query query) {
  I32 next = sum + I32{_mm512_madd_epi16(codes.v, query.v)};
  KVARN_KEEP_IN_ORDER("+v", next.v);
  return next;
}
#elif defined(KVARN_TARGET_AVX2)
KVARN_INLINE I32 dot(I32 sum, I32 codes, Query query) {
  // As an intrinsic it would be loaded into a register first: one instruction more, in a loop that the front end limits.
  __m256i product;
  asm("vpmaddwd %2, %1, %0" : "=x"(product) : "x"(codes.v), "m"(*query.at));
  I32 next = sum + I32{product};
  KVARN_KEEP_IN_ORDER("+x", next.v);
  return next;
}
#elif defined(__SSE2__)
KVARN_INLINE I32 dot(I32 sum, I32 codes, Query query) {
  return sum + I32{reinterpret_cast<RawI32>(_mm_madd_epi16(reinterpret_cast<__m128i>(codes.v), reinterpret_cast<__m128i>(query.v)))};
}
#else
KVARN_INLINE I32 dot(I32 sum, I32 codes, Query query) {
  // Codes are below 2^8, so only the query's halves carry a sign.
  const RawI32 low = ((query << 16).v >> 16) * (codes.v & 0xffff);
  const RawI32 high = (query.v >> 16) * (codes.v >> 16);
  return sum + I32{low} + I32{high};
}
#endif
#endif

// ---- horizontal sums: four vectors of 16-byte rows with four partial sums each become kLanes sums in row order ----

#if defined(KVARN_TARGET_AVX512)
KVARN_INLINE I32 add_pairs(I32 a, I32 b) { return {_mm512_add_epi32(_mm512_unpacklo_epi32(a.v, b.v), _mm512_unpackhi_epi32(a.v, b.v))}; }
KVARN_INLINE I32 add_halves(I32 a, I32 b) {
  const __m512i sums = _mm512_add_epi32(_mm512_unpacklo_epi64(a.v, b.v), _mm512_unpackhi_epi64(a.v, b.v));
  return {_mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), sums)};
}
#elif defined(KVARN_TARGET_AVX2)
KVARN_INLINE I32 add_pairs(I32 a, I32 b) { return {_mm256_add_epi32(_mm256_unpacklo_epi32(a.v, b.v), _mm256_unpackhi_epi32(a.v, b.v))}; }
KVARN_INLINE I32 add_halves(I32 a, I32 b) {
  const __m256i sums = _mm256_add_epi32(_mm256_unpacklo_epi64(a.v, b.v), _mm256_unpackhi_epi64(a.v, b.v));
  return {_mm256_permutevar8x32_epi32(sums, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))};
}
#else
KVARN_INLINE I32 add_pairs(I32 a, I32 b) {
  return I32{__builtin_shufflevector(a.v, b.v, 0, 4, 1, 5)} + I32{__builtin_shufflevector(a.v, b.v, 2, 6, 3, 7)};
}
KVARN_INLINE I32 add_halves(I32 a, I32 b) {
  return I32{__builtin_shufflevector(a.v, b.v, 0, 1, 4, 5)} + I32{__builtin_shufflevector(a.v, b.v, 2, 3, 6, 7)};
}
#endif

// ---- loops over the float vectors of a row, whose length is a multiple of 16 ----

inline constexpr int kUnrolled = kLanes == 16 ? 1 : 2;

// f(i, u) for i = 0, kLanes, ... below n; u = 0 .. kUnrolled - 1 in turn, for separate accumulators.
template <class Function>
KVARN_INLINE void for_vectors(int n, const Function& f) {
  for (int i = 0; i < n; i += kUnrolled * kLanes) {
    f(i, 0);
    if constexpr (kUnrolled == 2) f(i + kLanes, 1);
  }
}

// ---- 2^x ----

// Relative error 3e-6; arguments below -125 give 2^-125. For x <= 0.
KVARN_INLINE F32 exp2(F32 x) {
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const F32 shift = broadcast(12582912.0f);
  x = max(x, broadcast(-125.0f));
  const F32 shifted = x + shift;
  const F32 f = x - (shifted - shift);
  F32 p = fma(broadcast(9.57010221e-3f), f, broadcast(5.59178628e-2f));
  p = fma(p, f, broadcast(2.40247443e-1f));
  p = fma(p, f, broadcast(6.93121791e-1f));
  p = fma(p, f, broadcast(9.99999285e-1f));
  return as_f32(as_i32(p) + (as_i32(shifted) << 23));
}

}  // namespace
}  // namespace kvarn::cpu
