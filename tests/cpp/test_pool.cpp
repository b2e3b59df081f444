// The paged cache, one rule at a time, through the C ABI.
#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "expect.h"

namespace {

using Pairs = std::vector<std::pair<int32_t, int32_t>>;

Pairs pairs(const kvarn_pair* list, int64_t count) {
  Pairs result;
  for (int64_t i = 0; i < count; ++i) result.emplace_back(list[i].source, list[i].destination);
  return result;
}

class PoolTest : public ::testing::Test {
 protected:
  void make(int32_t num_blocks, int32_t num_slots, int32_t sink_tokens = 0, int32_t recent_tokens = 0) {
    kvarn_pool_params params{};
    KVARN_INIT(params);
    params.num_blocks = num_blocks;
    params.num_slots = num_slots;
    params.tile_tokens = 32;
    params.sink_tokens = sink_tokens;
    params.recent_tokens = recent_tokens;
    kvarn_pool* made = nullptr;
    ASSERT_SUCCEEDS(kvarn_pool_create(&params, &made));
    pool_.reset(made);
    KVARN_INIT(work_);
  }

  kvarn_sequence sequence() {
    kvarn_sequence result = 0;
    EXPECT_SUCCEEDS(kvarn_sequence_create(pool_.get(), &result));
    return result;
  }
  kvarn_status append(kvarn_sequence s, int64_t n) { return kvarn_sequence_append(pool_.get(), s, n, &work_); }
  kvarn_status commit(kvarn_sequence s, int64_t n) { return kvarn_sequence_commit(pool_.get(), s, n, &work_); }
  kvarn_status truncate(kvarn_sequence s, int64_t n) { return kvarn_sequence_truncate(pool_.get(), s, n, &work_); }
  void fill(kvarn_sequence s, int64_t n) {
    EXPECT_SUCCEEDS(append(s, n));
    EXPECT_SUCCEEDS(commit(s, n));
  }
  kvarn_sequence fork(kvarn_sequence s) {
    kvarn_sequence result = 0;
    EXPECT_SUCCEEDS(kvarn_sequence_fork(pool_.get(), s, &result));
    return result;
  }

  kvarn_sequence_info info(kvarn_sequence s) {
    kvarn_sequence_info result{};
    KVARN_INIT(result);
    EXPECT_SUCCEEDS(kvarn_sequence_get_info(pool_.get(), s, &result));
    return result;
  }
  kvarn_pool_info info() {
    kvarn_pool_info result{};
    KVARN_INIT(result);
    EXPECT_SUCCEEDS(kvarn_pool_get_info(pool_.get(), &result));
    return result;
  }
  std::vector<int32_t> table(kvarn_sequence s) {
    std::vector<int32_t> result(static_cast<size_t>(info(s).num_tiles));
    EXPECT_SUCCEEDS(kvarn_sequence_table(pool_.get(), s, result.data(), static_cast<int64_t>(result.size())));
    return result;
  }
  Pairs copies() { return pairs(work_.copies, work_.num_copies); }
  Pairs decodes() { return pairs(work_.decodes, work_.num_decodes); }
  Pairs encodes() { return pairs(work_.encodes, work_.num_encodes); }

  struct Destroy {
    void operator()(kvarn_pool* pool) const { kvarn_pool_destroy(pool); }
  };
  std::unique_ptr<kvarn_pool, Destroy> pool_;
  kvarn_work work_{};
};

TEST_F(PoolTest, AnAppendFillsSlotsAndACommitEncodesWholeTiles) {
  make(4, 4);
  const kvarn_sequence s = sequence();
  ASSERT_SUCCEEDS(append(s, 70));
  ASSERT_EQ(work_.num_tokens, 70);
  const std::vector<int32_t> before = table(s);
  ASSERT_EQ(before.size(), 3u);
  for (int64_t i = 0; i < 70; ++i) EXPECT_EQ(work_.slot_mapping[i], int64_t{~before[static_cast<size_t>(i / 32)]} * 32 + i % 32);

  ASSERT_SUCCEEDS(commit(s, 70));
  const std::vector<int32_t> after = table(s);
  EXPECT_EQ(encodes(), (Pairs{{~before[0], after[0]}, {~before[1], after[1]}}));
  EXPECT_GE(after[0], 0);
  EXPECT_GE(after[1], 0);
  EXPECT_EQ(after[2], before[2]);
  EXPECT_EQ(info().free_slots, 3);
  EXPECT_EQ(info().free_blocks, 2);
  EXPECT_EQ(info(s).num_blocks, 2);
  EXPECT_EQ(info(s).num_slots, 1);
}

TEST_F(PoolTest, UncommittedTokensAreNeverEncoded) {
  make(4, 4);
  const kvarn_sequence s = sequence();
  fill(s, 30);
  ASSERT_SUCCEEDS(append(s, 8));
  ASSERT_SUCCEEDS(commit(s, 1));  // 31 of the tile's 32
  EXPECT_EQ(work_.num_encodes, 0);
  ASSERT_SUCCEEDS(kvarn_sequence_rollback(pool_.get(), s, 7));
  EXPECT_EQ(info(s).num_tokens, 31);
  EXPECT_EQ(info(s).num_tiles, 1);
  EXPECT_EQ(info().free_slots, 3);
  fill(s, 1);
  EXPECT_EQ(work_.num_encodes, 1);
}

TEST_F(PoolTest, SinksAndRecentTokensStayInStaging) {
  make(8, 8, 32, 40);
  const kvarn_sequence s = sequence();
  fill(s, 103);  // tile 1 ends at 64 > 103 - 40
  EXPECT_EQ(work_.num_encodes, 0);
  fill(s, 1);
  EXPECT_EQ(work_.num_encodes, 1);
  const std::vector<int32_t> entries = table(s);
  EXPECT_LT(entries[0], 0) << "the sink";
  EXPECT_GE(entries[1], 0);
  EXPECT_LT(entries[2], 0);
  EXPECT_LT(entries[3], 0);
}

TEST_F(PoolTest, AForkWritesIntoACopy) {
  make(4, 4);
  const kvarn_sequence a = sequence();
  fill(a, 10);
  const kvarn_sequence b = fork(a);
  EXPECT_EQ(table(a), table(b));
  const int32_t shared = ~table(a)[0];
  ASSERT_SUCCEEDS(append(b, 1));
  const int32_t own = ~table(b)[0];
  EXPECT_NE(own, shared);
  EXPECT_EQ(copies(), (Pairs{{shared, own}}));
  EXPECT_EQ(work_.slot_mapping[0], int64_t{own} * 32 + 10);
  EXPECT_EQ(~table(a)[0], shared);
  // The other one is alone again.
  ASSERT_SUCCEEDS(append(a, 1));
  EXPECT_EQ(work_.num_copies, 0);
}

TEST_F(PoolTest, ATileThatTwoSequencesShareInStagingIsEncodedOnce) {
  make(4, 8, 0, 32);
  const kvarn_sequence a = sequence();
  fill(a, 32);
  const kvarn_sequence b = fork(a);
  const int32_t slot = ~table(a)[0];
  fill(a, 32);
  ASSERT_EQ(encodes(), (Pairs{{slot, table(a)[0]}}));
  EXPECT_EQ(~table(b)[0], slot) << "b keeps its recent tokens in full precision";
  fill(b, 32);
  EXPECT_EQ(work_.num_encodes, 0) << "the block is there already";
  EXPECT_EQ(table(b)[0], table(a)[0]);
  EXPECT_EQ(info().free_blocks, 3);
  EXPECT_EQ(info().free_slots, 6);
}

TEST_F(PoolTest, AnEncodedSlotThatIsWrittenAgainIsEncodedAgain) {
  make(4, 8, 0, 32);
  const kvarn_sequence a = sequence();
  fill(a, 32);
  const kvarn_sequence b = fork(a);
  fill(a, 32);
  ASSERT_EQ(work_.num_encodes, 1);
  const int32_t slot = ~table(b)[0];
  ASSERT_SUCCEEDS(truncate(b, 20));
  EXPECT_EQ(work_.num_decodes, 0);
  fill(b, 12);  // b is alone on the slot and writes in place
  EXPECT_EQ(~table(b)[0], slot);
  fill(b, 32);
  ASSERT_EQ(work_.num_encodes, 1) << "the slot no longer holds what the block holds";
  EXPECT_NE(table(b)[0], table(a)[0]);
}

TEST_F(PoolTest, ABlockThatWasFreedIsNotRemembered) {
  make(1, 8, 0, 32);
  const kvarn_sequence a = sequence();
  fill(a, 32);
  const kvarn_sequence b = fork(a);
  fill(a, 32);
  ASSERT_SUCCEEDS(kvarn_sequence_free(pool_.get(), a));
  EXPECT_EQ(info().free_blocks, 1);
  fill(b, 32);
  EXPECT_EQ(work_.num_encodes, 1);
}

TEST_F(PoolTest, TruncatingIntoAnEncodedTileDecodesIt) {
  make(4, 2);
  const kvarn_sequence s = sequence();
  fill(s, 64);
  const std::vector<int32_t> before = table(s);
  ASSERT_SUCCEEDS(truncate(s, 40));
  ASSERT_EQ(work_.num_decodes, 1);
  EXPECT_EQ(decodes()[0], (std::pair<int32_t, int32_t>{before[1], ~table(s)[1]}));
  EXPECT_EQ(info(s).num_committed, 40);
  EXPECT_EQ(info().free_blocks, 3);
  ASSERT_SUCCEEDS(truncate(s, 32));
  EXPECT_EQ(work_.num_decodes, 0) << "a cut between tiles needs no decode";
  EXPECT_EQ(info().free_slots, 2);
}

TEST_F(PoolTest, TruncateMayDecodeIntoTheSlotItFrees) {
  make(4, 1);
  const kvarn_sequence s = sequence();
  fill(s, 32);
  fill(s, 5);
  ASSERT_EQ(info().free_slots, 0);
  ASSERT_SUCCEEDS(truncate(s, 3));
  ASSERT_EQ(work_.num_decodes, 1);
  EXPECT_EQ(~table(s)[0], decodes()[0].second);
}

TEST_F(PoolTest, RunningOutChangesNothing) {
  make(1, 2);
  const kvarn_sequence s = sequence();
  EXPECT_FAILS(append(s, 65), KVARN_OUT_OF_BLOCKS, "[kvarn.sequence_append] slots: expected 3 free staging slots, got 2 of 2");
  EXPECT_EQ(info(s).num_tokens, 0);
  EXPECT_EQ(info().free_slots, 2);
  ASSERT_SUCCEEDS(append(s, 64));
  const std::vector<int32_t> before = table(s);
  EXPECT_FAILS(commit(s, 64), KVARN_OUT_OF_BLOCKS, "[kvarn.sequence_commit] blocks: expected 2 free blocks, got 1 of 1");
  EXPECT_EQ(table(s), before);
  EXPECT_EQ(info(s).num_committed, 0);
  EXPECT_EQ(info().free_blocks, 1);
  ASSERT_SUCCEEDS(commit(s, 63)) << "one tile fits";
  // The open tile's slot is shared and the other slot taken: nowhere to decode to.
  fork(s);
  fill(sequence(), 1);
  const std::vector<int32_t> shared = table(s);
  EXPECT_FAILS(truncate(s, 5), KVARN_OUT_OF_BLOCKS, "[kvarn.sequence_truncate] slots: expected 1 free staging slots, got 0 of 2");
  EXPECT_FAILS(append(s, 1), KVARN_OUT_OF_BLOCKS, "[kvarn.sequence_append] slots: expected 1 free staging slots, got 0 of 2");
  EXPECT_EQ(table(s), shared);
  EXPECT_EQ(info(s).num_tokens, 64);
  EXPECT_EQ(info(s).num_committed, 63);
}

TEST_F(PoolTest, APrefixIsSharedByWholeTiles) {
  make(4, 4);
  const kvarn_sequence a = sequence();
  fill(a, 70);
  kvarn_sequence b = 0;
  ASSERT_SUCCEEDS(kvarn_sequence_share_prefix(pool_.get(), a, 64, &b));
  EXPECT_EQ(info(b).num_committed, 64);
  EXPECT_EQ(table(b), (std::vector<int32_t>{table(a)[0], table(a)[1]}));
  EXPECT_FAILS(kvarn_sequence_share_prefix(pool_.get(), a, 40, &b), KVARN_INVALID_ARGUMENT,
               "num_tokens: expected 32 or 64, the ends of an encoded tile, got 40");
  EXPECT_FAILS(kvarn_sequence_share_prefix(pool_.get(), a, 71, &b), KVARN_INVALID_ARGUMENT,
               "expected 0 to 70 (the committed ones), got 71");
  // Inside a tile that is still in staging the cut is free, and the first to write copies.
  kvarn_sequence c = 0;
  ASSERT_SUCCEEDS(kvarn_sequence_share_prefix(pool_.get(), a, 66, &c));
  ASSERT_SUCCEEDS(append(c, 1));
  EXPECT_EQ(work_.num_copies, 1);
  // The shared blocks outlive their first owner.
  ASSERT_SUCCEEDS(kvarn_sequence_free(pool_.get(), a));
  EXPECT_EQ(info().free_blocks, 2);
  ASSERT_SUCCEEDS(kvarn_sequence_free(pool_.get(), b));
  ASSERT_SUCCEEDS(kvarn_sequence_free(pool_.get(), c));
  EXPECT_EQ(info().free_blocks, 4);
  EXPECT_EQ(info().free_slots, 4);
  EXPECT_EQ(info().num_sequences, 0);
}

TEST_F(PoolTest, StaleAndForeignHandlesAreErrors) {
  make(4, 4);
  const kvarn_sequence s = sequence();
  ASSERT_SUCCEEDS(kvarn_sequence_free(pool_.get(), s));
  const kvarn_sequence reused = sequence();
  EXPECT_NE(reused, s);
  kvarn_sequence result = 0;
  kvarn_sequence_info sequence_info{};
  KVARN_INIT(sequence_info);
  int32_t entry = 0;
  for (const kvarn_sequence stale : {s, kvarn_sequence{0}, ~kvarn_sequence{0}, reused + 1}) {
    EXPECT_FAILS(append(stale, 1), KVARN_STALE_HANDLE,
                 "[kvarn.sequence_append] sequence: expected a live sequence of this pool, got handle");
    EXPECT_FAILS(commit(stale, 0), KVARN_STALE_HANDLE, "[kvarn.sequence_commit]");
    EXPECT_FAILS(truncate(stale, 0), KVARN_STALE_HANDLE, "[kvarn.sequence_truncate]");
    EXPECT_FAILS(kvarn_sequence_rollback(pool_.get(), stale, 0), KVARN_STALE_HANDLE, "[kvarn.sequence_rollback]");
    EXPECT_FAILS(kvarn_sequence_fork(pool_.get(), stale, &result), KVARN_STALE_HANDLE, "[kvarn.sequence_fork]");
    EXPECT_FAILS(kvarn_sequence_share_prefix(pool_.get(), stale, 0, &result), KVARN_STALE_HANDLE, "[kvarn.sequence_share_prefix]");
    EXPECT_FAILS(kvarn_sequence_free(pool_.get(), stale), KVARN_STALE_HANDLE, "[kvarn.sequence_free]");
    EXPECT_FAILS(kvarn_sequence_get_info(pool_.get(), stale, &sequence_info), KVARN_STALE_HANDLE, "[kvarn.sequence_get_info]");
    EXPECT_FAILS(kvarn_sequence_table(pool_.get(), stale, &entry, 1), KVARN_STALE_HANDLE, "[kvarn.sequence_table]");
  }
  EXPECT_EQ(result, 0u);
  auto mine = std::move(pool_);
  make(4, 4);
  const kvarn_sequence foreign = sequence();
  EXPECT_FAILS(kvarn_sequence_free(mine.get(), foreign), KVARN_STALE_HANDLE, "[kvarn.sequence_free]");
  EXPECT_FAILS(kvarn_sequence_free(pool_.get(), reused), KVARN_STALE_HANDLE, "[kvarn.sequence_free]");
}

TEST_F(PoolTest, BadArgumentsAreErrors) {
  make(4, 4);
  const kvarn_sequence s = sequence();
  fill(s, 10);
  EXPECT_FAILS(append(s, -1), KVARN_INVALID_ARGUMENT,
               "num_tokens: expected 0 to 2147483637 (a sequence has 2^31 - 1 tokens at most), got -1");
  EXPECT_FAILS(append(s, INT64_MAX), KVARN_INVALID_ARGUMENT, "got 9223372036854775807");
  EXPECT_FAILS(commit(s, 1), KVARN_INVALID_ARGUMENT, "num_tokens: expected 0 to 0 (the uncommitted ones), got 1");
  EXPECT_FAILS(kvarn_sequence_rollback(pool_.get(), s, 1), KVARN_INVALID_ARGUMENT,
               "num_tokens: expected 0 to 0 (the uncommitted ones), got 1");
  EXPECT_FAILS(truncate(s, 11), KVARN_INVALID_ARGUMENT, "num_tokens: expected 0 to 10 (the tokens of the sequence), got 11");
  EXPECT_FAILS(truncate(s, -1), KVARN_INVALID_ARGUMENT, "got -1");
  EXPECT_FAILS(kvarn_sequence_append(pool_.get(), s, 1, nullptr), KVARN_INVALID_ARGUMENT,
               "[kvarn.sequence_append] work: expected a pointer, got NULL");
  kvarn_work short_work{};
  EXPECT_FAILS(kvarn_sequence_append(pool_.get(), s, 1, &short_work), KVARN_INVALID_ARGUMENT, "work.struct_size: expected");
  EXPECT_EQ(info(s).num_tokens, 10) << "the append was refused before it happened";
  EXPECT_FAILS(kvarn_sequence_append(nullptr, s, 1, &work_), KVARN_INVALID_ARGUMENT, "pool: expected a pointer, got NULL");
  EXPECT_FAILS(kvarn_sequence_create(pool_.get(), nullptr), KVARN_INVALID_ARGUMENT, "result: expected a pointer, got NULL");
  EXPECT_FAILS(kvarn_sequence_table(pool_.get(), s, nullptr, 1), KVARN_INVALID_ARGUMENT, "table: expected a pointer, got NULL");
  EXPECT_FAILS(kvarn_sequence_table(pool_.get(), s, nullptr, 0), KVARN_INVALID_ARGUMENT, "capacity: expected at least 1 entries, got 0");
  kvarn_pool_destroy(nullptr);
}

TEST(PoolCreate, BadParamsAreErrors) {
  kvarn_pool_params good{};
  KVARN_INIT(good);
  good.num_blocks = 0;
  good.num_slots = 1;
  good.tile_tokens = 64;
  good.sink_tokens = 128;
  kvarn_pool* pool = nullptr;
  ASSERT_SUCCEEDS(kvarn_pool_create(&good, &pool));
  kvarn_pool_destroy(pool);
  pool = nullptr;
  const auto expect = [&](auto change, const char* text) {
    kvarn_pool_params bad = good;
    change(bad);
    EXPECT_FAILS(kvarn_pool_create(&bad, &pool), KVARN_INVALID_ARGUMENT, text);
  };
  expect([](auto& p) { p.struct_size = 3; }, "[kvarn.pool_create] params.struct_size: expected 32 (KVARN_INIT), got 3");
  expect([](auto& p) { p.num_blocks = -1; }, "num_blocks: expected at least 0, got -1");
  expect([](auto& p) { p.num_slots = 0; }, "num_slots: expected at least 1, got 0");
  expect([](auto& p) { p.tile_tokens = 48; }, "tile_tokens: expected 32, 64, 128 or 256, got 48");
  expect([](auto& p) { p.sink_tokens = 100; }, "sink_tokens: expected a multiple of tile_tokens = 64, got 100");
  expect([](auto& p) { p.sink_tokens = -64; }, "sink_tokens: expected a multiple of tile_tokens = 64, got -64");
  expect([](auto& p) { p.recent_tokens = -1; }, "recent_tokens: expected at least 0, got -1");
  EXPECT_FAILS(kvarn_pool_create(&good, nullptr), KVARN_INVALID_ARGUMENT, "pool: expected a pointer, got NULL");
  EXPECT_FAILS(kvarn_pool_create(nullptr, &pool), KVARN_INVALID_ARGUMENT, "params: expected a pointer, got NULL");
  EXPECT_EQ(pool, nullptr);
}

}  // namespace
