// encode: a block takes one operand of one tile. Grid: (tiles * num_kv_heads, 2 operands, layers), kEncodeThreads threads.
#include "amd.h"
#include "encode_plain.h"

namespace kvarn::cuda {

#define KVARN_ENCODE_KERNEL(name, T)                                                             \
  extern "C" __global__ void __launch_bounds__(kEncodeThreads) kvarn_encode_##name(EncodeArgs) { \
    extern __shared__ __align__(16) uint8_t shared[];                                            \
    if (blockIdx.y == 0) {                                                                       \
      encode_plain<T, true>(shared);                                                             \
    } else {                                                                                     \
      encode_plain<T, false>(shared);                                                            \
    }                                                                                            \
  }

KVARN_ENCODE_KERNEL(f32, float)
KVARN_ENCODE_KERNEL(f16, __half)
KVARN_ENCODE_KERNEL(bf16, __nv_bfloat16)

}  // namespace kvarn::cuda
