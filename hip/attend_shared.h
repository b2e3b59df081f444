// What the launch of a matrix attention kernel and its code agree on.
#pragma once

namespace kvarn::cuda {

constexpr int kMatrixTile = 128;  // tokens
constexpr bool is_matrix_width(int bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8; }

}  // namespace kvarn::cuda
