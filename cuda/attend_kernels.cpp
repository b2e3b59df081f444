// The table of tensor-core kernels; each shape is instantiated in a file of its own.
#include "attend.h"

namespace kvarn::cuda {

#define KVARN_ATTEND_MMA(head_dim, rows) AttendKernel attend_mma_d##head_dim##_r##rows(int k_bits, int v_bits);
KVARN_ATTEND_MMA(64, 8)
KVARN_ATTEND_MMA(64, 16)
KVARN_ATTEND_MMA(128, 8)
KVARN_ATTEND_MMA(256, 8)
#undef KVARN_ATTEND_MMA

AttendKernel find_attend_mma(int head_dim, int rows_per_warp, int k_bits, int v_bits) {
  if (head_dim == 64) return rows_per_warp == 8 ? attend_mma_d64_r8(k_bits, v_bits) : attend_mma_d64_r16(k_bits, v_bits);
  if (head_dim == 128 && rows_per_warp == 8) return attend_mma_d128_r8(k_bits, v_bits);  // 16 rows do not fit the registers
  if (head_dim == 256 && rows_per_warp == 8) return attend_mma_d256_r8(k_bits, v_bits);
  return {};
}

}  // namespace kvarn::cuda
