#include "attend_kernel.cuh"

namespace kvarn::cuda {
AttendKernel attend_mma_d128_r8() { return attend_mma_of<AttendMma<128, 1, 11>>(); }
}  // namespace kvarn::cuda
