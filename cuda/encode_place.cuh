// What a block of an encode kernel reads and writes: one operand of one tile of one head of one layer.
#pragma once

#include "encode.h"
#include "numbers.cuh"

namespace kvarn::cuda {

struct EncodePlace {
  const uint8_t* tile;  // [tile_tokens][head_dim]; null where there is no such slot
  uint8_t* record;      // null where there is no such block
};
__device__ __forceinline__ EncodePlace encode_place(const EncodeArgs& a) {
  const int tile = blockIdx.x / a.num_kv_heads, head = blockIdx.x % a.num_kv_heads, operand = blockIdx.y, layer = blockIdx.z;
  const int64_t slot = a.slots[tile], block = a.blocks[tile];
  if (block < 0 || block >= a.num_blocks) return {nullptr, nullptr};
  const int64_t tile_bytes = static_cast<int64_t>(a.tile_tokens) * a.head_dim * dtype_bytes(a.dtype);
  const uint8_t* const from = a.staging + layer * a.staging_layer_stride + ((slot * 2 + operand) * a.num_kv_heads + head) * tile_bytes;
  uint8_t* const record = a.records + layer * a.records_layer_stride + (block * a.num_kv_heads + head) * a.layout.record_bytes;
  return {slot >= 0 && slot < a.num_slots ? from : nullptr, record};
}
// The operand's factor, or null.
__device__ __forceinline__ const float* encode_factor(const EncodeArgs& a, bool is_k) {
  const float* const factors = is_k ? a.k_feedback : a.v_feedback;
  const int64_t head = static_cast<int64_t>(blockIdx.z) * a.num_kv_heads + blockIdx.x % a.num_kv_heads;
  return factors == nullptr ? nullptr : factors + head * a.head_dim * a.head_dim;
}

}  // namespace kvarn::cuda
