// What the encoder is launched with. Plain data, copied to the device by value.
#pragma once

#include "kvarn/format.h"

namespace kvarn::cuda {

struct EncodeArgs {
  const uint8_t* staging;
  uint8_t* records;
  const int32_t* slots;
  const int32_t* blocks;
  int64_t staging_layer_stride, records_layer_stride;  // bytes
  int64_t num_slots, num_blocks;
  int num_kv_heads, head_dim, tile_tokens, dtype;
  int published;              // normalisation
  int unbiased_k, unbiased_v;  // rounding
  RecordLayout layout;
};

// Grid: (tiles * num_kv_heads, 2 operands, layers), kEncodeThreads threads.
constexpr int kEncodeThreads = 256;

struct EncodeKernel {
  const void* function = nullptr;
  int shared_bytes = 0;
};
EncodeKernel find_encode(int head_dim, int tile_tokens);

}  // namespace kvarn::cuda
