// Planes of codes, metadata and the decoding of a record.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "ref/ref.h"

namespace kvarn::ref {
namespace {

constexpr int kWidths[] = {2, 3, 4, 5, 6, 8};
constexpr int kHeadDims[] = {64, 80, 96, 112, 128, 160, 192, 256, 512};
constexpr int kTileTokens[] = {32, 64, 128, 256};

TEST(RefRecord, CodesSurviveARoundTripInEveryShape) {
  for (const int bits : kWidths) {
    for (const int g : kTileTokens) {
      for (const int d : kHeadDims) {
        const RecordLayout layout = make_layout({bits, bits, g, 16}, d);
        std::vector<uint8_t> record(layout.record_bytes, 0);
        const auto code = [&](int t, int c, int salt) { return (t * 7 + c * 13 + t * c + salt) & ((1 << bits) - 1); };
        for (int t = 0; t < g; ++t) {
          for (int c = 0; c < d; ++c) {
            set_k_code(record.data(), layout, t, c, code(t, c, 1));
            set_v_code(record.data(), layout, t, c, code(t, c, 2));
          }
        }
        for (int t = 0; t < g; ++t) {
          for (int c = 0; c < d; ++c) {
            ASSERT_EQ(k_code(record.data(), layout, t, c), code(t, c, 1)) << bits << " bits, G " << g << ", D " << d;
            ASSERT_EQ(v_code(record.data(), layout, t, c), code(t, c, 2)) << bits << " bits, G " << g << ", D " << d;
          }
        }
        const auto metadata = record.begin() + layout.metadata_offset[kKScale];
        EXPECT_TRUE(std::all_of(metadata, record.end(), [](uint8_t byte) { return byte == 0; }));
      }
    }
  }
}

// No two codes share a bit: with every code at its largest, the planes hold exactly rows * codes * bits ones.
TEST(RefRecord, CodesOccupyDisjointBits) {
  for (const int bits : kWidths) {
    for (const int d : kHeadDims) {
      const int g = 32;
      const RecordLayout layout = make_layout({bits, bits, g, 16}, d);
      std::vector<uint8_t> record(layout.record_bytes, 0);
      for (int t = 0; t < g; ++t) {
        for (int c = 0; c < d; ++c) {
          set_k_code(record.data(), layout, t, c, (1 << bits) - 1);
          set_v_code(record.data(), layout, t, c, (1 << bits) - 1);
        }
      }
      const auto ones = [&](int begin, int end) {
        int count = 0;
        for (int i = begin; i < end; ++i) count += std::popcount(record[i]);
        return count;
      };
      EXPECT_EQ(ones(0, layout.v_low_offset), g * d * bits);
      EXPECT_EQ(ones(layout.v_low_offset, layout.metadata_offset[kKScale]), g * d * bits);
      EXPECT_EQ(ones(layout.metadata_offset[kKScale], layout.record_bytes), 0);
    }
  }
}

// What the kernels rely on: one mask takes four consecutive codes out of a word, one in each byte.
TEST(RefRecord, AMaskTakesAQuadOfConsecutiveCodes) {
  const RecordLayout layout = make_layout({4, 2, 128, 16}, 128);
  std::vector<uint8_t> record(layout.record_bytes, 0);
  const int token = 6;
  for (int c = 0; c < 128; ++c) set_k_code(record.data(), layout, token, c, c % 16);
  for (int word = 0; word < 16; ++word) {
    uint32_t value;
    std::memcpy(&value, record.data() + layout.k_low.word_offset(token, word), 4);
    for (int plane = 0; plane < 2; ++plane) {
      const uint32_t quad = value >> 4 * plane & 0x0f0f0f0f;
      for (int j = 0; j < 4; ++j) EXPECT_EQ(quad >> 8 * j & 255, static_cast<uint32_t>((8 * word + 4 * plane + j) % 16));
    }
  }
}

TEST(RefRecord, MetadataRoundsToF16AndSaturates) {
  const RecordLayout layout = make_layout({4, 2, 32, 16}, 64);
  std::vector<uint8_t> record(layout.record_bytes, 0);
  std::vector<float> values(64, 1.0f);
  values[0] = 1.0f + 0x1p-11f;  // a half: to the even neighbour below
  values[1] = 1.0f + 0x1.8p-10f;
  values[2] = 1e9f;
  values[3] = -1e9f;
  values[4] = -0.0f;
  values[5] = 0x1p-26f;  // below half of the least fp16 number
  set_metadata(record.data(), layout, kKScale, values.data());
  EXPECT_EQ(metadata_value(record.data(), layout, kKScale, 0), 1.0);
  EXPECT_EQ(metadata_value(record.data(), layout, kKScale, 1), 1.0 + 0x1p-9);
  EXPECT_EQ(metadata_value(record.data(), layout, kKScale, 2), 65504.0);
  EXPECT_EQ(metadata_value(record.data(), layout, kKScale, 3), -65504.0);
  EXPECT_FALSE(std::signbit(metadata_value(record.data(), layout, kKScale, 4)));
  EXPECT_EQ(metadata_value(record.data(), layout, kKScale, 5), 0.0);
}

// 8-bit metadata. Inside [low, low + 255 step] a value is off by half a step; at the ends by what rounding the range to fp16 moved:
// 2^-11 of |lo| and of the range (and 2^-25, half the least fp16 number, once for low and 255 times for the step). fp32 adds a few 2^-24.
TEST(RefRecord, EightBitMetadataStaysWithinItsBound) {
  const RecordLayout layout = make_layout({4, 2, 128, 8}, 128);
  Generator generator(3);
  for (const float size : {1e-3f, 0.1f, 1.0f, 300.0f}) {
    for (const float offset : {-1.0f, 0.0f, 0.7f}) {
      std::vector<uint8_t> record(layout.record_bytes, 0);
      std::vector<float> values(128);
      for (float& x : values) x = size * (generator.next_value() + offset);
      set_metadata(record.data(), layout, kVZero, values.data());
      const auto [lo, hi] = std::minmax_element(values.begin(), values.end());
      const double range = static_cast<double>(*hi) - *lo;
      const double magnitude = std::max(std::fabs(*lo), std::fabs(*hi));
      const double bound = range / 255 / 2 * (1 + 0x1p-10) + 0x1p-11 * (std::fabs(*lo) + range) + 0x1p-25 * 256 + 0x1p-20 * magnitude;
      double worst = 0;
      for (int i = 0; i < 128; ++i) worst = std::max(worst, std::fabs(metadata_value(record.data(), layout, kVZero, i) - values[i]));
      EXPECT_LE(worst, bound) << "size " << size << ", offset " << offset;
      EXPECT_GT(worst, range / 255 / 8) << "a test of rounding must see some";
    }
  }
}

TEST(RefRecord, EightBitMetadataOfEqualValues) {
  const RecordLayout layout = make_layout({4, 2, 32, 8}, 64);
  std::vector<uint8_t> record(layout.record_bytes, 0xff);
  const std::vector<float> values(64, 0.5f);
  set_metadata(record.data(), layout, kKScale, values.data());
  for (int i = 0; i < 64; ++i) {
    EXPECT_EQ(record[layout.metadata_offset[kKScale] + i], 0);
    EXPECT_EQ(metadata_value(record.data(), layout, kKScale, i), 0.5);
  }
}

TEST(RefRecord, NanMetadataIsNanInBothForms) {
  for (const int metadata_bits : {16, 8}) {
    const RecordLayout layout = make_layout({4, 2, 32, metadata_bits}, 64);
    std::vector<uint8_t> record(layout.record_bytes, 0xff);
    set_metadata_nan(record.data(), layout, kVScale);
    for (int i = 0; i < 32; ++i) EXPECT_TRUE(std::isnan(metadata_value(record.data(), layout, kVScale, i)));
    const uint8_t* at =
        record.data() + (metadata_bits == 16 ? layout.metadata_offset[kVScale] : layout.metadata_range_offset + 4 * kVScale);
    EXPECT_EQ(at[0] | at[1] << 8, 0x7e00);
    EXPECT_EQ(at[2] | at[3] << 8, 0x7e00);
  }
}

TEST(RefRecord, DecodesByTheFormulas) {
  const Format format{3, 5, 32, 16};
  const int d = 80;
  const RecordLayout layout = make_layout(format, d);
  std::vector<uint8_t> record(layout.record_bytes, 0);
  const auto fill = [&](Metadata which, float first, float step) {
    std::vector<float> values(layout.metadata_count[which]);
    for (size_t i = 0; i < values.size(); ++i) values[i] = first + step * static_cast<float>(i);
    set_metadata(record.data(), layout, which, values.data());
  };
  fill(kKScale, 0.25f, 1.0f);
  fill(kKZero, -8.0f, 0.5f);
  fill(kKTokenScale, 1.0f, 0.25f);
  fill(kVChannelScale, 2.0f, 0.5f);
  fill(kVScale, 0.5f, 0.125f);
  fill(kVZero, 3.0f, -1.0f);
  set_k_code(record.data(), layout, 3, 70, 5);
  set_v_code(record.data(), layout, 31, 79, 30);
  std::vector<double> k(32 * d), v(32 * d);
  decode_tile(record.data(), format, d, k.data(), v.data());
  EXPECT_EQ(k[3 * d + 70], (5 * (0.25 + 70) + (-8 + 35.0)) * 1.75);
  EXPECT_EQ(k[3 * d + 69], (-8 + 34.5) * 1.75);
  EXPECT_EQ(v[31 * d + 79], (30 * (0.5 + 31 * 0.125) + (3 - 31)) * (2 + 39.5));

  // The same numbers in fp32 are exact here; rotated back they are the plain inverse within its rounding.
  std::vector<float> k32(32 * d), v32(32 * d);
  decode_tile(record.data(), format, d, true, k32.data(), v32.data());
  for (int i = 0; i < 32 * d; ++i) {
    EXPECT_EQ(k32[i], k[i]);
    EXPECT_EQ(v32[i], v[i]);
  }
  decode_tile(record.data(), format, d, false, k32.data(), v32.data());
  hadamard_exact(k.data() + 3 * d, d, true);
  double norm = 0;
  for (int c = 0; c < d; ++c) norm += k[3 * d + c] * k[3 * d + c];
  for (int c = 0; c < d; ++c) EXPECT_NEAR(k32[3 * d + c], k[3 * d + c], 100 * 0x1p-24 * std::sqrt(norm));
}

}  // namespace
}  // namespace kvarn::ref
