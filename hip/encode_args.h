// Shared memory of the encode kernels on AMD.
#pragma once

namespace kvarn::cuda {

// Five vectors of floats an axis, and two floats a warp.
constexpr int encode_plain_bytes(int head_dim, int tile_tokens) { return 4 * (5 * (head_dim + tile_tokens) + 16); }

}  // namespace kvarn::cuda
