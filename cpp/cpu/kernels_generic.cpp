#define KVARN_TARGET_GENERIC
#include "cpu/simd.h"  // first: it decides how the layout functions are compiled

#include "cpu/attend-inl.h"
#include "cpu/decode-inl.h"
#include "cpu/encode-inl.h"
#include "cpu/rotate-inl.h"

namespace kvarn::cpu {

extern const Kernels kernels_generic = {"generic", rotate_rows, encode_tile, decode_tile, &kAttendKernels};

}  // namespace kvarn::cpu
