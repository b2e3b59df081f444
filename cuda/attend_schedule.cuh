// Who attends to what: every block derives its own share of the batch from the lengths in device memory.
//
// The tiles of all items form one line, sequence by sequence; block w of W takes [w*T/W, (w+1)*T/W) of its T units. A unit is one tile, or
// `run_tiles` of them when results must not depend on the batch. `item_units` further units stand for what an item costs besides its tiles.
// On NVIDIA units may also be whole items or equal parts of them: see attend_walk.cuh.
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
  int slot, slot_first, slot_rest, slot_step;  // partial results: own; part 0; part i > 0 is at slot_rest + i * slot_step
  int end;                                     // 1: there is no further run
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
  int run_tiles;  // > 0: a unit is a run of so many tiles
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
  const int tile_end = static_cast<int>((static_cast<unsigned>(l.seq_len) + a.tile_tokens - 1) / a.tile_tokens);
  l.too_long = tile_end > a.max_tiles;
  l.tiles = l.too_long ? 1 : max(0, tile_end - l.tile_begin);
  l.row_blocks =
      static_cast<int>((static_cast<unsigned>(l.q_len) * a.group + a.block_rows - 1) / a.block_rows);  // q has fewer than 2^32 rows
  l.run_tiles = a.run_tiles;
  l.units = max(1, a.run_tiles > 0 ? (l.tiles + a.run_tiles - 1) / a.run_tiles : a.item_units + l.tiles);
  l.total = static_cast<int64_t>(a.num_kv_heads) * l.row_blocks * l.units;
  return l;
}

// Run of `length` units from unit `offset` of the sequence's item `item`, which begins at unit `item_begin`.
__device__ inline void describe_run(const AttendArgs& a, const SequenceLoad& load, int sequence, int item, int64_t item_begin, int offset,
                                    int length, int block, int blocks, int64_t total, Run& run) {
  run.end = 0;
  run.sequence = sequence;
  run.q_begin = load.q_begin;
  run.q_len = load.q_len;
  run.seq_len = load.seq_len;
  run.kv_head = item / load.row_blocks;
  run.first_row = item % load.row_blocks * a.block_rows;
  run.rows = static_cast<int>(min(static_cast<int64_t>(a.block_rows), static_cast<int64_t>(load.q_len) * a.group - run.first_row));
  // What the rows of this block see, which may be less than what the sequence's rows see together.
  const int first_position = load.seq_len - load.q_len + run.first_row / a.group;
  const int last_position = load.seq_len - load.q_len + (run.first_row + run.rows - 1) / a.group;
  run.first_visible = first_visible(a, first_position);
  run.last_visible = last_visible(a, last_position, load.seq_len);
  // The first row sees the least of the end, the last row the least of the beginning.
  run.full_first = first_visible(a, last_position);
  run.full_last = last_visible(a, first_position, load.seq_len);
  const int scale = load.run_tiles > 0 ? load.run_tiles : 1;
  const int skipped = load.run_tiles > 0 ? 0 : a.item_units;  // they come first
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
  if (load.run_tiles > 0) {
    run.parts = load.units;
    run.slot_first = run.slot_rest = run.counter = static_cast<int>(item_begin);
    run.slot_step = 1;
    run.slot = run.slot_first + offset;
  } else {
    // The first and the last block that have a part of this item.
    const int first_block = static_cast<int>(((item_begin + 1) * blocks - 1) / total);
    const int last_block = static_cast<int>(((item_begin + load.units) * blocks - 1) / total);
    run.parts = last_block - first_block + 1;
    run.slot_first = 2 * first_block + 1;
    run.slot_rest = 2 * first_block;
    run.slot_step = 2;
    run.counter = first_block;
    run.slot = block == first_block ? run.slot_first : 2 * block;
  }
}

}  // namespace kvarn::cuda
