// Error feedback: an operand is rounded again channel by channel, and each channel's error is spread over the token's channels still to
// come; docs/FORMAT.md gives the order of every operation.
//
// Tokens lie in lanes. A step's value takes the errors of all steps before it in rising order, so that a block of steps can gather
// them in registers: D^2 / 2 fused multiply-adds a token, each with half a load of the factor and a quarter of an error.
#pragma once

#include "cpu/scratch.h"
#include "cpu/sums-inl.h"

namespace kvarn::cpu {
namespace {

constexpr int kFeedbackSteps = kLanes >= 16 ? 8 : 4;  // of one block; each takes a channel
constexpr int kFeedbackVectors = 2;                   // of tokens that are rounded together
static_assert(kFeedbackSteps <= kMaxFeedbackSteps && kLanes % kFeedbackSteps == 0);

// K: rows are channels and columns tokens; V: the reverse.
struct Feedback {
  int channels, tokens;
  const float* factor;                // [channels][channels], read above the diagonal
  const int32_t* order;               // [channels]: the channel of each step
  float* token_lanes;                 // the operand; codes take its place
  const float *row_mean, *row_scale;  // x = balanced value - row_mean is rounded to the grid code * row_scale + row_zero
  const float* row_zero;
  const float *column_scale, *column_weight;
  float levels;
  float* panels;  // the factor as it is read, feedback_panel_floats
  float* errors;  // [steps][kFeedbackVectors][kLanes]
  uint8_t* codes;
  int64_t code_stride;
};

// Reads the channels of steps from a factor's diagonal. False unless every channel has its step.
inline bool read_order(const float* factor, int channels, int32_t* order) {
  uint32_t taken[kMaxHeadDim / 32] = {};
  for (int k = 0; k < channels; ++k) {
    const float entry = factor[static_cast<int64_t>(k) * (channels + 1)];
    if (!(entry >= 0.0f && entry < static_cast<float>(channels))) return false;
    order[k] = static_cast<int32_t>(entry);
    const uint32_t bit = 1u << order[k] % 32;
    if (static_cast<float>(order[k]) != entry || (taken[order[k] / 32] & bit) != 0) return false;
    taken[order[k] / 32] |= bit;
  }
  return true;
}

// For each block of steps the rows above and beside it, in V weighted with the channels' weights.
template <bool kIsK>
inline void pack_factor(const Feedback& f) {
  float* panel = f.panels;
  for (int first = 0; first < f.channels; first += kFeedbackSteps) {
    for (int i = 0; i < first + kFeedbackSteps; ++i) {
      const float* const row = f.factor + static_cast<int64_t>(i) * f.channels + first;
      for (int j = 0; j < kFeedbackSteps; ++j) panel[j] = kIsK ? row[j] : row[j] * f.column_weight[f.order[first + j]];
      panel += kFeedbackSteps;
    }
  }
}

// kFeedbackVectors * kLanes tokens from `token` on.
template <bool kIsK>
__attribute__((noinline)) void feed_back_tokens(const Feedback& f, int token) {
  constexpr int kJ = kFeedbackSteps, kT = kFeedbackVectors;
  const F32 levels = broadcast(f.levels);
  const auto of_tokens = [&](const float* values, int t) { return load(values + token + t * kLanes); };
  const auto place = [&](int channel, int t) { return block_at(f.token_lanes, token + t * kLanes, f.channels) + channel * kLanes; };
  const float* panel = f.panels;
  for (int first = 0; first < f.channels; first += kJ) {
    F32 x[kJ][kT];
    KVARN_UNROLL for (int j = 0; j < kJ; ++j) {
      const int channel = f.order[first + j];
      KVARN_UNROLL for (int t = 0; t < kT; ++t) {
        const F32 weight = kIsK ? of_tokens(f.column_weight, t) : broadcast(f.column_weight[channel]);
        const F32 mean = kIsK ? broadcast(f.row_mean[channel]) : of_tokens(f.row_mean, t);
        x[j][t] = load(place(channel, t)) * weight - mean;
      }
    }
    const float* error = f.errors;
#pragma GCC unroll 1
    for (int i = 0; i < first; ++i, panel += kJ, error += kT * kLanes) {
      F32 e[kT];
      KVARN_UNROLL for (int t = 0; t < kT; ++t) e[t] = load(error + t * kLanes);
      KVARN_UNROLL for (int j = 0; j < kJ; ++j) {
        const F32 share = broadcast(panel[j]);
        KVARN_UNROLL for (int t = 0; t < kT; ++t) x[j][t] = fma(share, e[t], x[j][t]);
      }
    }
    KVARN_UNROLL for (int i = 0; i < kJ; ++i, panel += kJ) {
      const int channel = f.order[first + i];
      KVARN_UNROLL for (int t = 0; t < kT; ++t) {
        const F32 scale = kIsK ? broadcast(f.row_scale[channel]) : of_tokens(f.row_scale, t);
        const F32 zero_point = kIsK ? broadcast(f.row_zero[channel]) : of_tokens(f.row_zero, t);
        const F32 code = clamp(round_even((x[i][t] - zero_point) * (broadcast(1.0f) / scale)), zero(), levels);
        F32 e = fma(code, scale, zero_point) - x[i][t];
        if constexpr (!kIsK) e = e * broadcast(f.column_scale[channel]);
        store(place(channel, t), code);
        store(f.errors + ((first + i) * kT + t) * kLanes, e);
        KVARN_UNROLL for (int j = i + 1; j < kJ; ++j) x[j][t] = fma(broadcast(panel[j]), e, x[j][t]);
      }
    }
  }
  for (int t = 0; t < kT; ++t) {
    const int at = token + t * kLanes;
    for (int group = 0; group < f.channels; group += kLanes) {
      F32 codes[kLanes];
      for (int i = 0; i < kLanes; ++i) codes[i] = load(place(group + i, t));
      if constexpr (kIsK) {
        transpose(codes);
        for (int i = 0; i < kLanes; ++i) store_u8(f.codes + (at + i) * f.code_stride + group, to_i32(codes[i]));
      } else {
        for (int i = 0; i < kLanes; ++i) store_u8(f.codes + (group + i) * f.code_stride + at, to_i32(codes[i]));
      }
    }
  }
}

template <bool kIsK>
inline void feed_back(const Feedback& f) {
  pack_factor<kIsK>(f);
  for (int token = 0; token < f.tokens; token += kFeedbackVectors * kLanes) feed_back_tokens<kIsK>(f, token);
}

}  // namespace
}  // namespace kvarn::cpu
