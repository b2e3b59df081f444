// AMD's runtime as the backend sees it: a library that is looked for when the backend is first used, a dozen of its functions, errors as
// statuses. Nothing of it is needed to build.
#pragma once

#include <cstdlib>
#include <string>

#include "gpu/checks.h"

namespace kvarn::hip {

using namespace kvarn::gpu;  // what the GPU backends share

using hipError_t = int;
using hipModule_t = void*;
using hipFunction_t = void*;
using hipStream_t = void*;
inline constexpr hipError_t kHipSuccess = 0;
inline constexpr hipError_t kHipErrorOutOfMemory = 2;

// hipDeviceAttribute_t, the same in ROCm 5, 6 and 7.
inline constexpr int kMultiprocessorCount = 63, kMaxSharedMemoryPerBlock = 74, kWarpSize = 87;

struct Runtime {
  std::string file;    // that was found
  std::string reason;  // why there is none
  hipError_t (*hipGetDeviceCount)(int*) = nullptr;
  hipError_t (*hipGetDevice)(int*) = nullptr;
  hipError_t (*hipSetDevice)(int) = nullptr;
  hipError_t (*hipGetDeviceProperties)(void*, int) = nullptr;
  hipError_t (*hipDeviceGetAttribute)(int*, int, int) = nullptr;
  const char* (*hipGetErrorName)(hipError_t) = nullptr;
  const char* (*hipGetErrorString)(hipError_t) = nullptr;
  hipError_t (*hipGetLastError)() = nullptr;
  hipError_t (*hipModuleLoadData)(hipModule_t*, const void*) = nullptr;
  hipError_t (*hipModuleGetFunction)(hipFunction_t*, hipModule_t, const char*) = nullptr;
  hipError_t (*hipModuleLaunchKernel)(hipFunction_t, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, hipStream_t,
                                      void**, void**) = nullptr;
  hipError_t (*hipMalloc)(void**, size_t) = nullptr;
  hipError_t (*hipFree)(void*) = nullptr;
  hipError_t (*hipMemset)(void*, int, size_t) = nullptr;
  hipError_t (*hipDeviceSynchronize)() = nullptr;
};

// Looked for once in the life of the process.
const Runtime& runtime();

// "hipErrorNoDevice: no ROCm-capable device is detected"
std::string error_text(hipError_t error);
// Turns an error of the runtime into a status that names the operation, and clears it: it has been reported.
kvarn_status check(const char* operation, const char* what, hipError_t error);

#define KVARN_HIP(operation, what, call)                                                                                       \
  do {                                                                                                                         \
    if (const kvarn_status hip_status = ::kvarn::hip::check(operation, what, call); hip_status != KVARN_OK) return hip_status; \
  } while (false)

struct DeviceName {
  std::string name;    // "AMD Instinct MI300X"
  std::string target;  // "gfx942", without its features
  std::string text() const { return name + " (" + target + ")"; }
  // Of the instruction set: 9 of gfx90a and gfx942, 11 of gfx1100.
  int generation() const { return std::atoi(target.substr(3, target.size() - 5).c_str()); }
};
hipError_t name_device(int device, DeviceName* result);

// Kernels come as offload bundles, one code object for each target, embedded in this library.
struct Bundle {
  const char* name;
  const void* data;
};
extern const Bundle kBundles[];
extern const int kBundleCount;
extern const char kTargets[];  // "gfx90a, gfx942, ..."
bool is_built_for(const DeviceName& device);

// A kernel of a bundle, on the current device, whose number is `device` and for whose target there are kernels. Loads the bundles of a
// device once.
kvarn_status find_kernel(int device, const char* bundle, const char* name, hipFunction_t* function);
bool has_bundle(const char* bundle);
// What the compiler gave a kernel, as its code object says: what HIP's runtimes tell of registers differs from version to version.
struct KernelResources {
  int registers = 0;     // vector registers of a lane
  int shared_bytes = 0;  // that every launch has
};
kvarn_status find_resources(const char* bundle, const std::string& target, const std::string& kernel, KernelResources* resources);
// Loads the bundles for the current device, whose number is `device`; fails where they have no code object for it.
hipError_t load_bundles(int device);

// Makes a device current and puts the caller's back.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    error_ = runtime().hipGetDevice(&before_);
    if (error_ == kHipSuccess && before_ != device) {
      error_ = runtime().hipSetDevice(device);
      changed_ = error_ == kHipSuccess;
    }
  }
  ~DeviceScope() {
    if (changed_) (void)runtime().hipSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  hipError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  hipError_t error_ = kHipSuccess;
};

}  // namespace kvarn::hip
