// Single values of a record, any format. For the paths where speed is not the point.
#pragma once

#include <cuda_fp16.h>

#include "kvarn/format.h"

namespace kvarn::cuda {

__device__ __forceinline__ int plane_code(const uint8_t* plane_bytes, const Plane& plane, int row, int i) {
  // code_word and code_shift for a width known at run time only, without their divisions
  const int log = (plane.bits >> 1) - (plane.bits >> 3), within = i & (31 >> log);
  const uint32_t word = *reinterpret_cast<const uint32_t*>(plane_bytes + plane.word_offset(row, i >> (5 - log)));
  return static_cast<int>(word >> ((within & 3) * 8 + (within >> 2 << log)) & ((1u << plane.bits) - 1u));
}
__device__ __forceinline__ int k_code(const uint8_t* record, const RecordLayout& r, int token, int channel) {
  int code = plane_code(record + r.k_low_offset, r.k_low, token, channel);
  if (r.k_high.bits != 0) code += plane_code(record + r.k_high_offset, r.k_high, token, channel) << r.k_low.bits;
  return code;
}
__device__ __forceinline__ int v_code(const uint8_t* record, const RecordLayout& r, int token, int channel) {
  int code = plane_code(record + r.v_low_offset, r.v_low, channel, token);
  if (r.v_high.bits != 0) code += plane_code(record + r.v_high_offset, r.v_high, channel, token) << r.v_low.bits;
  return code;
}
__device__ __forceinline__ float metadata_value(const uint8_t* record, const RecordLayout& r, int which, int i) {
  if (r.format.metadata_bits == 16) return __half2float(reinterpret_cast<const __half*>(record + r.metadata_offset[which])[i]);
  const __half* range = reinterpret_cast<const __half*>(record + r.metadata_range_offset) + 2 * which;
  return __fadd_rn(__half2float(range[0]), __fmul_rn(static_cast<float>(record[r.metadata_offset[which] + i]), __half2float(range[1])));
}

// Where the six vectors lie when a kernel has spread them out as floats: [kMetadataCount] one after the other.
struct MetadataFloats {
  int offset[kMetadataCount];
  int count;
};
__host__ __device__ constexpr MetadataFloats metadata_floats(int head_dim, int tile_tokens) {
  MetadataFloats m{};
  for (int i = 0; i < kMetadataCount; ++i) {
    m.offset[i] = m.count;
    m.count += i == kKScale || i == kKZero || i == kVChannelScale ? head_dim : tile_tokens;
  }
  return m;
}
__device__ __forceinline__ void spread_metadata(const uint8_t* record, const RecordLayout& r, const MetadataFloats& m, float* to,
                                                int thread, int threads) {
  for (int which = 0; which < kMetadataCount; ++which) {
    for (int i = thread; i < r.metadata_count[which]; i += threads) to[m.offset[which] + i] = metadata_value(record, r, which, i);
  }
}

}  // namespace kvarn::cuda
