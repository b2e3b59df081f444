// What the device code shared with CUDA needs on AMD: CUDA's names over the compiler's builtins, and nothing else. Neither ROCm's headers
// nor its device library are needed; with KVARN_HIP_ROCM_HEADERS the sources are compiled through <hip/hip_runtime.h> instead of the few
// macros below, and the names here, which live in a namespace, hide the ones of that header.
//
// A "warp" of the shared code is 32 lanes on every machine. A wave of 64 lanes carries two of them side by side: shuffles and ballots stay
// inside their 32 lanes, and nothing in the shared code lets the two halves of a wave wait for one another.
#pragma once

#if defined(KVARN_HIP_ROCM_HEADERS)
#include <hip/hip_runtime.h>
#else
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __host__ __attribute__((host))
#define __shared__ __attribute__((shared))
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#if !defined(__HIP_PLATFORM_AMD__)
#define __HIP_PLATFORM_AMD__ 1
#endif
#endif
// CUDA's second number asks for resident blocks; here registers decide that, or KVARN_WAVES_PER_SIMD.
#undef __launch_bounds__
#define __launch_bounds__(threads, ...) __attribute__((amdgpu_flat_work_group_size(threads, threads)))
// The compiler makes the registers of so many waves fit, at least.
#define KVARN_WAVES_PER_SIMD(waves) __attribute__((amdgpu_waves_per_eu(waves)))
#undef __noinline__
#define __noinline__ inline __attribute__((always_inline))  // a call would need a stack
#define __grid_constant__
// Arguments lie in constant memory: helpers of the format must not take their address.
#define KVARN_HD __host__ __device__ inline __attribute__((always_inline))

#include <cstddef>
#include <cstdint>

#if !defined(INFINITY)
#define INFINITY __builtin_inff()
#endif
#if !defined(NAN)
#define NAN __builtin_nanf("")
#endif

namespace kvarn::cuda {

// Of the instruction set: 9 is CDNA, 10 to 12 RDNA 2 to 4. 0: of the host.
#if defined(__GFX9__)
inline constexpr int kGeneration = 9;
#elif defined(__GFX10__)
inline constexpr int kGeneration = 10;
#elif defined(__GFX11__)
inline constexpr int kGeneration = 11;
#elif defined(__GFX12__)
inline constexpr int kGeneration = 12;
#else
inline constexpr int kGeneration = 0;
#endif
inline constexpr int kWave = kGeneration == 9 ? 64 : 32;

// ---- where a thread is ----

struct ThreadIndex {
  __declspec(property(get = get_x)) unsigned x;
  static __device__ __forceinline__ unsigned get_x() { return __builtin_amdgcn_workitem_id_x(); }
};
struct BlockIndex {
  __declspec(property(get = get_x)) unsigned x;
  __declspec(property(get = get_y)) unsigned y;
  __declspec(property(get = get_z)) unsigned z;
  static __device__ __forceinline__ unsigned get_x() { return __builtin_amdgcn_workgroup_id_x(); }
  static __device__ __forceinline__ unsigned get_y() { return __builtin_amdgcn_workgroup_id_y(); }
  static __device__ __forceinline__ unsigned get_z() { return __builtin_amdgcn_workgroup_id_z(); }
};
struct GridSize {
  __declspec(property(get = get_x)) unsigned x;
  // The first hidden argument of code object version 5 and later: blocks in x.
  static __device__ __forceinline__ unsigned get_x() {
    return *(const __attribute__((address_space(4))) unsigned*)__builtin_amdgcn_implicitarg_ptr();
  }
};
inline constexpr __device__ ThreadIndex threadIdx{};
inline constexpr __device__ BlockIndex blockIdx{};
inline constexpr __device__ GridSize gridDim{};

// The same number, of which the compiler knows nothing: what is computed from it is computed where that is written, not kept in a register
// since the kernel's beginning.
__device__ __forceinline__ int again(int x) {
  asm volatile("" : "+v"(x));
  return x;
}
__device__ __forceinline__ int wave_lane() { return again(static_cast<int>(threadIdx.x)) & (kWave - 1); }

// The arguments of the kernel, which are its only parameter. Each call is a new place to the compiler, so that no argument is kept in a
// register, or spilled, from one phase of a kernel to the next.
template <class Args>
__device__ __forceinline__ const Args& kernel_args() {
  auto p = (const __attribute__((address_space(4))) Args*)__builtin_amdgcn_kernarg_segment_ptr();
  asm volatile("" : "+s"(p));
  return *(const Args*)p;
}

// ---- vectors and types ----

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
__device__ __forceinline__ float2 make_float2(float x, float y) { return {x, y}; }
__device__ __forceinline__ float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class To, class From>
__device__ __forceinline__ To bits_as(From x) {
  return __builtin_bit_cast(To, x);
}
__device__ __forceinline__ int __float_as_int(float x) { return bits_as<int>(x); }
__device__ __forceinline__ float __uint_as_float(unsigned x) { return bits_as<float>(x); }

using __half = _Float16;
__device__ __forceinline__ float __half2float(__half x) { return static_cast<float>(x); }
__device__ __forceinline__ __half __float2half_rn(float x) { return static_cast<__half>(x); }
__device__ __forceinline__ __half __ushort_as_half(unsigned short x) { return bits_as<__half>(x); }

struct __nv_bfloat16 {
  uint16_t bits;
  __device__ __forceinline__ explicit operator float() const { return __uint_as_float(static_cast<unsigned>(bits) << 16); }
};
__device__ __forceinline__ float __bfloat162float(__nv_bfloat16 x) { return static_cast<float>(x); }
__device__ __forceinline__ __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned u = bits_as<unsigned>(x);
  const unsigned rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? u >> 16 | 0x40u : rounded)};
}

// ---- arithmetic: one rounding each, because the sources are compiled without contraction ----

__device__ __forceinline__ float __fadd_rn(float x, float y) { return x + y; }
__device__ __forceinline__ float __fsub_rn(float x, float y) { return x - y; }
__device__ __forceinline__ float __fmul_rn(float x, float y) { return x * y; }
__device__ __forceinline__ float __fdiv_rn(float x, float y) { return x / y; }
__device__ __forceinline__ float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
__device__ __forceinline__ float __fmaf_rn(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
__device__ __forceinline__ float fmaf(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
__device__ __forceinline__ float fminf(float x, float y) { return __builtin_fminf(x, y); }
__device__ __forceinline__ float fmaxf(float x, float y) { return __builtin_fmaxf(x, y); }
__device__ __forceinline__ float fabsf(float x) { return __builtin_fabsf(x); }
__device__ __forceinline__ float rintf(float x) { return __builtin_rintf(x); }
__device__ __forceinline__ float ldexpf(float x, int e) { return __builtin_ldexpf(x, e); }
// Of normal numbers.
__device__ __forceinline__ int ilogbf(float x) { return static_cast<int>(bits_as<unsigned>(x) >> 23 & 255u) - 127; }
__device__ __forceinline__ float exp2_approx(float x) { return __builtin_amdgcn_exp2f(x); }
__device__ __forceinline__ float exp2f(float x) { return __builtin_amdgcn_exp2f(x); }
__device__ __forceinline__ float log2f(float x) { return __builtin_amdgcn_logf(x); }
__device__ __forceinline__ float reciprocal_approx(float x) { return __builtin_amdgcn_rcpf(x); }
// Relative error below 1e-6 everywhere: a power series where 1 - 2/(e + 1) would cancel.
__device__ __forceinline__ float tanhf(float x) {
  const float a = fabsf(x), square = x * x;
  float series = fmaf(square, 2.1869489e-2f, -5.3968254e-2f);
  series = fmaf(square, series, 1.3333334e-1f);
  series = fmaf(square, series, -3.3333334e-1f);
  const float small = fmaf(x * square, series, x);
  const float large = __builtin_copysignf(1.0f - 2.0f * __builtin_amdgcn_rcpf(exp2f(2.8853901f * a) + 1.0f), x);
  return a < 0.25f ? small : large;
}
template <class T>
__device__ __forceinline__ constexpr T min(T x, T y) {
  return y < x ? y : x;
}
template <class T>
__device__ __forceinline__ constexpr T max(T x, T y) {
  return x < y ? y : x;
}
__device__ __forceinline__ int __ffs(int x) { return __builtin_ffs(x); }

// ---- lanes ----

// A result of lanes together: it is made here, where all lanes are active, and not moved into a branch that only some of them take.
__device__ __forceinline__ int together(int x) {
  asm volatile("" : "+v"(x));
  return x;
}
// The value of another lane of the wave.
template <class T>
__device__ __forceinline__ T from_lane(T x, int lane) {
  if constexpr (sizeof(T) == 8) {
    const uint64_t u = bits_as<uint64_t>(x);
    const auto low = static_cast<uint32_t>(together(__builtin_amdgcn_ds_bpermute(lane << 2, static_cast<int>(u))));
    const auto high = static_cast<uint32_t>(together(__builtin_amdgcn_ds_bpermute(lane << 2, static_cast<int>(u >> 32))));
    return bits_as<T>(static_cast<uint64_t>(high) << 32 | low);
  } else {
    static_assert(sizeof(T) == 4, "a register or two");
    return bits_as<T>(together(__builtin_amdgcn_ds_bpermute(lane << 2, bits_as<int>(x))));
  }
}
template <class T>
__device__ __forceinline__ T __shfl_xor_sync(unsigned, T x, int distance) {
  return from_lane(x, wave_lane() ^ distance);
}
template <class T>
__device__ __forceinline__ T __shfl_sync(unsigned, T x, int lane) {
  return from_lane(x, (wave_lane() & ~31) | lane);
}
template <class T>
__device__ __forceinline__ T __shfl_up_sync(unsigned, T x, int distance) {
  const int lane = wave_lane();
  return from_lane(x, (lane & 31) >= distance ? lane - distance : lane);
}
__device__ __forceinline__ unsigned __ballot_sync(unsigned, bool x) {
#if defined(__GFX9__)
  return static_cast<unsigned>(__builtin_amdgcn_ballot_w64(x) >> (wave_lane() & 32));
#else
  return __builtin_amdgcn_ballot_w32(x);
#endif
}

// A value that is the same in all lanes of the wave, as the compiler cannot know.
__device__ __forceinline__ int uniform(int x) { return __builtin_amdgcn_readfirstlane(x); }

// ---- device memory ----

using GlobalBytes = const __attribute__((address_space(1))) uint8_t*;
template <class T>
using Global = const __attribute__((address_space(1))) T*;

__device__ __forceinline__ GlobalBytes global_bytes(const void* p) { return (GlobalBytes)p; }
// sizeof(T): 4, 8 or 16, and p aligned to it.
template <class T>
__device__ __forceinline__ T load_as(GlobalBytes p) {
  if constexpr (sizeof(T) == 4) {
    return bits_as<T>(*(Global<unsigned>)p);
  } else {
    using Words = unsigned __attribute__((ext_vector_type(sizeof(T) / 4)));
    return bits_as<T>(*(Global<Words>)p);
  }
}
// The same address, of which the compiler knows nothing: what is read through it is read where that is written, not before a loop.
__device__ __forceinline__ GlobalBytes again(GlobalBytes p) {
  asm volatile("" : "+s"(p));
  return p;
}

// ---- order ----

// Lanes of a wave run in step and its accesses to shared memory stay in order; only the compiler must be kept from moving them.
__device__ __forceinline__ void __syncwarp() {
  __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
  __builtin_amdgcn_wave_barrier();
}
__device__ __forceinline__ void __syncthreads() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
__device__ __forceinline__ int __syncthreads_or(int x) {
  __shared__ int any;
  if (threadIdx.x == 0) any = 0;
  __syncthreads();
  if (x != 0) __hip_atomic_fetch_or(&any, 1, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
  __syncthreads();
  const int result = any;
  __syncthreads();
  return result;
}
// The shared code's atomicOr is on shared memory.
__device__ __forceinline__ unsigned atomicOr(unsigned* p, unsigned x) {
  return __hip_atomic_fetch_or(p, x, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
}
// A barrier among all threads of the block: the only use of CUDA's numbered barriers in the shared code.
__device__ __forceinline__ void named_barrier(int, int) { __syncthreads(); }
__device__ __forceinline__ void __threadfence() { __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "agent"); }

// What blocks tell one another passes the caches that they do not share.
template <class T>
__device__ __forceinline__ T __ldcg(const T* p) {
  T x;
  static_assert(sizeof(T) % 4 == 0, "whole words");
  uint32_t words[sizeof(T) / 4];
#pragma unroll
  for (unsigned i = 0; i < sizeof(T) / 4; ++i) {
    words[i] = __hip_atomic_load(reinterpret_cast<const uint32_t*>(p) + i, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
  }
  __builtin_memcpy(&x, words, sizeof x);
  return x;
}
template <class T>
__device__ __forceinline__ void __stcg(T* p, T x) {
  uint32_t words[sizeof(T) / 4];
  __builtin_memcpy(words, &x, sizeof x);
#pragma unroll
  for (unsigned i = 0; i < sizeof(T) / 4; ++i) {
    __hip_atomic_store(reinterpret_cast<uint32_t*>(p) + i, words[i], __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
  }
}
__device__ __forceinline__ unsigned atomicInc(unsigned* p, unsigned limit) {
  return __builtin_amdgcn_atomic_inc32(p, limit, __ATOMIC_RELAXED, "agent");
}

}  // namespace kvarn::cuda
