// kvarn_attend on the GPU against the float64 oracle on the same records and staging.
#include <cmath>

#include "attend_shapes.h"
#include "cuda_machine.h"

namespace kvarn::test {
namespace {

// Tensor cores cut each of up to 65 sums (head_dim 256, two parts of q) off at 2^-23 of the partial sum, all towards zero; half of that on
// average.
constexpr double kScoreCut = 65 * 0x1p-24;

void check(AttendCase& c, const kvarn_attend_params& p, const std::string& what) {
  DeviceAttend device(c, p);
  const AttendCase::Result first = device.run();
  c.expect_oracle(first, c.oracle(p), what + " (" + device.description() + ")", kScoreCut);
  // The same bits every time.
  const AttendCase::Result second = device.run();
  EXPECT_EQ(std::memcmp(first.out.data(), second.out.data(), first.out.size() * sizeof(float)), 0) << what;
  EXPECT_EQ(std::memcmp(first.lse.data(), second.lse.data(), first.lse.size() * sizeof(float)), 0) << what;
}
void check(const AttendShape& shape) {
  AttendCase c(shape);
  check(c, c.params(), name_of(shape));
}
constexpr auto kCheck = [](AttendCase& c, const kvarn_attend_params& p, const std::string& what) { check(c, p, what); };

TEST(CudaAttend, TensorCoreShapes) {
  KVARN_NEEDS_GPU();
  uint32_t seed = 1;
  for (const int head_dim : {64, 128, 256}) {
    for (const int k_bits : {2, 3, 4, 8}) {
      for (const int v_bits : {2, 3, 4, 8}) {
        for (const int group : {3, 12}) {
          AttendShape shape;
          shape.format = {k_bits, v_bits, 128, 16};
          shape.head_dim = head_dim;
          shape.group = group;
          shape.dtype = static_cast<int>(seed % 3);
          shape.seq_lens = {700, 129};
          shape.q_lens = {1, 2};
          shape.seed = seed++;
          check(shape);
        }
      }
    }
  }
}

TEST(CudaAttend, EveryHeadDimAndTileLength) {
  KVARN_NEEDS_GPU();
  check_every_head_dim_and_tile_length(kCheck);
}

TEST(CudaAttend, EveryGroup) {
  KVARN_NEEDS_GPU();
  for (const int head_dim : {128, 256}) {
    for (const int group : kAttendGroups) {
      AttendShape shape;
      shape.head_dim = head_dim;
      shape.group = group;
      shape.seq_lens = {400, 129};
      shape.q_lens = {1, 3};
      check(shape);
    }
  }
}

TEST(CudaAttend, OddLengthsInOneBatch) {
  KVARN_NEEDS_GPU();
  for (const int tile : {64, 128}) {
    for (const int sink_tiles : {0, 1, 100}) {
      for (const int dtype : {KVARN_F32, KVARN_F16, KVARN_BF16}) {
        AttendShape shape;
        shape.format.tile_tokens = tile;
        shape.dtype = dtype;
        shape.sink_tiles = sink_tiles;
        check_odd_lengths_in_one_batch(shape, kCheck);
      }
    }
  }
}

TEST(CudaAttend, ManySequencesAndLongOnes) {
  KVARN_NEEDS_GPU();
  AttendShape shape;
  shape.kv_heads = 2;
  shape.group = 2;
  shape.seq_lens.clear();
  shape.q_lens.clear();
  for (int i = 0; i < 70; ++i) {
    shape.seq_lens.push_back(i % 9 == 0 ? 2100 + i : (37 * i) % 300);
    shape.q_lens.push_back(1 + (i % 7 == 0));
  }
  check(shape);
  AttendShape one;
  one.kv_heads = 1;
  one.group = 8;
  one.seq_lens = {30000};
  one.q_lens = {2};
  check(one);
}

// Batches of which attend_walk.cuh makes a line of tiles, with and without tiles for what an item costs, and whole items.
TEST(CudaAttend, EveryDivisionOfTheWork) {
  KVARN_NEEDS_GPU();
  const auto shape_of = [](int kv_heads, const std::vector<int>& seq_lens) {
    AttendShape shape;
    shape.kv_heads = kv_heads;
    shape.group = 2;
    shape.seq_lens = seq_lens;
    shape.q_lens.assign(seq_lens.size(), 1);
    return shape;
  };
  std::vector<int> ones(81, 1), hundreds(131, 100), alike;
  ones[40] = 8192;
  hundreds[0] = 5120;
  for (int i = 0; i < 90; ++i) alike.push_back(300 + i);
  for (const int metadata_bits : {16, 8}) {  // 8: not for tensor cores
    for (const AttendShape& division : {shape_of(8, ones), shape_of(1, hundreds), shape_of(4, alike)}) {
      AttendShape shape = division;
      shape.format.metadata_bits = metadata_bits;
      check(shape);
    }
  }
}

TEST(CudaAttend, QueriesLongerThanTheSequenceSeeNothingBeforeIt) {
  KVARN_NEEDS_GPU();
  for (const int tile : {64, 128}) {
    AttendShape shape;
    shape.format.tile_tokens = tile;
    check_queries_longer_than_the_sequence(shape, kCheck);
  }
}

TEST(CudaAttend, LongQueries) {
  KVARN_NEEDS_GPU();
  check_long_queries(kCheck);
}

TEST(CudaAttend, WindowSoftCapAlibiAndSinks) {
  KVARN_NEEDS_GPU();
  for (const int tile : {64, 128}) check_every_option(tile, kCheck);
}

TEST(CudaAttend, WindowsOfEverySize) {
  KVARN_NEEDS_GPU();
  AttendShape shape;
  shape.head_dim = 64;
  shape.seq_lens = {661};
  shape.q_lens = {2};
  AttendCase c(shape);
  for (const int window : {1, 2, 31, 127, 128, 129, 130, 257, 660, 661, 662, 100000}) {
    kvarn_attend_params p = c.params();
    p.window = window;
    check(c, p, "window " + std::to_string(window));
  }
}

TEST(CudaAttend, StridesAndRotatedFrames) {
  KVARN_NEEDS_GPU();
  check_strides_and_rotated_frames(kCheck);
}

TEST(CudaAttend, LargeScores) {
  KVARN_NEEDS_GPU();
  check_large_scores(kCheck);
}

TEST(CudaAttend, NegativeAndZeroScale) {
  KVARN_NEEDS_GPU();
  AttendShape shape;
  shape.seq_lens = {300};
  AttendCase c(shape);
  kvarn_attend_params p = c.params();
  p.softmax_scale = -0.05f;
  check(c, p, "negative");
  p.softmax_scale = 0.0f;
  check(c, p, "zero");
}

// A NaN reaches the rows that see its tile, and no other sequence or head.
TEST(CudaAttend, NanStaysWhereItIsSeen) {
  KVARN_NEEDS_GPU();
  AttendShape shape;
  shape.seq_lens = {500, 500, 300};
  shape.q_lens = {1, 2, 1};
  AttendCase c(shape);
  for (const Metadata which : {kKScale, kKZero, kKTokenScale, kVChannelScale, kVScale, kVZero}) {
    AttendCase broken(shape);
    const int block = broken.entry(0, 1);
    ASSERT_GE(block, 0);
    ref::set_metadata_nan(broken.record(block, 1), broken.layout(), which);
    check(broken, broken.params(), "metadata " + std::to_string(which));
  }
  AttendCase staging(shape);
  const int slot = ~staging.entry(1, 0);
  ASSERT_GE(slot, 0);
  staging.set_value(staging.staging_value(slot, 1, 0, 5, 7), NAN);
  check(staging, staging.params(), "staging");
  AttendCase query(shape);
  query.set_value(query.q_value(1, 3, 11), NAN);
  check(query, query.params(), "q");
}

// What lies behind a sequence's last token in its slot is undefined.
TEST(CudaAttend, UnusedStagingIsNotRead) {
  KVARN_NEEDS_GPU();
  for (const int dtype : {KVARN_F32, KVARN_F16, KVARN_BF16}) {
    AttendShape shape;
    shape.dtype = dtype;
    shape.seq_lens = {131, 300};
    shape.q_lens = {1, 3};
    AttendCase c(shape);
    for (const int sequence : {0, 1}) {
      const int tile = shape.seq_lens[sequence] / 128, slot = ~c.entry(sequence, tile);
      for (int operand = 0; operand < 2; ++operand) {
        for (int token = shape.seq_lens[sequence] % 128; token < 128; ++token) {
          for (int d = 0; d < 128; ++d) c.set_value(c.staging_value(slot, operand, 1, token, d), NAN);
        }
      }
    }
    check(c, c.params(), name_of(shape));
  }
}

// An index outside its table makes that sequence NaN and leaves the others as they are.
TEST(CudaAttend, InvalidIndicesGiveNanForTheirSequenceAlone) {
  KVARN_NEEDS_GPU();
  for (const int tile : {64, 128}) {
    AttendShape shape;
    shape.format.tile_tokens = tile;
    shape.seq_lens = {500, 450, 300};
    shape.q_lens = {1, 2, 1};
    AttendCase c(shape);
    const kvarn_attend_params p = c.params();
    const AttendCase::Expected expected = c.oracle(p);
    const size_t row_values = static_cast<size_t>(shape.q_heads()) * shape.head_dim;
    for (const int32_t bad : {INT32_MAX, INT32_MIN, static_cast<int32_t>(p.num_blocks), ~static_cast<int32_t>(p.num_slots)}) {
      const int32_t good = c.entry(1, 2);
      c.entry(1, 2) = bad;
      const AttendCase::Result got = DeviceAttend(c, p).run();
      c.entry(1, 2) = good;
      ASSERT_EQ(got.status, KVARN_OK);
      for (size_t i = 0; i < got.out.size(); ++i) {
        const size_t token = i / row_values;
        if (token == 1 || token == 2) {
          EXPECT_TRUE(std::isnan(got.out[i])) << i;
        } else {
          EXPECT_NEAR(got.out[i], expected.out[i], 1e-3) << i;  // row-wise 5e-4 of values of about unit size
        }
      }
    }
    // A length beyond the table.
    DeviceAttend device(c, p);
    const std::vector<int32_t> lens{500, 100000, 300};
    device.seq_lens().set(lens.data(), lens.size() * sizeof(int32_t));
    const AttendCase::Result got = device.run();
    for (size_t i = 0; i < got.out.size(); ++i) {
      const size_t token = i / row_values;
      EXPECT_EQ(std::isnan(got.out[i]), token == 1 || token == 2) << i;
    }
  }
}

TEST(CudaAttend, BatchInvariant) {
  KVARN_NEEDS_GPU();
  for (const int group : {4, 9}) {
    AttendShape shape;
    shape.group = group;
    shape.seq_lens = {900, 1300, 260, 2500};
    shape.q_lens = {1, 1, 1, 1};
    AttendCase c(shape);
    const kvarn_attend_params p = c.params();
    DeviceAttend batch(c, p, true);
    const AttendCase::Result together = batch.run();
    c.expect_oracle(together, c.oracle(p), "batch");
    const size_t row_values = static_cast<size_t>(shape.q_heads()) * shape.head_dim;
    for (int s = 0; s < 4; ++s) {
      // The same plan, one sequence.
      DeviceAttend alone(c, p, true);
      const std::vector<int32_t> cu{0, 1};
      DeviceBytes cu_one(cu);
      kvarn_attend_params& q = alone.params();
      q.cu_q_lens = cu_one.as<int32_t>();
      q.seq_lens += s;
      q.block_table += s * q.block_table_stride;
      q.q = static_cast<const uint8_t*>(q.q) + s * q.q_token_stride * c.value_bytes();
      q.out = static_cast<uint8_t*>(q.out) + s * q.out_token_stride * c.value_bytes();
      q.num_seqs = 1;
      q.num_q_tokens = 1;
      const AttendCase::Result got = alone.run();
      EXPECT_EQ(std::memcmp(got.out.data() + s * row_values, together.out.data() + s * row_values, row_values * sizeof(float)), 0)
          << "sequence " << s << " group " << group;
    }
  }
}

TEST(CudaAttend, GraphIsTheFirstCallAndReplaysWithOtherLengths) {
  KVARN_NEEDS_GPU();
  AttendShape shape;
  shape.dtype = KVARN_F16;
  shape.seq_lens = {900, 1300, 260};
  shape.q_lens = {1, 1, 1};
  AttendCase c(shape);
  const kvarn_attend_params p = c.params();
  DeviceAttend device(c, p);
  cudaStream_t stream;
  EXPECT_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  EXPECT_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  EXPECT_EQ(device.launch(stream), KVARN_OK) << kvarn_last_error();
  EXPECT_CUDA(cudaStreamEndCapture(stream, &graph));
  EXPECT_CUDA(cudaGraphInstantiate(&executable, graph, 0));
  for (const std::vector<int32_t>& lens : {std::vector<int32_t>{900, 1300, 260}, {130, 1, 257}, {899, 1299, 129}}) {
    device.seq_lens().set(lens.data(), lens.size() * sizeof(int32_t));
    EXPECT_CUDA(cudaMemset(device.out().data(), 0xa5, device.out().size()));
    EXPECT_CUDA(cudaDeviceSynchronize());
    EXPECT_CUDA(cudaGraphLaunch(executable, stream));
    EXPECT_CUDA(cudaStreamSynchronize(stream));
    kvarn_attend_params host = p;
    host.seq_lens = lens.data();
    c.expect_oracle(device.result(), c.oracle(host), "replay with " + std::to_string(lens[0]));
  }
  EXPECT_CUDA(cudaGraphExecDestroy(executable));
  EXPECT_CUDA(cudaGraphDestroy(graph));
  EXPECT_CUDA(cudaStreamDestroy(stream));
}

}  // namespace
}  // namespace kvarn::test
