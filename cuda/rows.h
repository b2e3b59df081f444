// What the row kernels (hadamard, append, decode) are launched with. Plain data, copied to the device by value.
#pragma once

#include "kvarn/format.h"
#include "rotation.h"

namespace kvarn::cuda {

constexpr int kRowThreads = 256;  // 8 warps, one row each at a time

struct HadamardArgs {
  const void* x;
  void* out;
  int64_t rows;
  int dtype, inverse;
  Rotation rotation;
};

struct AppendArgs {
  const void* k;
  const void* v;
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;  // values
  const int64_t* slot_mapping;
  int64_t num_tokens;
  void* staging;
  int64_t num_slots;
  int num_kv_heads, tile_tokens, dtype, rotated;
  Rotation rotation;
};

struct DecodeArgs {
  const uint8_t* records;
  int64_t num_blocks;
  const int32_t* blocks;
  const int32_t* destinations;
  int64_t num_destinations;
  void* k;
  void* v;
  int64_t tile_stride, head_stride;  // values
  int num_kv_heads, dtype, rotated;
  RecordLayout layout;
  Rotation rotation;
};

// Each needs rotation_bytes(head_dim) of shared memory; decode needs decode_bytes() besides. Grids: rows in steps of 8 for hadamard and
// append, (tiles * num_kv_heads, 2 operands) for decode.
const void* find_hadamard(int head_dim);
const void* find_append(int head_dim);
const void* find_decode(int head_dim);
constexpr int rotation_bytes(int head_dim) { return kRowThreads / 32 * head_dim * 4; }
constexpr int decode_bytes(int head_dim, int tile_tokens) { return 3 * (head_dim + tile_tokens) * 4; }  // six vectors as floats

}  // namespace kvarn::cuda
