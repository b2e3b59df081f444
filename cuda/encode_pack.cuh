// From codes in shared memory to a record's planes. docs/FORMAT.md, section 3.
#pragma once

#include "encode.h"
#include "encode_shape.cuh"

namespace kvarn::cuda {

// Of one operand. A plane's row is a token of K, a channel of V; its codes i = residue + 16n. codes: rows of words that have the codes of
// four n each, [group of four n][residue].
template <bool kIsK, class Shape>
class CodePacker {
 public:
  __device__ __forceinline__ static void pack(const uint32_t* codes, const RecordLayout& r, uint8_t* record) {
    const Plane& low = kIsK ? r.k_low : r.v_low;
    const Plane& high = kIsK ? r.k_high : r.v_high;
    uint8_t* const low_bytes = record + (kIsK ? r.k_low_offset : r.v_low_offset);
    uint8_t* const high_bytes = record + (kIsK ? r.k_high_offset : r.v_high_offset);
    if (low.bits == 8) {
      pack_plane<8>(codes, low, low_bytes, 0, false);
    } else if (low.bits == 4) {
      pack_plane<4>(codes, low, low_bytes, 0, high.bits != 0);
    } else {
      pack_plane<2>(codes, low, low_bytes, 0, high.bits != 0);
    }
    if (high.bits == 2) {
      pack_plane<2>(codes, high, high_bytes, low.bits, true);
    } else if (high.bits == 1) {
      pack_plane<1>(codes, high, high_bytes, low.bits, true);
    }
  }

 private:
  static constexpr int kPlaneRows = kIsK ? Shape::kTokens : Shape::kHeadDim, kPlaneCodes = kIsK ? Shape::kHeadDim : Shape::kTokens;
  static constexpr int kGroups = Shape::groups(kPlaneCodes), kFill = kPlaneCodes < 64 ? kPlaneCodes / 16 : 4;

  // Bytes b of four words each, for b = 0 ... 3.
  __device__ __forceinline__ static void transpose(const uint32_t* from, uint32_t* to, int stride) {
    const uint32_t low01 = __byte_perm(from[0], from[1], 0x5140), low23 = __byte_perm(from[2], from[3], 0x5140);
    const uint32_t high01 = __byte_perm(from[0], from[1], 0x7362), high23 = __byte_perm(from[2], from[3], 0x7362);
    to[0] = __byte_perm(low01, low23, 0x5410);
    to[stride] = __byte_perm(low01, low23, 0x7632);
    if (kFill < 4) return;
    to[2 * stride] = __byte_perm(high01, high23, 0x5410);
    to[3 * stride] = __byte_perm(high01, high23, 0x7632);
  }
  template <int kBits>
  __device__ __forceinline__ static void pack_plane(const uint32_t* codes, const Plane& plane, uint8_t* to, int shift, bool masked) {
    constexpr int kQuads = kBits == 1 ? 4 : 8 / kBits;  // of 16 residues in an output word
    constexpr int kWide = 4 / kQuads;                   // output words of the same n
    constexpr uint32_t kMask = ((1u << kBits) - 1u) * 0x01010101u;
    for (int item = threadIdx.x; item < kPlaneRows * kGroups; item += Shape::kThreads) {
      const int row = item % kPlaneRows, group = item / kPlaneRows;
      uint32_t w[16], out[16];
#pragma unroll
      for (int l = 0; l < 16; l += 4) {
        const Four<uint32_t> v = *reinterpret_cast<const Four<uint32_t>*>(codes + row * Shape::code_stride(kPlaneCodes) + 16 * group + l);
#pragma unroll
        for (int j = 0; j < 4; ++j) w[l + j] = masked ? v.v[j] >> shift & kMask : v.v[j];
      }
#pragma unroll
      for (int h = 0; h < kWide; ++h) {
        uint32_t quads[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          quads[j] = w[4 * kQuads * h + j];
#pragma unroll
          for (int p = 1; p < kQuads; ++p) quads[j] |= w[4 * kQuads * h + 4 * p + j] << (p * kBits);
        }
        transpose(quads, out + h, kWide);
      }
      int count = kFill * kWide, first = 4 * group * kWide;
      if constexpr (kBits == 1) {
#pragma unroll
        for (int b = 0; b < kFill / 2; ++b) out[b] = out[2 * b] | out[2 * b + 1] << 4;
        count = kFill / 2;
        first = 2 * group;
      }
      if constexpr (kBits != 1 && kFill * kWide >= 4) {
#pragma unroll
        for (int v = 0; v < kFill * kWide; v += 4) {
          *reinterpret_cast<uint4*>(to + plane.word_offset(row, first + v)) = make_uint4(out[v], out[v + 1], out[v + 2], out[v + 3]);
        }
      } else {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          if (v < count) *reinterpret_cast<uint32_t*>(to + plane.word_offset(row, first + v)) = out[v];
        }
      }
    }
  }
};

}  // namespace kvarn::cuda
