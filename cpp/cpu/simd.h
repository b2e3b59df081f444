// Vectors of the instruction set that a translation unit is compiled for. The unit defines exactly one of KVARN_TARGET_GENERIC,
// KVARN_TARGET_AVX2, KVARN_TARGET_AVX512 (and KVARN_TARGET_VNNI beside the last), and KVARN_HD, before any include.
//
// Everything here and in *-inl.h lives in an anonymous namespace and uses no standard library type: an inline function of external linkage
// that was compiled for AVX-512 could otherwise be the copy that the linker keeps for the whole program.
//
//   F32, I32        kLanes floats, 32-bit integers
//   fma(a, b, c)    a * b + c, fms: a * b - c; one rounding, on every target
//   min, max        the second argument when either is NaN
//   select(m, yes, no), any, all; less, less_equal: false for NaN
//   load_f16, load_bf16, store_f16, store_bf16: nearest even, overflow to infinity, NaN stays NaN
#pragma once

#include <cstdint>

#define KVARN_INLINE inline __attribute__((always_inline))
// Before a loop over an array of vectors with a constant count: only unrolled does the array live in registers.
#define KVARN_UNROLL _Pragma("GCC unroll 32")
#if !defined(KVARN_HD)
#error "define KVARN_HD as always_inline: the layout functions must leave no copy compiled for this target"
#endif

#include "kvarn/format.h"
#include "kvarn/kvarn.h"

#if defined(KVARN_TARGET_AVX512)
#include "simd_avx512.h"
#elif defined(KVARN_TARGET_AVX2)
#include "simd_avx2.h"
#elif defined(KVARN_TARGET_GENERIC)
#include "simd_generic.h"
#else
#error "define the target before including simd.h"
#endif

namespace kvarn::cpu {
namespace {

KVARN_INLINE F32 negate(F32 x) { return as_f32(as_i32(x) ^ as_i32(broadcast(-0.0f))); }
KVARN_INLINE F32 clamp(F32 x, F32 low, F32 high) { return min(max(x, low), high); }

KVARN_INLINE void store_bf16(uint16_t* p, F32 a) {
  const I32 bits = as_i32(a);
  const I32 rounded = (bits + broadcast(int32_t{0x7fff}) + ((bits >> 16) & broadcast(int32_t{1}))) >> 16;
  const I32 quiet = (bits >> 16) | broadcast(int32_t{0x40});
  // A NaN compares false with itself.
  store_u16(p, as_i32(select(less_equal(a, a), as_f32(rounded), as_f32(quiet))));
}

// kLanes values at index `i` of an array of `Dtype`.
template <int Dtype>
KVARN_INLINE F32 load_values(const void* p, int64_t i) {
  if constexpr (Dtype == KVARN_F32) return load(static_cast<const float*>(p) + i);
  if constexpr (Dtype == KVARN_F16) return load_f16(static_cast<const uint16_t*>(p) + i);
  if constexpr (Dtype == KVARN_BF16) return load_bf16(static_cast<const uint16_t*>(p) + i);
}

template <int Dtype>
KVARN_INLINE void store_values(void* p, int64_t i, F32 a) {
  if constexpr (Dtype == KVARN_F32) store(static_cast<float*>(p) + i, a);
  if constexpr (Dtype == KVARN_F16) store_f16(static_cast<uint16_t*>(p) + i, a);
  if constexpr (Dtype == KVARN_BF16) store_bf16(static_cast<uint16_t*>(p) + i, a);
}

// Calls f.template operator()<Dtype>() for a run-time dtype.
template <class Function>
KVARN_INLINE void with_dtype(int dtype, const Function& f) {
  if (dtype == KVARN_F32) return f.template operator()<KVARN_F32>();
  if (dtype == KVARN_F16) return f.template operator()<KVARN_F16>();
  f.template operator()<KVARN_BF16>();
}

}  // namespace
}  // namespace kvarn::cpu
