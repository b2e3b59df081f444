#include "encode_kernel.cuh"

namespace kvarn::cuda {
EncodeKernel encode_d64(int tile_tokens, bool feedback) {
  if (tile_tokens == 128) return feedback ? encode_in_registers<4, 8, 2, 2, true>() : encode_in_registers<4, 8, 2, 4, false>();
  if (tile_tokens == 64 && !feedback) return encode_in_registers<4, 4, 4, 8, false>();
  return {};
}
}  // namespace kvarn::cuda
