// Matrix instructions. Products are summed in double and rounded once: the hardware's order of additions is not modelled.
// Fragment layouts: AMD's ISA documents and matrix instruction calculator (CDNA2, CDNA3, RDNA3, RDNA4).
#pragma once

#include "machine.h"

namespace amdsim {

enum class Element { kF16, kBf16, kI8, kU8, kI4, kU4, kFp8, kFp8Fnuz, kF32 };
enum class Sum { kF32, kF16, kBf16, kI32 };

constexpr int bits_of(Element type) {
  switch (type) {
    case Element::kF32:
      return 32;
    case Element::kF16:
    case Element::kBf16:
      return 16;
    case Element::kI4:
    case Element::kU4:
      return 4;
    default:
      return 8;
  }
}

// Element `j` of the packed fragment that starts at register `first` in `lane`.
template <Element kType>
inline double element(const u32 (*first)[kWave], int lane, int j) {
  constexpr int kBits = bits_of(kType), kPerWord = 32 / kBits;
  const u32 word = first[j / kPerWord][lane] >> (kBits * (j % kPerWord) & 31);
  switch (kType) {
    case Element::kF32:
      return f32(word);
    case Element::kF16:
      return f16(word);
    case Element::kBf16:
      return bf16(word);
    case Element::kI8:
      return static_cast<i8>(word);
    case Element::kU8:
      return static_cast<u8>(word);
    case Element::kI4:
      return static_cast<i32>(word << 28) >> 28;
    case Element::kU4:
      return word & 15;
    case Element::kFp8:
      return fp8(static_cast<u8>(word), false);
    case Element::kFp8Fnuz:
      return fp8(static_cast<u8>(word), true);
  }
  return 0;
}

// c[row][column] += sum over k of a[row][k] * b[k][column]
template <int kM, int kK>
inline void multiply(const double (&a)[kM][kK], const double (&b)[kK][kM], double (&c)[kM][kM]) {
  for (int row = 0; row < kM; ++row) {
    for (int k = 0; k < kK; ++k) {
      const double x = a[row][k];
      for (int column = 0; column < kM; ++column) c[row][column] += x * b[k][column];
    }
  }
}

// What CDNA 2 makes of the subnormal numbers that its 16-bit MFMA instructions read and write.
inline double flush(double x, double smallest_normal) { return std::abs(x) < smallest_normal ? std::copysign(0.0, x) : x; }

// v_mfma_*_MxMxK with one block, wave 64: lane l holds row (or column) l % M and K / (64 / M) consecutive k from (l / M) on.
// Result register r of lane l: column l % M; row 4 * (l / M) + r % 4 + 8 * (r / 4) for M = 32, 4 * (l / M) + r for M = 16.
// kFlush: subnormal operands and results count as zero.
template <int kM, int kK, Element kType, bool kInteger, bool kFlush>
inline void mfma(Wave& w, u64 d, u64 a, u64 b, const u32* accumulator, u32 constant) {
  constexpr int kPerLane = kK * kM / 64;
  static thread_local double left[kM][kK], right[kK][kM], sum[kM][kM];
  for (int row = 0; row < kM; ++row) {
    for (int k = 0; k < kK; ++k) {
      const int lane = row + kM * (k / kPerLane);
      left[row][k] = element<kType>(w.v + a, lane, k % kPerLane);
      right[k][row] = element<kType>(w.v + b, lane, k % kPerLane);
      if (kFlush) {
        constexpr double kSmallest = kType == Element::kF16 ? 0x1p-14 : 0x1p-126;
        left[row][k] = flush(left[row][k], kSmallest);
        right[k][row] = flush(right[k][row], kSmallest);
      }
    }
  }
  memset(sum, 0, sizeof sum);
  multiply(left, right, sum);
  constexpr int kRegisters = kM * kM / 64;
  u32 result[kRegisters][64];  // the result may overlap the accumulator
  for (int r = 0; r < kRegisters; ++r) {
    for (int lane = 0; lane < 64; ++lane) {
      const int row = 4 * (lane / kM) + r % 4 + (kM == 32 ? 8 * (r / 4) : 0);
      const double s = sum[row][lane % kM];
      const u32 c = accumulator ? accumulator[r * kWave + lane] : constant;
      if (kInteger) {
        result[r][lane] = static_cast<u32>(static_cast<i64>(s) + static_cast<i32>(c));
      } else {
        const double total = kFlush ? flush(s + flush(f32(c), 0x1p-126), 0x1p-126) : s + f32(c);
        result[r][lane] = bits(static_cast<float>(total));
      }
    }
  }
  memcpy(w.v[d], result, sizeof result);
}

// v_wmma_*_16x16xK, wave 32.
// RDNA3: lanes 0..15 hold a whole row (column) each and lanes 16..31 must hold the same again; result register r of lane l: row 2 * r + l
// / 16. RDNA4: lanes l and l + 16 share row (column) l % 16: 16-bit elements alternate between them in fours, smaller ones in halves of K;
// result register r of lane l: row 8 * (l / 16) + r.
template <int kK, Element kLeft, Element kRight, Sum kSum, bool kRdna4>
inline void wmma(Wave& w, u64 d, u64 a, u64 b, const u32* accumulator, u32 constant, bool high) {
  static thread_local double left[16][kK], right[kK][16], sum[16][16];
  constexpr int kWords = kK * bits_of(kLeft) / 32;
  if (!kRdna4) {
    for (int r = 0; r < kWords; ++r) {
      for (int lane = 0; lane < 16; ++lane) {
        if (w.v[a + r][lane] != w.v[a + r][lane + 16] || w.v[b + r][lane] != w.v[b + r][lane + 16]) {
          throw Trap("WMMA: lanes 16..31 of an operand do not repeat lanes 0..15");
        }
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kK; ++k) {
      constexpr bool kFours = bits_of(kLeft) == 16;
      const int group = !kRdna4 ? 0 : kFours ? k / 4 % 2 : k / (kK / 2);
      const int lane = row + 16 * group, j = !kRdna4 ? k : kFours ? k / 8 * 4 + k % 4 : k % (kK / 2);
      left[row][k] = element<kLeft>(w.v + a, lane, j);
      right[k][row] = element<kRight>(w.v + b, lane, j);
    }
  }
  memset(sum, 0, sizeof sum);
  multiply(left, right, sum);
  constexpr bool kPacked = kRdna4 && (kSum == Sum::kF16 || kSum == Sum::kBf16);
  u32 result[8][32];
  for (int r = 0; r < 8; ++r) {
    for (int lane = 0; lane < 32; ++lane) {
      const double s = sum[kRdna4 ? 8 * (lane / 16) + r : 2 * r + lane / 16][lane % 16];
      u32 c = !accumulator ? constant : kPacked ? accumulator[r / 2 * kWave + lane] >> 16 * (r & 1) : accumulator[r * kWave + lane];
      if (!kRdna4 && high && accumulator) c >>= 16;
      switch (kSum) {
        case Sum::kF32:
          result[r][lane] = bits(static_cast<float>(s + f32(c)));
          break;
        case Sum::kF16:
          result[r][lane] = half(s + f16(c));
          break;
        case Sum::kBf16:
          result[r][lane] = bfloat(static_cast<float>(s + bf16(c)));
          break;
        case Sum::kI32:
          result[r][lane] = static_cast<u32>(static_cast<i64>(s) + static_cast<i32>(c));
          break;
      }
    }
  }
  for (int r = 0; r < 8; ++r) {
    for (int lane = 0; lane < 32; ++lane) {
      if (kSum == Sum::kF32 || kSum == Sum::kI32) {
        w.v[d + r][lane] = result[r][lane];
      } else {
        u32& word = w.v[d + (kRdna4 ? r / 2 : r)][lane];
        const int shift = (kRdna4 ? r & 1 : high) ? 16 : 0;
        word = (word & ~(0xffffu << shift)) | result[r][lane] << shift;
      }
    }
  }
}

}  // namespace amdsim
