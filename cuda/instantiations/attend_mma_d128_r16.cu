#include "attend_kernel.cuh"

namespace kvarn::cuda {
AttendKernel attend_mma_d128_r16() { return attend_mma_of<AttendMma<128, 2, 7>>(); }
}  // namespace kvarn::cuda
