// Kernels that break a rule, each in one way. Run with 128 threads, so that two or four waves share the LDS.
#include "device.h"

KERNEL(reads_beyond)(const u32* in, u32* out) { out[thread()] = in[thread() + 1]; }
KERNEL(writes_beyond)(const u32* in, u32* out) { out[thread() + 1] = in[thread()]; }
KERNEL(reads_before)(const u32* in, u32* out) { out[thread()] = in[(int)thread() - 1]; }
KERNEL(writes_input)(u32* in, u32* out) { in[thread()] = out[thread()]; }
KERNEL(adds_beyond)(const u32* in, u32* out) {
  __hip_atomic_fetch_add(&out[thread() + 1], in[thread()], __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
__device__ const u32 kTable[8] = {1, 2, 3, 4, 5, 6, 7, 8};
KERNEL(writes_constant)(const u32* in, u32* out) {
  const_cast<volatile u32*>(kTable)[in[0] & 7] = 1;
  out[thread()] = kTable[thread() & 7];
}

// Each wave reads what another one wrote, with no barrier between.
KERNEL(races_read_after_write)(const u32* in, u32* out) {
  __shared__ u32 s[128];
  s[thread()] = in[thread()];
  __builtin_amdgcn_wave_barrier();
  out[thread()] = ((volatile u32*)s)[127 - thread()];
}
KERNEL(races_write_after_read)(const u32* in, u32* out) {
  __shared__ u32 s[128];
  s[thread()] = in[thread()];
  barrier();
  out[thread()] = s[127 - thread()];
  s[thread()] = 1;
  barrier();
  out[thread()] += s[thread()];
}
KERNEL(races_two_writes)(const u32* in, u32* out) {
  __shared__ u32 s[32];
  s[thread() & 31] = in[thread()];
  barrier();
  out[thread()] = s[thread() & 31];
}
KERNEL(races_atomic_and_read)(const u32* in, u32* out) {
  __shared__ u32 s[1];
  if (thread() == 0) s[0] = 0;
  barrier();
  __hip_atomic_fetch_add(&s[0], in[thread()], __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
  out[thread()] = *(volatile u32*)s;
}
// Only the second half of the waves' bytes of a word belongs to another wave: no race, and the counterpart where it is one.
KERNEL(shares_words_by_halves)(const u32* in, u32* out) {
  __shared__ unsigned short s[128];
  const u32 t = thread(), wave = t / 32, lane = t % 32;
  s[(lane * 4 + wave)] = (unsigned short)in[t];
  barrier();
  out[t] = s[lane * 4 + wave];
}
KERNEL(races_by_halves)(const u32* in, u32* out) {
  __shared__ unsigned short s[128];
  const u32 t = thread();
  s[t % 64] = (unsigned short)in[t];
  barrier();
  out[t] = s[t % 64];
}

// Half of the waves wait at one barrier, the other half at another one.
KERNEL(waits_at_two_barriers)(const u32* in, u32* out) {
  const bool low = __builtin_amdgcn_readfirstlane(thread()) < 64;
  if (low) out[thread()] = in[thread()];
  if (low) {
    barrier();
    asm volatile("s_nop 1");
  } else {
    asm volatile("s_nop 2");
    barrier();
  }
}
KERNEL(waits_at_one_barrier)(const u32* in, u32* out) {
  if (__builtin_amdgcn_readfirstlane(thread()) < 64) out[thread()] = in[thread()];
  barrier();
  if (__builtin_amdgcn_readfirstlane(thread()) >= 64) out[thread()] = in[thread()];
}

KERNEL(lds_beyond)(const u32* in, u32* out, u32 shift) {
  __shared__ u32 s[128];
  s[thread() + shift] = in[thread()];
  barrier();
  out[thread()] = s[127 - thread()];
}
KERNEL(reads_unwritten_lds)(const u32* in, u32* out) {
  __shared__ u32 s[128];
  if (thread() < 100) s[thread()] = in[thread()];
  barrier();
  out[thread()] = s[127 - thread()];
}
KERNEL(reads_unwritten_byte)(const u32* in, u32* out) {
  __shared__ unsigned char s[256];
  s[2 * thread()] = (unsigned char)in[thread()];
  barrier();
  out[thread()] = ((volatile unsigned char*)s)[(2 * thread() + in[0]) & 255];
}
KERNEL(scratch_beyond)(const u32* in, u32* out) {
  volatile u32 a[8];
  for (int i = 0; i < 8; ++i) a[i] = in[i];
  out[thread()] = a[in[thread()]];
}
KERNEL(never_ends)(const u32* in, u32* out) {
  while (*(volatile const u32*)in) out[thread()] += 1;
}
// What two workgroups do at one place of global memory.
KERNEL(races_of_groups_two_writes)(const u32* in, u32* out) { out[thread()] = in[thread()]; }
KERNEL(races_of_groups_read_after_write)(const u32* in, u32* out) {
  out[group() * 128 + thread()] = in[thread()];
  out[1024 + group() * 128 + thread()] = out[thread()];
}
KERNEL(races_of_groups_write_after_read)(const u32* in, u32* out) {
  const u32 before = out[128 + thread()];
  out[group() * 128 + thread()] = in[thread()] + before;
}
// A count says that a result is there before the store has left the wave; and, correct, after it.
KERNEL(publishes_early)(const u32* in, u32* out) {
  out[16 + group() * 128 + thread()] = in[thread()];
  __hip_atomic_fetch_add(out, 1, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
KERNEL(publishes_late)(const u32* in, u32* out) {
  out[16 + group() * 128 + thread()] = in[thread()];
  __hip_atomic_fetch_add(out, 1, __ATOMIC_RELEASE, __HIP_MEMORY_SCOPE_AGENT);
}
// The last workgroup to arrive adds up what all have stored: without a barrier before the first wave counts the workgroup in, what the
// other waves store may come too late.
__device__ inline void add_up(const u32* in, u32* out, bool wait) {
  __shared__ u32 arrived;
  __hip_atomic_store(&out[256 + group() * 128 + thread()], in[thread()], __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "agent");
  if (wait) barrier();
  if (thread() == 0) arrived = __hip_atomic_fetch_add(out, 1, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
  barrier();
  if (arrived != 3) return;
  u32 sum = 0;
  for (u32 i = 0; i < 4; ++i) {
    sum += __hip_atomic_load(&out[256 + i * 128 + thread()], __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
  }
  out[128 + thread()] = sum;
}
KERNEL(adds_up_early)(const u32* in, u32* out) { add_up(in, out, false); }
KERNEL(adds_up)(const u32* in, u32* out) { add_up(in, out, true); }
// Correct: bytes of a word that belong to one group each, and a message that is read where all groups see it.
KERNEL(groups_apart)(const u32* in, u32* out) {
  ((unsigned char*)out)[2 * thread() + group()] = (unsigned char)in[thread()];
  __hip_atomic_store(&out[1024 + group()], group(), __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
  out[1536 + group() * 128 + thread()] = __hip_atomic_load(&out[1024], __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
// A value that depends on which of two workgroups runs first.
KERNEL(depends_on_order)(u32* out) {
  if (thread() == 0) *(volatile u32*)out = __builtin_amdgcn_workgroup_id_x();
}
#if defined(__gfx1100__)
// Lanes 16..31 hold their rows backwards instead of repeating lanes 0..15.
KERNEL(wmma_without_replication)(const _Float16* in, float* out) {
  const u32 lane = thread(), row = lane & 15;
  half16 a, b;
  for (int i = 0; i < 16; ++i) {
    a[i] = in[row * 16 + (lane < 16 ? i : 15 - i)];
    b[i] = in[row * 16 + i];
  }
  float8 c = {};
  c = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(a, b, c);
  for (int i = 0; i < 8; ++i) out[lane * 8 + i] = c[i];
}
#endif
