// The bytes of a record beside its codes: metadata, padding, and what an operand becomes that cannot be encoded. docs/FORMAT.md, section 4.
#pragma once

#include <cuda_fp16.h>

#include "encode.h"
#include "primitives.cuh"

namespace kvarn::cuda {

__device__ __forceinline__ float clip_value(float x, float low, float high) { return fminf(fmaxf(x, low), high); }

__device__ __forceinline__ __half saturate_half(float x) { return __float2half_rn(__fadd_rn(clip_value(x, -65504.0f, 65504.0f), 0.0f)); }

// One vector by a block of kThreads. values[o] is the vector's element index[o], or no element where that is negative. reduce: shared
// memory, a pair for every warp, that nothing else uses between the last barrier before and the next one after.
template <int kThreads, int N>
__device__ __forceinline__ void write_metadata(const RecordLayout& r, uint8_t* record, Metadata which, const float (&values)[N],
                                               const int (&index)[N], float2* reduce) {
  uint8_t* const to = record + r.metadata_offset[which];
  if (r.format.metadata_bits == 16) {
#pragma unroll
    for (int o = 0; o < N; ++o) {
      if (index[o] >= 0) reinterpret_cast<__half*>(to)[index[o]] = saturate_half(values[o]);
    }
    return;
  }
  float low = INFINITY, high = -INFINITY;
#pragma unroll
  for (int o = 0; o < N; ++o) {
    if (index[o] < 0) continue;
    low = fminf(low, __fadd_rn(values[o], 0.0f));
    high = fmaxf(high, __fadd_rn(values[o], 0.0f));
  }
#pragma unroll
  for (int h = 16; h >= 1; h /= 2) {
    low = fminf(low, __shfl_xor_sync(kFullWarp, low, h));
    high = fmaxf(high, __shfl_xor_sync(kFullWarp, high, h));
  }
  if (threadIdx.x % 32 == 0) reduce[threadIdx.x / 32] = make_float2(low, high);
  __syncthreads();  // the warps' extremes are written
  for (int w = 0; w < kThreads / 32; ++w) {
    low = fminf(low, reduce[w].x);
    high = fmaxf(high, reduce[w].y);
  }
  __syncthreads();  // and read
  const __half low16 = saturate_half(low), step16 = saturate_half(__fdiv_rn(__fsub_rn(high, low), 255.0f));
  const float base = __half2float(low16), step = __half2float(step16);
  const float inverse = __fdiv_rn(1.0f, step);
  if (threadIdx.x == 0) {
    __half* const range = reinterpret_cast<__half*>(record + r.metadata_range_offset) + 2 * which;
    range[0] = low16;
    range[1] = step16;
  }
#pragma unroll
  for (int o = 0; o < N; ++o) {
    if (index[o] < 0) continue;
    const float units = rintf(__fmul_rn(__fsub_rn(__fadd_rn(values[o], 0.0f), base), inverse));
    to[index[o]] = step > 0.0f ? static_cast<uint8_t>(clip_value(units, 0.0f, 255.0f)) : 0;
  }
}

template <int kThreads>
__device__ __forceinline__ void write_padding(const RecordLayout& r, uint8_t* record) {
  const int used = r.metadata_range_offset + (r.format.metadata_bits == 8 ? kMetadataCount * 4 : 0);
  for (int i = used + threadIdx.x; i < r.record_bytes; i += kThreads) record[i] = 0;
}

// V also writes the padding.
template <bool kIsK, int kThreads>
__device__ __forceinline__ void write_nan(const RecordLayout& r, uint8_t* record) {
  const int begin = kIsK ? r.k_low_offset : r.v_low_offset;
  const int end = kIsK ? r.v_low_offset : r.metadata_offset[0];
  for (int i = begin + 4 * threadIdx.x; i < end; i += 4 * kThreads) *reinterpret_cast<uint32_t*>(record + i) = 0;
  const __half nan = __ushort_as_half(0x7e00);
  for (int which = kIsK ? kKScale : kVChannelScale; which <= (kIsK ? kKTokenScale : kVZero); ++which) {
    uint8_t* const at = record + r.metadata_offset[which];
    for (int i = threadIdx.x; i < r.metadata_count[which]; i += kThreads) {
      if (r.format.metadata_bits == 16) {
        reinterpret_cast<__half*>(at)[i] = nan;
      } else {
        at[i] = 0;
      }
    }
    if (r.format.metadata_bits == 8 && threadIdx.x < 2) {
      reinterpret_cast<__half*>(record + r.metadata_range_offset)[2 * which + threadIdx.x] = nan;
    }
  }
  if (!kIsK) write_padding<kThreads>(r, record);
}

}  // namespace kvarn::cuda
