// The machine that the handlers of instructions act on: one wave's registers, the workgroup's LDS with its race shadow, and bounded memory.
#pragma once

#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "global_shadow.h"
#include "numbers.h"

#ifndef AMDSIM_WAVE
#error "AMDSIM_WAVE: expected 32 or 64"
#endif

namespace amdsim {

constexpr int kWave = AMDSIM_WAVE;
constexpr u64 kAllLanes = kWave == 64 ? ~0ull : 0xffffffffull;

// Scalar register file: 0..105 SGPRs, 106 VCC, 108..123 TTMPs, 126 EXEC, 128 M0.
constexpr int kVcc = 106, kTtmp = 108, kExec = 126, kM0 = 128, kNumScalars = 130;
// Vector register file: 0..255 VGPRs, 256..511 accumulation VGPRs, then room for tuples that end at the last one.
constexpr int kNumVectors = 512;

// High halves of the flat addresses of LDS and scratch; host addresses stay below both.
constexpr u64 kSharedAperture = 0x00010000, kPrivateAperture = 0x00020000;
// Third and fourth word of the buffer resource through which kernels without flat scratch reach their private memory.
constexpr u32 kScratchResource = 0x5c4a7c00;

// What a kernel must not do; the text says what it did.
struct Trap : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline u64 relative(u64 r, u32 offset) {
  if (r + offset >= kNumVectors) throw Trap("a relative register number beyond the last register");
  return r + offset;
}

struct Range {
  u64 begin, end;
  u32 writable;
};

struct Wave;
struct Machine;
struct Inst;
using Handler = const Inst* (*)(const Inst*, Wave&, Machine&);

// One decoded instruction: the handler of its shape, and its register numbers and constants.
struct Inst {
  Handler run;
  const u64* p;
  u64 pc;
};

enum class State { kReady, kBarrier, kEnded };

struct Wave {
  alignas(64) u32 v[kNumVectors][kWave];
  u32 s[kNumScalars];
  bool scc;
  State state;
  const Inst* next;
  u32 mode;             // float mode: bits 0..3 rounding (fp32, fp16/64), 4..7 denormals
  u32 index;            // of the wave in its workgroup
  bool stores_pending;  // to global memory, which the wave has not waited for
  u32 lane_scratch_bytes;
  std::vector<u8> scratch;

  u64 exec() const { return mask(kExec); }
  u64 mask(u64 r) const { return kWave == 32 ? s[r] : s64(r); }
  void set_mask(u64 r, u64 value) {
    s[r] = static_cast<u32>(value);
    if (kWave == 64) s[r + 1] = static_cast<u32>(value >> 32);
  }
  u64 s64(u64 r) const { return static_cast<u64>(s[r]) | static_cast<u64>(s[r + 1]) << 32; }
  void set_s64(u64 r, u64 value) {
    s[r] = static_cast<u32>(value);
    s[r + 1] = static_cast<u32>(value >> 32);
  }
  u8* scratch_at(u32 address, int lane, u32 bytes) {
    if (static_cast<u64>(address) + bytes > lane_scratch_bytes) {
      throw Trap("scratch access of " + std::to_string(bytes) + " bytes at " + std::to_string(address) + " beyond " +
                 std::to_string(lane_scratch_bytes));
    }
    return &scratch[static_cast<size_t>(lane) * lane_scratch_bytes + address];
  }
};

// Who touched the bytes of one LDS word since the last barrier. A race is two waves at one byte, at least one of them writing, or an atomic
// of one and a plain access of the other.
struct LdsWord {
  u32 epoch;
  u8 writer[4];   // wave of the last plain write per byte, 0xff: none
  u32 readers;    // waves
  u32 atomics;    // waves
  u8 read_bytes;  // bytes that any wave read
  u8 written;     // bytes that hold data, whenever written
};

struct Checks {
  bool lds_races = true;
  bool lds_uninitialized = true;
  u64 max_instructions = 0;  // per wave; 0: no limit
};

struct Machine {
  std::vector<Range> ranges;                                  // sorted by address, disjoint
  std::vector<std::shared_ptr<GlobalShadow>> global_shadows;  // of the writable ranges; empty: not checked
  u32 group = 0;                                              // that runs, counted from 1
  const std::vector<Wave>* waves = nullptr;                   // of the group
  bool told = false;                                          // by an atomic, since that was last asked
  size_t last_range = 0;
  std::vector<u8> lds;
  std::vector<LdsWord> shadow;
  u32 epoch = 1;
  Checks checks;
  u64 image = 0;  // address of the code object's loaded image
  const Inst* insts = nullptr;
  size_t num_insts = 0;

  const Range* find(u64 address) const {
    auto after = std::upper_bound(ranges.begin(), ranges.end(), address, [](u64 a, const Range& r) { return a < r.begin; });
    return after == ranges.begin() ? nullptr : &*(after - 1);
  }

  u8* global(u64 address, u32 bytes, Access access) {
    if (last_range >= ranges.size() || address < ranges[last_range].begin || address + bytes > ranges[last_range].end) {
      const Range* range = find(address);
      if (!range || address + bytes > range->end) global_trap(address, bytes, access, "out of bounds");
      last_range = range - ranges.data();
    }
    if (is_write(access) && !ranges[last_range].writable) global_trap(address, bytes, access, "to read-only memory");
    if (!global_shadows.empty() && global_shadows[last_range] && (access == Access::kRead || access == Access::kWrite)) {
      const std::string wrong = global_shadows[last_range]->touch(address, bytes, access, group);
      if (!wrong.empty()) throw Trap("global race: the workgroup " + wrong + " in this launch");
    }
    return reinterpret_cast<u8*>(address);
  }

  // An atomic tells other workgroups something, such as that a result is there: the stores before it must have left the waves.
  void publish() {
    told = true;
    if (global_shadows.empty()) return;
    for (const Wave& w : *waves) {
      if (w.stores_pending) throw Trap("global race: an atomic while stores of wave " + std::to_string(w.index) + " are not waited for");
    }
  }

  u8* local(u32 address, u32 bytes, Access access, const Wave& w) {
    if (access == Access::kSharedRead) access = Access::kRead;
    if (static_cast<u64>(address) + bytes > lds.size()) {
      local_trap("LDS %s of %u bytes at %u beyond the %zu of the workgroup", verb(access), bytes, address, lds.size());
    }
    for (u32 word = address / 4; word <= (address + bytes - 1) / 4; ++word) {
      const u32 from = std::max(address, 4 * word), to = std::min(address + bytes, 4 * word + 4);
      touch(word, ((1u << (to - from)) - 1) << (from & 3), access, w);
    }
    return &lds[address];
  }

  // A generic address: LDS, scratch or global memory by its aperture.
  u8* flat(u64 address, u32 bytes, Access access, Wave& w, int lane) {
    const u64 aperture = address >> 32;
    if (aperture == kSharedAperture) return local(static_cast<u32>(address), bytes, access, w);
    if (aperture == kPrivateAperture) return w.scratch_at(static_cast<u32>(address), lane, bytes);
    return global(address, bytes, access);
  }

  // Raw buffer access: null where the hardware returns zero or drops the store.
  u8* buffer(const Wave& w, u64 resource, u32 offset, u32 scalar_offset, u32 bytes, Access access) {
    const u64 base = (static_cast<u64>(w.s[resource]) | static_cast<u64>(w.s[resource + 1]) << 32) & 0xffffffffffffull;
    if (w.s[resource + 1] >> 16 & 0x3fff) throw Trap("structured buffer access is not modelled");
    if (static_cast<u64>(offset) + bytes > w.s[resource + 2]) return nullptr;
    return global(base + scalar_offset + offset, bytes, access);
  }

  const Inst* at(u64 address) const {
    const u64 pc = address - image;
    const Inst* found = std::lower_bound(insts, insts + num_insts, pc, [](const Inst& i, u64 a) { return i.pc < a; });
    if (found == insts + num_insts || found->pc != pc) throw Trap("jump to an address without an instruction");
    return found;
  }

  void barrier() { ++epoch; }

 private:
  static bool is_write(Access access) { return access == Access::kWrite || access == Access::kAtomic; }
  static const char* verb(Access access) { return !is_write(access) ? "read" : access == Access::kWrite ? "write" : "atomic"; }

  [[noreturn]] static void global_trap(u64 address, u32 bytes, Access access, const char* why) {
    char text[160];
    snprintf(text, sizeof text, "global %s of %u bytes %s at 0x%llx", verb(access), bytes, why, static_cast<unsigned long long>(address));
    throw Trap(text);
  }

  template <class... Args>
  [[noreturn]] static void local_trap(const char* format, Args... args) {
    char text[160];
    snprintf(text, sizeof text, format, args...);
    throw Trap(text);
  }

  void touch(u32 word, u32 bytes, Access access, const Wave& w) {
    LdsWord& x = shadow[word];
    if (access == Access::kRead && checks.lds_uninitialized && (bytes & ~x.written)) {
      local_trap("LDS read of word %u, which nothing has written", word);
    }
    if (checks.lds_races) {
      if (x.epoch != epoch) x = {epoch, {0xff, 0xff, 0xff, 0xff}, 0, 0, 0, x.written};
      const u32 me = 1u << w.index;
      for (int b = 0; b < 4; ++b) {
        if ((bytes >> b & 1) && x.writer[b] != 0xff && x.writer[b] != w.index) race(word, access, w, "written", x.writer[b]);
      }
      if (access != Access::kAtomic && (x.atomics & ~me)) race(word, access, w, "updated by atomics", __builtin_ctz(x.atomics & ~me));
      if (access != Access::kRead && (x.readers & ~me) && (x.read_bytes & bytes))
        race(word, access, w, "read", __builtin_ctz(x.readers & ~me));
      if (access == Access::kRead) {
        x.readers |= me;
        x.read_bytes |= bytes;
      } else if (access == Access::kAtomic) {
        x.atomics |= me;
      } else {
        for (int b = 0; b < 4; ++b) {
          if (bytes >> b & 1) x.writer[b] = static_cast<u8>(w.index);
        }
      }
    }
    if (access != Access::kRead) x.written |= bytes;
  }

  [[noreturn]] static void race(u32 word, Access access, const Wave& w, const char* what, u32 other) {
    const char* does = access == Access::kRead ? "reads" : access == Access::kWrite ? "writes" : "updates";
    local_trap("LDS race: wave %u %s word %u %s by wave %u with no barrier between", w.index, does, word, what, other);
  }
};

}  // namespace amdsim
