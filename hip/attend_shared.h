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

// Blocks of a matrix kernel that a multiprocessor (a compute unit of CDNA, a pair of them of RDNA) holds at a time, which is what is
// launched. A block has one wave on each of the four SIMDs. On CDNA (generation 9) registers decide, and the compiler is told to make so
// many fit; on RDNA (10 to 12) it is shared memory, 128 KiB of the pair, for 22 to 26 KB of a block with 8 rows and up to 51 KB with 16.
constexpr int matrix_blocks(int head_dim, int rows, int generation) {
  if (generation == 9) return head_dim == 256 ? 2 : 3;
  if (rows == 16) return 2;
  return generation == 10 && head_dim == 128 ? 4 : 5;
}

}  // namespace kvarn::cuda
