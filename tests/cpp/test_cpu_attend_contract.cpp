// What kvarn_attend promises beside accuracy: isolation of what is not a number, determinism, batch invariance, any parallel-for, large
// pools, and errors that write nothing.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <thread>

#include "attend_case.h"
#include "expect.h"

namespace kvarn::test {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

AttendShape batch_shape() {
  AttendShape shape;
  shape.format = {4, 2, 64, 16};
  shape.seq_lens = {400, 130, 64, 700};
  shape.q_lens = {2, 1, 3, 2};
  return shape;
}

// Rows in which `changed(sequence, query, kv head, head of the group)` says so are not finite; all others are those of `before`, bit for
// bit.
void expect_only(const AttendCase& c, const AttendCase::Result& before, const AttendCase::Result& after, bool lse_is_nan,
                 const std::function<bool(int, int, int, int)>& changed, const std::string& what) {
  const AttendShape& shape = c.shape();
  int64_t row = 0;
  for (size_t s = 0; s < shape.q_lens.size(); ++s) {
    for (int q = 0; q < shape.q_lens[s]; ++q) {
      for (int h = 0; h < shape.q_heads(); ++h, ++row) {
        const float* was = before.out.data() + row * shape.head_dim;
        const float* is = after.out.data() + row * shape.head_dim;
        const std::string where = what + ": sequence " + std::to_string(s) + ", query " + std::to_string(q) + ", head " + std::to_string(h);
        if (changed(static_cast<int>(s), q, h / shape.group, h % shape.group)) {
          EXPECT_TRUE(std::all_of(is, is + shape.head_dim, [](float x) { return !std::isfinite(x); })) << where;
          if (lse_is_nan) {
            EXPECT_TRUE(std::isnan(after.lse[row])) << where;
          } else {
            EXPECT_EQ(after.lse[row], before.lse[row]) << where;
          }
        } else {
          EXPECT_EQ(std::memcmp(was, is, sizeof(float) * shape.head_dim), 0) << where;
          EXPECT_EQ(after.lse[row], before.lse[row]) << where;
        }
      }
    }
  }
}

// ---- what is not a number ----

TEST(CpuAttendContract, NanMetadataReachesTheRowsThatSeeTheTile) {
  for (const int metadata_bits : {16, 8}) {
    for (const bool in_k : {true, false}) {
      AttendShape shape = batch_shape();
      shape.format.metadata_bits = metadata_bits;
      AttendCase c(shape);
      AttendCase bad(shape);
      // Tile 3 of sequence 0 holds positions 192 .. 255.
      uint8_t* record = bad.record(bad.entry(0, 3), 1);
      for (const Metadata which :
           in_k ? std::vector<Metadata>{kKScale, kKZero, kKTokenScale} : std::vector<Metadata>{kVScale, kVZero, kVChannelScale}) {
        ref::set_metadata_nan(record, bad.layout(), which);
      }
      for (const std::string& isa : runnable_isas()) {
        kvarn_attend_params p = c.params(), q = bad.params();
        expect_only(
            c, c.run(c.plan_params(isa), p), bad.run(bad.plan_params(isa), q), in_k,
            [](int s, int, int kv, int) { return s == 0 && kv == 1; }, isa);
        // Query 0 sits at position 398, query 1 at 399: a window of 143 lets only the first see position 255 (398 - 143 + 1 = 256: neither
        // does).
        p.window = q.window = 143;
        expect_only(c, c.run(c.plan_params(isa), p), bad.run(bad.plan_params(isa), q), in_k, [](int, int, int, int) { return false; }, isa);
        p.window = q.window = 144;
        expect_only(
            c, c.run(c.plan_params(isa), p), bad.run(bad.plan_params(isa), q), in_k,
            [](int s, int query, int kv, int) { return s == 0 && query == 0 && kv == 1; }, isa);
      }
    }
  }
}

TEST(CpuAttendContract, OneNanOrInfiniteScaleIsEnough) {
  for (const float value : {kNan, kInfinity}) {
    for (int which = 0; which < kMetadataCount; ++which) {
      AttendShape shape = batch_shape();
      AttendCase c(shape), bad(shape);
      const uint16_t half = ref::f32_to_f16(value);
      std::memcpy(bad.record(bad.entry(3, 2), 0) + bad.layout().metadata_offset[which] + 2 * 63, &half, 2);
      for (const std::string& isa : runnable_isas()) {
        expect_only(
            c, c.run(c.plan_params(isa), c.params()), bad.run(bad.plan_params(isa), bad.params()), which <= kKTokenScale,
            [](int s, int, int kv, int) { return s == 3 && kv == 0; }, isa + ", vector " + std::to_string(which));
      }
    }
  }
}

TEST(CpuAttendContract, AQueryThatIsNotFiniteIsNanAlone) {
  for (const float value : {kNan, kInfinity, -kInfinity}) {
    for (const int rotated : {0, 1}) {
      AttendShape shape = batch_shape();
      shape.group = 6;
      AttendCase c(shape), bad(shape);
      bad.set_value(bad.q_value(1, 8, 17), value);  // query 1 of sequence 0, KV head 1, head 2 of the group
      for (const std::string& isa : runnable_isas()) {
        kvarn_attend_params p = c.params(), q = bad.params();
        p.q_rotated = q.q_rotated = rotated;
        expect_only(
            c, c.run(c.plan_params(isa), p), bad.run(bad.plan_params(isa), q), true,
            [](int s, int query, int kv, int head) { return s == 0 && query == 1 && kv == 1 && head == 2; }, isa);
      }
    }
  }
}

TEST(CpuAttendContract, AStagedTokenReachesTheRowsThatSeeIt) {
  for (const int operand : {0, 1}) {
    for (const float value : {kNan, kInfinity}) {
      AttendShape shape = batch_shape();
      AttendCase c(shape), bad(shape);
      // The last token of sequence 2, which ends with its tile, and what lies behind the end of sequence 1.
      for (int channel = 0; channel < 128; ++channel) bad.set_value(bad.staging_value(~bad.entry(2, 0), operand, 1, 63, channel), value);
      for (int token = 130 - 128; token < 64; ++token) bad.set_value(bad.staging_value(~bad.entry(1, 2), operand, 0, token, 5), value);
      for (const std::string& isa : runnable_isas()) {
        expect_only(
            c, c.run(c.plan_params(isa), c.params()), bad.run(bad.plan_params(isa), bad.params()), operand == 0,
            [](int s, int query, int kv, int) { return s == 2 && query == 2 && kv == 1; }, isa);
      }
    }
  }
}

TEST(CpuAttendContract, AHugeQueryDoesNotDisturbOthers) {
  AttendShape shape = batch_shape();
  AttendCase c(shape), bad(shape);
  for (int channel = 0; channel < 128; ++channel) bad.set_value(bad.q_value(0, 0, channel), 3e38f);
  for (const std::string& isa : runnable_isas()) {
    expect_only(
        c, c.run(c.plan_params(isa), c.params()), bad.run(bad.plan_params(isa), bad.params()), true,
        [](int s, int query, int kv, int head) { return s == 0 && query == 0 && kv == 0 && head == 0; }, isa);
  }
}

// ---- determinism ----

bool same(const AttendCase::Result& a, const AttendCase::Result& b) {
  return a.out.size() == b.out.size() && std::memcmp(a.out.data(), b.out.data(), a.out.size() * sizeof(float)) == 0 &&
         std::memcmp(a.lse.data(), b.lse.data(), a.lse.size() * sizeof(float)) == 0;
}

TEST(CpuAttendContract, RepeatsBitForBit) {
  AttendShape shape = batch_shape();
  shape.seq_lens = {400, 3000, 64, 700};
  AttendCase c(shape);
  for (const std::string& isa : runnable_isas()) {
    for (const int threads : {1, 2, 7}) {
      kvarn_plan_params plan = c.plan_params(isa);
      plan.num_threads = threads;
      const AttendCase::Result first = c.run(plan, c.params());
      c.expect_oracle(first, c.oracle(c.params()), isa);
      for (int i = 0; i < 5; ++i) EXPECT_TRUE(same(first, c.run(plan, c.params()))) << isa << ", " << threads << " threads";
    }
  }
}

// One sequence of `c` alone, from the same memory.
AttendCase::Result run_alone(AttendCase& c, const kvarn_plan_params& plan, const kvarn_attend_params& all, int sequence) {
  const AttendShape& shape = c.shape();
  const int q_len = shape.q_lens[sequence];
  const int32_t cu_q_lens[2] = {0, q_len};
  const int32_t seq_len = shape.seq_lens[sequence];
  kvarn_attend_params p = all;
  p.num_seqs = 1;
  p.num_q_tokens = q_len;
  p.cu_q_lens = cu_q_lens;
  p.seq_lens = &seq_len;
  p.block_table = &c.entry(sequence, 0);
  p.q = c.q_value(all.cu_q_lens[sequence], 0, 0);
  const size_t rows = static_cast<size_t>(q_len) * shape.q_heads();
  AttendCase::Result result;
  result.out.resize(rows * shape.head_dim);
  result.lse.resize(rows);
  p.out = result.out.data();
  p.out_head_stride = shape.head_dim;
  p.out_token_stride = shape.q_heads() * shape.head_dim;
  p.lse = result.lse.data();
  kvarn_plan* handle = nullptr;
  EXPECT_SUCCEEDS(kvarn_plan_create(&plan, &handle));
  p.workspace_bytes = kvarn_plan_workspace_bytes(handle);
  void* const workspace = std::aligned_alloc(256, static_cast<size_t>(p.workspace_bytes));
  p.workspace = workspace;
  EXPECT_SUCCEEDS(kvarn_attend(handle, &p, nullptr));
  std::free(workspace);
  kvarn_plan_destroy(handle);
  return result;
}

TEST(CpuAttendContract, BatchInvariantResultsDependOnTheSequenceAlone) {
  AttendShape shape = batch_shape();
  shape.format.tile_tokens = 32;
  shape.seq_lens = {400, 3000, 64, 1700, 0};
  shape.q_lens = {2, 1, 30, 17, 1};
  AttendCase c(shape);
  for (const std::string& isa : runnable_isas()) {
    kvarn_plan_params plan = c.plan_params(isa);
    plan.batch_invariant = 1;
    const AttendCase::Result all = c.run(plan, c.params());
    c.expect_oracle(all, c.oracle(c.params()), isa);
    for (const int threads : {1, 3, 8}) {
      plan.num_threads = threads;
      EXPECT_TRUE(same(all, c.run(plan, c.params()))) << isa << ", " << threads << " threads";
      for (size_t s = 0; s < shape.seq_lens.size(); ++s) {
        const AttendCase::Result alone = run_alone(c, plan, c.params(), static_cast<int>(s));
        const size_t first = static_cast<size_t>(c.params().cu_q_lens[s]) * shape.q_heads();
        EXPECT_EQ(std::memcmp(alone.out.data(), all.out.data() + first * shape.head_dim, alone.out.size() * sizeof(float)), 0)
            << isa << ", " << s;
        EXPECT_EQ(std::memcmp(alone.lse.data(), all.lse.data() + first, alone.lse.size() * sizeof(float)), 0) << isa << ", " << s;
      }
    }
  }
}

void backwards(void* user, int64_t count, kvarn_parallel_body body, void* context) {
  static_cast<std::atomic<int>*>(user)->fetch_add(1);
  for (int64_t i = count; i-- > 0;) body(context, i);
}

void one_thread_each(void* user, int64_t count, kvarn_parallel_body body, void* context) {
  static_cast<std::atomic<int>*>(user)->fetch_add(1);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) threads.emplace_back([=] { body(context, i); });
  for (std::thread& t : threads) t.join();
}

TEST(CpuAttendContract, AnyParallelForGivesTheSameResult) {
  for (const int invariant : {0, 1}) {
    AttendShape shape = batch_shape();
    shape.format.tile_tokens = 32;
    shape.seq_lens = {400, 3000, 64, 700};
    AttendCase c(shape);
    const std::string isa = runnable_isas().front();  // the params keep a pointer to it
    kvarn_plan_params plan = c.plan_params(isa);
    plan.num_threads = 6;
    plan.batch_invariant = invariant;
    const AttendCase::Result own = c.run(plan, c.params());
    for (const kvarn_parallel_for loop : {backwards, one_thread_each}) {
      std::atomic<int> calls{0};
      plan.parallel_for = loop;
      plan.parallel_user = &calls;
      EXPECT_TRUE(same(own, c.run(plan, c.params())));
      EXPECT_GT(calls.load(), 0);
    }
  }
}

// ---- large pools ----

TEST(CpuAttendContract, OffsetsBeyondFourGigabytes) {
  AttendShape shape;
  shape.kv_heads = 3;
  shape.seq_lens = {600};
  shape.q_lens = {2};
  AttendCase c(shape);
  const int64_t record_bytes = c.layout().record_bytes, block_bytes = record_bytes * shape.kv_heads;
  const int64_t slot_bytes = slot_values(shape.kv_heads, 128, shape.head_dim) * 4;
  const int64_t num_blocks = (int64_t{9} << 30) / block_bytes, num_slots = (int64_t{9} << 30) / slot_bytes;
  const auto reserve = [](int64_t bytes) {
    void* p = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? nullptr : static_cast<uint8_t*>(p);
  };
  uint8_t* const records = reserve(num_blocks * block_bytes);
  uint8_t* const staging = reserve(num_slots * slot_bytes);
  if (records == nullptr || staging == nullptr) GTEST_SKIP() << "the system reserves no 18 GB of addresses";
  const AttendCase::Result near = c.run(c.plan_params(runnable_isas().front()), c.params());
  kvarn_attend_params p = c.params();
  for (int t = 0; t < 5; ++t) {
    int32_t& entry = c.entry(0, t);
    if (entry >= 0) {
      const int64_t block = num_blocks - 1 - entry * (num_blocks / 5);
      std::memcpy(records + block * block_bytes, c.record(entry, 0), static_cast<size_t>(block_bytes));
      entry = static_cast<int32_t>(block);
    } else {
      const int64_t slot = num_slots - 1 - ~entry * (num_slots / 3);
      std::memcpy(staging + slot * slot_bytes, c.staging_value(~entry, 0, 0, 0, 0), static_cast<size_t>(slot_bytes));
      entry = ~static_cast<int32_t>(slot);
    }
  }
  p.records = records;
  p.num_blocks = num_blocks;
  p.staging = staging;
  p.num_slots = num_slots;
  EXPECT_TRUE(same(near, c.run(c.plan_params(runnable_isas().front()), p)));
  munmap(records, static_cast<size_t>(num_blocks * block_bytes));
  munmap(staging, static_cast<size_t>(num_slots * slot_bytes));
}

// ---- errors ----

TEST(CpuAttendContract, BadTablesAreRefusedBeforeAnythingIsWritten) {
  AttendShape shape = batch_shape();
  AttendCase c(shape);
  const kvarn_attend_params good = c.params();
  const int32_t blocks = static_cast<int32_t>(good.num_blocks), slots = static_cast<int32_t>(good.num_slots);
  const auto expect_refused = [&](const kvarn_attend_params& p, const char* message) {
    const AttendCase::Result result = c.run(c.plan_params("generic"), p);
    EXPECT_FAILS(result.status, KVARN_INVALID_ARGUMENT, message);
    const float untouched = ref::bf16_to_f32(0xa5a5);  // the fill of the outputs, read as fp32
    for (const float x : result.lse) EXPECT_NEAR(x, untouched, std::abs(untouched) * 0.01f);
    for (const float x : result.out) EXPECT_NEAR(x, untouched, std::abs(untouched) * 0.01f);
  };
  const auto with_entry = [&](int sequence, int tile, int32_t value, const char* message) {
    const int32_t kept = c.entry(sequence, tile);
    c.entry(sequence, tile) = value;
    expect_refused(good, message);
    c.entry(sequence, tile) = kept;
  };
  with_entry(3, 4, blocks, "[kvarn.attend] block_table[3][4]");
  with_entry(0, 0, ~slots, "[kvarn.attend] block_table[0][0]");
  with_entry(1, 1, std::numeric_limits<int32_t>::min(), "[kvarn.attend] block_table[1][1]");

  const int32_t too_long[4] = {400, 130, 64, 11 * 64 + 1}, negative[4] = {400, -1, 64, 700};
  kvarn_attend_params p = good;
  p.seq_lens = too_long;
  expect_refused(p, "[kvarn.attend] seq_lens[3]");
  p.seq_lens = negative;
  expect_refused(p, "[kvarn.attend] seq_lens[1]");
  const int32_t falling[5] = {0, 2, 1, 6, 8}, late[5] = {1, 2, 3, 6, 8}, short_of[5] = {0, 2, 3, 6, 7};
  p = good;
  p.cu_q_lens = falling;
  expect_refused(p, "[kvarn.attend] cu_q_lens[2]");
  p.cu_q_lens = late;
  expect_refused(p, "[kvarn.attend] cu_q_lens[0]");
  p.cu_q_lens = short_of;
  expect_refused(p, "[kvarn.attend] cu_q_lens[4]");
}

}  // namespace
}  // namespace kvarn::test
