// One record to K and V of one tile: fma(code, scale, zero) * other in fp32, then the inverse rotation. Any bytes decode to something.
#pragma once

#include "cpu/kernels.h"
#include "cpu/metadata-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/rotate-inl.h"
#include "cpu/scratch.h"

namespace kvarn::cpu {
namespace {

// kLanes rows of fp32 values [kLanes][head_dim] to `out`, at token `token`.
inline void store_rows(const DecodeTile& tile, const DecodeScratch& s, void* out, int token) {
  const int channels = tile.layout->head_dim;
  const int64_t at = static_cast<int64_t>(token) * channels;
  if (!tile.rotated) {
    const int value_bytes = tile.dtype == KVARN_F32 ? 4 : 2;
    rotate_rows({s.rows, static_cast<uint8_t*>(out) + at * value_bytes, kLanes, channels, channels, KVARN_F32, tile.dtype, channels, true,
                 s.rotation});
    return;
  }
  with_dtype(tile.dtype, [&]<int Dtype>() {
    for (int i = 0; i < kLanes * channels; i += kLanes) store_values<Dtype>(out, at + i, load(s.rows + i));
  });
}

inline void decode_k(const DecodeTile& tile, const DecodeScratch& s) {
  const RecordLayout& layout = *tile.layout;
  const int channels = layout.head_dim;
  load_metadata(tile.record, layout, kKScale, s.channel_scale);
  load_metadata(tile.record, layout, kKZero, s.channel_zero);
  load_metadata(tile.record, layout, kKTokenScale, s.token_scale);
  for (int token = 0; token < layout.format.tile_tokens; token += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      unpack_row(layout.k_low, layout.k_high, tile.record + layout.k_low_offset, tile.record + layout.k_high_offset, token + i, s.codes);
      const F32 other = broadcast(s.token_scale[token + i]);
      float* const row = s.rows + i * channels;
      for (int d = 0; d < channels; d += kLanes) {
        store(row + d, fma(to_f32(load_u8(s.codes + d)), load(s.channel_scale + d), load(s.channel_zero + d)) * other);
      }
    }
    store_rows(tile, s, tile.k, token);
  }
}

inline void decode_v(const DecodeTile& tile, const DecodeScratch& s) {
  const RecordLayout& layout = *tile.layout;
  const int channels = layout.head_dim;
  const int tokens = layout.format.tile_tokens;
  const int64_t stride = code_row_stride(tokens);
  load_metadata(tile.record, layout, kVScale, s.token_scale);
  load_metadata(tile.record, layout, kVZero, s.token_zero);
  load_metadata(tile.record, layout, kVChannelScale, s.channel_other);
  for (int d = 0; d < channels; ++d) {
    unpack_row(layout.v_low, layout.v_high, tile.record + layout.v_low_offset, tile.record + layout.v_high_offset, d, s.codes + d * stride);
  }
  for (int token = 0; token < tokens; token += kLanes) {
    const F32 scale = load(s.token_scale + token);
    const F32 zeros = load(s.token_zero + token);
    for (int d = 0; d < channels; d += kLanes) {
      F32 block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] = fma(to_f32(load_u8(s.codes + (d + i) * stride + token)), scale, zeros) * broadcast(s.channel_other[d + i]);
      }
      transpose(block);
      for (int i = 0; i < kLanes; ++i) store(s.rows + i * channels + d, block[i]);
    }
    store_rows(tile, s, tile.v, token);
  }
}

inline void decode_tile(const DecodeTile& tile) {
  const DecodeScratch s = decode_scratch(tile.scratch, tile.layout->head_dim, tile.layout->format.tile_tokens, kRotateScratchFloats);
  if (tile.k != nullptr) decode_k(tile, s);
  if (tile.v != nullptr) decode_v(tile, s);
}

}  // namespace
}  // namespace kvarn::cpu
