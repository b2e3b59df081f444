#include "attend_kernel.cuh"

namespace kvarn::cuda {

AttendKernel attend_mma_d128_r8(int k_bits, int v_bits) {
  if (k_bits == 4 && v_bits == 2) return attend_mma_of<AttendMma<128, 1, 11, 4, 2>>();
  if (k_bits == 2 && v_bits == 2) return attend_mma_of<AttendMma<128, 1, 11, 2, 2>>();
  return attend_mma_of<AttendMma<128, 1, 7, kAnyWidth, kAnyWidth>>();
}

}  // namespace kvarn::cuda
