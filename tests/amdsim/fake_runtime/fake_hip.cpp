// A stand-in for libamdhip64: memory is host memory, and kernels are the real machine code of one target, run in the emulator.
// It implements what a backend needs that loads an offload bundle and launches kernels of it; README.md lists the functions and variables.
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "devices.h"
#include "emulated_kernels.h"

#define FAKE_HIP extern "C" __attribute__((visibility("default")))

namespace {

using Work = std::function<int()>;
using Graph = std::vector<Work>;

struct Stream {
  std::deque<Work> pending;
  std::unique_ptr<Graph> captured;  // while it captures
};
struct Allocation {
  uint64_t bytes;
  int device;
};

// One lock for everything: calls may come from any thread, and kernels run one at a time.
std::recursive_mutex g_mutex;
std::map<uint64_t, Allocation> g_allocations;  // by their beginning
Stream g_null_stream;
std::map<Stream*, std::unique_ptr<Stream>> g_streams;
std::map<Graph*, std::unique_ptr<Graph>> g_graphs;

// Null where it is not a stream.
Stream* find_stream(void* stream) {
  if (!stream) return &g_null_stream;
  auto found = g_streams.find(static_cast<Stream*>(stream));
  return found == g_streams.end() ? nullptr : found->second.get();
}

// While a stream captures, nothing may wait for it, be allocated, or go to the null stream.
int check_not_capturing(const char* what) {
  for (auto& [key, stream] : g_streams) {
    if (stream->captured) return fail(kCaptureUnsupported, what);
  }
  return kSuccess;
}

// With AMDSIM_DEFERRED=1 work waits for a synchronization, as it may on a device; otherwise it runs at once.
int enqueue(void* stream, Work work) {
  if (!target()) return fail(kNoDevice);
  Stream* s = find_stream(stream);
  if (!s) return fail(kInvalidHandle, "not a stream");
  if (s->captured) {
    s->captured->push_back(std::move(work));
    return kSuccess;
  }
  if (!stream) {
    if (const int error = check_not_capturing("work on the null stream")) return error;
  }
  if (!number_from("AMDSIM_DEFERRED", 0)) return work();
  s->pending.push_back(std::move(work));
  return kSuccess;
}

int drain(Stream& s) {
  int first = kSuccess;
  while (!s.pending.empty()) {
    auto work = std::move(s.pending.front());
    s.pending.pop_front();
    const int error = work();
    if (!first) first = error;
  }
  return first;
}

// The null stream waits for all others.
int drain_all() {
  int first = check_not_capturing("a synchronization");
  if (first) return first;
  for (auto& [key, stream] : g_streams) {
    const int error = drain(*stream);
    if (!first) first = error;
  }
  const int error = drain(g_null_stream);
  return first ? first : error;
}

int copy(void* to, const void* from, size_t bytes, int kind) {
  constexpr int kHostToDevice = 1, kDeviceToHost = 2, kDeviceToDevice = 3, kDefault = 4;
  if (kind < 0 || kind > kDefault) return fail(kInvalidValue, "hipMemcpy: kind " + std::to_string(kind));
  const auto on_device = [&](const void* p) {
    auto after = g_allocations.upper_bound(reinterpret_cast<uint64_t>(p));
    if (after == g_allocations.begin()) return false;
    --after;
    return reinterpret_cast<uint64_t>(p) + bytes <= after->first + after->second.bytes;
  };
  if (bytes && (kind == kHostToDevice || kind == kDeviceToDevice) && !on_device(to))
    return fail(kInvalidValue, "hipMemcpy: the target is not inside a device allocation");
  if (bytes && (kind == kDeviceToHost || kind == kDeviceToDevice) && !on_device(from))
    return fail(kInvalidValue, "hipMemcpy: the source is not inside a device allocation");
  memmove(to, from, bytes);
  return kSuccess;
}

int run(Function& function, const uint32_t grid[3], const uint32_t block[3], uint32_t dynamic_lds,
        const std::vector<std::string>& arguments) {
  std::vector<const void*> pointers;
  for (const std::string& argument : arguments) pointers.push_back(argument.data());
  std::vector<amdsim_range> ranges;
  for (const auto& [begin, allocation] : g_allocations) {
    if (allocation.device == function.module->device) ranges.push_back({begin, begin + allocation.bytes, 1});
  }
  static int launches = 0;  // each launch gets an order of its own
  const int interleave = number_from("AMDSIM_INTERLEAVE", 0);
  const amdsim_options options = {static_cast<uint32_t>(number_from("AMDSIM_LDS_RACES", 1)),
                                  static_cast<uint32_t>(number_from("AMDSIM_LDS_UNINITIALIZED", 1)),
                                  static_cast<uint32_t>(number_from("AMDSIM_GLOBAL_RACES", 1)),
                                  static_cast<uint32_t>(number_from("AMDSIM_REVERSE", 0)),
                                  static_cast<uint32_t>(interleave ? interleave + launches++ : 0),
                                  static_cast<uint32_t>(number_from("AMDSIM_THREADS", 1)),
                                  2'000'000'000};
  if (function.core->launch(function.kernel, grid, block, dynamic_lds, pointers.data(), ranges.data(), ranges.size(), &options)) {
    return fail(kIllegalAddress, function.name + ": " + function.core->error());
  }
  return kSuccess;
}

}  // namespace

// ---- devices -------------------------------------------------------------------------------------------------------------

FAKE_HIP int hipGetDeviceCount(int* count) {
  *count = static_cast<int>(devices().size());
  return *count > 0 ? kSuccess : fail(kNoDevice);
}

FAKE_HIP int hipGetDevice(int* device) {
  *device = g_device;
  return check_device(g_device);
}

FAKE_HIP int hipSetDevice(int device) {
  const int error = check_device(device);
  if (!error) g_device = device;
  return error;
}

FAKE_HIP int hipRuntimeGetVersion(int* version) {
  *version = 70000000;
  return kSuccess;
}

FAKE_HIP int hipDriverGetVersion(int* version) { return hipRuntimeGetVersion(version); }

// Offsets of the fields in hipDeviceProp_t of ROCm 6 and 7.
FAKE_HIP int hipGetDevicePropertiesR0600(void* properties, int device) {
  if (const int error = check_device(device)) return error;
  char* p = static_cast<char*>(properties);
  memset(p, 0, 1472);
  const auto put = [&](size_t offset, auto value) { memcpy(p + offset, &value, sizeof value); };
  snprintf(p, 256, "emulated %s", target(device)->name);
  put(288, kMemoryBytes);          // totalGlobalMem
  put(296, size_t{kLdsBytes});     // sharedMemPerBlock
  put(308, target(device)->wave);  // warpSize
  put(320, kMaxThreads);           // maxThreadsPerBlock
  put(360, target(device)->major);
  put(364, target(device)->minor);
  put(388, number_from("AMDSIM_PROCESSORS", target(device)->processors));  // multiProcessorCount
  put(616, target(device)->l2_bytes);
  put(624, target(device)->threads_per_processor);
  put(640, size_t{kLdsBytes});  // sharedMemPerMultiprocessor
  snprintf(p + 1160, 256, "%s", target(device)->full_name);
  return kSuccess;
}

FAKE_HIP int hipDeviceGetAttribute(int* value, int attribute, int device) {
  if (const int error = check_device(device)) return error;
  switch (attribute) {
    case 19:
      *value = target(device)->l2_bytes;
      return kSuccess;
    case 23:
      *value = target(device)->major;
      return kSuccess;
    case 56:
      *value = kMaxThreads;
      return kSuccess;
    case 57:
      *value = target(device)->threads_per_processor;
      return kSuccess;
    case 61:
      *value = target(device)->minor;
      return kSuccess;
    case 63:
      *value = number_from("AMDSIM_PROCESSORS", target(device)->processors);
      return kSuccess;
    case 74:
    case 75:
    case 76:
    case 10002:
      *value = kLdsBytes;
      return kSuccess;
    case 87:
      *value = target(device)->wave;
      return kSuccess;
    default:
      return fail(kInvalidValue, "hipDeviceGetAttribute: attribute " + std::to_string(attribute) + " is not modelled");
  }
}

// ---- errors --------------------------------------------------------------------------------------------------------------

FAKE_HIP const char* hipGetErrorName(int error) { return describe(error).name; }

FAKE_HIP const char* hipGetErrorString(int error) { return describe(error).text; }

FAKE_HIP int hipGetLastError() {
  const int last = g_last;
  g_last = kSuccess;
  return last;
}

FAKE_HIP int hipPeekAtLastError() { return g_last; }

// What the emulator said about this thread's last failure.
FAKE_HIP const char* amdsim_last_trap() { return g_detail.c_str(); }

// ---- memory --------------------------------------------------------------------------------------------------------------

FAKE_HIP int hipMalloc(void** pointer, size_t bytes) {
  const std::lock_guard lock(g_mutex);
  if (!target()) return fail(kNoDevice);
  if (const int error = check_not_capturing("hipMalloc")) return error;
  *pointer = nullptr;
  if (bytes == 0) return kSuccess;
  if (bytes > kMemoryBytes) return fail(kOutOfMemory);
  // At least a cache line lies between two allocations, so that every overrun leaves its own.
  *pointer = aligned_alloc(256, (bytes + 511) & ~size_t{255});
  if (!*pointer) return fail(kOutOfMemory);
  memset(*pointer, 0xee, bytes);
  g_allocations[reinterpret_cast<uint64_t>(*pointer)] = {bytes, g_device};
  return kSuccess;
}

FAKE_HIP int hipMemGetInfo(size_t* free_bytes, size_t* total) {
  if (!target()) return fail(kNoDevice);
  const std::lock_guard lock(g_mutex);
  *total = *free_bytes = kMemoryBytes;
  for (const auto& [begin, allocation] : g_allocations) *free_bytes -= std::min<size_t>(*free_bytes, allocation.bytes);
  return kSuccess;
}

FAKE_HIP int hipFree(void* pointer) {
  const std::lock_guard lock(g_mutex);
  if (!pointer) return kSuccess;
  const int error = drain_all();
  if (!g_allocations.erase(reinterpret_cast<uint64_t>(pointer))) return fail(kInvalidDevicePointer, "hipFree: not an allocation");
  free(pointer);
  return error;
}

// Makes host memory, such as a numpy array's, count as a device allocation. What it overlaps of other host memory is no longer one.
FAKE_HIP int amdsim_register(void* pointer, size_t bytes) {
  const std::lock_guard lock(g_mutex);
  const auto begin = reinterpret_cast<uint64_t>(pointer);
  auto other = g_allocations.lower_bound(begin);
  if (other != g_allocations.begin() && std::prev(other)->first + std::prev(other)->second.bytes > begin) --other;
  while (other != g_allocations.end() && other->first < begin + bytes) other = g_allocations.erase(other);
  if (bytes) g_allocations[begin] = {bytes, g_device};
  return kSuccess;
}

FAKE_HIP int amdsim_unregister(void* pointer) {
  const std::lock_guard lock(g_mutex);
  return g_allocations.erase(reinterpret_cast<uint64_t>(pointer)) ? kSuccess : fail(kInvalidDevicePointer);
}

FAKE_HIP int hipMemcpy(void* to, const void* from, size_t bytes, int kind) {
  const std::lock_guard lock(g_mutex);
  if (const int error = drain_all()) return error;
  return copy(to, from, bytes, kind);
}

FAKE_HIP int hipMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void* stream) {
  const std::lock_guard lock(g_mutex);
  constexpr int kHostToDevice = 1;
  if (kind != kHostToDevice) return enqueue(stream, [=] { return copy(to, from, bytes, kind); });
  // Pageable host memory is read before the call returns.
  auto staged = std::make_shared<std::string>(static_cast<const char*>(from), bytes);
  return enqueue(stream, [=] { return copy(to, staged->data(), bytes, kind); });
}

FAKE_HIP int hipMemsetAsync(void* to, int value, size_t bytes, void* stream) {
  const std::lock_guard lock(g_mutex);
  return enqueue(stream, [=] {
    const std::string pattern(bytes, static_cast<char>(value));
    return copy(to, pattern.data(), bytes, 1);
  });
}

FAKE_HIP int hipMemset(void* to, int value, size_t bytes) {
  const std::lock_guard lock(g_mutex);
  if (const int error = drain_all()) return error;
  const int error = hipMemsetAsync(to, value, bytes, nullptr);
  return error ? error : drain_all();
}

struct PointerAttributes {  // hipPointerAttribute_t of ROCm 6 and 7
  int type, device;
  void *device_pointer, *host_pointer;
  int is_managed;
  unsigned flags;
};

FAKE_HIP int hipPointerGetAttributes(PointerAttributes* attributes, const void* pointer) {
  const std::lock_guard lock(g_mutex);
  const auto address = reinterpret_cast<uint64_t>(pointer);
  constexpr int kUnregistered = 0, kDevice = 2;
  auto after = g_allocations.upper_bound(address);
  const bool known = after != g_allocations.begin() && address < std::prev(after)->first + std::prev(after)->second.bytes;
  *attributes = {known ? kDevice : kUnregistered,
                 known ? std::prev(after)->second.device : -1,
                 known ? const_cast<void*>(pointer) : nullptr,
                 nullptr,
                 0,
                 0};
  return kSuccess;
}

// ---- streams -------------------------------------------------------------------------------------------------------------

FAKE_HIP int hipStreamCreate(void** stream) {
  const std::lock_guard lock(g_mutex);
  if (!target()) return fail(kNoDevice);
  auto created = std::make_unique<Stream>();
  *stream = created.get();
  g_streams[created.get()] = std::move(created);
  return kSuccess;
}

FAKE_HIP int hipStreamCreateWithFlags(void** stream, unsigned) { return hipStreamCreate(stream); }

FAKE_HIP int hipStreamDestroy(void* stream) {
  const std::lock_guard lock(g_mutex);
  auto found = g_streams.find(static_cast<Stream*>(stream));
  if (found == g_streams.end()) return fail(kInvalidHandle, "not a stream");
  const int error = drain(*found->second);
  g_streams.erase(found);
  return error;
}

FAKE_HIP int hipStreamSynchronize(void* stream) {
  const std::lock_guard lock(g_mutex);
  if (!stream) return drain_all();
  Stream* s = find_stream(stream);
  if (!s) return fail(kInvalidHandle, "not a stream");
  return s->captured ? fail(kCaptureUnsupported, "hipStreamSynchronize") : drain(*s);
}

FAKE_HIP int hipDeviceSynchronize() {
  const std::lock_guard lock(g_mutex);
  return drain_all();
}

// ---- graphs: what a stream was given while it captured, in order -------------------------------------------------------------

FAKE_HIP int hipStreamBeginCapture(void* stream, int) {
  const std::lock_guard lock(g_mutex);
  Stream* s = find_stream(stream);
  if (!s || !stream) return fail(kInvalidHandle, "not a stream that can capture");
  if (s->captured) return fail(kCaptureUnsupported, "the stream captures already");
  s->captured = std::make_unique<Graph>();
  return kSuccess;
}

FAKE_HIP int hipStreamEndCapture(void* stream, void** graph) {
  const std::lock_guard lock(g_mutex);
  Stream* s = find_stream(stream);
  if (!s || !s->captured) return fail(kInvalidHandle, "not a stream that captures");
  *graph = s->captured.get();
  g_graphs[s->captured.get()] = std::move(s->captured);
  return kSuccess;
}

FAKE_HIP int hipGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  const std::lock_guard lock(g_mutex);
  auto found = g_graphs.find(static_cast<Graph*>(graph));
  if (found == g_graphs.end()) return fail(kInvalidHandle, "not a graph");
  auto copied = std::make_unique<Graph>(*found->second);
  *executable = copied.get();
  g_graphs[copied.get()] = std::move(copied);
  return kSuccess;
}

FAKE_HIP int hipGraphLaunch(void* executable, void* stream) {
  const std::lock_guard lock(g_mutex);
  auto found = g_graphs.find(static_cast<Graph*>(executable));
  if (found == g_graphs.end()) return fail(kInvalidHandle, "not a graph");
  for (const Work& work : *found->second) {
    if (const int error = enqueue(stream, work)) return error;
  }
  return kSuccess;
}

FAKE_HIP int hipGraphDestroy(void* graph) {
  const std::lock_guard lock(g_mutex);
  return g_graphs.erase(static_cast<Graph*>(graph)) ? kSuccess : fail(kInvalidHandle, "not a graph");
}

FAKE_HIP int hipGraphExecDestroy(void* executable) { return hipGraphDestroy(executable); }

// ---- modules -------------------------------------------------------------------------------------------------------------

FAKE_HIP int hipModuleLoadData(void** module, const void* data) {
  const std::lock_guard lock(g_mutex);
  if (!target()) return fail(kNoDevice);
  std::string image = find_code_object(static_cast<const char*>(data), target()->name);
  if (image.empty())
    return fail(kNoBinaryForGpu, std::string("hipModuleLoadData: no offload bundle with a code object for ") + target()->name);
  std::error_code none;
  std::string file = (std::filesystem::temp_directory_path(none) / "fake_hip_XXXXXX").string();
  const int handle = mkstemp(file.data());
  if (handle < 0 || write(handle, image.data(), image.size()) != static_cast<ssize_t>(image.size()))
    return fail(kOutOfMemory, "cannot write the code object to " + file);
  close(handle);
  auto loaded = std::make_unique<Module>();
  loaded->device = g_device;
  loaded->target = target()->name;
  loaded->file = file;
  loaded->image = std::move(image);
  *module = loaded.get();
  g_modules.all[loaded.get()] = std::move(loaded);
  return kSuccess;
}

FAKE_HIP int hipModuleUnload(void* module) {
  const std::lock_guard lock(g_mutex);
  auto found = g_modules.all.find(static_cast<Module*>(module));
  if (found == g_modules.all.end()) return fail(kInvalidHandle, "not a module");
  const int error = drain_all();
  Modules::unload(*found->second);
  g_modules.all.erase(found);
  return error;
}

FAKE_HIP int hipModuleGetFunction(void** function, void* module, const char* name) {
  const std::lock_guard lock(g_mutex);
  auto found = g_modules.all.find(static_cast<Module*>(module));
  if (found == g_modules.all.end()) return fail(kInvalidHandle, "not a module");
  Module& m = *found->second;
  const std::string symbol = '\0' + std::string(name) + ".kd" + '\0';
  if (m.image.find(symbol) == std::string::npos) return fail(kNotFound, std::string("hipModuleGetFunction: no kernel ") + name);
  auto& slot = m.functions[name];
  if (!slot) slot = std::make_unique<Function>(Function{&m, name, nullptr, nullptr, {}});
  *function = slot.get();
  return kSuccess;
}

FAKE_HIP int hipFuncSetAttribute(const void*, int, int) { return kSuccess; }

FAKE_HIP int hipModuleLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                                   unsigned block_z, unsigned dynamic_lds, void* stream, void** arguments, void** extra) {
  const std::lock_guard lock(g_mutex);
  auto& f = *static_cast<Function*>(function);
  if (f.module->device != g_device) return fail(kInvalidHandle, f.name + ": loaded on another device than the current one");
  if (extra) return fail(kInvalidValue, f.name + ": arguments in a buffer are not modelled");
  if (!grid_x || !grid_y || !grid_z || !block_x || !block_y || !block_z)
    return fail(kInvalidConfiguration, f.name + ": an empty grid or workgroup");
  if (std::string why; !prepare(f, why)) return fail(kLaunchFailure, why);
  std::vector<std::string> values;
  for (size_t i = 0; i < f.core->num_arguments(f.kernel); ++i)
    values.emplace_back(static_cast<const char*>(arguments[i]), f.core->argument_bytes(f.kernel, i));
  return enqueue(stream, [=, &f] {
    const uint32_t grid[3] = {grid_x, grid_y, grid_z}, block[3] = {block_x, block_y, block_z};
    return run(f, grid, block, dynamic_lds, values);
  });
}
