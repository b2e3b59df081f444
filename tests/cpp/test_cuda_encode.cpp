// encode, append, hadamard and decode on the GPU: the bytes of the oracle's fp32 definition.
#include "cuda_machine.h"
#include "encode_case.h"

namespace kvarn::test {
namespace {

kvarn_plan* plan_of(const Format& f, int head_dim, int heads, int dtype) {
  kvarn_plan_params p{};
  KVARN_INIT(p);
  p.backend = KVARN_TEST_BACKEND;
  p.config = {{f.k_bits, f.v_bits, f.tile_tokens, f.metadata_bits}, head_dim, heads, dtype};
  kvarn_plan* plan = nullptr;
  EXPECT_EQ(kvarn_plan_create(&p, &plan), KVARN_OK) << kvarn_last_error();
  return plan;
}

// k, v [tiles * heads][tokens][channels] in one staging array of `tiles` slots; returns the records, [tiles][heads].
std::vector<uint8_t> encode(const EncodeCase& c, const std::vector<std::vector<float>>& k, const std::vector<std::vector<float>>& v) {
  const RecordLayout layout = make_layout(c.format, c.head_dim);
  const int tiles = static_cast<int>(k.size()) / c.heads;
  std::vector<float> values;
  for (int slot = 0; slot < tiles; ++slot) {
    for (int operand = 0; operand < 2; ++operand) {
      for (int head = 0; head < c.heads; ++head) {
        const std::vector<float>& tile = (operand == 0 ? k : v)[slot * c.heads + head];
        values.insert(values.end(), tile.begin(), tile.end());
      }
    }
  }
  DeviceBytes staging(to_dtype(values, c.dtype));
  DeviceBytes records(static_cast<size_t>(tiles) * c.heads * layout.record_bytes, 0xaa);
  std::vector<int32_t> slots, blocks;
  for (int i = 0; i < tiles; ++i) {
    slots.push_back(i);
    blocks.push_back(tiles - 1 - i);
  }
  DeviceBytes device_slots(slots), device_blocks(blocks);
  kvarn_encode_params p{};
  KVARN_INIT(p);
  p.staging = staging.data();
  p.num_slots = tiles;
  p.records = records.data();
  p.num_blocks = tiles;
  p.num_layers = 1;
  p.slots = device_slots.as<int32_t>();
  p.blocks = device_blocks.as<int32_t>();
  p.num_tiles = tiles;
  p.normalisation = c.normalisation;
  p.rounding = c.rounding;
  const auto upload = [&](const float* factors) {
    const size_t count = factors == nullptr ? 0 : static_cast<size_t>(c.heads) * c.head_dim * c.head_dim;
    return DeviceBytes(std::vector<float>(factors, factors + count));
  };
  const auto k_factors = upload(c.k_feedback), v_factors = upload(c.v_feedback);
  if (c.k_feedback != nullptr) p.k_feedback = k_factors.as<float>();
  if (c.v_feedback != nullptr) p.v_feedback = v_factors.as<float>();
  kvarn_plan* plan = plan_of(c.format, c.head_dim, c.heads, c.dtype);
  EXPECT_EQ(kvarn_encode(plan, &p, nullptr), KVARN_OK) << kvarn_last_error();
  const std::vector<uint8_t> reversed = records.bytes();
  EXPECT_TRUE(records.intact());
  kvarn_plan_destroy(plan);
  std::vector<uint8_t> in_order;
  const size_t block_bytes = static_cast<size_t>(c.heads) * layout.record_bytes;
  for (int i = 0; i < tiles; ++i) {
    const auto at = reversed.begin() + static_cast<ptrdiff_t>((tiles - 1 - i) * block_bytes);
    in_order.insert(in_order.end(), at, at + static_cast<ptrdiff_t>(block_bytes));
  }
  return in_order;
}

void check(const EncodeCase& c, const std::vector<std::vector<float>>& k, const std::vector<std::vector<float>>& v) {
  const RecordLayout layout = make_layout(c.format, c.head_dim);
  const std::vector<uint8_t> got = encode(c, k, v);
  for (size_t i = 0; i < k.size(); ++i) {
    const auto at = got.begin() + static_cast<ptrdiff_t>(i) * layout.record_bytes;
    EXPECT_EQ(first_difference(c, {at, at + layout.record_bytes}, expected_record(c, k[i], v[i], static_cast<int>(i) % c.heads)), "")
        << "tile " << i;
  }
}
void check(const EncodeCase& c, uint64_t seed, float scale = 1.0f, int tiles = 1) {
  std::vector<std::vector<float>> k, v;
  for (int i = 0; i < tiles * c.heads; ++i) {
    k.push_back(tile_values(c.format.tile_tokens, c.head_dim, seed + 2 * i, scale));
    v.push_back(tile_values(c.format.tile_tokens, c.head_dim, seed + 2 * i + 1, scale));
  }
  check(c, k, v);
}

TEST(CudaEncode, EveryWidthAndShape) {
  KVARN_NEEDS_GPU();
  for_every_width_and_shape([](const EncodeCase& c, uint64_t seed) { check(c, seed); });
}

TEST(CudaEncode, TilesInRegisters) {
  KVARN_NEEDS_GPU();
  uint64_t seed = 900;
  for (const int head_dim : {64, 128, 256}) {
    for (const int width : {2, 3, 4, 8}) {
      for (const int dtype : kDtypes) {
        check({{width, 2, 128, 16}, head_dim, 3, dtype}, seed, 1.0f, 4);
        seed += 100;
      }
    }
  }
}

TEST(CudaEncode, EveryOption) {
  KVARN_NEEDS_GPU();
  for_every_option({{32, 80}, {128, 128}}, [](const EncodeCase& c, uint64_t seed) { check(c, seed); });
}

TEST(CudaEncode, FeedbackInEveryShapeAndOption) {
  KVARN_NEEDS_GPU();
  for_every_feedback(2, [](const EncodeCase& c, uint64_t seed) { check(c, seed, 1.0f, 2); });
}

TEST(CudaEncode, FeedbackInNoOrderOfTheChannelsBecomesNan) {
  KVARN_NEEDS_GPU();
  for_every_bad_order([](const EncodeCase& c, uint64_t seed) { check(c, seed); });
}

TEST(CudaEncode, SizesFromTinyToHuge) {
  KVARN_NEEDS_GPU();
  for_every_size({4, 2, 128, 8}, 128, [](const EncodeCase& c, uint64_t seed, float scale) { check(c, seed, scale); });
}

TEST(CudaEncode, DegenerateTiles) {
  KVARN_NEEDS_GPU();
  for (const auto& [tokens, channels] : {std::pair{32, 64}, std::pair{128, 128}}) {
    const std::vector<std::vector<float>> tiles = degenerate_tiles(tokens, channels);
    const std::vector<float> factors = feedback_factors(2, channels, 4);
    for (const int rounding : {KVARN_MINMAX, KVARN_UNBIASED}) {
      for (const int normalisation : {KVARN_SCALE_INVARIANT, KVARN_PUBLISHED}) {
        for (const int metadata_bits : {16, 8}) {
          check({{4, 2, tokens, metadata_bits}, channels, 1, KVARN_F32, normalisation, rounding}, tiles, tiles);
          const float* const k_factor = factors.data();
          const float* const v_factor = k_factor + channels * channels;
          check({{3, 4, tokens, metadata_bits}, channels, 1, KVARN_F32, normalisation, rounding, k_factor, v_factor}, tiles, tiles);
        }
      }
    }
  }
}

TEST(CudaHadamard, BytesOfTheOracle) {
  KVARN_NEEDS_GPU();
  for (const int head_dim : kHeadDims) {
    for (const int dtype : kDtypes) {
      for (const int inverse : {0, 1}) {
        constexpr int kRows = 37;
        const std::vector<float> x = from_dtype(to_dtype(tile_values(kRows, head_dim, head_dim + inverse), dtype), dtype);
        std::vector<float> expected = x;
        for (int r = 0; r < kRows; ++r) ref::hadamard(expected.data() + static_cast<size_t>(r) * head_dim, head_dim, inverse != 0);
        DeviceBytes in(to_dtype(x, dtype)), out(in.size());
        kvarn_plan* plan = plan_of({4, 2, 128, 16}, head_dim, 1, KVARN_F16);
        kvarn_hadamard_params p{};
        KVARN_INIT(p);
        p.x = in.data();
        p.out = out.data();
        p.rows = kRows;
        p.dtype = dtype;
        p.inverse = inverse;
        EXPECT_EQ(kvarn_hadamard(plan, &p, nullptr), KVARN_OK) << kvarn_last_error();
        EXPECT_EQ(out.bytes(), to_dtype(expected, dtype)) << head_dim << " " << dtype << " " << inverse;
        p.out = in.data();
        EXPECT_EQ(kvarn_hadamard(plan, &p, nullptr), KVARN_OK) << kvarn_last_error();
        EXPECT_EQ(in.bytes(), to_dtype(expected, dtype)) << "in place";
        kvarn_plan_destroy(plan);
      }
    }
  }
}

TEST(CudaAppend, BytesOfTheOracle) {
  KVARN_NEEDS_GPU();
  for (const int head_dim : kHeadDims) {
    for (const int dtype : kDtypes) {
      for (const int rotated : {0, 1}) {
        constexpr int kHeads = 3, kTokens = 9, kTile = 32, kSlots = 4;
        const int head_stride = head_dim + 8, token_stride = kHeads * head_stride + 16;
        const std::vector<int64_t> mapping{0, 33, -1, 127, 64, 5, kSlots * kTile, -7, 31};
        const std::vector<float> k = from_dtype(to_dtype(tile_values(kTokens, token_stride, 1), dtype), dtype);
        const std::vector<float> v = from_dtype(to_dtype(tile_values(kTokens, token_stride, 2), dtype), dtype);
        std::vector<float> expected(static_cast<size_t>(kSlots) * 2 * kHeads * kTile * head_dim, 0.0f);
        for (int t = 0; t < kTokens; ++t) {
          if (mapping[t] < 0 || mapping[t] >= kSlots * kTile) continue;
          for (int operand = 0; operand < 2; ++operand) {
            for (int h = 0; h < kHeads; ++h) {
              const float* from = (operand == 0 ? k : v).data() + t * token_stride + h * head_stride;
              std::vector<float> row(from, from + head_dim);
              if (rotated == 0) ref::hadamard(row.data(), head_dim, false);
              const int64_t at = (((mapping[t] / kTile * 2 + operand) * kHeads + h) * kTile + mapping[t] % kTile) * head_dim;
              std::copy(row.begin(), row.end(), expected.begin() + at);
            }
          }
        }
        DeviceBytes device_k(to_dtype(k, dtype)), device_v(to_dtype(v, dtype)), device_mapping(mapping);
        DeviceBytes staging(to_dtype(expected, dtype).size(), 0);
        kvarn_append_params p{};
        KVARN_INIT(p);
        p.k = device_k.data();
        p.v = device_v.data();
        p.k_token_stride = p.v_token_stride = token_stride;
        p.k_head_stride = p.v_head_stride = head_stride;
        p.slot_mapping = device_mapping.as<int64_t>();
        p.num_tokens = kTokens;
        p.staging = staging.data();
        p.num_slots = kSlots;
        p.rotated = rotated;
        kvarn_plan* plan = plan_of({4, 2, kTile, 16}, head_dim, kHeads, dtype);
        EXPECT_EQ(kvarn_append(plan, &p, nullptr), KVARN_OK) << kvarn_last_error();
        EXPECT_EQ(staging.bytes(), to_dtype(expected, dtype)) << head_dim << " " << dtype << " " << rotated;
        EXPECT_TRUE(staging.intact());
        kvarn_plan_destroy(plan);
      }
    }
  }
}

TEST(CudaDecode, BytesOfTheOracle) {
  KVARN_NEEDS_GPU();
  int i = 0;
  for (const int head_dim : kHeadDims) {
    for (const int tokens : kTileTokens) {
      for (const int rotated : {0, 1}) {
        const Format format{kWidths[i % 6], kWidths[(i / 6 + i) % 6], tokens, i % 2 == 0 ? 16 : 8};
        const int dtype = kDtypes[i % 3];
        ++i;
        const RecordLayout layout = make_layout(format, head_dim);
        const size_t values = static_cast<size_t>(tokens) * head_dim;
        std::vector<uint8_t> record(static_cast<size_t>(layout.record_bytes));
        const std::vector<float> k = tile_values(tokens, head_dim, i), v = tile_values(tokens, head_dim, i + 1);
        ref::encode_tile(k.data(), v.data(), format, head_dim, {}, record.data());
        std::vector<float> expected_k(values), expected_v(values);
        ref::decode_tile(record.data(), format, head_dim, rotated != 0, expected_k.data(), expected_v.data());
        DeviceBytes records(record), out_k(values * (dtype == KVARN_F32 ? 4 : 2)), out_v(out_k.size());
        const std::vector<int32_t> zero{0};
        DeviceBytes blocks(zero);
        kvarn_decode_params p{};
        KVARN_INIT(p);
        p.records = records.data();
        p.num_blocks = 1;
        p.blocks = blocks.as<int32_t>();
        p.num_tiles = p.num_destinations = 1;
        p.k = out_k.data();
        p.v = out_v.data();
        p.dtype = dtype;
        p.rotated = rotated;
        kvarn_plan* plan = plan_of(format, head_dim, 1, KVARN_F16);
        EXPECT_EQ(kvarn_decode(plan, &p, nullptr), KVARN_OK) << kvarn_last_error();
        EXPECT_EQ(out_k.bytes(), to_dtype(expected_k, dtype)) << "K " << head_dim << " " << tokens << " " << rotated;
        EXPECT_EQ(out_v.bytes(), to_dtype(expected_v, dtype)) << "V " << head_dim << " " << tokens << " " << rotated;
        kvarn_plan_destroy(plan);
      }
    }
  }
}

}  // namespace
}  // namespace kvarn::test
