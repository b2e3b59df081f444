// The kernels of rows.cuh and their table.
#include "rows.cuh"

namespace kvarn::cuda {
namespace {

// Of a multiprocessor; 0 leaves it to the compiler, which on sm_120 spills registers for the sake of more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kLeastRowBlocks = 2;
#else
constexpr int kLeastRowBlocks = 0;
#endif

template <int D>
__global__ void __launch_bounds__(kRowThreads, kLeastRowBlocks) hadamard_kernel(const __grid_constant__ HadamardArgs a) {
  extern __shared__ float scratch[];
  hadamard_rows<D>(a, scratch);
}
template <int D>
__global__ void __launch_bounds__(kRowThreads, kLeastRowBlocks) append_kernel(const __grid_constant__ AppendArgs a) {
  extern __shared__ float scratch[];
  append_rows<D>(a, scratch);
}
template <int D>
__global__ void __launch_bounds__(kRowThreads, kLeastRowBlocks) decode_kernel(const __grid_constant__ DecodeArgs a) {
  extern __shared__ float scratch[];
  decode_rows<D>(a, scratch);
}

template <template <int> class Kernel>
const void* of_head_dim(int head_dim) {
  switch (head_dim) {
    case 64:
      return Kernel<64>::function();
    case 128:
      return Kernel<128>::function();
    case 256:
      return Kernel<256>::function();
    case 512:
      return Kernel<512>::function();
    default:
      return Kernel<0>::function();
  }
}
template <int D>
struct Hadamard {
  static const void* function() { return reinterpret_cast<const void*>(&hadamard_kernel<D>); }
};
template <int D>
struct Append {
  static const void* function() { return reinterpret_cast<const void*>(&append_kernel<D>); }
};
template <int D>
struct Decode {
  static const void* function() { return reinterpret_cast<const void*>(&decode_kernel<D>); }
};

}  // namespace

const void* find_hadamard(int head_dim) { return of_head_dim<Hadamard>(head_dim); }
const void* find_append(int head_dim) { return of_head_dim<Append>(head_dim); }
const void* find_decode(int head_dim) { return of_head_dim<Decode>(head_dim); }

}  // namespace kvarn::cuda
