// The oracle's conversions, hashes and generator against their definitions.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "ref/ref.h"

namespace kvarn::ref {
namespace {

TEST(RefNumbers, EveryF16SurvivesARoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = f16_to_f32(static_cast<uint16_t>(bits));
    if (std::isnan(value)) {
      EXPECT_GT(bits & 0x7fff, 0x7c00u);
      EXPECT_EQ(f32_to_f16(value) & 0x7fff, 0x7e00);
    } else {
      EXPECT_EQ(f32_to_f16(value), bits);
    }
  }
}

TEST(RefNumbers, F16RoundsToNearestEven) {
  EXPECT_EQ(f16_to_f32(0x3c00), 1.0f);
  EXPECT_EQ(f16_to_f32(0x7bff), 65504.0f);
  EXPECT_EQ(f16_to_f32(0x0001), 0x1p-24f);
  for (uint16_t low = 0; low < 0x7bff; ++low) {
    const auto high = static_cast<uint16_t>(low + 1);
    const float middle = (f16_to_f32(low) + f16_to_f32(high)) / 2;  // exact: one more bit than fp16 has
    EXPECT_EQ(f32_to_f16(std::nextafterf(middle, 0)), low);
    EXPECT_EQ(f32_to_f16(middle), low % 2 == 0 ? low : high);
    EXPECT_EQ(f32_to_f16(std::nextafterf(middle, INFINITY)), high);
    EXPECT_EQ(f32_to_f16(-middle), 0x8000 | (low % 2 == 0 ? low : high));
  }
  // 65520 is the middle between the largest number and the next one there would be.
  EXPECT_EQ(f32_to_f16(std::nextafterf(65520.0f, 0)), 0x7bff);
  EXPECT_EQ(f32_to_f16(65520.0f), 0x7c00);
  EXPECT_EQ(f32_to_f16(-INFINITY), 0xfc00);
}

TEST(RefNumbers, Bf16RoundsToNearestEven) {
  for (uint32_t bits = 0; bits < 0x7f80; ++bits) {
    const auto low = static_cast<uint16_t>(bits);
    const auto high = static_cast<uint16_t>(bits + 1);
    const float middle = std::bit_cast<float>(bits << 16 | 0x8000u);
    EXPECT_EQ(f32_to_bf16(bf16_to_f32(low)), low);
    EXPECT_EQ(f32_to_bf16(std::bit_cast<float>(bits << 16 | 0x7fffu)), low);
    EXPECT_EQ(f32_to_bf16(middle), low % 2 == 0 ? low : high);
    EXPECT_EQ(f32_to_bf16(std::bit_cast<float>(bits << 16 | 0x8001u)), high);
  }
  EXPECT_TRUE(std::isnan(bf16_to_f32(f32_to_bf16(NAN))));
  EXPECT_EQ(f32_to_bf16(INFINITY), 0x7f80);
}

TEST(RefNumbers, StoresAndLoadsEveryDtype) {
  const std::vector<float> values = {0.0f, -1.5f, 0.25f, 1024.0f, -0x1p-14f};  // exact in all three
  for (const int dtype : {KVARN_F32, KVARN_F16, KVARN_BF16}) {
    std::vector<uint8_t> bytes(values.size() * dtype_bytes(dtype));
    std::vector<float> back(values.size());
    store_values(values.data(), dtype, static_cast<int64_t>(values.size()), bytes.data());
    load_values(bytes.data(), dtype, static_cast<int64_t>(values.size()), back.data());
    EXPECT_EQ(back, values);
  }
}

TEST(RefNumbers, HashesOfKnownMessages) {
  EXPECT_EQ(crc32("123456789", 9), 0xcbf43926u);
  EXPECT_EQ(sha256("", 0), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256("abc", 3), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 56),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
}

TEST(RefNumbers, GeneratorIsSplitmix64) {
  Generator zero(0);
  EXPECT_EQ(zero.next(), 0xe220a8397b1dcdafu);
  EXPECT_EQ(zero.next(), 0x6e789e6aa1b965f4u);
  Generator values(0);
  // Bytes 0xaf, 0xcd, 0x1d, 0x7b of the first draw: 175 + 205 + 29 + 123 - 510 = 22.
  EXPECT_EQ(values.next_value(), 22.0f / 256);
}

}  // namespace
}  // namespace kvarn::ref
