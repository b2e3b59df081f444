// The matrix attention kernels: head_dim and rows of a block.
#include <amd.h>

#include "attend_matrix.h"

namespace kvarn::cuda {

// On CDNA, where waves of 512 registers would be possible, at least two waves of a SIMD.
#define KVARN_ATTEND_KERNEL(D, kRows)                                                                         \
  extern "C" __global__ void __launch_bounds__(kMatrixThreads) KVARN_WAVES_PER_SIMD(kGeneration == 9 ? 2 : 1) \
      kvarn_attend_d##D##_r##kRows(AttendArgs) {                                                              \
    __shared__ MatrixShared<D, kRows> shared;                                                                 \
    attend_matrix<D, kRows>(shared);                                                                          \
  }

KVARN_ATTEND_KERNEL(64, 8)
KVARN_ATTEND_KERNEL(64, 16)
KVARN_ATTEND_KERNEL(128, 8)
KVARN_ATTEND_KERNEL(128, 16)
#if defined(__GFX9__)
KVARN_ATTEND_KERNEL(256, 8)
#endif

}  // namespace kvarn::cuda
