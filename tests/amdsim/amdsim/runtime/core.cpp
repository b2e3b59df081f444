// Program files, dispatch and the wave scheduler.
//
// A program file is text, one record a line:
//   gfx N | packed_ids 0/1 | image PATH BYTES | relocation OFFSET ADDEND | lds N | private N | properties N | preload N | rsrc1 N | rsrc2 N
//   entry PC | kernarg BYTES | argument KIND OFFSET BYTES | handlers LIBRARY | handler SYMBOL | inst PC HANDLER PARAMETERS... | text PC
//   TEXT
#include "core.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <atomic>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <thread>
#include <utility>

#include "machine.h"
#include "modes.h"

namespace amdsim {
namespace {

thread_local std::string g_error;

struct Argument {
  std::string kind;
  u32 offset, bytes;
};

// A code object's image needs pages of its own: code reads it by addresses relative to the instruction.
struct Image {
  u8* data = nullptr;
  size_t bytes = 0;
  ~Image() {
    if (data) munmap(data, bytes);
  }
};

}  // namespace
}  // namespace amdsim

using namespace amdsim;

struct amdsim_kernel {
  u32 gfx = 0, packed_ids = 0, lds = 0, private_bytes = 0, properties = 0, preload = 0, rsrc1 = 0, rsrc2 = 0, kernarg_bytes = 0;
  u64 entry = 0;
  Image image;
  std::vector<Argument> arguments;
  std::vector<u32> explicit_arguments;  // indices into `arguments`
  std::vector<Inst> insts;
  std::vector<u64> parameters;
  std::map<u64, std::string> texts;
  bool atomics = false;  // in global memory: its workgroups then share one host thread
  std::vector<u64> hits;
  std::mutex hits_mutex;
};

namespace amdsim {
namespace {

std::unique_ptr<amdsim_kernel> read_program(const char* path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(std::string("cannot open ") + path);
  auto kernel = std::make_unique<amdsim_kernel>();
  std::map<std::string, u32*> numbers = {{"gfx", &kernel->gfx},
                                         {"packed_ids", &kernel->packed_ids},
                                         {"lds", &kernel->lds},
                                         {"private", &kernel->private_bytes},
                                         {"properties", &kernel->properties},
                                         {"preload", &kernel->preload},
                                         {"rsrc1", &kernel->rsrc1},
                                         {"rsrc2", &kernel->rsrc2},
                                         {"kernarg", &kernel->kernarg_bytes}};
  std::vector<void*> libraries;
  std::vector<Handler> handlers;
  std::vector<size_t> first_parameter;
  std::string line, key;
  while (std::getline(file, line)) {
    std::istringstream in(line);
    in >> key;
    if (auto number = numbers.find(key); number != numbers.end()) {
      in >> *number->second;
    } else if (key == "entry") {
      in >> kernel->entry;
    } else if (key == "image") {
      std::string image_path;
      size_t bytes;
      in >> bytes >> std::ws;
      std::getline(in, image_path);
      void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (pages == MAP_FAILED) throw std::runtime_error("cannot map the image");
      kernel->image.data = static_cast<u8*>(pages);
      kernel->image.bytes = bytes;
      std::ifstream image(image_path, std::ios::binary);
      if (!image) throw std::runtime_error("cannot open " + image_path);
      image.read(reinterpret_cast<char*>(pages), static_cast<std::streamsize>(bytes));
    } else if (key == "relocation") {
      u64 offset, addend;
      in >> offset >> addend;
      store<u64>(kernel->image.data + offset, reinterpret_cast<u64>(kernel->image.data) + addend);
    } else if (key == "argument") {
      Argument argument;
      in >> argument.kind >> argument.offset >> argument.bytes;
      if (argument.kind.rfind("hidden_", 0)) kernel->explicit_arguments.push_back(static_cast<u32>(kernel->arguments.size()));
      kernel->arguments.push_back(argument);
    } else if (key == "handlers") {
      in >> std::ws;
      std::string library;
      std::getline(in, library);
      void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
      if (!handle) throw std::runtime_error(dlerror());
      libraries.push_back(handle);
    } else if (key == "handler") {
      std::string symbol;
      in >> symbol;
      void* found = nullptr;
      for (void* library : libraries) {
        if ((found = dlsym(library, symbol.c_str()))) break;
      }
      if (!found) throw std::runtime_error("no handler " + symbol);
      handlers.push_back(reinterpret_cast<Handler>(found));
    } else if (key == "inst") {
      u64 pc, parameter;
      size_t handler;
      in >> pc >> handler;
      kernel->insts.push_back({handlers.at(handler), nullptr, pc});
      first_parameter.push_back(kernel->parameters.size());
      while (in >> parameter) kernel->parameters.push_back(parameter);
    } else if (key == "text") {
      u64 pc;
      in >> pc >> std::ws;
      std::getline(in, kernel->texts[pc]);
      kernel->atomics |= kernel->texts[pc].find("_atomic") != std::string::npos;
    } else {
      throw std::runtime_error(std::string(path) + ": unknown record " + key);
    }
  }
  for (size_t i = 0; i < kernel->insts.size(); ++i) kernel->insts[i].p = kernel->parameters.data() + first_parameter[i];
  kernel->hits.assign(kernel->insts.size(), 0);
  return kernel;
}

// Bit numbers of the kernel descriptor (AMDGPU usage guide of LLVM, "Kernel Descriptor").
enum Property : u32 {
  kPrivateSegmentBuffer = 1 << 0,
  kDispatchPtr = 1 << 1,
  kQueuePtr = 1 << 2,
  kKernargPtr = 1 << 3,
  kDispatchId = 1 << 4,
  kFlatScratchInit = 1 << 5,
  kPrivateSegmentSize = 1 << 6,
};

struct Launch {
  const amdsim_kernel& kernel;
  u32 grid[3], block[3];
  u32 lds_bytes;
  std::vector<u8> kernarg;
  alignas(64) u8 packet[64] = {};
  std::vector<u32> user_scalars;
  amdsim_options options;
  std::vector<Range> ranges;
  std::vector<std::shared_ptr<GlobalShadow>> global_shadows;

  u32 num_threads() const { return block[0] * block[1] * block[2]; }
  u32 num_waves() const { return (num_threads() + kWave - 1) / kWave; }
};

void fill_kernarg(Launch& launch, const void* const* arguments) {
  // The compiler may load whole aligned pieces of up to 64 bytes beyond the last argument.
  launch.kernarg.assign(launch.kernel.kernarg_bytes + 64, 0);
  for (const Argument& a : launch.kernel.arguments) {
    u8* to = launch.kernarg.data() + a.offset;
    const auto axis = [&] { return a.kind.back() - 'x'; };
    if (a.kind.rfind("hidden_", 0)) {
      memcpy(to, *arguments++, a.bytes);
    } else if (!a.kind.rfind("hidden_block_count_", 0)) {
      store<u32>(to, launch.grid[axis()]);
    } else if (!a.kind.rfind("hidden_group_size_", 0)) {
      store<u16>(to, static_cast<u16>(launch.block[axis()]));
    } else if (a.kind == "hidden_grid_dims") {
      const u32* g = launch.grid;
      const u32* b = launch.block;
      store<u16>(to, static_cast<u16>(g[2] * b[2] > 1 ? 3 : g[1] * b[1] > 1 ? 2 : 1));
    } else if (a.kind == "hidden_dynamic_lds_size") {
      store<u32>(to, launch.lds_bytes - launch.kernel.lds);
    } else if (a.kind == "hidden_shared_base") {
      store<u32>(to, static_cast<u32>(kSharedAperture));
    } else if (a.kind == "hidden_private_base") {
      store<u32>(to, static_cast<u32>(kPrivateAperture));
    }
  }
}

void fill_packet(Launch& launch) {
  u8* p = launch.packet;
  for (int i = 0; i < 3; ++i) {
    store<u16>(p + 4 + 2 * i, static_cast<u16>(launch.block[i]));
    store<u32>(p + 12 + 4 * i, launch.grid[i] * launch.block[i]);
  }
  store<u32>(p + 24, launch.kernel.private_bytes);
  store<u32>(p + 28, launch.lds_bytes);
  store<u64>(p + 40, reinterpret_cast<u64>(launch.kernarg.data()));
}

void fill_user_scalars(Launch& launch) {
  std::vector<u32>& user = launch.user_scalars;
  const auto push64 = [&](u64 value) { user.insert(user.end(), {static_cast<u32>(value), static_cast<u32>(value >> 32)}); };
  const u32 properties = launch.kernel.properties;
  if (properties & kPrivateSegmentBuffer) user.insert(user.end(), {0, 0, launch.kernel.private_bytes, kScratchResource});
  if (properties & kDispatchPtr) push64(reinterpret_cast<u64>(launch.packet));
  if (properties & kQueuePtr) push64(0);
  if (properties & kKernargPtr) push64(reinterpret_cast<u64>(launch.kernarg.data()));
  if (properties & kDispatchId) push64(0);
  if (properties & kFlatScratchInit) push64(0);
  if (properties & kPrivateSegmentSize) user.push_back(launch.kernel.private_bytes);
  const u32 preloaded = launch.kernel.preload & 127, from = launch.kernel.preload >> 7;
  for (u32 i = 0; i < preloaded; ++i) user.push_back(load<u32>(launch.kernarg.data() + 4 * (from + i)));
  user.resize(std::max<size_t>(user.size(), launch.kernel.rsrc2 >> 1 & 31), 0);
}

void start_wave(const Launch& launch, const Machine& machine, Wave& w, u32 index, const u32 group[3]) {
  const amdsim_kernel& kernel = launch.kernel;
  // A kernel that reads what it never wrote finds NaN, in fp32 and in fp16, and an address that is nobody's.
  memset(w.v, 0xff, sizeof w.v);
  memset(w.s, 0xff, sizeof w.s);
  memcpy(w.s, launch.user_scalars.data(), 4 * launch.user_scalars.size());
  w.scc = false;
  w.state = State::kReady;
  w.index = index;
  w.stores_pending = false;
  w.mode = kernel.rsrc1 >> 12 & 255;
  // A kernel with preloaded arguments starts with 256 bytes for firmware that does not preload.
  w.next = machine.at(machine.image + kernel.entry + (kernel.preload & 127 ? 256 : 0));
  if (kernel.gfx >= 12) {
    w.s[kTtmp + 9] = group[0];
    w.s[kTtmp + 7] = group[1] | group[2] << 16;
  } else {
    size_t next = launch.user_scalars.size();
    for (int axis = 0; axis < 3; ++axis) {
      if (kernel.rsrc2 >> (7 + axis) & 1) w.s[next++] = group[axis];
    }
    if (kernel.rsrc2 >> 10 & 1) w.s[next++] = 0;
    if ((kernel.rsrc2 & 1) && kernel.gfx < 11) w.s[next++] = 0;  // offset of the wave's scratch
  }
  u64 live = 0;
  for (u32 lane = 0; lane < kWave && index * kWave + lane < launch.num_threads(); ++lane) {
    const u32 thread = index * kWave + lane;
    const u32 x = thread % launch.block[0], y = thread / launch.block[0] % launch.block[1],
              z = thread / (launch.block[0] * launch.block[1]);
    live |= 1ull << lane;
    if (kernel.packed_ids) {
      w.v[0][lane] = x | y << 10 | z << 20;
    } else {
      w.v[0][lane] = x;
      if ((kernel.rsrc2 >> 11 & 3) > 0) w.v[1][lane] = y;
      if ((kernel.rsrc2 >> 11 & 3) > 1) w.v[2][lane] = z;
    }
  }
  w.s[kExec] = static_cast<u32>(live);
  w.s[kExec + 1] = static_cast<u32>(live >> 32);
  w.lane_scratch_bytes = kernel.private_bytes;
  w.scratch.assign(static_cast<size_t>(kernel.private_bytes) * kWave, 0xcd);
}

void run_wave(Wave& w, Machine& machine, u64* hits) {
  apply_mode(w.mode);
  u64 count = 0;
  const Inst* i = w.next;
  w.state = State::kReady;
  do {
    w.next = i;
    ++hits[i - machine.insts];
    if (machine.checks.max_instructions && ++count > machine.checks.max_instructions) throw Trap("the limit of instructions is reached");
    i = i->run(i, w, machine);
  } while (i);
}

// Which wave of several workgroups runs next, up to its next barrier: that of the highest priority. Without a seed all are equal. With one
// they are random, and a wave may be left behind until little else can run: now and then the one that ran, and those whose workgroup
// has told the others something by an atomic before they came to it.
class Priorities {
 public:
  explicit Priorities(u32 seed) : seed_(seed), random_(seed) {}
  u64 first() { return seed_ ? kLeftBehind + random_() : 0; }
  u64 left_behind() { return seed_ ? random_() : 0; }
  u64 after(u64 priority) { return seed_ && random_() % 32 == 0 ? left_behind() : priority; }

 private:
  static constexpr u64 kLeftBehind = 1ull << 32;
  u32 seed_;
  std::mt19937 random_;
};

// A workgroup that is being run.
class Group {
 public:
  Group(const Launch& launch, Priorities& source)
      : launch_(launch), source_(source), waves_(launch.num_waves()), priorities_(launch.num_waves()) {
    machine_.ranges = launch.ranges;
    machine_.global_shadows = launch.global_shadows;
    machine_.checks = {launch.options.lds_races != 0, launch.options.lds_uninitialized != 0, launch.options.max_instructions};
    machine_.image = reinterpret_cast<u64>(launch.kernel.image.data);
    machine_.insts = launch.kernel.insts.data();
    machine_.num_insts = launch.kernel.insts.size();
    machine_.waves = &waves_;
  }

  void begin(u64 number) {
    const u32* grid = launch_.grid;
    id_[0] = static_cast<u32>(number % grid[0]);
    id_[1] = static_cast<u32>(number / grid[0] % grid[1]);
    id_[2] = static_cast<u32>(number / grid[0] / grid[1]);
    machine_.group = static_cast<u32>(number + 1);
    machine_.lds.assign(launch_.lds_bytes, 0xcd);
    machine_.shadow.assign(launch_.lds_bytes / 4 + 1, LdsWord{0, {0xff, 0xff, 0xff, 0xff}, 0, 0, 0, 0});
    machine_.epoch = 1;
    for (u32 i = 0; i < waves_.size(); ++i) {
      start_wave(launch_, machine_, waves_[i], i, id_);
      priorities_[i] = source_.first();
    }
  }

  bool ended() const { return count(State::kEnded) == waves_.size(); }

  u64 priority() const { return priorities_[next()]; }

  // Runs one wave. The trap's text; empty: none.
  std::string advance(u64* hits) {
    const size_t i = next();
    try {
      run_wave(waves_[i], machine_, hits);
    } catch (const std::exception& error) {
      return describe(waves_[i], error.what());
    }
    priorities_[i] = source_.after(priorities_[i]);
    if (std::exchange(machine_.told, false)) {
      for (size_t wave = 0; wave < waves_.size(); ++wave) {
        if (waves_[wave].state == State::kReady) priorities_[wave] = source_.left_behind();
      }
    }
    return count(State::kReady) == 0 ? pass_barrier() : std::string();
  }

 private:
  // The wave of highest priority among those that have not come to the barrier; the first of them where priorities are equal.
  size_t next() const {
    size_t best = waves_.size();
    for (size_t i = 0; i < waves_.size(); ++i) {
      const size_t wave = launch_.options.reverse ? waves_.size() - 1 - i : i;
      if (waves_[wave].state == State::kReady && (best == waves_.size() || priorities_[wave] > priorities_[best])) best = wave;
    }
    return best;
  }

  size_t count(State state) const {
    return static_cast<size_t>(std::count_if(waves_.begin(), waves_.end(), [&](const Wave& w) { return w.state == state; }));
  }

  std::string pass_barrier() {
    const Wave* first = nullptr;
    for (Wave& w : waves_) {
      if (w.state != State::kBarrier) continue;
      if (first && w.next != first->next) return describe(w, "the waves wait at different barriers");
      first = &w;
    }
    for (Wave& w : waves_) {
      if (w.state == State::kBarrier) w.state = State::kReady;
    }
    machine_.barrier();
    return {};
  }

  std::string describe(const Wave& w, const char* what) const {
    std::ostringstream text;
    text << "workgroup (" << id_[0] << ", " << id_[1] << ", " << id_[2] << "), wave " << w.index;
    // A handler that ends a wave's turn has moved `next` on by itself.
    if (w.next >= machine_.insts && w.next < machine_.insts + machine_.num_insts) {
      text << ", pc 0x" << std::hex << w.next->pc;
      if (auto found = launch_.kernel.texts.find(w.next->pc); found != launch_.kernel.texts.end()) text << " (" << found->second << ")";
    }
    text << ": " << what;
    return text.str();
  }

  const Launch& launch_;
  Priorities& source_;
  Machine machine_;
  std::vector<Wave> waves_;
  std::vector<u64> priorities_;
  u32 id_[3] = {};
};

constexpr size_t kGroupsAtOnce = 4;  // when they are interleaved

int run_grid(amdsim_kernel& kernel, const Launch& launch) {
  const u64 num_groups = static_cast<u64>(launch.grid[0]) * launch.grid[1] * launch.grid[2];
  std::atomic<u64> next_group{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::string error;
  const auto work = [&] {
    const unsigned host_mode = _mm_getcsr();
    std::vector<u64> hits(kernel.insts.size(), 0);
    Priorities priorities(launch.options.interleave);
    std::vector<std::unique_ptr<Group>> idle, running;
    for (size_t i = 0; i < (launch.options.interleave ? kGroupsAtOnce : 1); ++i)
      idle.push_back(std::make_unique<Group>(launch, priorities));
    while (!failed) {
      for (u64 i; !idle.empty() && (i = next_group++) < num_groups; idle.pop_back()) {
        idle.back()->begin(launch.options.reverse ? num_groups - 1 - i : i);
        running.push_back(std::move(idle.back()));
      }
      if (running.empty()) break;
      const auto one = std::max_element(running.begin(), running.end(), [](auto& a, auto& b) { return a->priority() < b->priority(); });
      std::string trap = (*one)->advance(hits.data());
      if (!trap.empty() && !failed.exchange(true)) error = std::move(trap);
      if ((*one)->ended()) {
        idle.push_back(std::move(*one));
        running.erase(one);
      }
    }
    _mm_setcsr(host_mode);
    const std::lock_guard lock(mutex);
    for (size_t i = 0; i < hits.size(); ++i) kernel.hits[i] += hits[i];
  };
  const u64 num_workers = kernel.atomics ? 1 : std::clamp<u64>(launch.options.threads, 1, std::max<u64>(num_groups, 1));
  std::vector<std::thread> workers;
  for (u64 i = 1; i < num_workers; ++i) workers.emplace_back(work);
  work();
  for (std::thread& worker : workers) worker.join();
  if (failed) g_error = error;
  return failed ? 1 : 0;
}

}  // namespace
}  // namespace amdsim

extern "C" {

amdsim_kernel* amdsim_open(const char* program) {
  try {
    return read_program(program).release();
  } catch (const std::exception& error) {
    g_error = error.what();
    return nullptr;
  }
}

void amdsim_close(amdsim_kernel* kernel) { delete kernel; }

size_t amdsim_num_arguments(const amdsim_kernel* kernel) { return kernel->explicit_arguments.size(); }

size_t amdsim_argument_bytes(const amdsim_kernel* kernel, size_t index) {
  return kernel->arguments[kernel->explicit_arguments[index]].bytes;
}

int amdsim_launch(amdsim_kernel* kernel, const uint32_t grid[3], const uint32_t block[3], uint32_t dynamic_lds_bytes,
                  const void* const* arguments, const amdsim_range* ranges, size_t num_ranges, const amdsim_options* options) {
  try {
    Launch launch{
        *kernel, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, kernel->lds + dynamic_lds_bytes, {}, {}, {}, *options, {},
        {}};
    if (launch.num_threads() == 0 || launch.num_threads() > 1024) throw Trap("a workgroup has 1 to 1024 threads");
    if (launch.lds_bytes > 64 << 10) throw Trap("a workgroup has at most 65536 bytes of LDS");
    fill_kernarg(launch, arguments);
    fill_packet(launch);
    fill_user_scalars(launch);
    for (size_t i = 0; i < num_ranges; ++i) launch.ranges.push_back({ranges[i].begin, ranges[i].end, ranges[i].writable});
    const auto add = [&](const u8* data, size_t bytes) {
      const u64 begin = reinterpret_cast<u64>(data);
      launch.ranges.push_back({begin, begin + bytes, 0});
    };
    add(launch.kernarg.data(), launch.kernarg.size());
    add(launch.packet, sizeof launch.packet);
    add(kernel->image.data, kernel->image.bytes);
    std::sort(launch.ranges.begin(), launch.ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    if (options->global_races && static_cast<u64>(grid[0]) * grid[1] * grid[2] > 1) {
      for (const Range& r : launch.ranges) {
        launch.global_shadows.push_back(r.writable ? std::make_shared<GlobalShadow>(r.begin, r.end) : nullptr);
      }
    }
    return run_grid(*kernel, launch);
  } catch (const std::exception& error) {
    g_error = error.what();
    return 1;
  }
}

size_t amdsim_num_instructions(const amdsim_kernel* kernel) { return kernel->insts.size(); }
const uint64_t* amdsim_hits(const amdsim_kernel* kernel) { return kernel->hits.data(); }
const char* amdsim_error(void) { return g_error.c_str(); }
}
