// The kernels of hip/*.hip as nvcc compiles them, by name.
#pragma once

#include <cstddef>

namespace kvarn::nvidia {

struct Kernel {
  const char* name;
  const void* function;
  const void* arguments;  // symbol of the constant memory that the kernel reads its arguments from
  size_t argument_bytes;
};
struct Kernels {
  const Kernel* begin;
  const Kernel* end;
};

Kernels row_kernels();
Kernels encode_kernels();
Kernels attend_kernels();

#define KVARN_KERNEL(name, Args) \
  {#name, reinterpret_cast<const void*>(&kvarn::cuda::name), kvarn::cuda::kernel_arguments, sizeof(kvarn::cuda::Args)}

}  // namespace kvarn::nvidia
