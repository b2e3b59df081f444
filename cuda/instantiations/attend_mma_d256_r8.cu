#include "attend_kernel.cuh"

namespace kvarn::cuda {
AttendKernel attend_mma_d256_r8() { return attend_mma_of<AttendMma<256, 1, 7>>(); }
}  // namespace kvarn::cuda
