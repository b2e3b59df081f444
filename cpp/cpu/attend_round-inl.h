// Rounding folded values to integers, in the order in which the steps of a plane of codes meet them (attend_simd.h).
//
// Step s of a row's query lies at out + kStepBytes * s; with VNNI that is the high bytes' plane, and the low bytes' is kQueryStride behind
// it. Values are read up to the end of the last block of 128; they are zero behind the last code.
#pragma once

#include "cpu/attend_scratch.h"
#include "cpu/attend_simd.h"

namespace kvarn::cpu {
namespace {

// Bytes from one query plane to the next, and from one row's first to the next row's.
#if defined(KVARN_TARGET_AVX2)
inline constexpr int kQueryStride = kQueryRowBytes;
#else
inline constexpr int kQueryStride = 2 * kMaxPaddedCodes / kQueryPlanes;
#endif
static_assert(kQueryPlanes * kQueryStride <= kQueryRowBytes);

#if defined(KVARN_TARGET_VNNI)

// Lanes of 16 bytes from the order that packing leaves, value 4v + l in word v of lane l, into step order.
template <int kBits>
KVARN_INLINE __m512i order_words(__m512i packed) {
  if constexpr (kBits == 8) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), packed);
  } else if constexpr (kBits == 4) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 8, 1, 9, 4, 12, 5, 13, 2, 10, 3, 11, 6, 14, 7, 15), packed);
  } else {
    return packed;
  }
}

// round(x * inverse) for one row; returns the sum of the integers, exact in fp32.
template <int kBits>
KVARN_INLINE float round_plane(const float* x, int codes, float inverse_step, uint8_t* out) {
  constexpr int kStride = kBits == 1 ? 2 : 1;  // vectors between the four that are packed together
  const __m512 inverse = _mm512_set1_ps(inverse_step);
  const __m512i low_byte = _mm512_set1_epi16(0xff), half = _mm512_set1_epi16(128);
  __m512i sum = _mm512_setzero_si512();
  for (int c = 0; c < codes; c += 64 * kStride) {
    for (int i = 0; i < kStride; ++i) {
      __m512i n[4];
      for (int v = 0; v < 4; ++v) {
        n[v] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + c + (v * kStride + i) * 16), inverse));
        sum = _mm512_add_epi32(sum, n[v]);
      }
      const __m512i first = _mm512_packs_epi32(n[0], n[1]), second = _mm512_packs_epi32(n[2], n[3]);
      const __m512i low = _mm512_packus_epi16(_mm512_and_si512(first, low_byte), _mm512_and_si512(second, low_byte));
      const __m512i high =
          _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(first, half), 8), _mm512_srai_epi16(_mm512_add_epi16(second, half), 8));
      _mm512_storeu_si512(out + c + i * 64, order_words<kBits>(high));
      _mm512_storeu_si512(out + kQueryStride + c + i * 64, order_words<kBits>(low));
    }
  }
  return reduce_add(F32{_mm512_cvtepi32_ps(sum)});
}

#elif defined(KVARN_TARGET_AVX2) || defined(KVARN_TARGET_AVX512)

// Two vectors of integers as 16-bit values, every quad in the order 0, 2, 1, 3.
KVARN_INLINE __m256i pack_quads(__m256i a, __m256i b) {
  const __m256i order =
      _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  return _mm256_shuffle_epi8(_mm256_packs_epi32(a, b), order);
}

// Two steps, one in each half.
KVARN_INLINE void store_steps(uint8_t* out, __m256i steps) {
#if defined(KVARN_TARGET_AVX2)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute2x128_si256(steps, steps, 0x00));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + kStepBytes), _mm256_permute2x128_si256(steps, steps, 0x11));
#else
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), steps);
#endif
}

// round(x * inverse) for one row; returns the sum of the integers, exact in fp32.
template <int kBits>
KVARN_INLINE float round_plane(const float* x, int codes, float inverse_step, uint8_t* out) {
  constexpr int kPlanes = 8 / kBits;
  const __m256 inverse = _mm256_set1_ps(inverse_step);
  __m256i sum = _mm256_setzero_si256();
  const auto rounded = [&](const float* from) __attribute__((always_inline)) {
    const __m256i n = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from), inverse));
    sum = _mm256_add_epi32(sum, n);
    return n;
  };
  if constexpr (kPlanes == 1) {
    const __m256i order = _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7);
    for (int c = 0; c < codes; c += 16) {
      const __m256i a = rounded(x + c), b = rounded(x + c + 8);
      store_steps(out, _mm256_permutevar8x32_epi32(pack_quads(a, b), order));
      out += 2 * kStepBytes;
    }
  } else {
    constexpr int kStride = 4 * kPlanes;  // values between a chunk's words
    for (int c = 0; c < codes; c += 16 * kPlanes) {
      for (int i = 0; i < kPlanes / 2; ++i) {
        const float* from = x + c + 8 * i;
        const __m256i a = rounded(from), b = rounded(from + kStride), e = rounded(from + 2 * kStride), f = rounded(from + 3 * kStride);
        const __m256 ab = _mm256_castsi256_ps(pack_quads(a, b)), ef = _mm256_castsi256_ps(pack_quads(e, f));
        store_steps(out, _mm256_castps_si256(_mm256_shuffle_ps(ab, ef, 0x88)));
        store_steps(out + 2 * kStepBytes, _mm256_castps_si256(_mm256_shuffle_ps(ab, ef, 0xdd)));
        out += 4 * kStepBytes;
      }
    }
  }
  const __m256 lanes = _mm256_cvtepi32_ps(sum);
  __m128 total = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  total = _mm_add_ps(total, _mm_movehl_ps(total, total));
  return _mm_cvtss_f32(_mm_add_ss(total, _mm_movehdup_ps(total)));
}

#else

// round(x * inverse) for one row; returns the sum of the integers, exact in fp32.
template <int kBits>
inline float round_plane(const float* x, int codes, float inverse_step, uint8_t* out) {
  constexpr int kWordCodes = 32 / kBits;
  int32_t sum = 0;
  for (int c = 0; c < codes; c += 4 * kWordCodes) {
    for (int step = 0; step < chunk_steps(kBits); ++step) {
      int16_t n[8];
      for (int i = 0; i < 8; ++i) {
        const int code = c + i / 2 * kWordCodes + step_plane(kBits, step) * 4 + i % 2 * 2 + step_odd(kBits, step);
        const float scaled[kLanes] = {x[code] * inverse_step};
        int32_t rounded[kLanes];
        store(rounded, to_i32(load(scaled)));
        n[i] = static_cast<int16_t>(rounded[0]);
        sum += n[i];
      }
      __builtin_memcpy(out, n, sizeof(n));
      out += kStepBytes;
    }
  }
  return static_cast<float>(sum);
}

#endif

KVARN_INLINE float round_row(int bits, const float* x, int codes, float inverse_step, uint8_t* out) {
  switch (bits) {
    case 1:
      return round_plane<1>(x, codes, inverse_step, out);
    case 2:
      return round_plane<2>(x, codes, inverse_step, out);
    case 4:
      return round_plane<4>(x, codes, inverse_step, out);
    default:
      return round_plane<8>(x, codes, inverse_step, out);
  }
}

}  // namespace
}  // namespace kvarn::cpu
