// The paged cache against a model that holds every token of every sequence.
//
// A random program of calls runs on the pool; its work lists are carried out on fake memory, where a token is a number that never comes
// twice. After every step each sequence's table must read back exactly its tokens, the references must add up, and a call that failed must
// have changed nothing.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "expect.h"

namespace {

constexpr int32_t kTile = 32;
constexpr int64_t kGarbage = -1;

using Tile = std::vector<int64_t>;

struct Settings {
  int32_t num_blocks, num_slots, sink_tokens, recent_tokens;
};

struct Destroy {
  void operator()(kvarn_pool* pool) const { kvarn_pool_destroy(pool); }
};

struct Model {
  kvarn_sequence handle = 0;
  std::vector<int64_t> tokens;
  int64_t committed = 0;
};

// Everything observable of one sequence.
struct Snapshot {
  int64_t tokens, committed;
  std::vector<int32_t> table;
  friend bool operator==(const Snapshot&, const Snapshot&) = default;
};

class Machine {
 public:
  explicit Machine(const Settings& settings) : settings_(settings) {
    kvarn_pool_params params{};
    KVARN_INIT(params);
    params.num_blocks = settings.num_blocks;
    params.num_slots = settings.num_slots;
    params.tile_tokens = kTile;
    params.sink_tokens = settings.sink_tokens;
    params.recent_tokens = settings.recent_tokens;
    kvarn_pool* pool = nullptr;
    EXPECT_SUCCEEDS(kvarn_pool_create(&params, &pool));
    pool_.reset(pool);
    slots_.assign(static_cast<size_t>(settings.num_slots), Tile(kTile, kGarbage));
    blocks_.assign(static_cast<size_t>(settings.num_blocks), Tile(kTile, kGarbage));
  }

  std::vector<Model>& live() { return live_; }
  const std::vector<kvarn_sequence>& dead() const { return dead_; }
  const std::vector<Tile>& encoded() const { return encoded_; }
  kvarn_pool* pool() { return pool_.get(); }

  kvarn_status create() {
    Model m;
    const kvarn_status status = kvarn_sequence_create(pool(), &m.handle);
    if (status == KVARN_OK) live_.push_back(m);
    return status;
  }

  kvarn_status append(size_t s, int64_t n) {
    const References before = references();
    const std::vector<int32_t> old_table = table(live_[s].handle);
    kvarn_work work = empty_work();
    const kvarn_status status = kvarn_sequence_append(pool(), live_[s].handle, n, &work);
    const int64_t old_tokens = static_cast<int64_t>(live_[s].tokens.size());
    const bool copies = n > 0 && old_tokens % kTile != 0 && before.slots[static_cast<size_t>(~old_table.back())] > 1;
    const int64_t needed = (old_tokens + n + kTile - 1) / kTile - static_cast<int64_t>(old_table.size()) + (copies ? 1 : 0);
    EXPECT_EQ(status == KVARN_OUT_OF_BLOCKS, needed > before.free_slots()) << "fails exactly when there are too few slots";
    if (status != KVARN_OK) return status;
    EXPECT_EQ(work.num_copies, copies ? 1 : 0);
    EXPECT_EQ(work.num_decodes + work.num_encodes, 0);
    EXPECT_EQ(work.num_tokens, n);
    for (int64_t i = 0; i < work.num_copies; ++i) {
      EXPECT_EQ(before.slots[static_cast<size_t>(work.copies[i].destination)], 0) << "a copy goes into a free slot";
      slots_[static_cast<size_t>(work.copies[i].destination)] = slots_[static_cast<size_t>(work.copies[i].source)];
    }
    const References after = references();
    for (int64_t i = 0; i < n; ++i) {
      const size_t slot = static_cast<size_t>(work.slot_mapping[i] / kTile);
      EXPECT_EQ(after.slots[slot], 1) << "a shared slot is never written";
      slots_[slot][static_cast<size_t>(work.slot_mapping[i] % kTile)] = next_token_;
      live_[s].tokens.push_back(next_token_++);
    }
    return status;
  }

  kvarn_status commit(size_t s, int64_t n) {
    const References before = references();
    const std::vector<int32_t> old_table = table(live_[s].handle);
    kvarn_work work = empty_work();
    const kvarn_status status = kvarn_sequence_commit(pool(), live_[s].handle, n, &work);
    if (status != KVARN_OK) return status;
    Model& m = live_[s];
    m.committed += n;
    EXPECT_EQ(work.num_copies + work.num_decodes + work.num_tokens, 0);
    const std::vector<int32_t> new_table = table(m.handle);
    for (int64_t i = 0; i < work.num_encodes; ++i) {
      const kvarn_pair pair = work.encodes[i];
      EXPECT_EQ(before.blocks[static_cast<size_t>(pair.destination)], 0) << "a block that somebody owns is never encoded into";
      const auto tile = std::find(new_table.begin(), new_table.end(), pair.destination) - new_table.begin();
      EXPECT_EQ(old_table[static_cast<size_t>(tile)], ~pair.source);
      EXPECT_LE((tile + 1) * kTile, m.committed - settings_.recent_tokens) << "neither recent nor uncommitted tokens are encoded";
      blocks_[static_cast<size_t>(pair.destination)] = slots_[static_cast<size_t>(pair.source)];
      encoded_.push_back(slots_[static_cast<size_t>(pair.source)]);
    }
    for (int64_t t = settings_.sink_tokens / kTile; (t + 1) * kTile <= m.committed - settings_.recent_tokens; ++t) {
      EXPECT_GE(new_table[static_cast<size_t>(t)], 0) << "every tile older than the recent tokens is encoded";
    }
    return status;
  }

  kvarn_status rollback(size_t s, int64_t n) {
    const kvarn_status status = kvarn_sequence_rollback(pool(), live_[s].handle, n);
    if (status == KVARN_OK) live_[s].tokens.resize(live_[s].tokens.size() - static_cast<size_t>(n));
    return status;
  }

  kvarn_status truncate(size_t s, int64_t n) {
    kvarn_work work = empty_work();
    const kvarn_status status = kvarn_sequence_truncate(pool(), live_[s].handle, n, &work);
    if (status != KVARN_OK) return status;
    EXPECT_LE(work.num_decodes, 1);
    for (int64_t i = 0; i < work.num_decodes; ++i) {
      slots_[static_cast<size_t>(work.decodes[i].destination)] = blocks_[static_cast<size_t>(work.decodes[i].source)];
    }
    const References after = references();
    for (int64_t i = 0; i < work.num_decodes; ++i) EXPECT_EQ(after.slots[static_cast<size_t>(work.decodes[i].destination)], 1);
    live_[s].tokens.resize(static_cast<size_t>(n));
    live_[s].committed = std::min(live_[s].committed, n);
    return status;
  }

  kvarn_status fork(size_t s) {
    Model m = live_[s];
    const kvarn_status status = kvarn_sequence_fork(pool(), live_[s].handle, &m.handle);
    if (status == KVARN_OK) live_.push_back(m);
    return status;
  }

  kvarn_status share_prefix(size_t s, int64_t n) {
    Model m;
    const kvarn_status status = kvarn_sequence_share_prefix(pool(), live_[s].handle, n, &m.handle);
    if (status != KVARN_OK) return status;
    m.tokens.assign(live_[s].tokens.begin(), live_[s].tokens.begin() + n);
    m.committed = n;
    live_.push_back(m);
    return status;
  }

  kvarn_status release(size_t s) {
    const kvarn_status status = kvarn_sequence_free(pool(), live_[s].handle);
    if (status != KVARN_OK) return status;
    dead_.push_back(live_[s].handle);
    live_.erase(live_.begin() + static_cast<std::ptrdiff_t>(s));
    return status;
  }

  std::vector<Snapshot> snapshot() {
    std::vector<Snapshot> result;
    for (const Model& m : live_) {
      const kvarn_sequence_info i = info(m.handle);
      result.push_back({i.num_tokens, i.num_committed, table(m.handle)});
    }
    return result;
  }

  void check() {
    for (const Model& m : live_) {
      const kvarn_sequence_info i = info(m.handle);
      ASSERT_EQ(i.num_tokens, static_cast<int64_t>(m.tokens.size()));
      ASSERT_EQ(i.num_committed, m.committed);
      const std::vector<int32_t> entries = table(m.handle);
      ASSERT_EQ(static_cast<int64_t>(entries.size()), (i.num_tokens + kTile - 1) / kTile);
      ASSERT_EQ(i.num_blocks + i.num_slots, i.num_tiles);
      for (size_t t = 0; t < m.tokens.size(); ++t) {
        const int32_t entry = entries[t / kTile];
        const Tile& tile = entry >= 0 ? blocks_[static_cast<size_t>(entry)] : slots_[static_cast<size_t>(~entry)];
        ASSERT_EQ(tile[t % kTile], m.tokens[t]) << "token " << t;
      }
      for (size_t t = 0; t < entries.size() && t < static_cast<size_t>(settings_.sink_tokens / kTile); ++t) ASSERT_LT(entries[t], 0);
      if (m.tokens.size() % kTile != 0) {
        ASSERT_LT(entries.back(), 0) << "an unfinished tile is in staging";
      }
    }
    const References counted = references();
    kvarn_pool_info i{};
    KVARN_INIT(i);
    ASSERT_SUCCEEDS(kvarn_pool_get_info(pool(), &i));
    ASSERT_EQ(i.free_slots, counted.free_slots()) << "nothing leaks";
    ASSERT_EQ(i.free_blocks, counted.free_blocks());
    ASSERT_EQ(i.num_sequences, static_cast<int32_t>(live_.size()));
    // A tile is encoded once: no two live blocks hold the same tokens.
    std::set<Tile> contents;
    for (size_t b = 0; b < blocks_.size(); ++b) {
      if (counted.blocks[b] > 0) {
        ASSERT_TRUE(contents.insert(blocks_[b]).second) << "block " << b;
      }
    }
  }

  std::vector<int32_t> table(kvarn_sequence handle) {
    std::vector<int32_t> result(static_cast<size_t>(info(handle).num_tiles));
    EXPECT_SUCCEEDS(kvarn_sequence_table(pool(), handle, result.data(), static_cast<int64_t>(result.size())));
    return result;
  }

 private:
  struct References {
    std::vector<int> blocks, slots;
    int32_t free_slots() const { return static_cast<int32_t>(std::count(slots.begin(), slots.end(), 0)); }
    int32_t free_blocks() const { return static_cast<int32_t>(std::count(blocks.begin(), blocks.end(), 0)); }
  };

  References references() {
    References result{std::vector<int>(blocks_.size()), std::vector<int>(slots_.size())};
    for (const Model& m : live_) {
      for (const int32_t entry : table(m.handle))
        ++(entry >= 0 ? result.blocks[static_cast<size_t>(entry)] : result.slots[static_cast<size_t>(~entry)]);
    }
    return result;
  }

  kvarn_sequence_info info(kvarn_sequence handle) {
    kvarn_sequence_info result{};
    KVARN_INIT(result);
    EXPECT_SUCCEEDS(kvarn_sequence_get_info(pool(), handle, &result));
    return result;
  }

  static kvarn_work empty_work() {
    kvarn_work work{};
    KVARN_INIT(work);
    return work;
  }

  Settings settings_;
  std::unique_ptr<kvarn_pool, Destroy> pool_;
  std::vector<Tile> slots_, blocks_;
  std::vector<Model> live_;
  std::vector<kvarn_sequence> dead_;
  std::vector<Tile> encoded_;
  int64_t next_token_ = 0;
};

void run_program(const Settings& settings, uint32_t seed, int steps, std::map<std::string, std::map<kvarn_status, int>>& outcomes) {
  SCOPED_TRACE(::testing::Message() << "seed " << seed << ", blocks " << settings.num_blocks << ", slots " << settings.num_slots
                                    << ", sinks " << settings.sink_tokens << ", recent " << settings.recent_tokens);
  Machine machine(settings);
  std::mt19937 random(seed);
  const auto below = [&](int64_t n) { return n > 0 ? static_cast<int64_t>(random() % static_cast<uint64_t>(n)) : 0; };
  for (int step = 0; step < steps; ++step) {
    const std::vector<Snapshot> before = machine.snapshot();
    const size_t count = machine.live().size();
    const size_t s = static_cast<size_t>(below(static_cast<int64_t>(count)));
    const int64_t op = count == 0 ? 0 : below(100);
    const char* name = "";
    kvarn_status status = KVARN_OK;
    if (op < 6) {
      name = "create";
      status = machine.create();
    } else {
      const int64_t tokens = static_cast<int64_t>(machine.live()[s].tokens.size());
      const int64_t committed = machine.live()[s].committed;
      if (op < 36) {
        name = "append";
        // Single tokens, to the end of a tile, whole tiles, and more.
        const int64_t sizes[] = {1, kTile - tokens % kTile, below(kTile), below(4 * kTile), 0};
        status = machine.append(s, sizes[below(5)]);
      } else if (op < 64) {
        name = "commit";
        status = machine.commit(s, below(3) == 0 ? below(tokens - committed + 1) : tokens - committed);
      } else if (op < 70) {
        name = "rollback";
        status = machine.rollback(s, below(tokens - committed + 1));
      } else if (op < 78) {
        name = "truncate";
        status = machine.truncate(s, below(2) == 0 ? below(tokens + 1) : std::max<int64_t>(tokens - below(2 * kTile), 0));
      } else if (op < 86) {
        name = "fork";
        status = machine.fork(s);
      } else if (op < 91) {
        name = "share_prefix";
        const int64_t n = below(committed + 1);
        status = machine.share_prefix(s, below(2) == 0 ? n : n / kTile * kTile);
      } else if (op < 97 || machine.dead().empty()) {
        name = "free";
        status = machine.release(s);
      } else {
        name = "stale";
        const kvarn_sequence stale = machine.dead()[static_cast<size_t>(below(static_cast<int64_t>(machine.dead().size())))];
        status = kvarn_sequence_free(machine.pool(), stale);
        ASSERT_EQ(status, KVARN_STALE_HANDLE);
      }
    }
    ++outcomes[name][status];
    SCOPED_TRACE(::testing::Message() << "step " << step << ": " << name << " of sequence " << s << ": " << kvarn_status_name(status));
    if (status != KVARN_OK) {
      ASSERT_TRUE(status == KVARN_OUT_OF_BLOCKS || status == KVARN_STALE_HANDLE ||
                  (status == KVARN_INVALID_ARGUMENT && name == std::string("share_prefix")))
          << kvarn_last_error();
      ASSERT_TRUE(machine.snapshot() == before) << "a call that fails changes nothing";
    }
    machine.check();
    if (::testing::Test::HasFailure()) return;
  }
}

TEST(SequenceProperty, RandomProgramsReadBackTheirTokens) {
  const Settings settings[] = {
      {12, 10, 0, 0}, {12, 10, 32, 0}, {6, 16, 0, 32}, {16, 16, 64, 40}, {4, 20, 0, 100}, {0, 8, 1024, 0}, {40, 6, 0, 0}, {24, 24, 32, 1},
  };
  std::map<std::string, std::map<kvarn_status, int>> outcomes;
  for (uint32_t seed = 0; seed < 160; ++seed) {
    run_program(settings[seed % std::size(settings)], seed, 300, outcomes);
    if (::testing::Test::HasFailure()) return;
  }
  // The programs have reached every call, and every way in which it may fail.
  for (const char* name : {"create", "append", "commit", "rollback", "truncate", "fork", "share_prefix", "free"})
    EXPECT_GT(outcomes[name][KVARN_OK], 100) << name;
  for (const char* name : {"append", "commit", "truncate"}) EXPECT_GT(outcomes[name][KVARN_OUT_OF_BLOCKS], 10) << name;
  EXPECT_GT(outcomes["share_prefix"][KVARN_INVALID_ARGUMENT], 10);
  EXPECT_GT(outcomes["stale"][KVARN_STALE_HANDLE], 10);
}

// Any chunking of a prefill, with rejected tokens in between, encodes the same tiles as token by token, each once and in order.
TEST(SequenceProperty, ChunkingDoesNotChangeWhatIsEncoded) {
  std::mt19937 random(7);
  for (int run = 0; run < 120; ++run) {
    const int32_t sinks = static_cast<int32_t>(random() % 3) * kTile;
    const int32_t recent = static_cast<int32_t>(random() % 2 == 0 ? 0 : random() % 90);
    const int64_t length = static_cast<int64_t>(random() % 400);
    const Settings settings{16, 32, sinks, recent};
    Machine machine(settings);
    ASSERT_SUCCEEDS(machine.create());
    while (machine.live()[0].committed < length) {
      const int64_t left = length - machine.live()[0].committed;
      const int64_t chunk = run % 4 == 0 ? 1 : 1 + static_cast<int64_t>(random() % static_cast<uint64_t>(left));
      const int64_t rejected = random() % 3 == 0 ? static_cast<int64_t>(random() % 50) : 0;
      ASSERT_SUCCEEDS(machine.append(0, chunk + rejected));
      ASSERT_SUCCEEDS(machine.commit(0, chunk));
      ASSERT_SUCCEEDS(machine.rollback(0, rejected));
      machine.check();
      if (HasFatalFailure()) return;
    }
    std::vector<Tile> expected;
    for (int64_t t = sinks / kTile; (t + 1) * kTile <= length - recent; ++t) {
      const auto begin = machine.live()[0].tokens.begin() + t * kTile;
      expected.emplace_back(begin, begin + kTile);
    }
    ASSERT_EQ(machine.encoded(), expected) << "length " << length << ", sinks " << sinks << ", recent " << recent;
  }
}

}  // namespace
