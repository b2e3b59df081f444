// The kernels of one instruction set, as a table of functions. kernels_<isa>.cpp fills one each; everybody else calls through the table.
// Kernels trust their arguments, allocate nothing and keep no state; `scratch` belongs to the calling worker.
#pragma once

#include <cstdint>

#include "kvarn/format.h"
#include "kvarn/kvarn.h"

namespace kvarn::cpu {

struct AttendKernels;  // attend.h

// Rows of head_dim values times H (or its transpose), from `in` to `out`; they may be the same. `scratch`: rotate_scratch_floats.
struct RotateRows {
  const void* in;
  void* out;
  int64_t rows;
  int64_t in_stride, out_stride;  // values between rows
  int in_dtype, out_dtype;        // equal, or one of them KVARN_F32
  int head_dim;
  bool inverse;
  float* scratch;
};

// One tile of one head: k and v are [tile_tokens][head_dim] of `dtype`, rotated.
struct EncodeTile {
  const void* k;
  const void* v;
  uint8_t* record;
  const RecordLayout* layout;
  int dtype;
  int normalisation;  // kvarn_normalisation
  bool k_unbiased, v_unbiased;
  void* scratch;                         // encode_scratch_bytes, 64-byte aligned
  const float *k_feedback, *v_feedback;  // [head_dim][head_dim] of this head, or null
};

// The reverse; k or v may be null. Rotates back unless `rotated`.
struct DecodeTile {
  const uint8_t* record;
  const RecordLayout* layout;
  void* k;
  void* v;
  int dtype;
  bool rotated;
  void* scratch;  // decode_scratch_bytes, 64-byte aligned
};

struct Kernels {
  const char* name;  // as in KVARN_CPU_ISA
  void (*rotate_rows)(const RotateRows& rows);
  void (*encode_tile)(const EncodeTile& tile);
  void (*decode_tile)(const DecodeTile& tile);
  const AttendKernels* attend;
};

extern const Kernels kernels_generic;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_vnni;

inline constexpr int64_t kRotateScratchFloats = 2 * kMaxHeadDim * 16;
int64_t encode_scratch_bytes(int head_dim, int tile_tokens);
int64_t decode_scratch_bytes(int head_dim, int tile_tokens);

}  // namespace kvarn::cpu
