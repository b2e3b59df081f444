// encode: a block takes one operand of one tile. Grid: (tiles * num_kv_heads, 2 operands, layers), kEncodeThreads threads.
#include <amd.h>

#include "encode_feedback.h"

namespace kvarn::cuda {

struct EncodePlace {
  const uint8_t* tile;
  uint8_t* record;  // null: the destination is no block
  bool slot_exists;
};
__device__ __forceinline__ EncodePlace encode_place(const EncodeArgs& a, int operand) {
  const int tile = blockIdx.x / a.num_kv_heads, head = blockIdx.x % a.num_kv_heads, layer = blockIdx.z;
  const int64_t slot = a.slots[tile], block = a.blocks[tile];
  const int64_t tile_bytes = static_cast<int64_t>(a.tile_tokens) * a.head_dim * dtype_bytes(a.dtype);
  EncodePlace place;
  place.slot_exists = slot >= 0 && slot < a.num_slots;
  place.tile = a.staging + layer * a.staging_layer_stride + ((slot * 2 + operand) * a.num_kv_heads + head) * tile_bytes;
  place.record = block < 0 || block >= a.num_blocks
                     ? nullptr
                     : a.records + layer * a.records_layer_stride + (block * a.num_kv_heads + head) * a.layout.record_bytes;
  return place;
}

// Phases read the kernel's arguments anew, so that none of them is kept in a register from one to the next.
template <class T, bool kIsK>
__device__ __forceinline__ void encode_operand(uint8_t* shared) {
  float* const vectors = reinterpret_cast<float*>(shared);
  const auto encoder = [&](const EncodeArgs& a, const EncodePlace& place) {
    const T* const values = reinterpret_cast<const T*>(place.tile);
    const int r = kIsK ? a.head_dim : a.tile_tokens, c = kIsK ? a.tile_tokens : a.head_dim;
    return PlainEncoder<T, kIsK>{{values, a.head_dim, a.tile_tokens},
                                 {values, a.head_dim, a.tile_tokens},
                                 balance_at(vectors, r),
                                 balance_at(vectors + 5 * r, c),
                                 reinterpret_cast<Extremes*>(vectors + 5 * (r + c))};
  };
  // Of the operand's head, or null.
  const auto factor = [](const EncodeArgs& a) {
    const float* const factors = kIsK ? a.k_feedback : a.v_feedback;
    const int64_t head = static_cast<int64_t>(blockIdx.z) * a.num_kv_heads + blockIdx.x % a.num_kv_heads;
    return factors == nullptr ? nullptr : factors + head * a.head_dim * a.head_dim;
  };
  const auto levels = [](const EncodeArgs& a) { return (1 << (kIsK ? a.layout.format.k_bits : a.layout.format.v_bits)) - 1; };
  constexpr int kOperand = kIsK ? 0 : 1;
  float size = 1.0f;
  {
    const EncodeArgs& a = kernel_args<EncodeArgs>();
    const EncodePlace place = encode_place(a, kOperand);
    if (place.record == nullptr) return;
    const auto e = encoder(a, place);
    const float* const f = factor(a);
    if (!place.slot_exists || !e.finite() ||
        (f != nullptr && !orders_channels<kEncodeThreads>(f, a.head_dim, reinterpret_cast<unsigned*>(vectors)))) {
      PlainEncoder<T, kIsK>::write_nan(a.layout, place.record);
      return;
    }
    if (a.published == 0) size = e.size_of_tile();
    e.normalise(size);
  }
  {
    const EncodeArgs& a = kernel_args<EncodeArgs>();
    const bool unbiased = (kIsK ? a.unbiased_k : a.unbiased_v) != 0;
    encoder(a, encode_place(a, kOperand)).fit_rows(unbiased, levels(a), factor(a) != nullptr);
  }
  if (factor(kernel_args<EncodeArgs>()) == nullptr) {
    const EncodeArgs& a = kernel_args<EncodeArgs>();
    const EncodePlace place = encode_place(a, kOperand);
    encoder(a, place).round_and_pack(a.layout, place.record, static_cast<float>(levels(a)));
  } else {
    const EncodeArgs& a = kernel_args<EncodeArgs>();
    const EncodePlace place = encode_place(a, kOperand);
    float* const errors = vectors + encode_plain_bytes(a.head_dim, a.tile_tokens) / 4;
    uint8_t* const codes = reinterpret_cast<uint8_t*>(errors + feedback_tokens(a.head_dim) * feedback_stride(a.head_dim));
    const Feedback<T, kIsK> feedback{encoder(a, place), factor(a), static_cast<float>(levels(a)), errors, codes};
    feedback.round_and_pack(a.layout, place.record);
  }
  {
    // Step 4: half of the tile's size moves from the row scales into the column scales.
    const EncodeArgs& a = kernel_args<EncodeArgs>();
    const EncodePlace place = encode_place(a, kOperand);
    const auto e = encoder(a, place);
    const int exponent = a.published != 0 ? 0 : ilogbf(size) >> 1;
    e.write_vector(a.layout, place.record, e.kRowScale, e.row.best, -exponent);
    e.write_vector(a.layout, place.record, e.kRowZero, e.row.zero, -exponent);
    e.write_vector(a.layout, place.record, e.kColumnScale, e.column.best, exponent);
    if (!kIsK) e.write_padding(a.layout, place.record);
  }
}

#define KVARN_ENCODE_KERNEL(name, T)                                                             \
  extern "C" __global__ void __launch_bounds__(kEncodeThreads) kvarn_encode_##name(EncodeArgs) { \
    extern __shared__ __align__(16) uint8_t shared[];                                            \
    if (blockIdx.y == 0) {                                                                       \
      encode_operand<T, true>(shared);                                                           \
    } else {                                                                                     \
      encode_operand<T, false>(shared);                                                          \
    }                                                                                            \
  }

KVARN_ENCODE_KERNEL(f32, float)
KVARN_ENCODE_KERNEL(f16, __half)
KVARN_ENCODE_KERNEL(bf16, __nv_bfloat16)

}  // namespace kvarn::cuda
