// How a block walks through its share of the line of units.
//
// The line balances tiles, but it cuts items: the parts of one must be merged, and a block that has parts of two begins a second run. Where
// balance does not suffer, items are left whole, or get whole blocks of their own when there are fewer items than blocks.
#pragma once

#include "attend_schedule.cuh"

namespace kvarn::cuda {

struct Walk {
  int64_t unit, end;  // the next unit, and the end of the share
  int64_t total;      // units of all blocks
  int blocks;         // that have a share
  // >= 0: a unit is all that a block has of an item; every item is cut for one block, and so many more blocks are divided by the items'
  // tiles. -1: the line of tiles.
  int spare;
  int64_t tiles;  // of all items
  // The 32 sequences last looked at: the first of them and its first unit; this lane's sequence, and the units from there to its end.
  int chunk;
  int64_t base, through;
  SequenceLoad mine;
};

// Sum over the warp, of numbers below 2^42.
__device__ __forceinline__ int64_t warp_sum(int64_t x) {
  const unsigned low = __reduce_add_sync(kFullWarp, static_cast<unsigned>(x & 0xffff));
  const unsigned high = __reduce_add_sync(kFullWarp, static_cast<unsigned>(x >> 16));
  return (static_cast<int64_t>(high) << 16) + low;
}

// Cuts every item of a sequence into runs of equal length, one for each block it gets. All items together get no more blocks than there
// are: one each, and of `spare` ones the whole part of their share.
__device__ __forceinline__ void cut_evenly(const AttendArgs& a, int spare, int64_t all_tiles, SequenceLoad& l) {
  const int tiles = max(l.tiles, 1);
  const int blocks = spare == 0 ? 1 : 1 + static_cast<int>(static_cast<int64_t>(spare) * l.tiles / max(all_tiles, int64_t{1}));
  l.run_tiles = (tiles + blocks - 1) / blocks;
  l.units = (tiles + l.run_tiles - 1) / l.run_tiles;
  l.total = static_cast<int64_t>(a.num_kv_heads) * l.row_blocks * l.units;
}

// The sequences of a chunk, this lane's with its share of the units.
__device__ __forceinline__ void take_chunk(Walk& w, int lane, const SequenceLoad& l) {
  w.mine = l;
  w.through = l.total;
#pragma unroll
  for (int h = 1; h < 32; h *= 2) {
    const int64_t other = __shfl_up_sync(kFullWarp, w.through, h);
    if (lane >= h) w.through += other;
  }
}

// The 32 lanes of a warp call it together.
__device__ __forceinline__ Walk begin_walk(const AttendArgs& a, int block, int blocks, int lane) {
  constexpr int kSecondRun = 16;  // what a further run costs a block, in tiles
  Walk w{};
  SequenceLoad load{};
  unsigned items = 0;
  const int last_chunk = (a.num_seqs - 1) / 32 * 32;
#pragma unroll 1
  for (int chunk = last_chunk; chunk >= 0; chunk -= 32) {  // ends with the one that is walked through first
    load = sequence_load(a, chunk + lane);
    const unsigned own = static_cast<unsigned>(a.num_kv_heads) * load.row_blocks;
    w.total += load.total;
    w.tiles += static_cast<int64_t>(own) * load.tiles;
    items += own;
  }
  w.total = warp_sum(w.total);
  w.tiles = warp_sum(w.tiles);
  items = __reduce_add_sync(kFullWarp, items);
  w.spare = -1;
  if (a.run_tiles == 0) {
    const int spare = items < static_cast<unsigned>(blocks) ? blocks - static_cast<int>(items) : 0;
    int longest = 0;
    int64_t total = 0;
    SequenceLoad even{};
#pragma unroll 1
    for (int chunk = last_chunk; chunk >= 0; chunk -= 32) {
      even = chunk == 0 ? load : sequence_load(a, chunk + lane);
      cut_evenly(a, spare, w.tiles, even);
      if (even.total > 0) longest = max(longest, even.run_tiles);
      total += even.total;
    }
    longest = __reduce_max_sync(kFullWarp, longest);
    const unsigned runs = (items + blocks - 1) / blocks;  // of a block, at most
    if (static_cast<int64_t>(longest) * runs * blocks <= w.tiles + kSecondRun * blocks) {
      w.spare = spare;
      w.total = warp_sum(total);
      load = even;
    }
  }
  // With fewer units than blocks, the first blocks take one each: the parts of an item must lie in neighbouring blocks.
  w.blocks = static_cast<int>(min(static_cast<int64_t>(blocks), w.total));
  if (w.total <= blocks) {
    w.unit = min(static_cast<int64_t>(block), w.total);
    w.end = min(w.unit + 1, w.total);
  } else {
    w.unit = w.total * block / blocks;
    w.end = w.total * (block + 1) / blocks;
  }
  take_chunk(w, lane, load);
  return w;
}

// Describes the run that begins at w.unit < w.end to `run` in shared memory, where that is not null, and moves w.unit to its end. The 32
// lanes of a warp call it together.
__device__ __forceinline__ void next_run(const AttendArgs& a, Walk& w, int block, int lane, Run* run) {
  for (;;) {
    const int64_t first = w.base + w.through - w.mine.total;
    const bool here = first <= w.unit && w.unit < first + w.mine.total;
    const unsigned found = __ballot_sync(kFullWarp, here);
    if (found != 0) {
      int length = 0;
      if (here) {
        const int item = static_cast<int>((w.unit - first) / w.mine.units);
        const int64_t item_begin = first + static_cast<int64_t>(item) * w.mine.units;
        const int offset = static_cast<int>(w.unit - item_begin);
        length = w.mine.run_tiles > 0 ? 1 : static_cast<int>(min(static_cast<int64_t>(w.mine.units - offset), w.end - w.unit));
        if (run != nullptr) {
          describe_run(a, w.mine, w.chunk + lane, item, item_begin, offset, length, block, w.blocks, w.total, *run);
        }
      }
      w.unit += __shfl_sync(kFullWarp, length, __ffs(static_cast<int>(found)) - 1);
      __syncwarp();
      return;
    }
    w.base += __shfl_sync(kFullWarp, w.through, 31);
    w.chunk += 32;
    SequenceLoad next = sequence_load(a, w.chunk + lane);
    if (w.spare >= 0) cut_evenly(a, w.spare, w.tiles, next);
    take_chunk(w, lane, next);
  }
}

}  // namespace kvarn::cuda
