// Decode: values equal to the fp32 definition, on every instruction set, for any bytes.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "cpu_machine.h"

namespace kvarn {
namespace {

using namespace test;

// A record whose codes and metadata are arbitrary: any finite scales unless `hostile`, which leaves every byte to chance.
std::vector<uint8_t> random_record(const Format& format, int head_dim, uint64_t seed, bool hostile) {
  const RecordLayout layout = make_layout(format, head_dim);
  ref::Generator generator(seed);
  std::vector<uint8_t> record(static_cast<size_t>(layout.record_bytes));
  for (uint8_t& byte : record) byte = static_cast<uint8_t>(generator.next() >> 13);
  if (hostile) return record;
  for (int which = 0; which < kMetadataCount; ++which) {
    std::vector<float> values(static_cast<size_t>(layout.metadata_count[which]));
    for (float& value : values) value = generator.next_value();
    ref::set_metadata(record.data(), layout, static_cast<Metadata>(which), values.data());
  }
  return record;
}

kvarn_decode_params decode_params(const std::vector<uint8_t>& records, int64_t num_blocks, const int32_t* blocks, int64_t num_tiles,
                                  int dtype, bool rotated) {
  kvarn_decode_params p{};
  KVARN_INIT(p);
  p.records = records.data();
  p.num_blocks = num_blocks;
  p.blocks = blocks;
  p.num_tiles = num_tiles;
  p.num_destinations = num_tiles;
  p.dtype = dtype;
  p.rotated = rotated ? 1 : 0;
  return p;
}

// Equal bytes, or not-a-number in both.
::testing::AssertionResult same_values(const std::vector<uint8_t>& got, const std::vector<uint8_t>& expected, int dtype) {
  if (got == expected) return ::testing::AssertionSuccess();
  const std::vector<float> a = from_dtype(got, dtype);
  const std::vector<float> b = from_dtype(expected, dtype);
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(a[i]) && std::isnan(b[i])) continue;
    if (std::memcmp(&a[i], &b[i], 4) != 0)
      return ::testing::AssertionFailure() << "value " << i << ": expected " << b[i] << ", got " << a[i];
  }
  return ::testing::AssertionSuccess();
}

void check(const std::string& isa, const Format& format, int head_dim, int dtype, bool rotated, uint64_t seed, bool hostile) {
  const std::vector<uint8_t> record = random_record(format, head_dim, seed, hostile);
  const size_t count = static_cast<size_t>(format.tile_tokens) * static_cast<size_t>(head_dim);
  std::vector<float> k(count), v(count);
  ref::decode_tile(record.data(), format, head_dim, rotated, k.data(), v.data());
  const auto plan = make_plan(format, head_dim, 1, KVARN_F16, isa);
  const int32_t zero = 0;
  kvarn_decode_params p = decode_params(record, 1, &zero, 1, dtype, rotated);
  std::vector<uint8_t> k_out(count * static_cast<size_t>(ref::dtype_bytes(dtype))), v_out(k_out.size());
  p.k = k_out.data();
  p.v = v_out.data();
  ASSERT_SUCCEEDS(kvarn_decode(plan.get(), &p, nullptr));
  EXPECT_TRUE(same_values(k_out, to_dtype(k, dtype), dtype))
      << "K bits " << format.k_bits << " D " << head_dim << " G " << format.tile_tokens;
  EXPECT_TRUE(same_values(v_out, to_dtype(v, dtype), dtype))
      << "V bits " << format.v_bits << " D " << head_dim << " G " << format.tile_tokens;
}

class CpuDecode : public ::testing::TestWithParam<std::string> {};

TEST_P(CpuDecode, EveryWidthAndShape) {
  uint64_t seed = 1;
  for (const int head_dim : kHeadDims) {
    for (const int tokens : kTileTokens) {
      for (int i = 0; i < 6; ++i) {
        if ((tokens == 256 || head_dim == 512) && i % 2 != 0) continue;
        ++seed;
        check(GetParam(), {kWidths[i], kWidths[5 - i], tokens, 16}, head_dim, kDtypes[seed % 3], seed % 2 == 0, seed, false);
      }
    }
  }
}

TEST_P(CpuDecode, EveryDtypeFrameAndMetadata) {
  uint64_t seed = 1000;
  for (const int width : kWidths) {
    for (const int dtype : kDtypes) {
      for (const bool rotated : {false, true}) {
        for (const int metadata_bits : {16, 8}) check(GetParam(), {width, width, 32, metadata_bits}, 112, dtype, rotated, ++seed, false);
      }
    }
  }
}

// NaN, infinite and subnormal scales, codes in the padding bits: whatever the bytes, all sets agree with the definition.
TEST_P(CpuDecode, ArbitraryBytes) {
  uint64_t seed = 5000;
  for (const int head_dim : {64, 80, 112, 128}) {
    for (const int width : kWidths) {
      for (const int metadata_bits : {16, 8}) check(GetParam(), {width, width, 32, metadata_bits}, head_dim, KVARN_F32, true, ++seed, true);
    }
  }
}

TEST_P(CpuDecode, TilesGoWhereTheStridesSay) {
  const Format format{4, 2, 32, 16};
  const int head_dim = 64, heads = 3;
  const RecordLayout layout = make_layout(format, head_dim);
  const int64_t tile_count = int64_t{format.tile_tokens} * head_dim;
  const int num_blocks = 4;
  std::vector<uint8_t> records;
  for (int i = 0; i < num_blocks * heads; ++i) {
    const std::vector<uint8_t> record = random_record(format, head_dim, static_cast<uint64_t>(i), false);
    records.insert(records.end(), record.begin(), record.end());
  }
  const int32_t blocks[] = {3, 0, 3};
  const int32_t destinations[] = {4, 0, 2};
  const int64_t head_stride = 5 * tile_count + 64, tile_stride = tile_count;  // [heads][tiles]
  for (const bool with_destinations : {false, true}) {
    for (const int threads : {1, 3}) {
      const auto plan = make_plan(format, head_dim, heads, KVARN_F16, GetParam(), threads);
      std::vector<float> k(static_cast<size_t>(heads * head_stride), -7.0f), v = k, k_expected = k, v_expected = k;
      for (int i = 0; i < 3; ++i) {
        for (int h = 0; h < heads; ++h) {
          const int64_t at = (with_destinations ? destinations[i] : i) * tile_stride + h * head_stride;
          ref::decode_tile(records.data() + (blocks[i] * heads + h) * layout.record_bytes, format, head_dim, false, k_expected.data() + at,
                           v_expected.data() + at);
        }
      }
      kvarn_decode_params p = decode_params(records, num_blocks, blocks, 3, KVARN_F32, false);
      p.destinations = with_destinations ? destinations : nullptr;
      p.num_destinations = 5;
      p.tile_stride = tile_stride;
      p.head_stride = head_stride;
      p.k = k.data();
      p.v = v.data();
      ASSERT_SUCCEEDS(kvarn_decode(plan.get(), &p, nullptr));
      EXPECT_TRUE(k == k_expected);
      EXPECT_TRUE(v == v_expected);

      // One of the two alone.
      std::vector<float> alone(k.size(), -7.0f);
      p.k = nullptr;
      p.v = alone.data();
      ASSERT_SUCCEEDS(kvarn_decode(plan.get(), &p, nullptr));
      EXPECT_TRUE(alone == v_expected);

      const int32_t bad_blocks[] = {0, 4, 1};
      p.blocks = bad_blocks;
      EXPECT_FAILS(kvarn_decode(plan.get(), &p, nullptr), KVARN_INVALID_ARGUMENT, "blocks[1]: expected 0 to 3, got 4");
      p.blocks = blocks;
      const int32_t bad_destinations[] = {0, 1, 5};
      p.destinations = bad_destinations;
      EXPECT_FAILS(kvarn_decode(plan.get(), &p, nullptr), KVARN_INVALID_ARGUMENT, "destinations[2]: expected 0 to 4, got 5");
      EXPECT_TRUE(alone == v_expected);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, CpuDecode, ::testing::ValuesIn(machine_isas()), [](const auto& info) { return info.param; });

}  // namespace
}  // namespace kvarn
