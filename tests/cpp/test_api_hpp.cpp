// kvarn.hpp: ownership, results, and that it says what the C ABI says.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "kvarn/kvarn.hpp"

namespace {

TEST(Hpp, FormatsParseAndPrint) {
  const kvarn::Result<kvarn::Format> format = kvarn::parse_format("k3v5_g64_m8");
  ASSERT_TRUE(format) << format.error().message;
  EXPECT_EQ(*format, (kvarn::Format{3, 5, 64, 8}));
  EXPECT_EQ(kvarn::name_of(*format).value(), "k3v5_g64_m8");
  const kvarn::Result<kvarn::Format> none = kvarn::parse_format("k3v5");
  EXPECT_EQ(none.status(), KVARN_INVALID_ARGUMENT);
  EXPECT_NE(none.error().message.find("[kvarn.format_parse] name: expected"), std::string::npos);
  EXPECT_THROW(kvarn::parse_format("k3v5").value(), std::runtime_error);
}

TEST(Hpp, APlanRotatesSpans) {
  kvarn::Result<kvarn::Plan> plan = kvarn::Plan::create({.format = {4, 2, 128, 16}, .head_dim = 80, .num_kv_heads = 1, .num_threads = 1});
  ASSERT_TRUE(plan) << plan.error().message;
  EXPECT_EQ(plan->layout().record_bytes, kvarn::make_layout({4, 2, 128, 16}, 80).record_bytes);
  std::vector<float> x(3 * 80);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 13) - 6;
  std::vector<float> y(x.size()), z(x.size());
  ASSERT_TRUE(plan->hadamard<float>(x, y));
  ASSERT_TRUE(plan->hadamard<float>(y, z, true));
  // Integers up to 6 in 80 terms: a sum of at most 480 with some 10 roundings each way stays within 480 * 20 * 2^-24.
  for (size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(z[i], x[i], 6e-4);
  EXPECT_NE(x, y);
  const kvarn::Status ragged = plan->hadamard<float>(std::span<const float>(x).first(81), std::span<float>(y).first(81));
  EXPECT_EQ(ragged.status(), KVARN_INVALID_ARGUMENT);
  EXPECT_EQ(ragged.error().message, "[kvarn.hadamard] x, out: expected the same multiple of 80 values, got 81 and 81");
  // A params struct needs no struct_size.
  EXPECT_EQ(plan->attend({}).error().message, "[kvarn.attend] plan: expected one made with num_q_heads > 0, got 0");
  kvarn::Plan moved = *std::move(plan);
  EXPECT_EQ(std::string(moved.describe()).substr(0, 4), "cpu/");
  EXPECT_EQ(kvarn::Plan::create({.format = {4, 2, 128, 16}, .head_dim = 81, .num_kv_heads = 1}).status(), KVARN_INVALID_ARGUMENT);
}

TEST(Hpp, SequencesOwnTheirTiles) {
  kvarn::Result<kvarn::Pool> pool = kvarn::Pool::create({.num_blocks = 4, .num_slots = 4, .tile_tokens = 32, .sink_tokens = 0});
  ASSERT_TRUE(pool);
  {
    kvarn::Sequence a = *pool->sequence();
    const kvarn::Result<kvarn::Work> appended = a.append(40);
    ASSERT_TRUE(appended);
    EXPECT_EQ(appended->slot_mapping.size(), 40u);
    const kvarn::Result<kvarn::Work> committed = a.commit(40);
    ASSERT_TRUE(committed);
    ASSERT_EQ(committed->encodes.size(), 1u);
    EXPECT_EQ(a.table()[0], committed->encodes[0].destination);
    kvarn::Sequence b = *a.fork();
    EXPECT_EQ(b.table(), a.table());
    EXPECT_EQ(b.append(1)->copies.size(), 1u);
    EXPECT_TRUE(b.rollback(1));
    EXPECT_FALSE(b.rollback(1));
    kvarn::Sequence c = *a.share_prefix(32);
    EXPECT_EQ(c.info().num_committed, 32);
    EXPECT_EQ(pool->info().num_sequences, 3);
    std::vector<int32_t> none;
    EXPECT_EQ(c.table(none).status(), KVARN_INVALID_ARGUMENT);
    EXPECT_EQ(a.append(1000).status(), KVARN_OUT_OF_BLOCKS);
    a = std::move(c);
    EXPECT_EQ(a.info().num_tokens, 32);
  }
  EXPECT_EQ(pool->info().num_sequences, 0);
  EXPECT_EQ(pool->info().free_slots, 4);
  EXPECT_EQ(pool->info().free_blocks, 4);
}

TEST(Hpp, ASequenceOutlivesItsPoolObject) {
  kvarn::Sequence sequence = *kvarn::Pool::create({.num_blocks = 1, .num_slots = 1, .tile_tokens = 32, .sink_tokens = 32})->sequence();
  EXPECT_TRUE(sequence.append(32));
  EXPECT_TRUE(sequence.truncate(0));
}

TEST(Hpp, BackendsAreListed) {
  const auto backends = kvarn::backends();
  ASSERT_TRUE(backends);
  EXPECT_TRUE(std::any_of(backends->begin(), backends->end(),
                          [](const kvarn_backend_info& b) { return std::string(b.name) == "cpu" && b.available; }));
}

}  // namespace
