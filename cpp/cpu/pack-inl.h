// Codes of a record between bytes (one code each, row after row) and planes of quads. kvarn/format.h defines the planes.
//
// Eight codes are handled as one 64-bit integer: two quads of bytes. Records are little-endian, and so must the machine be.
#pragma once

#include "cpu/simd.h"

namespace kvarn::cpu {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "records are little-endian");

KVARN_INLINE uint64_t load_u64(const uint8_t* p) {
  uint64_t x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
KVARN_INLINE uint32_t load_u32(const uint8_t* p) {
  uint32_t x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
KVARN_INLINE void store_u32(uint8_t* p, uint32_t x) { __builtin_memcpy(p, &x, sizeof(x)); }

// First byte of row `row` of a plane; chunk i of a row starts 64 * i bytes further. The short last chunk has an address of its own.
KVARN_INLINE int64_t plane_row(const Plane& plane, int row) {
  return static_cast<int64_t>(row / kLineRows) * kLineRows * plane.row_bytes + row % kLineRows * kChunkBytes;
}
KVARN_INLINE int64_t plane_tail(const Plane& plane, int row) {
  return static_cast<int64_t>(row / kLineRows) * kLineRows * plane.row_bytes + plane.full_chunks() * kLineRows * kChunkBytes +
         row % kLineRows * plane.tail_bytes();
}

// One word from the next 32 / Bits codes, one per byte.
template <int Bits>
KVARN_INLINE uint32_t pack_word(const uint8_t* codes, int shift) {
  constexpr uint64_t kMask = ((1u << Bits) - 1) * 0x0101010101010101u;
  if constexpr (Bits == 8) return load_u32(codes);
  uint32_t word = 0;
  for (int pair = 0; pair < 4 / Bits; ++pair) {
    const uint64_t two_quads = load_u64(codes + 8 * pair) >> shift & kMask;
    word |= static_cast<uint32_t>(two_quads | two_quads >> (32 - Bits)) << (2 * Bits * pair);
  }
  return word;
}

// codes [plane.rows][stride]; bytes past plane.codes of a row must be readable and 0 up to a multiple of 32 codes.
template <int Bits>
inline void pack_plane_as(const Plane& plane, const uint8_t* codes, int64_t stride, int shift, uint8_t* out) {
  constexpr int kWordCodes = 32 / Bits;
  for (int row = 0; row < plane.rows; ++row) {
    const uint8_t* from = codes + row * stride;
    uint8_t* to = out + plane_row(plane, row);
    for (int chunk = 0; chunk < plane.full_chunks(); ++chunk) {
      for (int word = 0; word < 4; ++word, from += kWordCodes) store_u32(to + chunk * 64 + word * 4, pack_word<Bits>(from, shift));
    }
    to = out + plane_tail(plane, row);
    for (int word = 0; word < plane.tail_bytes() / 4; ++word, from += kWordCodes) store_u32(to + word * 4, pack_word<Bits>(from, shift));
  }
}

inline void pack_plane(const Plane& plane, const uint8_t* codes, int64_t stride, int shift, uint8_t* out) {
  switch (plane.bits) {
    case 1:
      return pack_plane_as<1>(plane, codes, stride, shift, out);
    case 2:
      return pack_plane_as<2>(plane, codes, stride, shift, out);
    case 4:
      return pack_plane_as<4>(plane, codes, stride, shift, out);
    case 8:
      return pack_plane_as<8>(plane, codes, stride, shift, out);
    default:
      return;
  }
}

inline void pack_codes(const Plane& low, const Plane& high, const uint8_t* codes, int64_t stride, uint8_t* low_out, uint8_t* high_out) {
  pack_plane(low, codes, stride, 0, low_out);
  pack_plane(high, codes, stride, low.bits, high_out);
}

// The 32 / Bits codes of one word, one per byte; added to what is there when Add.
template <int Bits, bool Add>
KVARN_INLINE void unpack_word(uint32_t word, int shift, uint8_t* codes) {
  constexpr uint64_t kMask = ((1u << Bits) - 1) * 0x0101010101010101u;
  if constexpr (Bits == 8) {
    store_u32(codes, word);
  } else {
    for (int pair = 0; pair < 4 / Bits; ++pair) {
      const uint64_t bits = word >> (2 * Bits * pair);
      uint64_t two_quads = ((bits | bits << (32 - Bits)) & kMask) << shift;
      if constexpr (Add) two_quads |= load_u64(codes + 8 * pair);
      __builtin_memcpy(codes + 8 * pair, &two_quads, sizeof(two_quads));
    }
  }
}

// Writes whole words: up to 31 codes past plane.codes of a row, so `stride` is at least plane.codes rounded up to 32.
template <int Bits, bool Add>
inline void unpack_row_as(const Plane& plane, const uint8_t* in, int row, int shift, uint8_t* codes) {
  constexpr int kWordCodes = 32 / Bits;
  const uint8_t* from = in + plane_row(plane, row);
  for (int chunk = 0; chunk < plane.full_chunks(); ++chunk) {
    for (int word = 0; word < 4; ++word, codes += kWordCodes) unpack_word<Bits, Add>(load_u32(from + chunk * 64 + word * 4), shift, codes);
  }
  from = in + plane_tail(plane, row);
  for (int word = 0; word < plane.tail_bytes() / 4; ++word, codes += kWordCodes)
    unpack_word<Bits, Add>(load_u32(from + word * 4), shift, codes);
}

// One row of codes, one per byte.
KVARN_INLINE void unpack_row(const Plane& low, const Plane& high, const uint8_t* low_in, const uint8_t* high_in, int row, uint8_t* codes) {
  if (low.bits == 2) unpack_row_as<2, false>(low, low_in, row, 0, codes);
  if (low.bits == 4) unpack_row_as<4, false>(low, low_in, row, 0, codes);
  if (low.bits == 8) unpack_row_as<8, false>(low, low_in, row, 0, codes);
  if (high.bits == 1) unpack_row_as<1, true>(high, high_in, row, low.bits, codes);
  if (high.bits == 2) unpack_row_as<2, true>(high, high_in, row, low.bits, codes);
}

}  // namespace
}  // namespace kvarn::cpu
