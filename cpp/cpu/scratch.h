// How a worker's scratch memory is divided. Included by kernels and by the plan, which sizes it.
#pragma once

#include <cstdint>

#include "kvarn/format.h"

#if !defined(KVARN_INLINE)
#define KVARN_INLINE inline __attribute__((always_inline))
#endif

namespace kvarn::cpu {
namespace {

constexpr int kMaxLanes = 16;
constexpr int kMaxFeedbackSteps = 8;

// Bytes between rows of codes, one per byte: the packing works on whole words of up to 32 codes.
KVARN_INLINE int64_t code_row_stride(int codes) { return (codes + 31) / 32 * 32; }

// Hands out 64-byte aligned pieces. With a null base it only counts.
struct ScratchPieces {
  uint8_t* base;
  int64_t bytes = 0;

  template <class T>
  KVARN_INLINE T* take(int64_t count) {
    T* const piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + bytes);
    bytes += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
};

struct EncodeScratch {
  float *channel_lanes, *token_lanes;  // the operand twice, padded by one value a lane
  float* balanced;                     // [columns][kLanes]
  float *row_scale, *row_weight, *row_spread, *row_best;
  float *column_scale, *column_weight, *column_spread, *column_best;
  float *row_mean, *row_zero;  // for feedback, as the panels
  float* panels;
  int32_t* order;  // [head_dim]: the channel of each step of feedback
  uint8_t* codes;
  int64_t bytes;
};

// The factor of feedback in blocks of steps, each with the rows above and beside it.
KVARN_INLINE int64_t feedback_panel_floats(int head_dim) { return static_cast<int64_t>(head_dim) * (head_dim + kMaxFeedbackSteps) / 2; }

KVARN_INLINE EncodeScratch encode_scratch(void* base, int head_dim, int tile_tokens) {
  ScratchPieces pieces{static_cast<uint8_t*>(base)};
  const int64_t values = static_cast<int64_t>(head_dim) * tile_tokens;
  const int64_t longest = head_dim > tile_tokens ? head_dim : tile_tokens;
  EncodeScratch s;
  s.channel_lanes = pieces.take<float>(values + head_dim);
  s.token_lanes = pieces.take<float>(values + tile_tokens);
  s.balanced = pieces.take<float>(longest * kMaxLanes);
  s.row_scale = pieces.take<float>(longest);
  s.row_weight = pieces.take<float>(longest);
  s.row_spread = pieces.take<float>(longest);
  s.row_best = pieces.take<float>(longest);
  s.column_scale = pieces.take<float>(longest);
  s.column_weight = pieces.take<float>(longest);
  s.column_spread = pieces.take<float>(longest);
  s.column_best = pieces.take<float>(longest);
  s.row_mean = pieces.take<float>(longest);
  s.row_zero = pieces.take<float>(longest);
  s.panels = pieces.take<float>(feedback_panel_floats(head_dim));
  s.order = pieces.take<int32_t>(head_dim);
  // K: a row per token over channels; V: a row per channel over tokens.
  const int64_t k_codes = tile_tokens * code_row_stride(head_dim);
  const int64_t v_codes = head_dim * code_row_stride(tile_tokens);
  s.codes = pieces.take<uint8_t>(k_codes > v_codes ? k_codes : v_codes);
  s.bytes = pieces.bytes;
  return s;
}

struct DecodeScratch {
  uint8_t* codes;
  float *channel_scale, *channel_zero, *channel_other;  // [head_dim]
  float *token_scale, *token_zero;                      // [tile_tokens]
  float* rows;                                          // [kLanes][head_dim]
  float* rotation;
  int64_t bytes;
};

KVARN_INLINE DecodeScratch decode_scratch(void* base, int head_dim, int tile_tokens, int64_t rotation_floats) {
  ScratchPieces pieces{static_cast<uint8_t*>(base)};
  DecodeScratch s;
  const int64_t k_codes = tile_tokens * code_row_stride(head_dim);
  const int64_t v_codes = head_dim * code_row_stride(tile_tokens);
  s.codes = pieces.take<uint8_t>(k_codes > v_codes ? k_codes : v_codes);
  s.channel_scale = pieces.take<float>(head_dim);
  s.channel_zero = pieces.take<float>(head_dim);
  s.channel_other = pieces.take<float>(head_dim);
  s.token_scale = pieces.take<float>(tile_tokens);
  s.token_zero = pieces.take<float>(tile_tokens);
  s.rows = pieces.take<float>(static_cast<int64_t>(kMaxLanes) * head_dim);
  s.rotation = pieces.take<float>(rotation_floats);
  s.bytes = pieces.bytes;
  return s;
}

}  // namespace
}  // namespace kvarn::cpu
