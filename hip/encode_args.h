// Shared memory of the encode kernels on AMD.
#pragma once

#include "kvarn/format.h"

namespace kvarn::cuda {

// Five vectors of floats an axis, and two floats a warp.
KVARN_HD constexpr int encode_plain_bytes(int head_dim, int tile_tokens) { return 4 * (5 * (head_dim + tile_tokens) + 16); }

// With error feedback: the errors of the tokens that are being rounded, and codes of a group of tokens, behind them.
constexpr int kFeedbackLanes = 8;   // of a token
constexpr int kFeedbackGroup = 32;  // tokens whose codes are packed together
// Tokens that are rounded at the same time: the errors of more would not fit.
KVARN_HD constexpr int feedback_tokens(int head_dim) { return head_dim <= 256 ? 32 : 16; }
// Floats between the errors of one token and of the next, bytes between their codes: not all in the same banks.
KVARN_HD constexpr int feedback_stride(int head_dim) { return head_dim + 4; }
constexpr int encode_feedback_bytes(int head_dim, int tile_tokens) {
  return encode_plain_bytes(head_dim, tile_tokens) + (4 * feedback_tokens(head_dim) + kFeedbackGroup) * feedback_stride(head_dim);
}
static_assert(encode_feedback_bytes(kMaxHeadDim, kMaxTileTokens) + 16 <= 64 * 1024, "what every AMD GPU has, with a few bytes of its own");

}  // namespace kvarn::cuda
