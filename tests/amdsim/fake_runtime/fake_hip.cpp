// A stand-in for libamdhip64: memory is host memory, and kernels are the real machine code of one target, run in the emulator.
// It implements what a backend needs that loads an offload bundle and launches kernels of it; README.md lists the functions and variables.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core.h"

#define FAKE_HIP extern "C" __attribute__((visibility("default")))

namespace {

// Values of hipError_t.
enum Error : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kInvalidConfiguration = 9,
  kInvalidDevicePointer = 17,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kNoBinaryForGpu = 209,
  kInvalidHandle = 400,
  kNotFound = 500,
  kIllegalAddress = 700,
  kLaunchFailure = 719,
};

struct ErrorText {
  int code;
  const char *name, *text;
};
constexpr ErrorText kErrors[] = {
    {kSuccess, "hipSuccess", "no error"},
    {kInvalidValue, "hipErrorInvalidValue", "invalid argument"},
    {kOutOfMemory, "hipErrorOutOfMemory", "out of memory"},
    {kInvalidConfiguration, "hipErrorInvalidConfiguration", "invalid configuration argument"},
    {kInvalidDevicePointer, "hipErrorInvalidDevicePointer", "invalid device pointer"},
    {kNoDevice, "hipErrorNoDevice", "no ROCm-capable device is detected"},
    {kInvalidDevice, "hipErrorInvalidDevice", "invalid device ordinal"},
    {kNoBinaryForGpu, "hipErrorNoBinaryForGpu", "no kernel image is available for execution on the device"},
    {kInvalidHandle, "hipErrorInvalidHandle", "invalid resource handle"},
    {kNotFound, "hipErrorNotFound", "named symbol not found"},
    {kIllegalAddress, "hipErrorIllegalAddress", "an illegal memory access was encountered"},
    {kLaunchFailure, "hipErrorLaunchFailure", "unspecified launch failure"},
};

const ErrorText& describe(int code) {
  for (const ErrorText& e : kErrors) {
    if (e.code == code) return e;
  }
  return kErrors[1];
}

// What a device of each target reports. `processors` is what HIP counts: compute units of CDNA, pairs of them of RDNA.
struct Target {
  const char *name, *full_name;
  int major, minor, wave, processors, l2_bytes, threads_per_processor;
};
constexpr Target kTargets[] = {
    {"gfx90a", "gfx90a:sramecc+:xnack-", 9, 0, 64, 104, 8 << 20, 2048},
    {"gfx942", "gfx942:sramecc+:xnack-", 9, 4, 64, 304, 4 << 20, 2048},
    {"gfx950", "gfx950:sramecc+:xnack-", 9, 5, 64, 256, 4 << 20, 2048},
    {"gfx1030", "gfx1030", 10, 3, 32, 40, 4 << 20, 2048},
    {"gfx1100", "gfx1100", 11, 0, 32, 48, 6 << 20, 2048},
    {"gfx1200", "gfx1200", 12, 0, 32, 16, 4 << 20, 2048},
    {"gfx1201", "gfx1201", 12, 0, 32, 32, 8 << 20, 2048},
};
constexpr int kLdsBytes = 64 << 10, kMaxThreads = 1024;

const Target* target() {
  const char* name = getenv("AMDSIM_TARGET");
  for (const Target& t : kTargets) {
    if (name && !strcmp(name, t.name)) return &t;
  }
  return nullptr;
}

int number_from(const char* variable, int otherwise) {
  const char* text = getenv(variable);
  return text && *text ? atoi(text) : otherwise;
}

struct Core {
  decltype(&amdsim_open) open;
  decltype(&amdsim_close) close;
  decltype(&amdsim_num_arguments) num_arguments;
  decltype(&amdsim_argument_bytes) argument_bytes;
  decltype(&amdsim_launch) launch;
  decltype(&amdsim_num_instructions) num_instructions;
  decltype(&amdsim_hits) hits;
  decltype(&amdsim_error) error;
};

struct Module;

struct Function {
  Module* module;
  std::string name;
  const Core* core = nullptr;
  amdsim_kernel* kernel = nullptr;
  std::string program;
};

struct Module {
  std::string target;
  std::string file;  // holds the code object
  std::string image;
  std::map<std::string, std::unique_ptr<Function>> functions;
};

struct Stream {
  std::deque<std::function<int()>> pending;
};

// One lock for everything: calls may come from any thread, and kernels run one at a time.
std::recursive_mutex g_mutex;
std::map<uint64_t, uint64_t> g_allocations;  // begin -> bytes
std::map<std::string, Core> g_cores;
Stream g_null_stream;
std::map<Stream*, std::unique_ptr<Stream>> g_streams;
thread_local int g_last = kSuccess;
thread_local std::string g_detail;

int fail(int code, const std::string& detail = {}) {
  g_last = code;
  g_detail = detail;
  if (!detail.empty()) fprintf(stderr, "fake HIP runtime: %s\n", detail.c_str());
  return code;
}

int check_device(int device) {
  if (!target()) return fail(kNoDevice);
  return device == 0 ? kSuccess : fail(kInvalidDevice);
}

// With AMDSIM_DEFERRED=1 work waits for a synchronization, as it may on a device; otherwise it runs at once.
int enqueue(void* stream, std::function<int()> work) {
  if (!target()) return fail(kNoDevice);
  if (!number_from("AMDSIM_DEFERRED", 0)) return work();
  Stream* s = stream ? static_cast<Stream*>(stream) : &g_null_stream;
  if (stream && !g_streams.count(s)) return fail(kInvalidHandle, "not a stream");
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
  int first = kSuccess;
  for (auto& [key, stream] : g_streams) {
    const int error = drain(*stream);
    if (!first) first = error;
  }
  const int error = drain(g_null_stream);
  return first ? first : error;
}

const Core* load_core(const std::string& path) {
  if (auto found = g_cores.find(path); found != g_cores.end()) return &found->second;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) return nullptr;
  Core core{};
  const auto resolve = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
  };
  resolve(core.open, "amdsim_open");
  resolve(core.close, "amdsim_close");
  resolve(core.num_arguments, "amdsim_num_arguments");
  resolve(core.argument_bytes, "amdsim_argument_bytes");
  resolve(core.launch, "amdsim_launch");
  resolve(core.num_instructions, "amdsim_num_instructions");
  resolve(core.hits, "amdsim_hits");
  resolve(core.error, "amdsim_error");
  return &(g_cores[path] = core);
}

// Translates a kernel when it is first launched: a backend may resolve hundreds that a test never runs.
bool prepare(Function& function, std::string& why) {
  if (function.kernel) return true;
  const char* python = getenv("AMDSIM_PYTHON");
  const char* package = getenv("AMDSIM_PACKAGE");
  if (!python || !package) {
    why = "AMDSIM_PYTHON and AMDSIM_PACKAGE must name the interpreter and the folder of the package amdsim";
    return false;
  }
  const std::string command = "PYTHONPATH='" + std::string(package) + "' '" + python + "' -m amdsim.prepare '" + function.module->file +
                              "' '" + function.name + "' 2>&1";
  FILE* pipe = popen(command.c_str(), "r");
  std::string core, program, other;
  char line[4096];
  while (pipe && fgets(line, sizeof line, pipe)) {
    std::string text(line);
    if (!text.empty() && text.back() == '\n') text.pop_back();
    if (!text.rfind("core ", 0)) {
      core = text.substr(5);
    } else if (!text.rfind("program ", 0)) {
      program = text.substr(8);
    } else {
      other += text + "\n";
    }
  }
  const int status = pipe ? pclose(pipe) : -1;
  if (status || core.empty() || program.empty()) {
    why = function.name + ": translation failed\n" + other;
    return false;
  }
  function.core = load_core(core);
  if (!function.core) {
    why = dlerror();
    return false;
  }
  function.kernel = function.core->open(program.c_str());
  function.program = program;
  if (!function.kernel) why = function.core->error();
  return function.kernel != nullptr;
}

// With AMDSIM_COVERAGE the counts of each kernel's instructions go to a file in that folder when its module is unloaded or the process
// ends.
void write_coverage(const Function& function) {
  const char* folder = getenv("AMDSIM_COVERAGE");
  if (!folder || !function.kernel) return;
  static int serial = 0;
  std::ofstream file(std::string(folder) + "/" + std::to_string(getpid()) + "_" + std::to_string(serial++) + ".hits");
  file << function.module->target << " " << function.name << " " << function.program << "\n";
  const uint64_t* hits = function.core->hits(function.kernel);
  for (size_t i = 0; i < function.core->num_instructions(function.kernel); ++i) file << hits[i] << "\n";
}

struct Modules {
  std::map<Module*, std::unique_ptr<Module>> all;
  ~Modules() {
    for (auto& [key, module] : all) unload(*module);
  }
  static void unload(Module& module) {
    for (auto& [name, function] : module.functions) {
      write_coverage(*function);
      if (function->kernel) function->core->close(function->kernel);
    }
    unlink(module.file.c_str());
  }
} g_modules;

// The code object for `name` in a clang offload bundle, or the data itself when it is a code object. Empty when there is none.
std::string find_code_object(const char* data, const char* name) {
  constexpr char kMagic[] = "__CLANG_OFFLOAD_BUNDLE__";
  if (memcmp(data, kMagic, sizeof kMagic - 1) != 0) return {};
  const char* at = data + sizeof kMagic - 1;
  const auto next = [&] {
    uint64_t value;
    memcpy(&value, at, sizeof value);
    at += sizeof value;
    return value;
  };
  for (uint64_t count = next(); count > 0; --count) {
    const uint64_t offset = next(), bytes = next(), length = next();
    std::string id(at, length);
    at += length;
    const size_t dashes = id.rfind("--");
    if (id.rfind("hip", 0) || dashes == std::string::npos) continue;
    if (const std::string processor = id.substr(dashes + 2); processor.substr(0, processor.find(':')) == name)
      return {data + offset, bytes};
  }
  return {};
}

int copy(void* to, const void* from, size_t bytes, int kind) {
  constexpr int kHostToDevice = 1, kDeviceToHost = 2, kDeviceToDevice = 3, kDefault = 4;
  if (kind < 0 || kind > kDefault) return fail(kInvalidValue, "hipMemcpy: kind " + std::to_string(kind));
  const auto on_device = [&](const void* p) {
    auto after = g_allocations.upper_bound(reinterpret_cast<uint64_t>(p));
    if (after == g_allocations.begin()) return false;
    --after;
    return reinterpret_cast<uint64_t>(p) + bytes <= after->first + after->second;
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
  for (const auto& [begin, bytes] : g_allocations) ranges.push_back({begin, begin + bytes, 1});
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
  *count = target() ? 1 : 0;
  return target() ? kSuccess : fail(kNoDevice);
}

FAKE_HIP int hipGetDevice(int* device) {
  *device = 0;
  return check_device(0);
}

FAKE_HIP int hipSetDevice(int device) { return check_device(device); }

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
  snprintf(p, 256, "emulated %s", target()->name);
  put(288, size_t{16} << 30);   // totalGlobalMem
  put(296, size_t{kLdsBytes});  // sharedMemPerBlock
  put(308, target()->wave);     // warpSize
  put(320, kMaxThreads);        // maxThreadsPerBlock
  put(360, target()->major);
  put(364, target()->minor);
  put(388, number_from("AMDSIM_PROCESSORS", target()->processors));  // multiProcessorCount
  put(616, target()->l2_bytes);
  put(624, target()->threads_per_processor);
  put(640, size_t{kLdsBytes});  // sharedMemPerMultiprocessor
  snprintf(p + 1160, 256, "%s", target()->full_name);
  return kSuccess;
}

FAKE_HIP int hipDeviceGetAttribute(int* value, int attribute, int device) {
  if (const int error = check_device(device)) return error;
  switch (attribute) {
    case 19:
      *value = target()->l2_bytes;
      return kSuccess;
    case 23:
      *value = target()->major;
      return kSuccess;
    case 56:
      *value = kMaxThreads;
      return kSuccess;
    case 57:
      *value = target()->threads_per_processor;
      return kSuccess;
    case 61:
      *value = target()->minor;
      return kSuccess;
    case 63:
      *value = number_from("AMDSIM_PROCESSORS", target()->processors);
      return kSuccess;
    case 74:
    case 75:
    case 76:
    case 10002:
      *value = kLdsBytes;
      return kSuccess;
    case 87:
      *value = target()->wave;
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
  *pointer = nullptr;
  if (bytes == 0) return kSuccess;
  if (bytes > size_t{16} << 30) return fail(kOutOfMemory);
  // At least a cache line lies between two allocations, so that every overrun leaves its own.
  *pointer = aligned_alloc(256, (bytes + 511) & ~size_t{255});
  if (!*pointer) return fail(kOutOfMemory);
  memset(*pointer, 0xee, bytes);
  g_allocations[reinterpret_cast<uint64_t>(*pointer)] = bytes;
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

// Makes host memory, such as a numpy array's, count as a device allocation.
FAKE_HIP int amdsim_register(void* pointer, size_t bytes) {
  const std::lock_guard lock(g_mutex);
  if (bytes) g_allocations[reinterpret_cast<uint64_t>(pointer)] = bytes;
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
  const bool known = after != g_allocations.begin() && address < std::prev(after)->first + std::prev(after)->second;
  *attributes = {known ? kDevice : kUnregistered, known ? 0 : -1, known ? const_cast<void*>(pointer) : nullptr, nullptr, 0, 0};
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
  auto found = g_streams.find(static_cast<Stream*>(stream));
  return found == g_streams.end() ? fail(kInvalidHandle, "not a stream") : drain(*found->second);
}

FAKE_HIP int hipDeviceSynchronize() {
  const std::lock_guard lock(g_mutex);
  return drain_all();
}

// ---- modules -------------------------------------------------------------------------------------------------------------

FAKE_HIP int hipModuleLoadData(void** module, const void* data) {
  const std::lock_guard lock(g_mutex);
  if (!target()) return fail(kNoDevice);
  std::string image = find_code_object(static_cast<const char*>(data), target()->name);
  if (image.empty())
    return fail(kNoBinaryForGpu, std::string("hipModuleLoadData: no offload bundle with a code object for ") + target()->name);
  char file[] = "/tmp/fake_hip_XXXXXX";
  const int handle = mkstemp(file);
  if (handle < 0 || write(handle, image.data(), image.size()) != static_cast<ssize_t>(image.size()))
    return fail(kOutOfMemory, "cannot write the code object");
  close(handle);
  auto loaded = std::make_unique<Module>();
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
  if (!slot) slot = std::make_unique<Function>(Function{&m, name});
  *function = slot.get();
  return kSuccess;
}

FAKE_HIP int hipFuncSetAttribute(const void*, int, int) { return kSuccess; }

FAKE_HIP int hipModuleLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                                   unsigned block_z, unsigned dynamic_lds, void* stream, void** arguments, void** extra) {
  const std::lock_guard lock(g_mutex);
  auto& f = *static_cast<Function*>(function);
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
