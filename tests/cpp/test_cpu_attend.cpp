// kvarn_attend on the CPU against the float64 oracle on the same records and staging, on every instruction set of this machine.
#include <algorithm>
#include <string>
#include <vector>

#include "attend_case.h"

namespace kvarn::test {
namespace {

std::string name_of(const AttendShape& s) {
  return "k" + std::to_string(s.format.k_bits) + "v" + std::to_string(s.format.v_bits) + "_g" + std::to_string(s.format.tile_tokens) +
         (s.format.metadata_bits == 8 ? "_m8" : "") + " head_dim " + std::to_string(s.head_dim) + " group " + std::to_string(s.group) +
         " dtype " + std::to_string(s.dtype);
}

void check(const AttendShape& shape) {
  AttendCase c(shape);
  c.expect_oracle_on_every_isa(c.params(), name_of(shape));
}

constexpr int kWidths[] = {2, 3, 4, 5, 6, 8};

TEST(CpuAttend, EveryHeadDimAndTileLength) {
  int i = 0;
  for (const int head_dim : {64, 80, 96, 112, 128, 160, 192, 256, 512}) {
    for (const int tokens : {32, 64, 128, 256}) {
      AttendShape shape;
      shape.format = {kWidths[i % 6], kWidths[(i / 6 + i) % 6], tokens, i % 5 == 0 ? 8 : 16};
      shape.head_dim = head_dim;
      shape.kv_heads = 1 + i % 2;
      shape.group = 1 + i % 4;
      shape.dtype = i % 3;
      shape.seq_lens = {3 * tokens + 7, tokens};
      shape.q_lens = {2, 1};
      shape.seed = static_cast<uint32_t>(++i);
      check(shape);
    }
  }
}

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
  for (const int group : {1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 33, 64, 71}) {
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
    shape.seq_lens = {0, 1, 127, 128, 129, 255, 256, 257, 5, 700, 64};
    shape.q_lens = {1, 1, 1, 1, 1, 2, 0, 4, 5, 1, 64};
    shape.sink_tiles = sink_tiles;
    check(shape);
  }
}

TEST(CpuAttend, QueriesLongerThanTheSequenceSeeNothingBeforeIt) {
  AttendShape shape;
  shape.seq_lens = {0, 3, 130};
  shape.q_lens = {2, 5, 140};
  AttendCase c(shape);
  kvarn_attend_params p = c.params();
  c.expect_oracle_on_every_isa(p, "causal");
  p.causal = 0;
  c.expect_oracle_on_every_isa(p, "not causal");
}

TEST(CpuAttend, LongQueries) {
  AttendShape shape;
  shape.kv_heads = 1;
  shape.group = 3;
  shape.seq_lens = {333, 190, 40};
  shape.q_lens = {200, 190, 33};
  AttendCase c(shape);
  kvarn_attend_params p = c.params();
  c.expect_oracle_on_every_isa(p, "causal");
  p.window = 50;
  c.expect_oracle_on_every_isa(p, "window");
  p.causal = 0;
  c.expect_oracle_on_every_isa(p, "window, not causal");
  p.window = 0;
  c.expect_oracle_on_every_isa(p, "not causal");
}

TEST(CpuAttend, WindowSoftCapAlibiAndSinks) {
  AttendShape shape;
  shape.format = {4, 2, 64, 16};
  shape.group = 4;
  shape.seq_lens = {700, 65, 300, 0};
  shape.q_lens = {3, 1, 20, 1};
  shape.q_size = 2;
  std::vector<float> slopes, sinks;
  for (int h = 0; h < shape.q_heads(); ++h) {
    slopes.push_back(std::exp2(-1.0f - static_cast<float>(h)));
    sinks.push_back(static_cast<float>(h % 5) * 2 - 3);
  }
  AttendCase c(shape);
  for (int options = 0; options < 16; ++options) {
    for (const int causal : {0, 1}) {
      kvarn_attend_params p = c.params();
      p.causal = causal;
      std::string what = causal ? "causal" : "full";
      if (options & 1) p.window = 100, what += " window";
      if (options & 2) p.logits_soft_cap = 3, what += " cap";
      if (options & 4) p.alibi_slopes = slopes.data(), what += " alibi";
      if (options & 8) p.sinks = sinks.data(), what += " sinks";
      c.expect_oracle_on_every_isa(p, what);
    }
  }
}

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

TEST(CpuAttend, StridesAndRotatedFrames) {
  for (const int head_dim : {96, 128}) {
    for (const int dtype : {KVARN_F32, KVARN_F16, KVARN_BF16}) {
      AttendShape shape;
      shape.head_dim = head_dim;
      shape.dtype = dtype;
      shape.stride_padding = 24;
      shape.q_lens = {5};
      AttendCase c(shape);
      for (int frames = 0; frames < 4; ++frames) {
        kvarn_attend_params p = c.params();
        p.q_rotated = frames & 1;
        p.out_rotated = frames >> 1;
        c.expect_oracle_on_every_isa(p, "frames " + std::to_string(frames) + " " + name_of(shape));
      }
    }
  }
}

// Scores of every size, up to a softmax that is all but one-hot.
TEST(CpuAttend, LargeScores) {
  for (const double q_size : {0.0, 0.1, 3.0, 10.0, 30.0, 100.0}) {
    for (const int k_bits : {2, 4, 8}) {
      AttendShape shape;
      shape.format.k_bits = k_bits;
      shape.seq_lens = {600};
      shape.q_lens = {8};
      shape.q_size = q_size;
      shape.sink_tiles = 0;
      AttendCase c(shape);
      c.expect_oracle_on_every_isa(c.params(), "q of size " + std::to_string(q_size) + ", K bits " + std::to_string(k_bits));
    }
  }
}

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
