#include "encode_tile.cuh"

namespace kvarn::cuda {
const void* encode_d64_g128() { return reinterpret_cast<const void*>(&encode_kernel<4, 8>); }
}  // namespace kvarn::cuda
