#include "attend_kernel.cuh"

namespace kvarn::cuda {

AttendKernel attend_mma_d64_r16(int k_bits, int v_bits) { return attend_mma_of<AttendMma<64, 2, 7, kAnyWidth, kAnyWidth>>(); }

}  // namespace kvarn::cuda
