#include "encode.h"

namespace kvarn::cuda {

// Null where no kernel holds such a tile in registers.
EncodeKernel encode_d64(int tile_tokens, bool feedback);
EncodeKernel encode_d128(int tile_tokens, bool feedback);
EncodeKernel encode_d256(int tile_tokens, bool feedback);
const void* encode_any(bool feedback);

EncodeKernel find_encode(int head_dim, int tile_tokens, bool feedback) {
  EncodeKernel kernel;
  switch (head_dim) {
    case 64:
      kernel = encode_d64(tile_tokens, feedback);
      break;
    case 128:
      kernel = encode_d128(tile_tokens, feedback);
      break;
    case 256:
      kernel = encode_d256(tile_tokens, feedback);
      break;
    default:
      break;
  }
  if (kernel.function != nullptr) return kernel;
  return {encode_any(feedback), encode_shared_bytes(head_dim, tile_tokens), kEncodeThreads};
}

}  // namespace kvarn::cuda
