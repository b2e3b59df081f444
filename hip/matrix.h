// 16 x 16 x 16 products of fp16 numbers, accumulated in fp32, as each family of targets has them: MFMA (gfx9), WMMA (gfx11, gfx12), dot
// products (gfx10). One description of who holds what serves all of them.
//
// Lane l holds row l % 16 of A and column l % 16 of B. The contraction is shared by kGroups groups of lanes, l / 16: each holds kDepth
// consecutive steps of it (on gfx11 all lanes hold all sixteen). Of the result, lane l holds column l % 16 and kHeld rows, row(l / 16, i).
#pragma once

#include "amd.h"

namespace kvarn::cuda {

using Float4 = float __attribute__((ext_vector_type(4)));
using Float8 = float __attribute__((ext_vector_type(8)));
using Half2 = _Float16 __attribute__((ext_vector_type(2)));
using Half4 = _Float16 __attribute__((ext_vector_type(4)));
using Half8 = _Float16 __attribute__((ext_vector_type(8)));
using Half16 = _Float16 __attribute__((ext_vector_type(16)));

#if defined(__GFX9__)
constexpr int kGroups = 4, kDepth = 4, kHeld = 4, kSums = 4;
#elif defined(__GFX11__)
constexpr int kGroups = 1, kDepth = 16, kHeld = 8, kSums = 8;
#elif defined(__GFX12__)
constexpr int kGroups = 2, kDepth = 8, kHeld = 8, kSums = 8;
#else
constexpr int kGroups = 2, kDepth = 8, kHeld = 8, kSums = 16;
#endif
constexpr int kLaneGroups = kWave / 16;
// Blocks of 16 tokens that attention works on at a time: a tile, but dot products for so many would not fit the instruction cache.
#if defined(__GFX10__)
constexpr int kBlocksAtOnce = 2;
#else
constexpr int kBlocksAtOnce = 8;
#endif

// Two fp16 numbers a word.
struct Fragment {
  uint32_t words[kDepth / 2];
};
struct Accumulator {
  float sums[kSums];  // what finish() turns into the kHeld values
};

// The group whose steps of the contraction a lane holds.
__device__ __forceinline__ int depth_group(int lane) { return kGroups == 1 ? 0 : lane / 16; }
// Row of the result that value i of lane group `group` belongs to.
__device__ __forceinline__ constexpr int row_held(int group, int i) {
#if defined(__GFX11__)
  return 2 * i + group;
#else
  return kHeld * group + i;
#endif
}
// The other way round.
__device__ __forceinline__ constexpr int group_of_row(int row) {
#if defined(__GFX11__)
  return row % 2;
#else
  return row / kHeld;
#endif
}
__device__ __forceinline__ constexpr int held_of_row(int row) {
#if defined(__GFX11__)
  return row / 2;
#else
  return row % kHeld;
#endif
}

template <int kControl>
struct DppControl {
  static constexpr int kValue = kControl;
};

// The value of the lane 8 places further in the same 16.
__device__ __forceinline__ float across_eight(float x) {
  return bits_as<float>(together(__builtin_amdgcn_mov_dpp(bits_as<int>(x), 0x128, 0xf, 0xf, true)));  // row_ror:8
}
// Lanes 0 to 7 of each 16 get x and their partner's x, lanes 8 to 15 y and their partner's y. Each instruction writes half of the lanes;
// the compiler would make both sums everywhere and choose. Volatile, so that it stays where all lanes are active. Not for gfx9, where a DPP
// operand must be older than the compiler sees to here.
__device__ __forceinline__ float sum_across_eight(float x, float y) {
  float sum;
  asm volatile(
      "v_add_f32_dpp %0, %1, %1 row_ror:8 row_mask:0xf bank_mask:0x3\n"
      "\tv_add_f32_dpp %0, %2, %2 row_ror:8 row_mask:0xf bank_mask:0xc"
      : "=&v"(sum)
      : "v"(x), "v"(y));
  return sum;
}
// The value of the lane 16 places further, of two groups.
__device__ __forceinline__ uint32_t across_sixteen(uint32_t x) {
#if defined(__GFX9__)
  return from_lane(x, wave_lane() ^ 16);
#else
  return static_cast<uint32_t>(
      together(__builtin_amdgcn_permlanex16(static_cast<int>(x), static_cast<int>(x), 0x76543210u, 0xfedcba98u, false, false)));
#endif
}
__device__ __forceinline__ bool any_lane(bool x) {
#if defined(__GFX9__)
  return __builtin_amdgcn_ballot_w64(x) != 0;
#else
  return __builtin_amdgcn_ballot_w32(x) != 0;
#endif
}
template <class Op>
__device__ __forceinline__ float over_groups(float x, Op op) {
  x = op(x, bits_as<float>(across_sixteen(bits_as<uint32_t>(x))));
  if constexpr (kWave == 64) x = op(x, from_lane(x, wave_lane() ^ 32));
  return x;
}

#if defined(__GFX9__)
__device__ __forceinline__ void multiply_add(Accumulator& c, const Fragment& a, const Fragment& b) {
  c = bits_as<Accumulator>(__builtin_amdgcn_mfma_f32_16x16x16f16(bits_as<Half4>(a), bits_as<Half4>(b), bits_as<Float4>(c), 0, 0, 0));
}
#elif defined(__GFX11__)
__device__ __forceinline__ void multiply_add(Accumulator& c, const Fragment& a, const Fragment& b) {
  c = bits_as<Accumulator>(__builtin_amdgcn_wmma_f32_16x16x16_f16_w32(bits_as<Half16>(a), bits_as<Half16>(b), bits_as<Float8>(c)));
}
#elif defined(__GFX12__)
__device__ __forceinline__ void multiply_add(Accumulator& c, const Fragment& a, const Fragment& b) {
  c = bits_as<Accumulator>(__builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(bits_as<Half8>(a), bits_as<Half8>(b), bits_as<Float8>(c)));
}
#else
// Every lane multiplies its half of the contraction with all sixteen rows, which the lanes of its half share with one another.
template <int kRow>
__device__ __forceinline__ void multiply_add_row(Accumulator& c, const Fragment& a, const Fragment& b) {
#pragma unroll
  for (int j = 0; j < kDepth / 2; ++j) {
    // The compiler does not move the sharing of a row into the instruction.
    asm("v_dot2c_f32_f16_dpp %0, %1, %2 row_share:%3 row_mask:0xf bank_mask:0xf"
        : "+v"(c.sums[kRow])
        : "v"(a.words[j]), "v"(b.words[j]), "n"(kRow));
  }
}
template <int kRow = 0>
__device__ __forceinline__ void multiply_add(Accumulator& c, const Fragment& a, const Fragment& b) {
  multiply_add_row<kRow>(c, a, b);
  if constexpr (kRow < 15) multiply_add<kRow + 1>(c, a, b);
}
#endif

// What a lane holds of the result, from its sums.
__device__ __forceinline__ void finish(const Accumulator& c, float (&held)[kHeld]) {
#if defined(__GFX9__) || defined(__GFX11__) || defined(__GFX12__)
#pragma unroll
  for (int i = 0; i < kHeld; ++i) held[i] = c.sums[i];
#else
  // The sums of either half of the contraction meet in the lane that holds the row.
  const bool upper = wave_lane() >= 16;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const float keep = upper ? c.sums[kHeld + i] : c.sums[i], send = upper ? c.sums[i] : c.sums[kHeld + i];
    held[i] = keep + bits_as<float>(across_sixteen(bits_as<uint32_t>(send)));
  }
#endif
}

}  // namespace kvarn::cuda
