// What attend needs beside immintrin.h of this folder. Included by one source file per instruction set, which defines KVARN_ATTEND_EMULATED
// as the name of its table.
#define KVARN_EMULATED_INSTRUCTIONS
#define KVARN_HD inline __attribute__((always_inline))
#include <immintrin.h>

#include "cpu/attend-inl.h"
#include "cpu/rotate-inl.h"
#include "cpu/simd.h"

namespace kvarn::cpu {

extern const Kernels KVARN_ATTEND_EMULATED = {"emulated", rotate_rows, nullptr, nullptr, &kAttendKernels};

}  // namespace kvarn::cpu
