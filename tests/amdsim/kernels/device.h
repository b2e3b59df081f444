// What the test kernels need of the HIP device headers; clang alone compiles them.
#pragma once

#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __shared__ __attribute__((shared))
#define __launch_bounds__(n) __attribute__((amdgpu_flat_work_group_size(1, n)))

typedef unsigned u32;
typedef unsigned long long u64;
typedef _Float16 half2 __attribute__((ext_vector_type(2)));
typedef _Float16 half4 __attribute__((ext_vector_type(4)));
typedef _Float16 half8 __attribute__((ext_vector_type(8)));
typedef _Float16 half16 __attribute__((ext_vector_type(16)));
typedef short short4 __attribute__((ext_vector_type(4)));
typedef short short8 __attribute__((ext_vector_type(8)));
typedef short short16 __attribute__((ext_vector_type(16)));
typedef float float2 __attribute__((ext_vector_type(2)));
typedef float float4 __attribute__((ext_vector_type(4)));
typedef float float8 __attribute__((ext_vector_type(8)));
typedef float float16 __attribute__((ext_vector_type(16)));
typedef int int2 __attribute__((ext_vector_type(2)));
typedef int int4 __attribute__((ext_vector_type(4)));
typedef int int8 __attribute__((ext_vector_type(8)));
typedef int int16 __attribute__((ext_vector_type(16)));

// A kernel of one workgroup of at most 256 threads; t is the thread.
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(256) name

__device__ inline u32 thread() { return __builtin_amdgcn_workitem_id_x(); }
__device__ inline u32 group() { return __builtin_amdgcn_workgroup_id_x(); }
__device__ inline float as_float(u32 bits) { return __builtin_bit_cast(float, bits); }
__device__ inline half2 as_half2(u32 bits) { return __builtin_bit_cast(half2, bits); }
template <class T>
__device__ inline u32 bits(T value) {
  return __builtin_bit_cast(u32, value);
}

__device__ inline void barrier() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
