// The float mode of a wave, carried out by the host's SSE control register.
#pragma once

#include <xmmintrin.h>

#include "machine.h"

namespace amdsim {

// Rounding: AMD 0 nearest, 1 up, 2 down, 3 toward zero; SSE swaps up and down. Denormals: fp32 results and operands are flushed unless both
// bits of the fp32 field are set; fp16 and fp64 denormals are always kept.
inline void apply_mode(u32 mode) {
  constexpr unsigned kMaskedExceptions = 0x1f80, kFlushDenormals = 0x8040;
  constexpr unsigned kRounding[4] = {0, 2, 1, 3};
  _mm_setcsr(kMaskedExceptions | kRounding[mode & 3] << 13 | ((mode >> 4 & 3) == 3 ? 0 : kFlushDenormals));
}

// s_setreg on the MODE register: `width` bits from `offset` on. Only rounding and denormals act; the rest is kept for s_getreg.
inline void set_mode(Wave& w, u32 offset, u32 width, u32 value) {
  const u32 field = (width >= 32 ? ~0u : (1u << width) - 1) << offset;
  w.mode = (w.mode & ~field) | (value << offset & field);
  apply_mode(w.mode);
}

}  // namespace amdsim
