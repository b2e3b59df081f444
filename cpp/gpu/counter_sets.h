// The counters of an attention schedule.
#pragma once

#include <cstdint>

namespace kvarn::gpu {

// Counters that the last arriving block of an item leaves at zero. Calls in flight at the same time must not share them; such calls have
// different workspaces, so a workspace's address picks the set.
struct CounterSets {
  static constexpr int kSets = 64;
  unsigned* counters = nullptr;  // [kSets][per_set], device memory
  int64_t per_set = 0;
  const void* owner[kSets] = {};
  uint64_t last_use[kSets] = {};
  uint64_t uses = 0;

  // The set of a workspace; the one that was not used for longest passes to a workspace that has none.
  unsigned* of(const void* workspace);
};

inline unsigned* CounterSets::of(const void* workspace) {
  int oldest = 0;
  for (int i = 0; i < kSets; ++i) {
    if (owner[i] == workspace) {
      last_use[i] = ++uses;
      return counters + i * per_set;
    }
    if (last_use[i] < last_use[oldest]) oldest = i;
  }
  owner[oldest] = workspace;
  last_use[oldest] = ++uses;
  return counters + oldest * per_set;
}

}  // namespace kvarn::gpu
