#define KVARN_TARGET_AVX2
#include "cpu/simd.h"  // first: it decides how the layout functions are compiled

#include "cpu/attend-inl.h"
#include "cpu/decode-inl.h"
#include "cpu/encode-inl.h"
#include "cpu/rotate-inl.h"

namespace kvarn::cpu {

extern const Kernels kernels_avx2 = {"avx2", rotate_rows, encode_tile, decode_tile, &kAttendKernels};

}  // namespace kvarn::cpu
