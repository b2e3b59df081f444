#include "encode_kernel.cuh"

namespace kvarn::cuda {
const void* encode_d128_g128(bool feedback) {
  return feedback ? reinterpret_cast<const void*>(&encode_kernel<8, 8, true>) : reinterpret_cast<const void*>(&encode_kernel<8, 8, false>);
}
}  // namespace kvarn::cuda
