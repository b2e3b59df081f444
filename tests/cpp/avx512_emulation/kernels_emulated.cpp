// The AVX-512 kernels of encode, decode and the rotation, over emulated instructions (immintrin.h in this folder).
#define KVARN_TARGET_AVX512
#define KVARN_HD inline __attribute__((always_inline))
#include "cpu/decode-inl.h"
#include "cpu/encode-inl.h"
#include "cpu/rotate-inl.h"
#include "cpu/simd.h"

namespace kvarn::cpu {

extern const Kernels kernels_emulated = {"avx512", rotate_rows, encode_tile, decode_tile, nullptr};

}  // namespace kvarn::cpu
