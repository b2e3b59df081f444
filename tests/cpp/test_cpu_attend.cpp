// kvarn_attend on the CPU against the float64 oracle on the same records and staging, on every instruction set of this machine.
#include <string>
#include <vector>

#include "attend_shapes.h"

namespace kvarn::test {
namespace {

// On every instruction set of this machine.
void check(AttendCase& c, const kvarn_attend_params& p, const std::string& what) { c.expect_oracle_on_every_isa(p, what); }
void check(const AttendShape& shape) {
  AttendCase c(shape);
  check(c, c.params(), name_of(shape));
}
constexpr auto kCheck = [](AttendCase& c, const kvarn_attend_params& p, const std::string& what) { check(c, p, what); };

TEST(CpuAttend, EveryHeadDimAndTileLength) { check_every_head_dim_and_tile_length(kCheck); }

TEST(CpuAttend, EveryPairOfWidths) {
  for (const int k_bits : kWidths) {
    for (const int v_bits : kWidths) {
      for (const int head_dim : {80, 128}) {
        AttendShape shape;
        shape.format = {k_bits, v_bits, 32, 16};
        shape.head_dim = head_dim;
        shape.kv_heads = 1;
        shape.group = 5;
        shape.seq_lens = {200};
        check(shape);
      }
    }
  }
}

TEST(CpuAttend, EveryGroup) {
  for (const int group : kAttendGroups) {
    AttendShape shape;
    shape.group = group;
    shape.seq_lens = {400, 129};
    shape.q_lens = {1, 3};
    check(shape);
  }
}

TEST(CpuAttend, OddLengthsInOneBatch) {
  for (const int sink_tiles : {0, 1, 100}) {
    AttendShape shape;
    shape.sink_tiles = sink_tiles;
    check_odd_lengths_in_one_batch(shape, kCheck);
  }
}

TEST(CpuAttend, QueriesLongerThanTheSequenceSeeNothingBeforeIt) { check_queries_longer_than_the_sequence({}, kCheck); }

TEST(CpuAttend, LongQueries) { check_long_queries(kCheck); }

TEST(CpuAttend, WindowSoftCapAlibiAndSinks) { check_every_option(64, kCheck); }

TEST(CpuAttend, WindowsOfEverySize) {
  AttendShape shape;
  shape.format = {2, 2, 32, 16};
  shape.head_dim = 64;
  shape.seq_lens = {161};
  shape.q_lens = {2};
  AttendCase c(shape);
  for (const int window : {1, 2, 31, 32, 33, 64, 65, 129, 160, 161, 162, 100000}) {
    kvarn_attend_params p = c.params();
    p.window = window;
    c.expect_oracle_on_every_isa(p, "window " + std::to_string(window));
  }
}

TEST(CpuAttend, StridesAndRotatedFrames) { check_strides_and_rotated_frames(kCheck); }

TEST(CpuAttend, LargeScores) { check_large_scores(kCheck); }

// Scales within one vector 1000 : 1, which leaves the small ones few of the query's 16 bits.
TEST(CpuAttend, OutlyingScales) {
  for (const Metadata which : {kKScale, kKTokenScale, kVScale, kVChannelScale}) {
    for (const int outliers : {1, 4}) {
      for (const double ratio : {30.0, 1000.0}) {
        AttendShape shape;
        shape.seq_lens = {640};
        shape.q_lens = {8};
        shape.sink_tiles = 0;
        AttendCase c(shape);
        const Metadata zero = which == kKScale ? kKZero : kVZero;
        const int top = which == kKScale ? 15 : 3;
        for (int block = 0; block < 5; ++block) {
          for (int head = 0; head < shape.kv_heads; ++head) {
            std::vector<float> values, zeros;
            for (int i = 0; i < 128; ++i) {
              values.push_back(static_cast<float>(ref::metadata_value(c.record(block, head), c.layout(), which, i)));
              zeros.push_back(static_cast<float>(ref::metadata_value(c.record(block, head), c.layout(), zero, i)));
            }
            for (int n = 0; n < outliers; ++n) {
              const int at = (block * 37 + head * 11 + n * 29) % 128;
              values[at] *= static_cast<float>(ratio);
              zeros[at] = -0.5f * static_cast<float>(top) * values[at];
            }
            ref::set_metadata(c.record(block, head), c.layout(), which, values.data());
            if (which == kKScale || which == kVScale) ref::set_metadata(c.record(block, head), c.layout(), zero, zeros.data());
          }
        }
        c.expect_oracle_on_every_isa(
            c.params(), "vector " + std::to_string(which) + ", " + std::to_string(outliers) + " outliers of " + std::to_string(ratio));
      }
    }
  }
}

TEST(CpuAttend, LargeMeansOfChannels) {
  AttendShape shape;
  shape.seq_lens = {600};
  shape.q_lens = {4};
  shape.mean_size = 30;
  shape.sink_tiles = 0;
  check(shape);
}

// Instruction sets differ in the order of fp32 sums, and so in the integers of values that lie at a half.
TEST(CpuAttend, InstructionSetsAgree) {
  AttendShape shape;
  shape.format = {3, 5, 64, 16};
  shape.head_dim = 112;
  shape.seq_lens = {500, 77};
  shape.q_lens = {2, 3};
  AttendCase c(shape);
  const AttendCase::Result first = c.run(c.plan_params("generic"), c.params());
  const std::vector<double> reference(first.out.begin(), first.out.end()), lse(first.lse.begin(), first.lse.end());
  for (const std::string& isa : runnable_isas()) {
    // An integer that moves by one changes a row by at most 1/32639 of its largest term; here and there one does, rarely three in a row.
    EXPECT_LE(c.worst_error(c.run(c.plan_params(isa), c.params()), {reference, lse}), 3.0 / 32639) << isa;
  }
}

}  // namespace
}  // namespace kvarn::test
