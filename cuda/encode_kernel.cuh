// The kernel around TileEncoder: one block an operand of one tile of one head of one layer.
#pragma once

#include "encode_tile.cuh"

namespace kvarn::cuda {

template <int NX, int NY, bool kFeedback>
__global__ void __launch_bounds__(kEncodeThreads, NX* NY <= 64 && NX != 0 ? 2 : 1) encode_kernel(const __grid_constant__ EncodeArgs a) {
  extern __shared__ __align__(16) uint8_t shared[];
  EncodeShared s;
  const int part_bytes = 16 * EncodeShared::part_stride(a.head_dim) * 4;
  s.part = reinterpret_cast<float*>(shared);
  s.part_c1 = reinterpret_cast<int*>(shared + part_bytes);
  s.part_c2 = reinterpret_cast<int*>(shared + 2 * part_bytes);
  s.x_weight = reinterpret_cast<float*>(shared + part_bytes + encode_union_bytes(a.head_dim, a.tile_tokens));
  s.x_mean = s.x_weight + a.head_dim;
  s.y_weight = s.x_mean + a.head_dim;
  s.y_mean = s.y_weight + a.tile_tokens;
  s.reduce = s.y_mean + a.tile_tokens;

  const int tile = blockIdx.x / a.num_kv_heads, head = blockIdx.x % a.num_kv_heads, operand = blockIdx.y, layer = blockIdx.z;
  const int64_t slot = a.slots[tile], block = a.blocks[tile];
  if (block < 0 || block >= a.num_blocks) return;
  const bool slot_exists = slot >= 0 && slot < a.num_slots;
  const int64_t tile_bytes = static_cast<int64_t>(a.tile_tokens) * a.head_dim * dtype_bytes(a.dtype);
  const uint8_t* from = a.staging + layer * a.staging_layer_stride + ((slot * 2 + operand) * a.num_kv_heads + head) * tile_bytes;
  uint8_t* record = a.records + layer * a.records_layer_stride + (block * a.num_kv_heads + head) * a.layout.record_bytes;
  if (operand == 0) {
    TileEncoder<true, NX, NY, kFeedback>(a, s, from, record).encode(slot_exists, a.unbiased_k != 0);
  } else {
    TileEncoder<false, NX, NY, kFeedback>(a, s, from, record).encode(slot_exists, a.unbiased_v != 0);
  }
}

}  // namespace kvarn::cuda
