// Memory in every width and space, atomics, and the control flow around them. in[1024] -> out[1024].
#include "device.h"

#define MEMORY(name) KERNEL(name)(const u32* in, u32* out)
typedef unsigned char u8;
typedef unsigned short u16;

MEMORY(global_bytes) {
  const u8* b = (const u8*)in;
  const signed char* s = (const signed char*)in;
  ((u8*)out)[thread()] = b[thread() * 3] + 1;
  out[256 + thread()] = (u32)(int)s[thread()];
}
MEMORY(global_halves) {
  const u16* h = (const u16*)in;
  const short* s = (const short*)in;
  ((u16*)out)[thread()] = h[thread() * 3];
  out[256 + thread()] = (u32)(int)s[thread()];
}
// Two halves of one register, loaded apart: d16 loads where the target keeps the other half.
MEMORY(global_pair_of_halves) {
  const _Float16* h = (const _Float16*)in;
  const half2 pair = {h[thread()], h[thread() + 100]};
  out[thread()] = bits(pair + pair);
}
MEMORY(global_wide) {
  const int4 v = ((const int4*)in)[thread()];
  int4 w = {v.w, v.z, v.y, v.x};
  ((int4*)out)[thread()] = w;
}
MEMORY(global_three) {
  const u32* p = in + 3 * thread();
  u32* q = out + 3 * thread();
  const u32 a = p[0], b = p[1], c = p[2];
  q[0] = c, q[1] = a, q[2] = b;
}
MEMORY(lds_wide) {
  __shared__ int4 s[256];
  s[thread()] = ((const int4*)in)[thread()];
  barrier();
  ((int4*)out)[thread()] = s[255 - thread()];
}
MEMORY(lds_pairs) {
  __shared__ u64 s[512];
  const u64* p = (const u64*)in;
  s[thread()] = p[thread()];
  s[thread() + 256] = p[thread() + 256];
  barrier();
  ((u64*)out)[thread()] = s[255 - thread()] ^ s[511 - thread()];
}
MEMORY(lds_narrow) {
  __shared__ u16 h[256];
  __shared__ u8 b[256];
  __shared__ signed char c[256];
  h[thread()] = (u16)in[thread()];
  b[thread()] = (u8)(in[thread()] >> 16);
  c[thread()] = (signed char)(in[thread()] >> 24);
  barrier();
  out[thread()] = h[255 - thread()] | (u32)b[thread() ^ 1] << 16;
  out[256 + thread()] = (u32)(int)c[thread() ^ 3];
}
MEMORY(lds_atomics) {
  __shared__ u32 s[8];
  if (thread() < 8) s[thread()] = thread() == 1 ? ~0u : 0;
  barrier();
  const u32 x = in[thread()];
#define OP(op, i) __hip_atomic_##op(&s[i], x, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP)
  const u32 old = OP(fetch_add, 0);
  OP(fetch_and, 1);
  OP(fetch_or, 2);
  OP(fetch_xor, 3);
  OP(fetch_max, 4);
  __hip_atomic_fetch_add((float*)&s[5], 0.5f, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
  barrier();
  if (thread() < 8) out[thread()] = s[thread()];
  out[256 + thread()] = old;
#undef OP
}
MEMORY(global_atomics) {
  const u32 x = in[thread()];
#define OP(op, i) __hip_atomic_##op(&out[i], x, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT)
  OP(fetch_add, 0);
  OP(fetch_and, 1);
  OP(fetch_or, 2);
  OP(fetch_xor, 3);
  OP(fetch_max, 4);
  OP(fetch_min, 5);
  __hip_atomic_fetch_add((u64*)(out + 8), (u64)x << 20, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
  __hip_atomic_fetch_add((float*)&out[6], 0.5f, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
  out[256 + thread()] = __hip_atomic_fetch_add(&out[7], 1u, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
#undef OP
}
MEMORY(compare_and_swap) {
  u32 old = __hip_atomic_load(&out[0], __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
  while (!__hip_atomic_compare_exchange_strong(&out[0], &old, old * 3 + in[thread()], __ATOMIC_RELAXED, __ATOMIC_RELAXED,
                                               __HIP_MEMORY_SCOPE_AGENT)) {
  }
  out[256 + thread()] = old;
}
// One pointer that may be to LDS or to global memory: flat instructions with apertures.
MEMORY(flat) {
  __shared__ u32 s[256];
  s[thread()] = in[thread()];
  barrier();
  const u32* p = in[0] & 1 ? (const u32*)s : in + 256;
  asm volatile("" : "+v"(p));
  out[thread()] = p[255 - thread()];
}
MEMORY(scratch) {
  u32 a[32];
  for (int i = 0; i < 32; ++i) a[i] = in[thread()] * (i + 1);
  u32 sum = 0;
  for (int i = 0; i < 8; ++i) sum += a[in[thread() + i] & 31];
  out[thread()] = sum;
}
MEMORY(buffer) {
  // A raw buffer of 512 bytes: loads beyond it give zero, stores are dropped.
  const u64 address = (u64)in, target = (u64)out;
  const int4 from = {(int)address, (int)(address >> 32), 512, 0}, to = {(int)target, (int)(target >> 32), 512, 0};
  int4 f, t;
  for (int i = 0; i < 4; ++i) f[i] = __builtin_amdgcn_readfirstlane(from[i]), t[i] = __builtin_amdgcn_readfirstlane(to[i]);
  const u32 offset = 4 * thread();
  u32 value;
#if defined(__gfx1200__)
  asm volatile("buffer_load_b32 %0, %1, %2, null offen offset:4\ns_wait_loadcnt 0" : "=v"(value) : "v"(offset), "s"(f));
  asm volatile("buffer_store_b32 %0, %1, %2, null offen" ::"v"(value + 1), "v"(offset), "s"(t));
#elif defined(__gfx1100__)
  asm volatile("buffer_load_b32 %0, %1, %2, 0 offen offset:4\ns_waitcnt vmcnt(0)" : "=v"(value) : "v"(offset), "s"(f));
  asm volatile("buffer_store_b32 %0, %1, %2, 0 offen" ::"v"(value + 1), "v"(offset), "s"(t));
#else
  asm volatile("buffer_load_dword %0, %1, %2, 0 offen offset:4\ns_waitcnt vmcnt(0)" : "=v"(value) : "v"(offset), "s"(f));
  asm volatile("buffer_store_dword %0, %1, %2, 0 offen" ::"v"(value + 1), "v"(offset), "s"(t));
#endif
  if (thread() >= 128) out[thread() + 256] = value;
}

MEMORY(divergent_loop) {
  u32 r = 0;
  for (u32 i = 0; i < (in[thread()] & 15u); ++i) {
    if (i & 1) {
      r += in[i];
    } else {
      r ^= in[i + 1];
    }
  }
  out[thread()] = r;
}
MEMORY(jump_table) {
  u32 r;
  switch (in[0] & 7) {
    case 0:
      r = in[thread()] + 1;
      break;
    case 1:
      r = in[thread()] * 3;
      break;
    case 2:
      r = in[thread()] ^ 5;
      break;
    case 3:
      r = ~in[thread()];
      break;
    case 4:
      r = in[thread()] >> 3;
      break;
    case 5:
      r = in[thread()] << 2;
      break;
    case 6:
      r = in[thread()] % 11;
      break;
    default:
      r = in[thread()] - 9;
  }
  out[thread()] = r;
}
__device__ __attribute__((noinline)) u32 callee(u32 a, u32 b) { return a * 17 + (b ^ (a >> 3)); }
MEMORY(call) { out[thread()] = callee(in[thread()], in[thread() + 256]) + callee(in[thread() + 256], in[thread()]); }

// A branch beyond the reach of s_branch, as the compiler writes it: the address of the instruction and a distance.
MEMORY(long_branch) {
  u32 value = in[thread()];
  asm volatile(
      "s_getpc_b64 s[20:21]\n"
      ".Lpost%=: s_add_u32 s20, s20, .Lfar%=-.Lpost%=\n"
      "s_addc_u32 s21, s21, 0\n"
      "s_setpc_b64 s[20:21]\n"
      "v_mov_b32 %0, 0\n"
#if defined(__GFX9__)
      ".Lfar%=: v_add_u32 %0, %0, %0"
#else
      ".Lfar%=: v_add_nc_u32 %0, %0, %0"
#endif
      : "+v"(value)
      :
      : "s20", "s21", "scc");
  out[thread()] = value;
}

// The same backwards: a negative distance takes -1 into the upper half.
MEMORY(long_branch_back) {
  u32 value = in[thread()];
  asm volatile(
      "s_branch .Lstart%=\n"
#if defined(__GFX9__)
      ".Lback%=: v_add_u32 %0, %0, %0\n"
#else
      ".Lback%=: v_add_nc_u32 %0, %0, %0\n"
#endif
      "s_branch .Lend%=\n"
      ".Lstart%=: s_getpc_b64 s[20:21]\n"
      ".Lpost%=: s_add_u32 s20, s20, .Lback%=-.Lpost%=\n"
      "s_addc_u32 s21, s21, -1\n"
      "s_setpc_b64 s[20:21]\n"
      ".Lend%=: s_nop 0"
      : "+v"(value)
      :
      : "s20", "s21", "scc");
  out[thread()] = value;
}

// Each condition once true and once false: a bit is set where the branch is not taken.
#if defined(__GFX9__)
#define SET_VCC(value) "s_mov_b64 vcc, " value "\n"
#define EXEC "exec"
#else
#define SET_VCC(value) "s_mov_b32 vcc_lo, " value "\n"
#define EXEC "exec_lo"
#endif
#define TRY(condition, bit) "s_cbranch_" condition " .Lskip" #bit "%=\nv_or_b32 %0, " #bit ", %0\n.Lskip" #bit "%=:\n"
MEMORY(branches) {
  u32 fell = 0;
  asm volatile(SET_VCC("0") TRY("vccz", 1) TRY("vccnz", 32)             //
               SET_VCC(EXEC) TRY("vccnz", 2) TRY("vccz", 64)            //
               "s_cmp_eq_u32 0, 0\n" TRY("scc1", 4) TRY("scc0", 0x80)   //
               "s_cmp_eq_u32 0, 1\n" TRY("scc0", 8) TRY("scc1", 0x100)  //
               TRY("execnz", 16) TRY("execz", 0x200) "s_nop 0"
               : "+v"(fell)
               :
               : "vcc", "scc");
  out[thread()] = fell;
}

extern "C" __global__ void __launch_bounds__(64) ids(u32* out, u32 unused, u64 scale) {
  const u32 x = __builtin_amdgcn_workitem_id_x(), y = __builtin_amdgcn_workitem_id_y(), z = __builtin_amdgcn_workitem_id_z();
  const u32 gx = __builtin_amdgcn_workgroup_id_x(), gy = __builtin_amdgcn_workgroup_id_y(), gz = __builtin_amdgcn_workgroup_id_z();
  const u32 sx = __builtin_amdgcn_workgroup_size_x(), sy = __builtin_amdgcn_workgroup_size_y(), sz = __builtin_amdgcn_workgroup_size_z();
  const u32 nx = __builtin_amdgcn_grid_size_x(), ny = __builtin_amdgcn_grid_size_y();
  const u32 global_x = gx * sx + x, global_y = gy * sy + y, global_z = gz * sz + z;
  out[global_x + nx * (global_y + ny * global_z)] = (global_x + 100 * global_y + 10000 * global_z) * (u32)(scale >> 32);
}
