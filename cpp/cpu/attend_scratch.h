// How attend's kernels divide a worker's scratch memory. Included by the kernels and by the plan, which sizes it.
#pragma once

#include "cpu/scratch.h"
#include "kvarn/format.h"

namespace kvarn::cpu {
namespace {

constexpr int kGroupRows = 4;  // rows of q that one pass over the codes serves at most

// Codes of a row, up to the end of the last chunk of its thinnest plane.
constexpr int padded_codes(int codes) { return (codes + 127) / 128 * 128; }
constexpr int kMaxPaddedCodes = padded_codes(kMaxHeadDim);

// Integers of one row of q in row order: 16-bit values at `low`, or bytes at `low` and `high`.
struct alignas(64) RowIntegers {
  uint8_t low[2 * kMaxPaddedCodes];
  uint8_t high[kMaxPaddedCodes];
};

// Integers of a group of rows, arranged for the low and the high plane of an operand.
struct alignas(64) GroupQuery {
  uint8_t low[kGroupRows * 2 * kMaxPaddedCodes];
  uint8_t high[kGroupRows * 2 * kMaxPaddedCodes];
};

struct AttendScratch {
  float* metadata[kMetadataCount];  // of the tile
  RowIntegers* integers;
  GroupQuery* query;
  float* folded;   // [kGroupRows][longest]
  int32_t* sums;   // [kGroupRows][longest]
  int32_t* rests;  // [kGroupRows][longest]
  float* weights;  // [kGroupRows][tile_tokens]
  int longest;     // max(head_dim, tile_tokens)
  int64_t bytes;
};

KVARN_INLINE AttendScratch attend_scratch(void* base, int head_dim, int tile_tokens) {
  ScratchPieces pieces{static_cast<uint8_t*>(base)};
  AttendScratch s;
  s.longest = head_dim > tile_tokens ? head_dim : tile_tokens;
  for (float*& vector : s.metadata) vector = pieces.take<float>(s.longest);
  s.integers = pieces.take<RowIntegers>(1);
  s.query = pieces.take<GroupQuery>(1);
  s.folded = pieces.take<float>(static_cast<int64_t>(kGroupRows) * s.longest);
  s.sums = pieces.take<int32_t>(static_cast<int64_t>(kGroupRows) * s.longest);
  s.rests = pieces.take<int32_t>(static_cast<int64_t>(kGroupRows) * s.longest);
  s.weights = pieces.take<float>(static_cast<int64_t>(kGroupRows) * tile_tokens);
  s.bytes = pieces.bytes;
  return s;
}

}  // namespace
}  // namespace kvarn::cpu
