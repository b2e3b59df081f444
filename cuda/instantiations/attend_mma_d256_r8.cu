#include "attend_kernel.cuh"

namespace kvarn::cuda {

AttendKernel attend_mma_d256_r8(int k_bits, int v_bits) {
  if (k_bits == 4 && v_bits == 2) return attend_mma_of<AttendMma<256, 1, 7, 4, 2>>();
  return attend_mma_of<AttendMma<256, 1, 7, kAnyWidth, kAnyWidth>>();
}

}  // namespace kvarn::cuda
