// Moves between lanes, and operations whose result depends on other lanes. in[256] -> out[256].
#include "device.h"

#define DPP(control) __builtin_amdgcn_update_dpp(7, in[thread()], control, 0xf, 0xf, false)
#define LANES(name) KERNEL(name)(const u32* in, u32* out)

LANES(quad_perm_1032) { out[thread()] = DPP(0xB1); }
LANES(row_shl_3) { out[thread()] = DPP(0x103); }
LANES(row_shr_1) { out[thread()] = DPP(0x111); }
LANES(row_ror_4) { out[thread()] = DPP(0x124); }
LANES(row_mirror) { out[thread()] = DPP(0x140); }
LANES(row_half_mirror) { out[thread()] = DPP(0x141); }
LANES(row_shr_1_zero) { out[thread()] = __builtin_amdgcn_update_dpp(7, in[thread()], 0x111, 0xf, 0xf, true); }
LANES(row_shr_1_masked) { out[thread()] = __builtin_amdgcn_update_dpp(7, in[thread()], 0x111, 0x5, 0x3, false); }
#if defined(__GFX9__)
LANES(row_bcast_15) { out[thread()] = DPP(0x142); }
LANES(row_newbcast_5) { out[thread()] = DPP(0x155); }
LANES(wave_shr_1) { out[thread()] = DPP(0x138); }
#else
LANES(row_share_5) { out[thread()] = DPP(0x155); }
LANES(row_xmask_6) { out[thread()] = DPP(0x166); }
LANES(dpp8_76543210) { out[thread()] = __builtin_amdgcn_mov_dpp8(in[thread()], 0x053977); }
LANES(permlane16_reverse) { out[thread()] = __builtin_amdgcn_permlane16(in[thread()], in[thread()], 0x89abcdef, 0x01234567, false, false); }
LANES(permlanex16_identity) {
  out[thread()] = __builtin_amdgcn_permlanex16(in[thread()], in[thread()], 0x76543210, 0xfedcba98, false, false);
}
#endif
LANES(swizzle_xor_9) { out[thread()] = __builtin_amdgcn_ds_swizzle(in[thread()], 0x241F); }
LANES(swizzle_quad_2301) { out[thread()] = __builtin_amdgcn_ds_swizzle(in[thread()], 0x804E); }
LANES(bpermute) { out[thread()] = __builtin_amdgcn_ds_bpermute(in[thread()] << 2, thread() * 3); }
LANES(permute) { out[thread()] = __builtin_amdgcn_ds_permute((thread() ^ 5) << 2, in[thread()]); }
LANES(readlane_5) { out[thread()] = __builtin_amdgcn_readlane(in[thread()], 5); }
LANES(readfirstlane_upper) {
  if (thread() >= 9) out[thread()] = __builtin_amdgcn_readfirstlane(in[thread()]);
}
LANES(writelane_3) {
  u32 value = in[thread()];
  asm volatile("v_writelane_b32 %0, %1, 3" : "+v"(value) : "s"(__builtin_amdgcn_readfirstlane(in[0])));
  out[thread()] = value;
}
// llvm.amdgcn.icmp with predicate 36: unsigned less.
LANES(ballot_below_100) {
#if __AMDGCN_WAVEFRONT_SIZE == 64
  const u64 mask = __builtin_amdgcn_uicmpl(in[thread()], 100ull, 36);
#else
  const u64 mask = __builtin_amdgcn_uicmp(in[thread()], 100u, 36);
#endif
  out[thread()] = (u32)(mask >> (thread() & 32));
}
LANES(count_below) { out[thread()] = __builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0u)); }
// A comparison and a selection that take a neighbour's value.
LANES(compare_with_neighbour) {
  const u32 other = __builtin_amdgcn_update_dpp(0, in[thread()], 0xB1, 0xf, 0xf, true);
  out[thread()] = other > in[thread()] ? other : 1u;
}
LANES(float_sum_of_row) {
  float x = as_float(in[thread()]);
  x += as_float(__builtin_amdgcn_update_dpp(0, bits(x), 0xB1, 0xf, 0xf, true));
  x += as_float(__builtin_amdgcn_update_dpp(0, bits(x), 0x4E, 0xf, 0xf, true));
  x += as_float(__builtin_amdgcn_update_dpp(0, bits(x), 0x141, 0xf, 0xf, true));
  x += as_float(__builtin_amdgcn_update_dpp(0, bits(x), 0x140, 0xf, 0xf, true));
  out[thread()] = bits(x);
}
