#include "attend_kernel.cuh"

namespace kvarn::cuda {
AttendKernel attend_mma_d64_r8() { return attend_mma_of<AttendMma<64, 1, 11>>(); }
}  // namespace kvarn::cuda
