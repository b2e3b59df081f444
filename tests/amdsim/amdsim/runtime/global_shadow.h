// Who touched the words of global memory during a launch: what one workgroup writes, another one may neither write nor read, except where
// the reader asks for the copy that all workgroups share. Atomics are left alone.
#pragma once

#include <sys/mman.h>

#include <string>

#include "numbers.h"

namespace amdsim {

enum class Access { kRead, kSharedRead, kWrite, kAtomic };

// The words of one range. The threads of the host share it; pages that nothing touches cost nothing.
class GlobalShadow {
 public:
  GlobalShadow(u64 begin, u64 end) : first_word_(begin / 4), bytes_((end / 4 - begin / 4 + 1) * sizeof(Word)) {
    void* pages = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) throw std::runtime_error("cannot map a shadow of global memory");
    words_ = static_cast<Word*>(pages);
  }
  GlobalShadow(const GlobalShadow&) = delete;
  GlobalShadow& operator=(const GlobalShadow&) = delete;
  ~GlobalShadow() { munmap(words_, bytes_); }

  // group: of the access, from 1 on. Null, or what is wrong with it.
  std::string touch(u64 address, u32 bytes, Access access, u32 group) {
    for (u64 word = address / 4; word <= (address + bytes - 1) / 4; ++word) {
      const u64 from = std::max(address, 4 * word), to = std::min(address + bytes, 4 * word + 4);
      const u32 mask = ((1u << (to - from)) - 1) << (from & 3);
      Word& w = words_[word - first_word_];
      const u32 writer = __atomic_load_n(&w.writer, __ATOMIC_RELAXED), reader = __atomic_load_n(&w.reader, __ATOMIC_RELAXED);
      if (is_foreign(writer, mask, group)) {
        return (access == Access::kWrite ? "writes what " : "reads what ") + name(writer) + " wrote";
      }
      if (access == Access::kWrite) {
        if (is_foreign(reader, mask, group)) return "writes what " + name(reader) + " read";
        mark(w.writer, writer, mask, group);
      } else {
        mark(w.reader, reader, mask, group);
      }
    }
    return {};
  }

 private:
  // Group and the bytes it touched, in the low 4 bits. With readers of several groups, the group is kMany.
  struct Word {
    u32 writer, reader;
  };
  static constexpr u32 kMany = (1u << 28) - 1;

  static bool is_foreign(u32 entry, u32 mask, u32 group) { return entry >> 4 != 0 && entry >> 4 != group && (entry & mask) != 0; }
  static std::string name(u32 entry) { return entry >> 4 == kMany ? "other workgroups" : "workgroup " + std::to_string((entry >> 4) - 1); }
  static void mark(u32& entry, u32 before, u32 mask, u32 group) {
    const u32 owner = before >> 4 == 0 || before >> 4 == group ? group : kMany;
    const u32 after = owner << 4 | (before & 15) | mask;
    if (after != before) __atomic_store_n(&entry, after, __ATOMIC_RELAXED);
  }

  u64 first_word_;
  size_t bytes_;
  Word* words_;
};

}  // namespace amdsim
