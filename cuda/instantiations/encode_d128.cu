#include "encode_kernel.cuh"

namespace kvarn::cuda {
EncodeKernel encode_d128(int tile_tokens, bool feedback) {
  if (tile_tokens == 128) return feedback ? encode_in_registers<8, 8, 2, 2, true>() : encode_in_registers<8, 8, 1, 2, false>();
  if (tile_tokens == 256 && !feedback) return encode_in_registers<8, 16, 1, 1, false>();
  if (tile_tokens == 64 && !feedback) return encode_in_registers<8, 4, 2, 4, false>();
  if (tile_tokens == 32 && !feedback) return encode_in_registers<8, 2, 4, 8, false>();
  return {};
}
}  // namespace kvarn::cuda
