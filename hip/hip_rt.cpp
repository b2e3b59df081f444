#include "hip_rt.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <string_view>
#include <vector>

namespace kvarn::hip {
namespace {

constexpr const char* kFiles[] = {"libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5", "libamdhip64.so"};

void open(Runtime& r) {
  void* library = nullptr;
  std::string names;
  // One that the process has loaded comes first, such as that of ROCm's torch: two runtimes know nothing of each other's streams.
  for (const int loaded : {RTLD_NOLOAD, 0}) {
    for (const char* file : kFiles) {
      if (library != nullptr) break;
      library = dlopen(file, RTLD_NOW | RTLD_LOCAL | loaded);
      const char* error = dlerror();
      if (library != nullptr) {
        r.file = file;
      } else if (loaded == 0) {
        // A library that is there but cannot be loaded is the reason worth telling.
        if (error != nullptr && std::strstr(error, "No such file") == nullptr) r.reason = error;
        names += std::string(names.empty() ? "" : ", ") + file;
      }
    }
  }
  if (library == nullptr) {
    if (r.reason.empty()) r.reason = "no AMD runtime (looked for " + names + ")";
    return;
  }
  r.reason.clear();
  const auto resolve = [&](auto& function, const char* name, const char* older = nullptr) {
    void* symbol = dlsym(library, name);
    if (symbol == nullptr && older != nullptr) symbol = dlsym(library, older);
    if (symbol == nullptr && r.reason.empty()) r.reason = r.file + ": no function " + name;
    std::memcpy(&function, &symbol, sizeof symbol);
  };
  resolve(r.hipGetDeviceCount, "hipGetDeviceCount");
  resolve(r.hipGetDevice, "hipGetDevice");
  resolve(r.hipSetDevice, "hipSetDevice");
  resolve(r.hipGetDeviceProperties, "hipGetDevicePropertiesR0600", "hipGetDeviceProperties");
  resolve(r.hipDeviceGetAttribute, "hipDeviceGetAttribute");
  resolve(r.hipGetErrorName, "hipGetErrorName");
  resolve(r.hipGetErrorString, "hipGetErrorString");
  resolve(r.hipGetLastError, "hipGetLastError");
  resolve(r.hipModuleLoadData, "hipModuleLoadData");
  resolve(r.hipModuleGetFunction, "hipModuleGetFunction");
  resolve(r.hipModuleLaunchKernel, "hipModuleLaunchKernel");
  resolve(r.hipMalloc, "hipMalloc");
  resolve(r.hipFree, "hipFree");
  resolve(r.hipMemset, "hipMemset");
  resolve(r.hipDeviceSynchronize, "hipDeviceSynchronize");
}

// Loaded modules of a device, in the order of kBundles; never unloaded, because plans hold their functions.
struct Modules {
  std::mutex mutex;
  std::map<int, std::vector<hipModule_t>> of_device;
};
Modules& modules() {
  static Modules* const all = new Modules;
  return *all;
}

// The code object for a target in an offload bundle; empty: there is none.
std::string_view code_object(const void* bundle, const std::string& target) {
  const char* const begin = static_cast<const char*>(bundle);
  const char* at = begin + std::strlen("__CLANG_OFFLOAD_BUNDLE__");
  const auto next = [&at] {
    uint64_t value;
    std::memcpy(&value, at, sizeof value);
    at += sizeof value;
    return value;
  };
  for (uint64_t count = next(); count > 0; --count) {
    const uint64_t offset = next(), bytes = next(), length = next();
    const std::string_view id(at, length);
    at += length;
    if (id == "hipv4-amdgcn-amd-amdhsa--" + target) return {begin + offset, bytes};
  }
  return {};
}

// A number of a kernel in its code object's metadata: MessagePack, a map for each kernel, keys in alphabetical order. -1: there is none.
int metadata_number(std::string_view code, const std::string& kernel, const std::string& key) {
  const auto text = [](const std::string& s) {
    return s.size() < 32 ? static_cast<char>(0xa0 | s.size()) + s : '\xd9' + std::string(1, static_cast<char>(s.size())) + s;
  };
  const size_t name = code.find(text(".name") + text(kernel));
  if (name == code.npos) return -1;
  size_t at = key < ".name" ? code.rfind(text(key), name) : code.find(text(key), name);
  if (at == code.npos) return -1;
  const auto byte = [code](size_t i) { return i < code.size() ? static_cast<unsigned char>(code[i]) : 0u; };
  at += text(key).size();
  if (byte(at) < 0x80) return static_cast<int>(byte(at));
  const int bytes = byte(at) == 0xcc ? 1 : byte(at) == 0xcd ? 2 : byte(at) == 0xce ? 4 : 0;
  unsigned value = 0;
  for (int i = 1; i <= bytes; ++i) value = value << 8 | byte(at + static_cast<size_t>(i));
  return bytes == 0 ? -1 : static_cast<int>(value);
}

}  // namespace

const Runtime& runtime() {
  static const Runtime* const opened = [] {
    auto* r = new Runtime;
    open(*r);
    return r;
  }();
  return *opened;
}

std::string error_text(hipError_t error) {
  return std::string(runtime().hipGetErrorName(error)) + ": " + runtime().hipGetErrorString(error);
}

kvarn_status check(const char* operation, const char* what, hipError_t error) {
  if (error == kHipSuccess) return KVARN_OK;
  (void)runtime().hipGetLastError();
  const kvarn_status status = error == kHipErrorOutOfMemory ? KVARN_OUT_OF_MEMORY : KVARN_LAUNCH_FAILED;
  return fail(status, "[kvarn.%s] %s: expected success, got %s", operation, what, error_text(error).c_str());
}

hipError_t name_device(int device, DeviceName* result) {
  // hipDeviceProp_t begins with the name and grew from one version of ROCm to the next (1,472 bytes in 6 and 7). The target's place
  // differs, but no other text in it begins like that.
  alignas(16) char properties[8192] = {};
  const hipError_t error = runtime().hipGetDeviceProperties(properties, device);
  if (error != kHipSuccess) return error;
  properties[sizeof properties - 1] = '\0';
  result->name = std::string(properties, strnlen(properties, 256));
  constexpr char kPrefix[] = {'g', 'f', 'x'};
  const char *const begin = properties + 256, *const end = properties + sizeof properties;
  const char* const found = std::search(begin, end, std::begin(kPrefix), std::end(kPrefix));
  result->target = found == end ? "gfx of no known name" : std::string(found);
  result->target = result->target.substr(0, result->target.find(':'));
  return kHipSuccess;
}

bool is_built_for(const DeviceName& device) {
  return (std::string(", ") + kTargets + ",").find(", " + device.target + ",") != std::string::npos;
}

hipError_t load_bundles(int device) {
  Modules& all = modules();
  const std::lock_guard lock(all.mutex);
  std::vector<hipModule_t>& loaded = all.of_device[device];
  while (static_cast<int>(loaded.size()) < kBundleCount) {
    hipModule_t module = nullptr;
    const hipError_t error = runtime().hipModuleLoadData(&module, kBundles[loaded.size()].data);
    if (error != kHipSuccess) return error;
    loaded.push_back(module);
  }
  return kHipSuccess;
}

bool has_bundle(const char* bundle) {
  return std::any_of(kBundles, kBundles + kBundleCount, [&](const Bundle& b) { return std::strcmp(bundle, b.name) == 0; });
}

kvarn_status find_kernel(int device, const char* bundle, const char* name, hipFunction_t* function) {
  KVARN_HIP("plan_create", "kernels", load_bundles(device));
  Modules& all = modules();
  const std::lock_guard lock(all.mutex);
  for (int i = 0; i < kBundleCount; ++i) {
    if (std::strcmp(bundle, kBundles[i].name) != 0) continue;
    return check("plan_create", name, runtime().hipModuleGetFunction(function, all.of_device[device][static_cast<size_t>(i)], name));
  }
  return fail(KVARN_INTERNAL, "[kvarn.plan_create] kernels: expected a bundle %s, got none", bundle);
}

kvarn_status find_resources(const char* bundle, const std::string& target, const std::string& kernel, KernelResources* resources) {
  for (int i = 0; i < kBundleCount; ++i) {
    if (std::strcmp(bundle, kBundles[i].name) != 0) continue;
    const std::string_view code = code_object(kBundles[i].data, target);
    *resources = {metadata_number(code, kernel, ".vgpr_count"), metadata_number(code, kernel, ".group_segment_fixed_size")};
    if (resources->registers > 0 && resources->shared_bytes >= 0) return KVARN_OK;
  }
  return fail(KVARN_INTERNAL, "[kvarn.plan_create] kernels: expected the registers of %s in its code object for %s, got none",
              kernel.c_str(), target.c_str());
}

}  // namespace kvarn::hip
