// Append: rows of K and V, rotated to the definition's bytes, in their slots.
#include <gtest/gtest.h>

#include <cstring>

#include "cpu_machine.h"

namespace kvarn {
namespace {

using namespace test;

std::vector<uint8_t> rotated(const std::vector<uint8_t>& bytes, int dtype, int head_dim) {
  std::vector<float> values = from_dtype(bytes, dtype);
  ref::hadamard(values.data(), head_dim, false);
  return to_dtype(values, dtype);
}

class CpuAppend : public ::testing::TestWithParam<std::string> {};

struct AppendCase {
  int head_dim, heads, tokens_per_tile, dtype;
  bool rotated;
};

TEST_P(CpuAppend, WritesRotatedRowsWhereTheMappingSays) {
  for (const AppendCase c : {AppendCase{128, 2, 128, KVARN_F16, false},
                             {80, 3, 32, KVARN_BF16, false},
                             {256, 1, 64, KVARN_F32, false},
                             {112, 5, 256, KVARN_F16, false},
                             {96, 2, 32, KVARN_F16, true},
                             {64, 8, 128, KVARN_BF16, true}}) {
    const auto plan = make_plan({4, 2, c.tokens_per_tile, 16}, c.head_dim, c.heads, c.dtype, GetParam(), 2);
    const int64_t bytes = ref::dtype_bytes(c.dtype);
    const int64_t num_slots = 5;
    for (const int64_t tokens : {int64_t{1}, int64_t{2 * c.tokens_per_tile + 3}}) {
      // K and V lie in one tensor [tokens][heads][3][head_dim], as a fused projection gives them: rows apart from each other.
      const int64_t head_stride = 3 * c.head_dim;
      const int64_t token_stride = c.heads * head_stride;
      const std::vector<uint8_t> kv = to_dtype(random_values(static_cast<size_t>(tokens * token_stride), 17), c.dtype);
      const uint8_t* const k = kv.data() + c.head_dim * bytes;
      const uint8_t* const v = kv.data() + 2 * c.head_dim * bytes;
      std::vector<int64_t> mapping;
      for (int64_t t = 0; t < tokens; ++t)
        mapping.push_back(t % 7 == 3 ? -1 - t : (t + 2 * c.tokens_per_tile - 1) % (num_slots * c.tokens_per_tile));
      const int64_t tile_bytes = int64_t{c.tokens_per_tile} * c.head_dim * bytes;
      std::vector<uint8_t> staging(static_cast<size_t>(num_slots * 2 * c.heads * tile_bytes), 0x5a);
      std::vector<uint8_t> expected = staging;
      for (int64_t t = 0; t < tokens; ++t) {
        if (mapping[static_cast<size_t>(t)] < 0) continue;
        const int64_t slot = mapping[static_cast<size_t>(t)] / c.tokens_per_tile;
        const int64_t position = mapping[static_cast<size_t>(t)] % c.tokens_per_tile;
        for (int operand = 0; operand < 2; ++operand) {
          for (int64_t h = 0; h < c.heads; ++h) {
            const uint8_t* from = (operand == 0 ? k : v) + (t * token_stride + h * head_stride) * bytes;
            std::vector<uint8_t> row(from, from + c.head_dim * bytes);
            if (!c.rotated) row = rotated(row, c.dtype, c.head_dim);
            std::memcpy(expected.data() + ((slot * 2 + operand) * c.heads + h) * tile_bytes + position * c.head_dim * bytes, row.data(),
                        row.size());
          }
        }
      }
      kvarn_append_params p{};
      KVARN_INIT(p);
      p.k = k;
      p.v = v;
      p.k_token_stride = p.v_token_stride = token_stride;
      p.k_head_stride = p.v_head_stride = head_stride;
      p.slot_mapping = mapping.data();
      p.num_tokens = tokens;
      p.staging = staging.data();
      p.num_slots = num_slots;
      p.rotated = c.rotated ? 1 : 0;
      ASSERT_SUCCEEDS(kvarn_append(plan.get(), &p, nullptr));
      ASSERT_EQ(staging, expected) << "head_dim " << c.head_dim << " tokens " << tokens;
    }
  }
}

TEST_P(CpuAppend, ABadMappingWritesNothing) {
  const auto plan = make_plan({4, 2, 128, 16}, 64, 1, KVARN_F32, GetParam(), 2);
  const std::vector<float> kv = random_values(3 * 64, 1);
  std::vector<float> staging(3 * 2 * 128 * 64, 4.5f);
  const std::vector<float> before = staging;
  const int64_t mapping[3] = {0, 1, 3 * 128};
  kvarn_append_params p{};
  KVARN_INIT(p);
  p.k = p.v = kv.data();
  p.k_token_stride = p.v_token_stride = p.k_head_stride = p.v_head_stride = 64;
  p.slot_mapping = mapping;
  p.num_tokens = 3;
  p.staging = staging.data();
  p.num_slots = 3;
  EXPECT_FAILS(kvarn_append(plan.get(), &p, nullptr), KVARN_INVALID_ARGUMENT, "slot_mapping[2]");
  EXPECT_FAILS(kvarn_append(plan.get(), &p, nullptr), KVARN_INVALID_ARGUMENT, "got 384");
  EXPECT_EQ(staging, before);
}

INSTANTIATE_TEST_SUITE_P(Isa, CpuAppend, ::testing::ValuesIn(machine_isas()), [](const auto& info) { return info.param; });

}  // namespace
}  // namespace kvarn
