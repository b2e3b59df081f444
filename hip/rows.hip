// hadamard, append and decode: the kernels of cuda/rows.cuh under the names that the host asks for.
#include <amd.h>

#include "rows.cuh"

namespace kvarn::cuda {

#define KVARN_ROW_KERNELS(name, D)                                                                \
  extern "C" __global__ void __launch_bounds__(kRowThreads) kvarn_hadamard_##name(HadamardArgs) { \
    extern __shared__ float scratch[];                                                            \
    hadamard_rows<D>(kernel_args<HadamardArgs>(), scratch);                                       \
  }                                                                                               \
  extern "C" __global__ void __launch_bounds__(kRowThreads) kvarn_append_##name(AppendArgs) {     \
    extern __shared__ float scratch[];                                                            \
    append_rows<D>(kernel_args<AppendArgs>(), scratch);                                           \
  }                                                                                               \
  extern "C" __global__ void __launch_bounds__(kRowThreads) kvarn_decode_##name(DecodeArgs) {     \
    extern __shared__ float scratch[];                                                            \
    decode_rows<D>(kernel_args<DecodeArgs>(), scratch);                                           \
  }

KVARN_ROW_KERNELS(any, 0)
KVARN_ROW_KERNELS(d64, 64)
KVARN_ROW_KERNELS(d128, 128)
KVARN_ROW_KERNELS(d256, 256)
KVARN_ROW_KERNELS(d512, 512)

}  // namespace kvarn::cuda
