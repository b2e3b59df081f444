// The device runtime as the backend sees it: errors as statuses, the current device as a scope.
#pragma once

#include <cuda_runtime_api.h>

#include "gpu/checks.h"

namespace kvarn::cuda {

using namespace kvarn::gpu;

// Turns an error of the runtime into a status that names the operation, and clears it: it has been reported.
inline kvarn_status check(const char* operation, const char* what, cudaError_t error) {
  if (error == cudaSuccess) return KVARN_OK;
  (void)cudaGetLastError();
  const kvarn_status status = error == cudaErrorMemoryAllocation ? KVARN_OUT_OF_MEMORY : KVARN_LAUNCH_FAILED;
  return fail(status, "[kvarn.%s] %s: expected success, got %s (%s)", operation, what, cudaGetErrorName(error), cudaGetErrorString(error));
}

#define KVARN_GPU(operation, what, call)                                                                                        \
  do {                                                                                                                          \
    if (const kvarn_status gpu_status = ::kvarn::cuda::check(operation, what, call); gpu_status != KVARN_OK) return gpu_status; \
  } while (false)

// Makes a device current and puts the caller's back.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceScope() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace kvarn::cuda
