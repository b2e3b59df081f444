#define KVARN_TARGET_AVX2
#define KVARN_HD inline __attribute__((always_inline))
#include "cpu/attend-inl.h"
#include "cpu/decode-inl.h"
#include "cpu/encode-inl.h"
#include "cpu/rotate-inl.h"
#include "cpu/simd.h"

namespace kvarn::cpu {

extern const Kernels kernels_avx2 = {"avx2", rotate_rows, encode_tile, decode_tile, &kAttendKernels};

}  // namespace kvarn::cpu
