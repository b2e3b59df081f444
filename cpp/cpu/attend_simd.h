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
inline constexpr int kStepCodes = 16;  // codes of a row in one step: one byte each
#else
inline constexpr int kQueryPlanes = 1;
inline constexpr int kStepCodes = 8;
#endif
inline constexpr int kStepBytes = 16;  // of one query plane

// Steps that unpack a whole chunk of `bits`-wide codes.
constexpr int chunk_steps(int bits) { return kChunkBytes * 8 / bits / kStepCodes; }

template <int kBegin, int kEnd, class Function>
KVARN_INLINE void unroll(const Function& f) {
  if constexpr (kBegin < kEnd) {
    f.template operator()<kBegin>();
    unroll<kBegin + 1, kEnd>(f);
  }
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
KVARN_INLINE I32 load_query(const uint8_t* p) { return {_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(p)))}; }
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
KVARN_INLINE I32 load_query(const uint8_t* p) { return {_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(p)))}; }
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
KVARN_INLINE I32 load_query(const uint8_t* p) { return load_codes(p); }
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
    return shift_words<kStep * kBits>(raw) & broadcast(int32_t{((1 << kBits) - 1) * 0x01010101});
  }
}
KVARN_INLINE I32 dot(I32 sum, I32 codes, I32 query) { return {_mm512_dpbusd_epi32(sum.v, codes.v, query.v)}; }
#else
template <int kBits, int kStep>
KVARN_INLINE I32 unpack(I32 raw) {
  constexpr int kShift = kStep % 2 * 8 + kStep / 2 * kBits;
  const I32 shifted = shift_words<kShift>(raw);
  if constexpr (kShift + kBits == 16) return shifted;  // nothing above the code
  return shifted & broadcast(int32_t{((1 << kBits) - 1) * 0x00010001});
}
#if defined(KVARN_TARGET_AVX512)
KVARN_INLINE I32 dot(I32 sum, I32 codes, I32 query) { return sum + I32{_mm512_madd_epi16(codes.v, query.v)}; }
#elif defined(KVARN_TARGET_AVX2)
KVARN_INLINE I32 dot(I32 sum, I32 codes, I32 query) { return sum + I32{_mm256_madd_epi16(codes.v, query.v)}; }
#elif defined(__SSE2__)
KVARN_INLINE I32 dot(I32 sum, I32 codes, I32 query) {
  return sum + I32{reinterpret_cast<RawI32>(_mm_madd_epi16(reinterpret_cast<__m128i>(codes.v), reinterpret_cast<__m128i>(query.v)))};
}
#else
KVARN_INLINE I32 dot(I32 sum, I32 codes, I32 query) {
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

// ---- the query's integers, in the order of the codes ----

// Stores kLanes integers that fit 16 bits, the i-th to i + kLanes - 1st of a row, in quads: with VNNI their low bytes at low[i] and their
// high bytes at high[i]; otherwise 16-bit values at low[2 * i], each quad in the order 0, 2, 1, 3.
#if defined(KVARN_TARGET_VNNI)
KVARN_INLINE void store_query(uint8_t* low, uint8_t* high, int i, I32 a) {
  const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(a.v, _mm512_set1_epi32(128)), 8);
  _mm_store_si128(reinterpret_cast<__m128i*>(low + i), _mm512_cvtepi32_epi8(a.v));
  _mm_store_si128(reinterpret_cast<__m128i*>(high + i), _mm512_cvtepi32_epi8(upper));
}
#elif defined(KVARN_TARGET_AVX512)
KVARN_INLINE void store_query(uint8_t* low, uint8_t*, int i, I32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + 2 * i), _mm512_cvtepi32_epi16(_mm512_shuffle_epi32(a.v, _MM_PERM_DBCA)));
}
#elif defined(KVARN_TARGET_AVX2)
KVARN_INLINE void store_query(uint8_t* low, uint8_t*, int i, I32 a) {
  const __m256i ordered = _mm256_shuffle_epi32(a.v, 0xd8);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(ordered, ordered), 0x88);
  _mm_store_si128(reinterpret_cast<__m128i*>(low + 2 * i), _mm256_castsi256_si128(packed));
}
#else
KVARN_INLINE void store_query(uint8_t* low, uint8_t*, int i, I32 a) {
  const int16_t quad[4] = {static_cast<int16_t>(a.v[0]), static_cast<int16_t>(a.v[2]), static_cast<int16_t>(a.v[1]),
                           static_cast<int16_t>(a.v[3])};
  __builtin_memcpy(low + 2 * i, quad, sizeof(quad));
}
#endif

typedef int32_t Quad __attribute__((vector_size(16)));
KVARN_INLINE Quad load_quad(const uint8_t* p) {
  Quad a;
  __builtin_memcpy(&a, p, sizeof(a));
  return a;
}
KVARN_INLINE void store_quad(uint8_t* p, Quad a) { __builtin_memcpy(p, &a, sizeof(a)); }

// One chunk from row order into step order: word w of step k, at out + k * stride, is word w * kSteps + k of `in`.
template <int kSteps>
KVARN_INLINE void arrange_chunk(const uint8_t* in, uint8_t* out, int stride) {
  if constexpr (kSteps == 1) {
    store_quad(out, load_quad(in));
  } else if constexpr (kSteps == 2) {
    const Quad a = load_quad(in), b = load_quad(in + 16);
    store_quad(out, __builtin_shufflevector(a, b, 0, 2, 4, 6));
    store_quad(out + stride, __builtin_shufflevector(a, b, 1, 3, 5, 7));
  } else {
    for (int k = 0; k < kSteps; k += 4) {
      const Quad a = load_quad(in + 4 * k), b = load_quad(in + 4 * (kSteps + k));
      const Quad c = load_quad(in + 4 * (2 * kSteps + k)), d = load_quad(in + 4 * (3 * kSteps + k));
      const Quad ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Quad cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      store_quad(out + k * stride, __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5));
      store_quad(out + (k + 1) * stride, __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7));
      store_quad(out + (k + 2) * stride, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
      store_quad(out + (k + 3) * stride, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
    }
  }
}

// ---- 2^x ----

// Relative error 1e-7; arguments below -125 give 2^-125. For x <= 0.
KVARN_INLINE F32 exp2(F32 x) {
  x = max(x, broadcast(-125.0f));
  const F32 whole = round_even(x);
  const F32 f = x - whole;
  F32 p = fma(broadcast(1.32764725e-3f), f, broadcast(9.67554189e-3f));
  p = fma(p, f, broadcast(5.55071309e-2f));
  p = fma(p, f, broadcast(2.40221202e-1f));
  p = fma(p, f, broadcast(6.93146944e-1f));
  p = fma(p, f, broadcast(1.00000012f));
  return as_f32(as_i32(p) + (to_i32(whole) << 23));
}

}  // namespace
}  // namespace kvarn::cpu
