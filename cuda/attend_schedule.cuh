// Who attends to what: every block derives its own share of the batch from the lengths in device memory.
//
// The tiles of all items form one line, sequence by sequence; block w of W takes [w*T/W, (w+1)*T/W) of its T units. A unit is one tile, or
// `run_tiles` of them when results must not depend on the batch. `item_units` further units stand for what an item costs besides its tiles.
#pragma once

#include "attend.h"
#include "rotate.cuh"

namespace kvarn::cuda {

// One run: consecutive tiles of one item.
struct Run {
  int sequence, kv_head;
  int first_row, rows;  // rows of the sequence in this row block
  int q_begin, q_len, seq_len;
  int tile_begin, tile_end;         // may be empty
  int first_visible, last_visible;  // positions that some row of the block sees
  int full_first, full_last;        // positions between which every row of the block sees everything
  int unit_end;                     // tensor-core kernel: loads up to the end of this run, counted over the block's life
  int parts;                        // of the item
  int counter;
  int end;                                         // 1: there is no further run
  int64_t slot, slot_first, slot_rest, slot_step;  // partial results: own; part 0; part i > 0 is at slot_rest + i * slot_step
};

__device__ __forceinline__ int row_position(const Run& run, int row, int group) { return run.seq_len - run.q_len + row / group; }
__device__ __forceinline__ bool sees_own_position_at_most(const AttendArgs& a) { return a.causal != 0 || a.window > 0; }
__device__ __forceinline__ int last_visible(const AttendArgs& a, int position, int seq_len) {
  return sees_own_position_at_most(a) ? min(position, seq_len - 1) : seq_len - 1;
}
__device__ __forceinline__ int first_visible(const AttendArgs& a, int position) {
  return a.window > 0 ? max(0, position - a.window + 1) : 0;
}

struct SequenceLoad {
  int q_begin, q_len, seq_len;
  int tile_begin, tiles;  // seen by some row
  bool too_long;
  int row_blocks;
  int units;      // of one item, at least one: an item without tiles still has rows to write
  int64_t total;  // units
};

__device__ inline SequenceLoad sequence_load(const AttendArgs& a, int s) {
  SequenceLoad l{};
  if (s >= a.num_seqs) return l;
  const int most = static_cast<int>(a.num_q_tokens);
  l.q_begin = min(max(a.cu_q_lens[s], 0), most);
  l.q_len = max(min(a.cu_q_lens[s + 1], most) - l.q_begin, 0);
  l.seq_len = max(a.seq_lens[s], 0);
  const int first = first_visible(a, l.seq_len - l.q_len);
  l.tile_begin = first / a.tile_tokens;
  const int tile_end = static_cast<int>((static_cast<int64_t>(l.seq_len) + a.tile_tokens - 1) / a.tile_tokens);
  l.too_long = tile_end > a.max_tiles;
  l.tiles = l.too_long ? 1 : max(0, tile_end - l.tile_begin);
  l.row_blocks = static_cast<int>((static_cast<int64_t>(l.q_len) * a.group + a.block_rows - 1) / a.block_rows);
  l.units = max(1, a.run_tiles > 0 ? (l.tiles + a.run_tiles - 1) / a.run_tiles : a.item_units + l.tiles);
  l.total = static_cast<int64_t>(a.num_kv_heads) * l.row_blocks * l.units;
  return l;
}

// Run of `length` units from unit `offset` of an item that begins at unit `item_begin`.
__device__ inline void describe_run(const AttendArgs& a, const SequenceLoad& load, int sequence, int64_t item, int64_t item_begin,
                                    int offset, int length, int block, int blocks, int64_t total, Run& run) {
  run.end = 0;
  run.sequence = sequence;
  run.q_begin = load.q_begin;
  run.q_len = load.q_len;
  run.seq_len = load.seq_len;
  run.kv_head = static_cast<int>(item / load.row_blocks);
  run.first_row = static_cast<int>(item % load.row_blocks) * a.block_rows;
  run.rows = static_cast<int>(min(static_cast<int64_t>(a.block_rows), static_cast<int64_t>(load.q_len) * a.group - run.first_row));
  // What the rows of this block see, which may be less than what the sequence's rows see together.
  const int first_position = load.seq_len - load.q_len + run.first_row / a.group;
  const int last_position = load.seq_len - load.q_len + (run.first_row + run.rows - 1) / a.group;
  run.first_visible = first_visible(a, first_position);
  run.last_visible = last_visible(a, last_position, load.seq_len);
  // The first row sees the least of the end, the last row the least of the beginning.
  run.full_first = first_visible(a, last_position);
  run.full_last = last_visible(a, first_position, load.seq_len);
  const int scale = a.run_tiles > 0 ? a.run_tiles : 1;
  const int skipped = a.run_tiles > 0 ? 0 : a.item_units;  // they come first
  const int64_t run_begin = load.tile_begin + static_cast<int64_t>(max(offset - skipped, 0)) * scale;
  const int64_t run_end = min(static_cast<int64_t>(load.tile_begin) + load.tiles,
                              load.tile_begin + static_cast<int64_t>(max(offset + length - skipped, 0)) * scale);
  const int64_t seen_end = run.last_visible < 0 ? 0 : run.last_visible / a.tile_tokens + 1;
  run.tile_begin = static_cast<int>(max(run_begin, static_cast<int64_t>(run.first_visible / a.tile_tokens)));
  run.tile_end = static_cast<int>(min(run_end, seen_end));
  if (load.too_long && run_begin < run_end) {  // one tile that no table has
    run.tile_begin = a.max_tiles;
    run.tile_end = a.max_tiles + 1;
  }
  if (a.run_tiles > 0) {
    run.parts = load.units;
    run.slot_first = run.slot_rest = item_begin;
    run.slot_step = 1;
    run.counter = static_cast<int>(item_begin);
    run.slot = item_begin + offset;
  } else {
    // The first and the last block that have a part of this item.
    const int first_block = static_cast<int>(((item_begin + 1) * blocks - 1) / total);
    const int last_block = static_cast<int>(((item_begin + load.units) * blocks - 1) / total);
    run.parts = last_block - first_block + 1;
    run.slot_first = 2 * static_cast<int64_t>(first_block) + 1;
    run.slot_rest = 2 * static_cast<int64_t>(first_block);
    run.slot_step = 2;
    run.counter = first_block;
    run.slot = block == first_block ? run.slot_first : 2 * static_cast<int64_t>(block);
  }
}

// Where a block stands in its share of the units.
struct Walk {
  int64_t unit, end;  // the next unit, and the end of the share
  int64_t total;      // units of all blocks
  int blocks;         // that have a share
  int chunk;          // first of the 32 sequences last looked at
  int64_t base;       // its first unit
};

// The 32 lanes of a warp call it together.
__device__ __forceinline__ Walk begin_walk(const AttendArgs& a, int block, int blocks, int lane) {
  Walk w{};
#pragma unroll 1
  for (int s = lane; s < a.num_seqs; s += 32) w.total += sequence_load(a, s).total;
#pragma unroll
  for (int h = 16; h >= 1; h /= 2) w.total += __shfl_xor_sync(kFullWarp, w.total, h);
  // With fewer units than blocks, the first blocks take one each: the parts of an item must lie in neighbouring blocks.
  w.blocks = static_cast<int>(min(static_cast<int64_t>(blocks), w.total));
  w.unit = block < w.blocks ? w.total * block / w.blocks : w.total;
  w.end = block < w.blocks ? w.total * (block + 1) / w.blocks : w.total;
  return w;
}

// Describes the run that begins at w.unit < w.end to `run` in shared memory, where that is not null, and moves w.unit to its end. The 32
// lanes of a warp call it together.
__device__ __forceinline__ void next_run(const AttendArgs& a, Walk& w, int block, int lane, Run* run) {
  for (;; w.chunk += 32) {
    const SequenceLoad mine = sequence_load(a, w.chunk + lane);
    int64_t through = mine.total;
#pragma unroll
    for (int h = 1; h < 32; h *= 2) {
      const int64_t other = __shfl_up_sync(kFullWarp, through, h);
      if (lane >= h) through += other;
    }
    const int64_t first = w.base + through - mine.total;
    const bool here = first <= w.unit && w.unit < first + mine.total;
    const unsigned found = __ballot_sync(kFullWarp, here);
    if (found != 0) {
      int length = 0;
      if (here) {
        const int64_t item = (w.unit - first) / mine.units;
        const int64_t item_begin = first + item * mine.units;
        const int offset = static_cast<int>(w.unit - item_begin);
        length = a.run_tiles > 0 ? 1 : static_cast<int>(min(static_cast<int64_t>(mine.units - offset), w.end - w.unit));
        if (run != nullptr) {
          describe_run(a, mine, w.chunk + lane, item, item_begin, offset, length, block, w.blocks, w.total, *run);
        }
      }
      w.unit += __shfl_sync(kFullWarp, length, __ffs(static_cast<int>(found)) - 1);
      __syncwarp();
      return;
    }
    w.base += __shfl_sync(kFullWarp, through, 31);
  }
}

}  // namespace kvarn::cuda
