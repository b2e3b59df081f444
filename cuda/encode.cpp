#include "encode.h"

namespace kvarn::cuda {

const void* encode_d64_g128(bool feedback);
const void* encode_d128_g128(bool feedback);
const void* encode_d256_g128(bool feedback);
const void* encode_any(bool feedback);

EncodeKernel find_encode(int head_dim, int tile_tokens, bool feedback) {
  EncodeKernel kernel;
  if (tile_tokens == 128 && head_dim == 64) {
    kernel.function = encode_d64_g128(feedback);
  } else if (tile_tokens == 128 && head_dim == 128) {
    kernel.function = encode_d128_g128(feedback);
  } else if (tile_tokens == 128 && head_dim == 256) {
    kernel.function = encode_d256_g128(feedback);
  } else {
    kernel.function = encode_any(feedback);
  }
  kernel.shared_bytes = encode_shared_bytes(head_dim, tile_tokens);
  return kernel;
}

}  // namespace kvarn::cuda
