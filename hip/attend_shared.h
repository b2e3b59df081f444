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

// Blocks of a matrix kernel that a multiprocessor of HIP (a compute unit of CDNA, a pair of them of RDNA) holds at a time, by the vector
// registers of a lane and the bytes of shared memory that the compiler gave the kernel. A block has one wave on each of the four SIMDs.
// generation: of the instruction set, 9 is CDNA, 10 to 12 RDNA 2 to 4.
constexpr int matrix_blocks(int generation, int registers, int shared_bytes) {
  const int unit = generation == 9 ? 8 : generation == 10 ? 16 : 24;  // of registers of a wave
  const int of_simd = generation == 9 ? 512 : generation == 10 ? 1024 : 1536;
  const int of_memory = generation == 9 ? 64 << 10 : 128 << 10, memory_unit = 1 << 10;
  const int by_registers = of_simd / ((registers + unit - 1) / unit * unit);
  const int by_memory = shared_bytes == 0 ? by_registers : of_memory / ((shared_bytes + memory_unit - 1) / memory_unit * memory_unit);
  return by_registers < by_memory ? by_registers : by_memory;
}

}  // namespace kvarn::cuda
