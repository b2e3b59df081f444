// What the attention kernels are launched with. Plain data, copied to the device by value.
#pragma once

#include <vector_types.h>

#include "kvarn/format.h"
#include "rotation.h"

namespace kvarn::cuda {

// A work item is (sequence, KV head, row block): up to `block_rows` query rows of one KV head against the tiles they see. Query row r of a
// sequence is token r / group, head r % group of the KV head's group. Items are cut into runs of tiles; a run that is not a whole item
// leaves a partial result (unnormalised output, maximum and sum of every row) in the workspace, and the last one to do so merges them.
struct AttendArgs {
  const void* q;
  void* out;
  int64_t q_token_stride, q_head_stride, out_token_stride, out_head_stride;  // values
  float* lse;
  const int32_t* cu_q_lens;
  const int32_t* seq_lens;
  const int32_t* block_table;
  int64_t block_table_stride;
  int max_tiles;  // of a sequence; a longer one is an error of the caller's and gives NaN
  const uint8_t* records;
  const uint8_t* staging;
  const float* alibi_slopes;
  const float* sinks;
  float* partial_out;    // [slots][block_rows][head_dim]
  float2* partial_sums;  // [slots][block_rows]: maximum (base 2), sum
  unsigned* counters;    // arrivals of the parts of cut items, of each row; all zero between launches
  int64_t record_bytes;
  int64_t num_blocks, num_slots;
  int64_t num_q_tokens;
  int num_seqs, num_kv_heads, group, dtype;
  int head_dim, tile_tokens;
  float softmax_scale, soft_cap;
  int causal, window;
  int q_rotated, out_rotated;
  int block_rows;
  int run_tiles;   // > 0: runs of exactly this many tiles, so that a sequence's sums do not depend on the batch; 0: as the load balances
  int item_units;  // what an item costs besides its tiles, in tiles, where blocks share the line of tiles
  Rotation rotation;
  // the tensor-core kernel
  int k_bits, v_bits;
  int v_offset, metadata_offset;
  int row_groups;                             // warps that share one reading of a tile, each with rows of its own
  int group_rows;                             // rows of a row group: what its warp holds, or fewer
  int tile_owners;                            // sets of such warps, which take turns at the tiles
  int k_stages, k_stage_bytes, num_k_stages;  // rings of stages: offset in shared memory, size and number
  int v_stages, v_stage_bytes, num_v_stages;
  // the generic kernel
  RecordLayout layout;
};

struct AttendKernel {
  const void* function = nullptr;
  int threads = 0;
  int warps = 0;          // that compute
  int rows_per_warp = 0;  // query rows a computing warp holds
  // Tensor-core kernels: shared memory of a launch without its stages.
  int (*fixed_bytes)(int row_groups, int group_rows) = nullptr;
};

// The tensor-core kernel of a head_dim and a format (widths 2, 3, 4, 8) whose warps hold `rows_per_warp` = 8 or 16 rows; function is null
// when there is none.
AttendKernel find_attend_mma(int head_dim, int rows_per_warp, int k_bits, int v_bits);
// Any format and head_dim.
AttendKernel find_attend_generic();
constexpr int kGenericThreads = 256;
constexpr int kGenericRows = 8;
constexpr int kGenericHeadBytes = 256;
constexpr int attend_generic_bytes(int head_dim, int tile_tokens) {
  const int metadata = 3 * (head_dim + tile_tokens);
  const int scratch = kGenericRows * head_dim;  // rows being rotated lie in the metadata's place
  return kGenericHeadBytes + 4 * (kGenericRows * (head_dim + tile_tokens) + (metadata > scratch ? metadata : scratch));
}

}  // namespace kvarn::cuda
