// What the launch of a matrix attention kernel and its code agree on.
#pragma once

namespace kvarn::cuda {

constexpr int kMatrixTile = 128;  // tokens
constexpr int kMatrixWaves = 4;   // of a block
constexpr bool is_matrix_width(int bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8; }
constexpr bool is_matrix_head_dim(int head_dim) { return head_dim == 64 || head_dim == 128 || head_dim == 256; }
// 16 rows of 256 channels do not fit the registers.
constexpr bool has_matrix_rows(int head_dim, int rows) { return is_matrix_head_dim(head_dim) && (rows == 8 || head_dim < 256); }

}  // namespace kvarn::cuda
