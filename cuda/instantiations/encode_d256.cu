#include "encode_kernel.cuh"

namespace kvarn::cuda {
EncodeKernel encode_d256(int tile_tokens, bool feedback) {
  if (tile_tokens == 128) return feedback ? encode_in_registers<16, 8, 1, 1, true>() : encode_in_registers<16, 8, 1, 1, false>();
  if (tile_tokens == 64 && !feedback) return encode_in_registers<16, 4, 2, 2, false>();
  return {};
}
}  // namespace kvarn::cuda
