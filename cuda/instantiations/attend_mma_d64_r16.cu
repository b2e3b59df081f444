#include "attend_kernel.cuh"

namespace kvarn::cuda {
AttendKernel attend_mma_d64_r16() { return attend_mma_of<AttendMma<64, 2, 7>>(); }
}  // namespace kvarn::cuda
