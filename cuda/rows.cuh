// hadamard, append and decode: one warp a row of head_dim values. A row is read once and written once; the rotation happens in registers
// when head_dim is a power of two, else in shared memory.
#pragma once

#include "numbers.cuh"
#include "record_values.cuh"
#include "rotate.cuh"
#include "rows.h"

namespace kvarn::cuda {

constexpr int kRowWarps = kRowThreads / 32;

// A row over the lanes of a warp. D: head_dim when it is a power of two, lane l then holds [l*E, (l+1)*E); 0: another one, lane + 32*i.
template <int D>
struct Row {
  static constexpr int E = D == 0 ? kMostOddHeadDim / 32 : D / 32;
  float x[E];

  static __device__ __forceinline__ int index(int lane, int i) { return D == 0 ? lane + 32 * i : lane * E + i; }
  static __device__ __forceinline__ int count(const Rotation& r) { return D == 0 ? r.head_dim : D; }

  // f(i, channel)
  template <class F>
  static __device__ __forceinline__ void for_each(const Rotation& r, int lane, F f) {
#pragma unroll
    for (int i = 0; i < E; ++i) {
      if (index(lane, i) < count(r)) f(i, index(lane, i));
    }
  }
  // Bytes a lane holds when it can move them in words of `Word`.
  template <class Word>
  static __device__ __forceinline__ bool fits(const void* p, int bytes) {
    return D != 0 && bytes % sizeof(Word) == 0 && reinterpret_cast<uintptr_t>(p) % sizeof(Word) == 0;
  }
  template <class T>
  __device__ __forceinline__ void load_as(const void* row, const Rotation& r, int lane) {
    const T* from = static_cast<const T*>(row);
    if (fits<uint2>(row, E * sizeof(T))) {
      constexpr int kWords = E * sizeof(T) < 8 ? 1 : E * sizeof(T) / 8;
      uint2 words[kWords];
#pragma unroll
      for (int w = 0; w < kWords; ++w) words[w] = reinterpret_cast<const uint2*>(from + lane * E)[w];
#pragma unroll
      for (int i = 0; i < E; ++i) x[i] = static_cast<float>(reinterpret_cast<const T*>(words)[i]);
    } else {
      for_each(r, lane, [&](int i, int d) { x[i] = static_cast<float>(from[d]); });
    }
  }
  __device__ __forceinline__ void load(const void* p, int64_t at, int dtype, const Rotation& r, int lane) {
    if (dtype == KVARN_F16) {
      load_as<__half>(static_cast<const __half*>(p) + at, r, lane);
    } else if (dtype == KVARN_BF16) {
      load_as<__nv_bfloat16>(static_cast<const __nv_bfloat16*>(p) + at, r, lane);
    } else {
      load_as<float>(static_cast<const float*>(p) + at, r, lane);
    }
  }
  static __device__ __forceinline__ void round_to(float x, __half& y) { y = __float2half_rn(x); }
  static __device__ __forceinline__ void round_to(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
  static __device__ __forceinline__ void round_to(float x, float& y) { y = x; }
  template <class T>
  __device__ __forceinline__ void store_as(void* row, const Rotation& r, int lane) const {
    T* to = static_cast<T*>(row);
    if (fits<uint2>(row, E * sizeof(T))) {
      constexpr int kWords = E * sizeof(T) < 8 ? 1 : E * sizeof(T) / 8;
      uint2 words[kWords];
#pragma unroll
      for (int i = 0; i < E; ++i) round_to(x[i], reinterpret_cast<T*>(words)[i]);
#pragma unroll
      for (int w = 0; w < kWords; ++w) reinterpret_cast<uint2*>(to + lane * E)[w] = words[w];
    } else {
      for_each(r, lane, [&](int i, int d) { round_to(x[i], to[d]); });
    }
  }
  __device__ __forceinline__ void store(void* p, int64_t at, int dtype, const Rotation& r, int lane) const {
    if (dtype == KVARN_F16) {
      store_as<__half>(static_cast<__half*>(p) + at, r, lane);
    } else if (dtype == KVARN_BF16) {
      store_as<__nv_bfloat16>(static_cast<__nv_bfloat16*>(p) + at, r, lane);
    } else {
      store_as<float>(static_cast<float*>(p) + at, r, lane);
    }
  }
  __device__ __forceinline__ void rotate(const Rotation& r, bool inverse, int lane, float* scratch) {
    if constexpr (D != 0) {
      rotate_registers(x, lane, r.scale);
    } else {
      for_each(r, lane, [&](int i, int d) { scratch[d] = x[i]; });
      __syncwarp();
      rotate_shared(scratch, r, inverse, lane);
      for_each(r, lane, [&](int i, int d) { x[i] = scratch[d]; });
      __syncwarp();
    }
  }
};

// scratch: rotation_bytes() of shared memory, and decode_bytes() for decode_rows.
template <int D>
__device__ __forceinline__ void hadamard_rows(const HadamardArgs& a, float* scratch) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + warp; row < a.rows;
       row += static_cast<int64_t>(gridDim.x) * kRowWarps) {
    Row<D> x;
    const int64_t at = row * Row<D>::count(a.rotation);
    x.load(a.x, at, a.dtype, a.rotation, lane);
    x.rotate(a.rotation, a.inverse != 0, lane, scratch + warp * a.rotation.head_dim);
    x.store(a.out, at, a.dtype, a.rotation, lane);
  }
}

template <int D>
__device__ __forceinline__ void append_rows(const AppendArgs& a, float* scratch) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t rows = a.num_tokens * a.num_kv_heads * 2;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + warp; row < rows; row += static_cast<int64_t>(gridDim.x) * kRowWarps) {
    const int64_t token = row / (2 * a.num_kv_heads);
    const int head = static_cast<int>(row % (2 * a.num_kv_heads) / 2), operand = static_cast<int>(row % 2);
    const int64_t place = a.slot_mapping[token];
    // A place outside the staging memory is skipped like a negative one: there is nowhere to put a NaN.
    if (place < 0 || place / a.tile_tokens >= a.num_slots) continue;
    Row<D> x;
    if (operand == 0) {
      x.load(a.k, token * a.k_token_stride + head * a.k_head_stride, a.dtype, a.rotation, lane);
    } else {
      x.load(a.v, token * a.v_token_stride + head * a.v_head_stride, a.dtype, a.rotation, lane);
    }
    if (a.rotated == 0) x.rotate(a.rotation, false, lane, scratch + warp * a.rotation.head_dim);
    const int64_t at = (((place / a.tile_tokens * 2 + operand) * a.num_kv_heads + head) * a.tile_tokens + place % a.tile_tokens) *
                       Row<D>::count(a.rotation);
    x.store(a.staging, at, a.dtype, a.rotation, lane);
  }
}

template <int D>
__device__ __forceinline__ void decode_rows(const DecodeArgs& a, float* scratch) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t tile = blockIdx.x / a.num_kv_heads;
  const int head = static_cast<int>(blockIdx.x % a.num_kv_heads), operand = static_cast<int>(blockIdx.y);
  void* const out = operand == 0 ? a.k : a.v;
  const int64_t destination = a.destinations != nullptr ? a.destinations[tile] : tile;
  if (out == nullptr || destination < 0 || destination >= a.num_destinations) return;
  const RecordLayout& r = a.layout;
  const int64_t block = a.blocks[tile];
  const bool exists = block >= 0 && block < a.num_blocks;
  const uint8_t* record = a.records + ((exists ? block : 0) * a.num_kv_heads + head) * r.record_bytes;
  const MetadataFloats m = metadata_floats(r.head_dim, r.format.tile_tokens);
  float* const metadata = scratch + kRowWarps * r.head_dim;
  if (exists) spread_metadata(record, r, m, metadata, threadIdx.x, kRowThreads);
  __syncthreads();  // metadata is spread out
  for (int t = warp; t < r.format.tile_tokens; t += kRowWarps) {
    Row<D> x;
    const auto for_each = [&](auto value) { Row<D>::for_each(a.rotation, lane, [&](int i, int d) { x.x[i] = value(d); }); };
    if (!exists) {
      for_each([&](int) { return NAN; });
    } else if (operand == 0) {
      for_each([&](int d) {
        return __fmul_rn(
            __fmaf_rn(static_cast<float>(k_code(record, r, t, d)), metadata[m.offset[kKScale] + d], metadata[m.offset[kKZero] + d]),
            metadata[m.offset[kKTokenScale] + t]);
      });
    } else {
      for_each([&](int d) {
        return __fmul_rn(
            __fmaf_rn(static_cast<float>(v_code(record, r, t, d)), metadata[m.offset[kVScale] + t], metadata[m.offset[kVZero] + t]),
            metadata[m.offset[kVChannelScale] + d]);
      });
    }
    if (a.rotated == 0) x.rotate(a.rotation, true, lane, scratch + warp * r.head_dim);
    x.store(out, destination * a.tile_stride + head * a.head_stride + static_cast<int64_t>(t) * r.head_dim, a.dtype, a.rotation, lane);
  }
}

}  // namespace kvarn::cuda
