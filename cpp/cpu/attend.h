// What the host side of attend asks of one instruction set's kernels.
#pragma once

#include <cstdint>

#include "kvarn/format.h"
#include "kvarn/kvarn.h"

namespace kvarn::cpu {

// Query rows of one KV head that are carried through the tiles together.
inline constexpr int kAttendMaxRows = 64;

// Reasons for a result that is not a number.
inline constexpr int32_t kRowIsNan = 1;     // both the output and the log-sum-exp
inline constexpr int32_t kOutputIsNan = 2;  // the output alone: only V was not finite

// Running softmax of some rows: output = acc / sum, weights relative to 2^peak.
struct AttendState {
  float* acc;      // [rows][head_dim], rotated frame
  float* peak;     // [rows], log2; -inf before the first visible token
  float* sum;      // [rows]
  int32_t* flags;  // [rows], kRowIsNan | kOutputIsNan
};

// A run of tiles of one KV head against some query rows.
struct AttendUnit {
  const RecordLayout* layout;
  int dtype;  // of staging
  int rows;
  // [rows][head_dim], rotated, times softmax_scale, and times log2(e) when there is no soft cap
  const float* q;
  // [rows]: row r sees the positions [see_begin[r], see_end[r]); empty when see_end <= see_begin
  const int32_t* see_begin;
  const int32_t* see_end;
  const float* alibi_slopes;  // [rows], times log2(e); or null
  const int32_t* positions;   // [rows] of the queries; read with alibi_slopes only
  float soft_cap;             // > 0: scores become cap * tanh(score / cap); 0: none
  const int32_t* table;       // the sequence's row of the block table
  int first_tile, end_tile;
  const uint8_t* records;  // of this KV head in block 0
  int64_t block_bytes;
  const uint8_t* staging_k;  // of this KV head in slot 0
  const uint8_t* staging_v;
  int64_t slot_bytes;
  AttendState state;
  void* scratch;  // attend_scratch_bytes, 64-byte aligned
};

struct AttendKernels {
  // out[r][i] = in[r * in_stride + i], `rows` rows of head_dim values of `dtype`.
  void (*load_rows)(const void* in, int dtype, int64_t in_stride, int rows, int head_dim, float* out);
  void (*store_rows)(const float* in, int dtype, int64_t out_stride, int rows, int head_dim, void* out);
  // Scales q and readies the state. A row that is not finite becomes zero and is flagged.
  void (*begin)(float* q, int rows, int head_dim, float scale, const AttendState& state);
  void (*run)(const AttendUnit& unit);
};

int64_t attend_scratch_bytes(const RecordLayout& layout);

}  // namespace kvarn::cpu
