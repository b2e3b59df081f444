// Which runs of tiles a block has, on AMD. The division of the work is that of cuda/attend_schedule.cuh; here each run is looked up from
// its first unit, so that nothing but two numbers is kept in registers while a run is worked on.
#pragma once

#include "attend_schedule.cuh"

namespace kvarn::cuda {

struct Share {
  int64_t unit, end;  // of the block, [unit, end)
  int64_t total;      // of all blocks
  int blocks;         // that have a share
};

// All threads of a block call it.
__device__ __forceinline__ Share share_of(const AttendArgs& a, int block, int blocks, int lane) {
  Share s;
  s.total = 0;
#pragma unroll 1
  for (int i = lane; i < a.num_seqs; i += 32) s.total += sequence_load(a, i).total;
#pragma unroll 1
  for (int h = 16; h >= 1; h /= 2) s.total += __shfl_xor_sync(kFullWarp, s.total, h);
  // With fewer units than blocks, the first blocks take one each: the parts of an item must lie in neighbouring blocks.
  s.blocks = static_cast<int>(min(static_cast<int64_t>(blocks), s.total));
  s.unit = block < s.blocks ? s.total * block / s.blocks : s.total;
  s.end = block < s.blocks ? s.total * (block + 1) / s.blocks : s.total;
  return s;
}

// Describes the run that begins at s.unit, to `run` in shared memory, and moves s.unit to its end. The 32 lanes of one warp call it.
__device__ __forceinline__ void next_run(const AttendArgs& a, Share& s, int block, int lane, Run& run) {
  int64_t base = 0;  // first unit of the chunk's sequences
#pragma unroll 1
  for (int chunk = 0; chunk < a.num_seqs; chunk += 32) {
    const SequenceLoad mine = sequence_load(a, chunk + lane);
    int64_t through = mine.total;
#pragma unroll 1
    for (int h = 1; h < 32; h *= 2) {
      const int64_t other = __shfl_up_sync(kFullWarp, through, h);
      if (lane >= h) through += other;
    }
    const int64_t first = base + through - mine.total;
    const bool here = first <= s.unit && s.unit < first + mine.total;
    const unsigned found = __ballot_sync(kFullWarp, here);
    base += __shfl_sync(kFullWarp, through, 31);
    if (found == 0) continue;
    int length = 0;
    if (here) {
      const int item = static_cast<int>((s.unit - first) / mine.units);
      const int64_t item_begin = first + static_cast<int64_t>(item) * mine.units;
      const int offset = static_cast<int>(s.unit - item_begin);
      length = a.run_tiles > 0 ? 1 : static_cast<int>(min(static_cast<int64_t>(mine.units - offset), s.end - s.unit));
      describe_run(a, mine, chunk + lane, item, item_begin, offset, length, block, s.blocks, s.total, run);
    }
    s.unit += __shfl_sync(kFullWarp, length, __ffs(static_cast<int>(found)) - 1);
    return;
  }
}

}  // namespace kvarn::cuda
