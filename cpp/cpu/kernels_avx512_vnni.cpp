#define KVARN_TARGET_AVX512
#define KVARN_TARGET_VNNI
#define KVARN_HD inline __attribute__((always_inline))
#include "cpu/attend-inl.h"
#include "cpu/decode-inl.h"
#include "cpu/encode-inl.h"
#include "cpu/rotate-inl.h"
#include "cpu/simd.h"

namespace kvarn::cpu {

extern const Kernels kernels_avx512_vnni = {"avx512_vnni", rotate_rows, encode_tile, decode_tile, &kAttendKernels};

}  // namespace kvarn::cpu
