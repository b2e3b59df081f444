// What the launch of a matrix attention kernel and its code agree on.
#pragma once

namespace kvarn::cuda {

constexpr int kMatrixTile = 128;  // tokens
constexpr int kMatrixWaves = 4;   // of a block
constexpr bool is_matrix_width(int bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8; }
// 16 rows of 256 channels do not fit the registers of a wave of 64 lanes, nor 8 those of 32.
constexpr bool has_matrix_kernel(int head_dim, int rows, int wave) {
  return head_dim == 64 || head_dim == 128 || (head_dim == 256 && rows == 8 && wave == 64);
}

}  // namespace kvarn::cuda
