// Record format v1: where every code and every scale of an encoded tile lives. docs/FORMAT.md is the normative text.
//
// A tile is `tile_tokens` (G) consecutive tokens of one KV head with `head_dim` (D) channels. Its record is one byte string:
//
//   K codes | V codes | metadata | zero padding to a multiple of 16 bytes
//
// Code arrays keep the contraction axis contiguous: K has rows = tokens over channels, V has rows = channels over tokens.
// A width is stored as one or two power-of-two planes (3 = 2+1, 5 = 4+1, 6 = 4+2); each plane is an array
//   [rows/4][chunks per row][4 rows][16 bytes]
// whose last chunk is shorter when a row is no multiple of 16 bytes (always whole 32-bit words).
//
// This header compiles as C++, CUDA and HIP and depends on nothing but the standard integer types.
#pragma once

#include <cstdint>

// A translation unit may define KVARN_HD itself, to force inlining.
#if !defined(KVARN_HD)
#if defined(__CUDACC__) || defined(__HIP__)
#define KVARN_HD __host__ __device__
#else
#define KVARN_HD
#endif
#endif

namespace kvarn {

inline constexpr int kMaxHeadDim = 512;
inline constexpr int kMaxTileTokens = 256;
inline constexpr int kChunkBytes = 16;  // one chunk: consecutive codes of one row
inline constexpr int kLineRows = 4;     // one line: the same chunk of four consecutive rows, 64 bytes
inline constexpr int kRecordAlignment = 16;

KVARN_HD constexpr bool is_supported_width(int bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 5 || bits == 6 || bits == 8; }
KVARN_HD constexpr bool is_supported_tile_tokens(int tokens) { return tokens == 32 || tokens == 64 || tokens == 128 || tokens == 256; }
KVARN_HD constexpr bool is_supported_head_dim(int d) {
  return d == 64 || d == 80 || d == 96 || d == 112 || d == 128 || d == 160 || d == 192 || d == 256 || d == 512;
}

// Bits of the first (low) plane of a width, and of the second (high) one; 0 when there is none. code = low + (high << low bits).
KVARN_HD constexpr int low_plane_bits(int bits) { return bits == 3 ? 2 : bits == 5 || bits == 6 ? 4 : bits; }
KVARN_HD constexpr int high_plane_bits(int bits) { return bits - low_plane_bits(bits); }

// Bytes of one row of `codes` codes in a plane, rounded up to whole 32-bit words.
KVARN_HD constexpr int plane_row_bytes(int codes, int plane_bits) { return (codes * plane_bits + 31) / 32 * 4; }

// One plane of `rows` x `codes` codes.
struct Plane {
  int bits;       // 1, 2, 4, 8; 0: the plane does not exist
  int rows;       // a multiple of 4
  int codes;      // codes per row
  int row_bytes;  // a multiple of 4
  int bytes;      // rows * row_bytes

  KVARN_HD constexpr int full_chunks() const { return row_bytes / kChunkBytes; }
  KVARN_HD constexpr int tail_bytes() const { return row_bytes % kChunkBytes; }

  // Byte offset of word `word` (32 bits) of row `row` within the plane.
  KVARN_HD constexpr int word_offset(int row, int word) const {
    const int chunk = word / 4;
    const int chunk_bytes = chunk < full_chunks() ? kChunkBytes : tail_bytes();
    return row / kLineRows * (kLineRows * row_bytes) + chunk * (kLineRows * kChunkBytes) + row % kLineRows * chunk_bytes + word % 4 * 4;
  }
};

KVARN_HD constexpr Plane make_plane(int rows, int codes, int bits) {
  const int row_bytes = bits == 0 ? 0 : plane_row_bytes(codes, bits);
  return Plane{bits, rows, codes, row_bytes, rows * row_bytes};
}

// Where code `i` of a row sits: which word of the row, and the bit inside that word ("planes of quads": inside a word,
// code 4p+j is in byte j at bits [p*bits, (p+1)*bits)).
KVARN_HD constexpr int code_word(int i, int bits) { return i / (32 / bits); }
KVARN_HD constexpr int code_shift(int i, int bits) {
  const int within = i % (32 / bits);
  return within % 4 * 8 + within / 4 * bits;
}

// The six metadata vectors, in record order.
enum Metadata : int { kKScale, kKZero, kKTokenScale, kVChannelScale, kVScale, kVZero, kMetadataCount };

struct Format {
  int k_bits = 0;
  int v_bits = 0;
  int tile_tokens = 0;
  int metadata_bits = 16;  // 16: fp16 vectors; 8: one byte per value, plus an fp16 (low, step) pair per vector

  friend constexpr bool operator==(const Format& a, const Format& b) {
    return a.k_bits == b.k_bits && a.v_bits == b.v_bits && a.tile_tokens == b.tile_tokens && a.metadata_bits == b.metadata_bits;
  }
};

KVARN_HD constexpr bool is_supported_format(const Format& f) {
  return is_supported_width(f.k_bits) && is_supported_width(f.v_bits) && is_supported_tile_tokens(f.tile_tokens) &&
         (f.metadata_bits == 16 || f.metadata_bits == 8);
}

// Every offset of one record, in bytes from its start.
struct RecordLayout {
  Format format;
  int head_dim;
  Plane k_low, k_high;  // rows = tokens, codes = channels
  Plane v_low, v_high;  // rows = channels, codes = tokens
  int k_low_offset, k_high_offset, v_low_offset, v_high_offset;
  int metadata_offset[kMetadataCount];  // first value of each vector: fp16, or bytes when metadata_bits == 8
  int metadata_count[kMetadataCount];   // values: head_dim or tile_tokens
  int metadata_range_offset;            // metadata_bits == 8: fp16 [kMetadataCount][2] = low, step; else the end of the vectors
  int record_bytes;
};

KVARN_HD constexpr RecordLayout make_layout(const Format& format, int head_dim) {
  RecordLayout r{};
  const int g = format.tile_tokens;
  r.format = format;
  r.head_dim = head_dim;
  r.k_low = make_plane(g, head_dim, low_plane_bits(format.k_bits));
  r.k_high = make_plane(g, head_dim, high_plane_bits(format.k_bits));
  r.v_low = make_plane(head_dim, g, low_plane_bits(format.v_bits));
  r.v_high = make_plane(head_dim, g, high_plane_bits(format.v_bits));
  r.k_low_offset = 0;
  r.k_high_offset = r.k_low_offset + r.k_low.bytes;
  r.v_low_offset = r.k_high_offset + r.k_high.bytes;
  r.v_high_offset = r.v_low_offset + r.v_low.bytes;
  int at = r.v_high_offset + r.v_high.bytes;
  for (int i = 0; i < kMetadataCount; ++i) {
    const bool per_channel = i == kKScale || i == kKZero || i == kVChannelScale;
    r.metadata_offset[i] = at;
    r.metadata_count[i] = per_channel ? head_dim : g;
    at += r.metadata_count[i] * format.metadata_bits / 8;
  }
  r.metadata_range_offset = at;
  if (format.metadata_bits == 8) at += kMetadataCount * 2 * 2;
  r.record_bytes = (at + kRecordAlignment - 1) / kRecordAlignment * kRecordAlignment;
  return r;
}

// Values of one staging slot: K and V, [2][num_kv_heads][tile_tokens][head_dim], rotated, in the model's dtype.
KVARN_HD constexpr int64_t slot_values(int num_kv_heads, int tile_tokens, int head_dim) {
  return int64_t{2} * num_kv_heads * tile_tokens * head_dim;
}

static_assert(make_layout({4, 2, 128, 16}, 128).record_bytes == 13824);
static_assert(make_layout({4, 2, 128, 16}, 256).record_bytes == 26880);
static_assert(make_layout({4, 4, 128, 16}, 128).record_bytes == 17920);
static_assert(make_layout({2, 2, 128, 16}, 128).record_bytes == 9728);
static_assert(make_layout({3, 3, 128, 16}, 128).k_high_offset == 4096, "3 bits = a 2-bit plane followed by a 1-bit plane");
static_assert(make_layout({4, 2, 128, 8}, 128).record_bytes == 12288 + 768 + 24 + 8);
static_assert(make_plane(128, 80, 4).tail_bytes() == 8, "80 codes of 4 bits: two full chunks and a short one");

}  // namespace kvarn
