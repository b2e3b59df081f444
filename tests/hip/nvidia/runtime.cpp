// A libamdhip64.so.7 on an NVIDIA GPU: the functions of AMD's runtime that the HIP backend calls, over CUDA's. Code objects are not looked
// at: kernels are nvcc's, of the same sources. Errors are CUDA's, whose numbers are HIP's as far as the backend tells them apart.
#include <cuda_runtime_api.h>

#include <cstring>
#include <initializer_list>

#include "kernels.h"

#define HIP_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

const kvarn::nvidia::Kernel* find(const char* name) {
  using namespace kvarn::nvidia;
  for (const Kernels& kernels : {row_kernels(), encode_kernels(), attend_kernels()}) {
    for (const Kernel* kernel = kernels.begin; kernel != kernels.end; ++kernel) {
      if (std::strcmp(kernel->name, name) == 0) return kernel;
    }
  }
  return nullptr;
}

}  // namespace

HIP_EXPORT int hipGetDeviceCount(int* count) { return cudaGetDeviceCount(count); }
HIP_EXPORT int hipGetDevice(int* device) { return cudaGetDevice(device); }
HIP_EXPORT int hipSetDevice(int device) { return cudaSetDevice(device); }
HIP_EXPORT const char* hipGetErrorName(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
HIP_EXPORT const char* hipGetErrorString(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
HIP_EXPORT int hipGetLastError() { return cudaGetLastError(); }
HIP_EXPORT int hipMalloc(void** memory, size_t bytes) { return cudaMalloc(memory, bytes); }
HIP_EXPORT int hipFree(void* memory) { return cudaFree(memory); }
HIP_EXPORT int hipMemset(void* memory, int value, size_t bytes) { return cudaMemset(memory, value, bytes); }
HIP_EXPORT int hipDeviceSynchronize() { return cudaDeviceSynchronize(); }

// hipDeviceProp_t as far as the backend reads it: the name, and somewhere behind it the target.
HIP_EXPORT int hipGetDevicePropertiesR0600(char* properties, int device) {
  cudaDeviceProp own;
  const cudaError_t error = cudaGetDeviceProperties(&own, device);
  if (error != cudaSuccess) return error;
  std::memcpy(properties, own.name, sizeof own.name);
  std::strcpy(properties + 1024, "gfx-of-nvidia");
  return cudaSuccess;
}

HIP_EXPORT int hipDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 63:  // hipDeviceAttributeMultiprocessorCount
      return cudaDeviceGetAttribute(value, cudaDevAttrMultiProcessorCount, device);
    case 74:  // hipDeviceAttributeMaxSharedMemoryPerBlock: what AMD has
      *value = 65536;
      return cudaSuccess;
    case 87:  // hipDeviceAttributeWarpSize
      *value = 32;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

HIP_EXPORT int hipModuleLoadData(const void** module, const void* image) {
  *module = image;
  return cudaSuccess;
}

HIP_EXPORT int hipModuleGetFunction(const kvarn::nvidia::Kernel** function, const void*, const char* name) {
  *function = find(name);
  return *function != nullptr ? cudaSuccess : cudaErrorSymbolNotFound;
}

HIP_EXPORT int hipModuleLaunchKernel(const kvarn::nvidia::Kernel* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                     unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes, cudaStream_t stream,
                                     void** arguments, void**) {
  cudaError_t error = cudaFuncSetAttribute(kernel->function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error == cudaSuccess) {
    error = cudaMemcpyToSymbolAsync(kernel->arguments, arguments[0], kernel->argument_bytes, 0, cudaMemcpyHostToDevice, stream);
  }
  if (error != cudaSuccess) return error;
  return cudaLaunchKernel(kernel->function, dim3(grid_x, grid_y, grid_z), dim3(block_x, block_y, block_z), arguments, shared_bytes, stream);
}
