// Encode: records equal to the oracle's fp32 definition, byte for byte, on every instruction set.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "encode_case.h"

namespace kvarn {
namespace {

using namespace test;

// One slot, one block, one head.
std::vector<uint8_t> encoded_record(kvarn_plan* plan, const EncodeCase& c, const std::vector<float>& k, const std::vector<float>& v) {
  std::vector<float> both = k;
  both.insert(both.end(), v.begin(), v.end());
  const std::vector<uint8_t> staging = to_dtype(both, c.dtype);
  const RecordLayout layout = make_layout(c.format, c.head_dim);
  std::vector<uint8_t> record(static_cast<size_t>(layout.record_bytes), 0xaa);
  const int32_t zero = 0;
  kvarn_encode_params p{};
  KVARN_INIT(p);
  p.staging = staging.data();
  p.num_slots = 1;
  p.records = record.data();
  p.num_blocks = 1;
  p.num_layers = 1;
  p.slots = p.blocks = &zero;
  p.num_tiles = 1;
  p.normalisation = c.normalisation;
  p.rounding = c.rounding;
  p.k_feedback = c.k_feedback;
  p.v_feedback = c.v_feedback;
  EXPECT_SUCCEEDS(kvarn_encode(plan, &p, nullptr));
  return record;
}

void check(const std::string& isa, const EncodeCase& c, const std::vector<float>& k, const std::vector<float>& v) {
  const auto plan = make_plan(c.format, c.head_dim, 1, c.dtype, isa);
  EXPECT_EQ(first_difference(c, encoded_record(plan.get(), c, k, v), expected_record(c, k, v)), "");
}
void check(const std::string& isa, const EncodeCase& c, uint64_t seed = 1, float scale = 1.0f) {
  check(isa, c, tile_values(c.format.tile_tokens, c.head_dim, seed, scale), tile_values(c.format.tile_tokens, c.head_dim, seed + 1, scale));
}

class CpuEncode : public ::testing::TestWithParam<std::string> {};

TEST_P(CpuEncode, EveryWidthAndShape) {
  for_every_width_and_shape([](const EncodeCase& c, uint64_t seed) { check(GetParam(), c, seed); });
}

TEST_P(CpuEncode, EveryOption) {
  for_every_option({{32, 80}}, [](const EncodeCase& c, uint64_t seed) { check(GetParam(), c, seed); });
}

TEST_P(CpuEncode, FeedbackInEveryShapeAndOption) {
  for_every_feedback(1, [](const EncodeCase& c, uint64_t seed) { check(GetParam(), c, seed); });
}

TEST_P(CpuEncode, FeedbackInNoOrderOfTheChannelsBecomesNan) {
  for_every_bad_order([](const EncodeCase& c, uint64_t seed) { check(GetParam(), c, seed); });
}

// A factor without entries above the diagonal feeds nothing back, and minmax grids stay as they are.
TEST_P(CpuEncode, FeedbackOfADiagonalChangesNothing) {
  for (const int head_dim : {64, 80, 112}) {
    std::vector<float> factor = feedback_factors(1, head_dim, 43);
    for (int i = 0; i < head_dim * head_dim; ++i) factor[i] = i % (head_dim + 1) == 0 ? factor[i] : 0.0f;
    const EncodeCase plain{{4, 2, 64, 16}, head_dim, 1, KVARN_F32, KVARN_SCALE_INVARIANT, KVARN_MINMAX};
    EncodeCase fed = plain;
    fed.k_feedback = fed.v_feedback = factor.data();
    const std::vector<float> k = tile_values(64, head_dim, 41), v = tile_values(64, head_dim, 42);
    const auto plan = make_plan(plain.format, head_dim, 1, plain.dtype, GetParam());
    EXPECT_EQ(first_difference(fed, encoded_record(plan.get(), fed, k, v), expected_record(plain, k, v)), "");
  }
}

TEST_P(CpuEncode, SizesFromTinyToHuge) {
  for_every_size({4, 2, 32, 8}, 96, [](const EncodeCase& c, uint64_t seed, float scale) { check(GetParam(), c, seed, scale); });
}

TEST_P(CpuEncode, DegenerateTiles) {
  const int tokens = 32, channels = 64;
  const std::vector<float> random = tile_values(tokens, channels, 9);
  const std::vector<float> factors = feedback_factors(2, channels, 4);
  for (const auto& tile : degenerate_tiles(tokens, channels)) {
    for (const int normalisation : {KVARN_SCALE_INVARIANT, KVARN_PUBLISHED}) {
      for (const int rounding : {KVARN_MINMAX, KVARN_UNBIASED}) {
        for (const int metadata_bits : {16, 8}) {
          check(GetParam(), {{2, 4, tokens, metadata_bits}, channels, 1, KVARN_F32, normalisation, rounding}, tile, random);
          check(GetParam(), {{3, 2, tokens, metadata_bits}, channels, 1, KVARN_F32, normalisation, rounding}, random, tile);
          const float* const k_factor = factors.data();
          const float* const v_factor = k_factor + channels * channels;
          check(GetParam(), {{3, 4, tokens, metadata_bits}, channels, 1, KVARN_F32, normalisation, rounding, k_factor, v_factor}, tile,
                tile);
        }
      }
    }
  }
}

TEST_P(CpuEncode, WhatNoScaleCanHoldBecomesNan) {
  const int tokens = 32, channels = 80;
  const std::vector<float> good = tile_values(tokens, channels, 21), factor = feedback_factors(1, channels, 22);
  const float bad_values[] = {std::numeric_limits<float>::quiet_NaN(),
                              std::numeric_limits<float>::infinity(),
                              -std::numeric_limits<float>::infinity(),
                              std::nextafter(0x1p30f, 0x1p31f),
                              -0x1p31f,
                              3e38f};
  for (const float bad : bad_values) {
    for (const size_t at : {size_t{0}, size_t{1234}, good.size() - 1}) {
      for (const int metadata_bits : {16, 8}) {
        std::vector<float> tile = good;
        tile[at] = bad;
        const EncodeCase c{{5, 6, tokens, metadata_bits}, channels};
        check(GetParam(), c, tile, good);
        check(GetParam(), c, good, tile);
        check(GetParam(), c, tile, tile);
        EncodeCase fed = c;
        fed.k_feedback = fed.v_feedback = factor.data();
        check(GetParam(), fed, tile, good);
        check(GetParam(), fed, good, tile);
      }
    }
  }
  // The largest value that is still encoded.
  std::vector<float> tile = good;
  tile[100] = -0x1p30f;
  check(GetParam(), {{4, 2, tokens, 16}, channels}, tile, good);
}

// Tiles, heads and layers all end up where they belong, whatever the number of threads.
TEST_P(CpuEncode, ManyTilesHeadsAndLayers) {
  EncodeCase c{{4, 2, 32, 16}, 64, 3, KVARN_BF16};
  const RecordLayout layout = make_layout(c.format, c.head_dim);
  const int64_t tile_values_count = int64_t{c.format.tile_tokens} * c.head_dim;
  const int layers = 2, num_slots = 4, num_blocks = 6;
  const int32_t slots[] = {2, 0, 2};
  const int32_t blocks[] = {5, 1, 0};
  const int64_t slot_count = slot_values(c.heads, c.format.tile_tokens, c.head_dim);
  const std::vector<float> values = random_values(static_cast<size_t>(layers * num_slots * slot_count), 31);
  const std::vector<uint8_t> staging = to_dtype(values, c.dtype);
  const int64_t layer_factors = int64_t{c.heads} * c.head_dim * c.head_dim;
  const std::vector<float> k_factors = feedback_factors(layers * c.heads, c.head_dim, 5);
  const std::vector<float> v_factors = feedback_factors(layers * c.heads, c.head_dim, 6);
  const int64_t layer_records = int64_t{num_blocks} * c.heads * layout.record_bytes + 48;  // a gap between layers
  for (const int threads : {1, 2, 5}) {
    const auto plan = make_plan(c.format, c.head_dim, c.heads, c.dtype, GetParam(), threads);
    std::vector<uint8_t> records(static_cast<size_t>(layers * layer_records), 0x77);
    std::vector<uint8_t> expected = records;
    for (int layer = 0; layer < layers; ++layer) {
      c.k_feedback = k_factors.data() + layer * layer_factors;
      c.v_feedback = v_factors.data() + layer * layer_factors;
      for (int i = 0; i < 3; ++i) {
        for (int h = 0; h < c.heads; ++h) {
          const float* slot = values.data() + (layer * num_slots + slots[i]) * slot_count;
          const std::vector<float> k(slot + h * tile_values_count, slot + (h + 1) * tile_values_count);
          const std::vector<float> v(slot + (c.heads + h) * tile_values_count, slot + (c.heads + h + 1) * tile_values_count);
          const std::vector<uint8_t> record = expected_record(c, k, v, h);
          std::memcpy(expected.data() + layer * layer_records + (blocks[i] * c.heads + h) * layout.record_bytes, record.data(),
                      record.size());
        }
      }
    }
    kvarn_encode_params p{};
    KVARN_INIT(p);
    p.staging = staging.data();
    p.num_slots = num_slots;
    p.records = records.data();
    p.num_blocks = num_blocks;
    p.num_layers = layers;
    p.staging_layer_stride_bytes = num_slots * slot_count * 2;
    p.records_layer_stride_bytes = layer_records;
    p.slots = slots;
    p.blocks = blocks;
    p.num_tiles = 3;
    p.k_feedback = k_factors.data();
    p.v_feedback = v_factors.data();
    ASSERT_SUCCEEDS(kvarn_encode(plan.get(), &p, nullptr));
    EXPECT_TRUE(records == expected) << threads;

    // Nothing is written when an index is out of range or a block named twice.
    const std::vector<uint8_t> before = records;
    const int32_t bad_slots[] = {0, 4, 1};
    p.slots = bad_slots;
    EXPECT_FAILS(kvarn_encode(plan.get(), &p, nullptr), KVARN_INVALID_ARGUMENT, "slots[1]: expected 0 to 3, got 4");
    p.slots = slots;
    const int32_t bad_blocks[] = {0, 1, -1};
    p.blocks = bad_blocks;
    EXPECT_FAILS(kvarn_encode(plan.get(), &p, nullptr), KVARN_INVALID_ARGUMENT, "blocks[2]: expected 0 to 5, got -1");
    const int32_t repeated[] = {3, 1, 3};
    p.blocks = repeated;
    EXPECT_FAILS(kvarn_encode(plan.get(), &p, nullptr), KVARN_INVALID_ARGUMENT, "blocks[2]");
    EXPECT_TRUE(records == before);
  }
}

#if defined(__x86_64__)
// A caller in flush-to-zero mode gets the same bytes and keeps its mode.
TEST_P(CpuEncode, DoesNotDependOnTheCallersFloatMode) {
  const EncodeCase c{{2, 2, 32, 16}, 64, 1, KVARN_F32, KVARN_PUBLISHED};
  const std::vector<float> k = tile_values(32, 64, 3, 0x1p-128f);  // subnormal products
  const std::vector<uint8_t> expected = expected_record(c, k, k);
  const auto plan = make_plan(c.format, c.head_dim, 1, c.dtype, GetParam());
  const unsigned before = _mm_getcsr();
  const unsigned odd = before | 0x8040 | 0x6000;  // flush to zero, denormals are zero, round toward zero
  _mm_setcsr(odd);
  const std::vector<uint8_t> record = encoded_record(plan.get(), c, k, k);
  const unsigned after = _mm_getcsr();
  _mm_setcsr(before);
  EXPECT_EQ(after & 0xffc0u, odd & 0xffc0u);
  EXPECT_EQ(first_difference(c, record, expected), "");
}
#endif

INSTANTIATE_TEST_SUITE_P(Isa, CpuEncode, ::testing::ValuesIn(machine_isas()), [](const auto& info) { return info.param; });

}  // namespace
}  // namespace kvarn
