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

// Integers of a group of rows, arranged for the low and the high plane of an operand. Up to 4 bytes a code, and an odd multiple of 512
// bytes, so that the rows of a group do not compete for the same cache sets.
constexpr int kQueryRowBytes = 4 * kMaxPaddedCodes + 512;
struct alignas(64) GroupQuery {
  uint8_t low[kGroupRows * kQueryRowBytes];
  uint8_t high[kGroupRows * kQueryRowBytes];
};

struct AttendScratch {
  float* metadata[kMetadataCount];  // of the tile
  GroupQuery* query;
  float* folded;   // [kGroupRows][stride]
  int32_t* sums;   // [kGroupRows][stride]
  int32_t* rests;  // [kGroupRows][stride]
  int stride;      // values between the rows of the group
  int64_t bytes;
};

KVARN_INLINE AttendScratch attend_scratch(void* base, int head_dim, int tile_tokens) {
  ScratchPieces pieces{static_cast<uint8_t*>(base)};
  AttendScratch s;
  const int longest = padded_codes(head_dim > tile_tokens ? head_dim : tile_tokens);
  s.stride = longest;
  for (float*& vector : s.metadata) vector = pieces.take<float>(longest);
  s.query = pieces.take<GroupQuery>(1);
  s.folded = pieces.take<float>(static_cast<int64_t>(kGroupRows) * longest);
  s.sums = pieces.take<int32_t>(static_cast<int64_t>(kGroupRows) * longest);
  s.rests = pieces.take<int32_t>(static_cast<int64_t>(kGroupRows) * longest);
  s.bytes = pieces.bytes;
  return s;
}

}  // namespace
}  // namespace kvarn::cpu
