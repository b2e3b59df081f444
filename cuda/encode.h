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
  int published;                         // normalisation
  int unbiased_k, unbiased_v;            // rounding
  const float *k_feedback, *v_feedback;  // [layers][num_kv_heads][head_dim][head_dim], or null
  RecordLayout layout;
};

// Grid: (tiles * num_kv_heads, 2 operands, layers). Threads of the kernel that takes any shape.
constexpr int kEncodeThreads = 256;

// Shared memory: partial sums; sums of codes, or the codes; scales and means of channels and tokens; row means of tiles outside registers.
KVARN_HD constexpr int encode_union_bytes(int head_dim, int tile_tokens) {
  const int parts = 2 * 16 * (head_dim + 16) * 4;
  const int k_codes = tile_tokens * (head_dim + 4), v_codes = head_dim * (tile_tokens + 4);
  const int codes = k_codes > v_codes ? k_codes : v_codes;
  return ((codes > parts ? codes : parts) + 15) & ~15;
}
KVARN_HD constexpr int encode_shared_bytes(int head_dim, int tile_tokens) {
  return 16 * (head_dim + 16) * 4 + encode_union_bytes(head_dim, tile_tokens) + (2 * head_dim + 2 * tile_tokens + 32) * 4 +
         (head_dim > tile_tokens ? head_dim : tile_tokens) * 4;
}

struct EncodeKernel {
  const void* function = nullptr;
  int shared_bytes = 0;
  int threads = 0;
};
// feedback: the kernel that can take factors; the other one is quicker without.
EncodeKernel find_encode(int head_dim, int tile_tokens, bool feedback);

}  // namespace kvarn::cuda
