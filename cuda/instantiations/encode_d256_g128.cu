#include "encode_tile.cuh"

namespace kvarn::cuda {
const void* encode_d256_g128() { return reinterpret_cast<const void*>(&encode_kernel<16, 8>); }
}  // namespace kvarn::cuda
