// The C ABI as a user of the shared library sees it: formats, layouts, versions, errors, plans.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "expect.h"
#include "kvarn/format.h"
#include "ref/ref.h"

namespace {

TEST(Api, TheVersionIsTheProjects) { EXPECT_STREQ(kvarn_version(), KVARN_VERSION_STRING); }

TEST(Api, EveryStatusHasAName) {
  for (int status = KVARN_OK; status <= KVARN_INTERNAL; ++status) {
    EXPECT_STRNE(kvarn_status_name(static_cast<kvarn_status>(status)), "unknown status") << status;
  }
  EXPECT_STREQ(kvarn_status_name(static_cast<kvarn_status>(KVARN_INTERNAL + 1)), "unknown status");
}

TEST(Api, TheLastErrorBelongsToItsThread) {
  kvarn_format format{};
  EXPECT_FAILS(kvarn_format_parse("here", &format), KVARN_INVALID_ARGUMENT, "got \"here\"");
  std::thread([&] {
    EXPECT_STREQ(kvarn_last_error(), "");
    EXPECT_FAILS(kvarn_format_parse("there", &format), KVARN_INVALID_ARGUMENT, "got \"there\"");
  }).join();
  EXPECT_NE(std::strstr(kvarn_last_error(), "here"), nullptr);
  const std::string before = kvarn_last_error();
  EXPECT_SUCCEEDS(kvarn_format_parse("k4v2_g128", &format));
  EXPECT_EQ(kvarn_last_error(), before) << "a success leaves it alone";
}

TEST(Api, FormatNamesRoundTrip) {
  for (const int32_t k : {2, 3, 4, 5, 6, 8}) {
    for (const int32_t v : {2, 3, 4, 5, 6, 8}) {
      for (const int32_t g : {32, 64, 128, 256}) {
        for (const int32_t m : {16, 8}) {
          const kvarn_format format{k, v, g, m};
          char expected[32];
          std::snprintf(expected, sizeof expected, "k%dv%d_g%d%s", k, v, g, m == 8 ? "_m8" : "");
          char name[32];
          ASSERT_SUCCEEDS(kvarn_format_name(format, name, sizeof name));
          EXPECT_STREQ(name, expected);
          kvarn_format parsed{};
          ASSERT_SUCCEEDS(kvarn_format_parse(name, &parsed));
          EXPECT_EQ(std::memcmp(&parsed, &format, sizeof format), 0) << name;
        }
      }
    }
  }
}

TEST(Api, OtherFormatNamesAreErrors) {
  kvarn_format format{1, 2, 3, 4};
  for (const char* name :
       {"", "k4", "k4v2", "k4v2g128", "k4v2_g", "k4v2_g128 ", " k4v2_g128", "k4v2_g128_m16", "k4v2_g128_m8x", "K4v2_g128", "k04v2_g128",
        "k4v2_g0128", "k+4v2_g128", "k-4v2_g128", "k4v2_g99999999999999999999", "k4v2_g128k4v2_g128"}) {
    EXPECT_FAILS(
        kvarn_format_parse(name, &format), KVARN_INVALID_ARGUMENT,
        "[kvarn.format_parse] name: expected \"k<bits>v<bits>_g<tile tokens>\" with an optional \"_m8\", such as \"k4v2_g128\", got \"" +
            std::string(name) + "\"");
  }
  EXPECT_FAILS(kvarn_format_parse("k7v2_g128", &format), KVARN_INVALID_ARGUMENT,
               "[kvarn.format_parse] format.k_bits: expected 2, 3, 4, 5, 6 or 8, got 7");
  EXPECT_FAILS(kvarn_format_parse("k4v1_g128", &format), KVARN_INVALID_ARGUMENT,
               "[kvarn.format_parse] format.v_bits: expected 2, 3, 4, 5, 6 or 8, got 1");
  EXPECT_FAILS(kvarn_format_parse("k4v2_g16", &format), KVARN_INVALID_ARGUMENT,
               "[kvarn.format_parse] format.tile_tokens: expected 32, 64, 128 or 256, got 16");
  EXPECT_FAILS(kvarn_format_parse(nullptr, &format), KVARN_INVALID_ARGUMENT, "[kvarn.format_parse] name: expected a string, got NULL");
  EXPECT_FAILS(kvarn_format_parse("k4v2_g128", nullptr), KVARN_INVALID_ARGUMENT,
               "[kvarn.format_parse] format: expected a pointer, got NULL");
  EXPECT_EQ(format.k_bits, 1) << "a failure writes nothing";
  // A message is cut, not overrun.
  EXPECT_FAILS(kvarn_format_parse(std::string(5000, 'x').c_str(), &format), KVARN_INVALID_ARGUMENT, "got \"xxxx");
}

TEST(Api, FormatNameChecksItsBuffer) {
  const kvarn_format format{4, 2, 128, 8};
  char name[16] = "untouched";
  EXPECT_FAILS(kvarn_format_name(format, name, 12), KVARN_INVALID_ARGUMENT,
               "[kvarn.format_name] capacity: expected at least 13 bytes, got 12");
  EXPECT_STREQ(name, "untouched");
  EXPECT_SUCCEEDS(kvarn_format_name(format, name, 13));
  EXPECT_STREQ(name, "k4v2_g128_m8");
  EXPECT_FAILS(kvarn_format_name(format, nullptr, 13), KVARN_INVALID_ARGUMENT, "name: expected a pointer, got NULL");
  EXPECT_FAILS(kvarn_format_name({4, 2, 128, 0}, name, 13), KVARN_INVALID_ARGUMENT,
               "[kvarn.format_name] format.metadata_bits: expected 16 or 8, got 0");
}

TEST(Api, TheLayoutIsFormatHs) {
  for (const int32_t head_dim : {64, 80, 96, 112, 128, 160, 192, 256, 512}) {
    for (const kvarn_format& format : {kvarn_format{4, 2, 128, 16}, kvarn_format{3, 5, 32, 8}, kvarn_format{8, 6, 256, 16}}) {
      kvarn_record_layout layout{};
      ASSERT_SUCCEEDS(kvarn_record_layout_of(format, head_dim, &layout));
      const kvarn::RecordLayout r = kvarn::make_layout({format.k_bits, format.v_bits, format.tile_tokens, format.metadata_bits}, head_dim);
      EXPECT_EQ(layout.record_bytes, r.record_bytes);
      EXPECT_EQ(layout.k_low_offset, 0);
      EXPECT_EQ(layout.k_high_offset, layout.k_low_bytes);
      EXPECT_EQ(layout.v_low_offset, layout.k_high_offset + layout.k_high_bytes);
      EXPECT_EQ(layout.v_high_offset, layout.v_low_offset + layout.v_low_bytes);
      EXPECT_EQ(layout.metadata_offset[0], layout.v_high_offset + layout.v_high_bytes);
      for (int i = 0; i < 6; ++i) {
        EXPECT_EQ(layout.metadata_offset[i], r.metadata_offset[i]);
        EXPECT_EQ(layout.metadata_count[i], i == 0 || i == 1 || i == 3 ? head_dim : format.tile_tokens);
      }
      EXPECT_EQ(layout.metadata_range_offset, r.metadata_range_offset);
    }
  }
  kvarn_record_layout layout{};
  EXPECT_FAILS(kvarn_record_layout_of({4, 2, 128, 16}, 100, &layout), KVARN_INVALID_ARGUMENT,
               "[kvarn.record_layout_of] head_dim: expected 64, 80, 96, 112, 128, 160, 192, 256 or 512, got 100");
  EXPECT_FAILS(kvarn_record_layout_of({4, 2, 128, 16}, 128, nullptr), KVARN_INVALID_ARGUMENT,
               "[kvarn.record_layout_of] layout: expected a pointer, got NULL");
}

TEST(Api, PlansDescribeThemselves) {
  kvarn_plan_params params{};
  KVARN_INIT(params);
  params.config = kvarn_config{{4, 2, 128, 16}, 128, 2, KVARN_F16};
  params.num_q_heads = 8;
  params.max_num_seqs = 4;
  params.max_q_tokens = 16;
  params.max_tiles = 64;
  params.num_threads = 2;
  kvarn_plan* plan = nullptr;
  ASSERT_SUCCEEDS(kvarn_plan_create(&params, &plan));
  EXPECT_EQ(std::strncmp(kvarn_plan_describe(plan), "cpu/", 4), 0) << kvarn_plan_describe(plan);
  EXPECT_GE(kvarn_plan_workspace_bytes(plan), 0);
  kvarn_plan_destroy(plan);
  kvarn_plan_destroy(nullptr);
  EXPECT_EQ(kvarn_plan_workspace_bytes(nullptr), 0);
  EXPECT_STREQ(kvarn_plan_describe(nullptr), "");
  plan = nullptr;
  EXPECT_FAILS(kvarn_plan_create(&params, nullptr), KVARN_INVALID_ARGUMENT, "[kvarn.plan_create] plan: expected a pointer, got NULL");
  EXPECT_FAILS(kvarn_plan_create(nullptr, &plan), KVARN_INVALID_ARGUMENT, "[kvarn.plan_create] params: expected a pointer, got NULL");
  params.config.head_dim = 100;
  EXPECT_FAILS(kvarn_plan_create(&params, &plan), KVARN_INVALID_ARGUMENT, "[kvarn.plan_create] head_dim: expected 64");
  params.config.head_dim = 128;
  params.cpu_isa = "mmx";
  EXPECT_FAILS(kvarn_plan_create(&params, &plan), KVARN_INVALID_ARGUMENT, "mmx");
  EXPECT_EQ(plan, nullptr);
}

TEST(Api, CpuIsasAreNamed) {
  const std::string isas = kvarn_cpu_isas();
  EXPECT_NE(isas.find("generic"), std::string::npos) << isas;
}

// A cache through every operation: rotate, append, commit, encode, attend, decode.
TEST(Api, OneSequenceThroughEveryOperation) {
  constexpr int32_t kHeadDim = 64, kTile = 32, kTokens = 70;
  kvarn_plan_params plan_params{};
  KVARN_INIT(plan_params);
  plan_params.config = kvarn_config{{8, 8, kTile, 16}, kHeadDim, 1, KVARN_F32};
  plan_params.num_q_heads = 1;
  plan_params.max_num_seqs = 1;
  plan_params.max_q_tokens = 1;
  plan_params.max_tiles = 4;
  plan_params.num_threads = 1;
  kvarn_plan* plan = nullptr;
  ASSERT_SUCCEEDS(kvarn_plan_create(&plan_params, &plan));
  kvarn_pool_params pool_params{};
  KVARN_INIT(pool_params);
  pool_params.num_blocks = pool_params.num_slots = 4;
  pool_params.tile_tokens = kTile;
  kvarn_pool* pool = nullptr;
  ASSERT_SUCCEEDS(kvarn_pool_create(&pool_params, &pool));
  kvarn_sequence sequence = 0;
  ASSERT_SUCCEEDS(kvarn_sequence_create(pool, &sequence));

  std::vector<float> k(kTokens * kHeadDim), v(k.size());
  for (size_t i = 0; i < k.size(); ++i) {
    k[i] = static_cast<float>(static_cast<int>(i * 7919 % 201) - 100) / 50;
    v[i] = static_cast<float>(static_cast<int>(i * 104729 % 201) - 100) / 50;
  }
  kvarn_record_layout layout{};
  ASSERT_SUCCEEDS(kvarn_record_layout_of(plan_params.config.format, kHeadDim, &layout));
  std::vector<float> staging(4 * 2 * kTile * kHeadDim);
  std::vector<uint8_t> records(static_cast<size_t>(4 * layout.record_bytes));

  kvarn_work work{};
  KVARN_INIT(work);
  ASSERT_SUCCEEDS(kvarn_sequence_append(pool, sequence, kTokens, &work));
  kvarn_append_params append{};
  KVARN_INIT(append);
  append.k = k.data();
  append.v = v.data();
  append.k_token_stride = append.v_token_stride = append.k_head_stride = append.v_head_stride = kHeadDim;
  append.slot_mapping = work.slot_mapping;
  append.num_tokens = work.num_tokens;
  append.staging = staging.data();
  append.num_slots = 4;
  ASSERT_SUCCEEDS(kvarn_append(plan, &append, nullptr));

  ASSERT_SUCCEEDS(kvarn_sequence_commit(pool, sequence, kTokens, &work));
  ASSERT_EQ(work.num_encodes, 2);
  std::vector<int32_t> slots, blocks;
  for (int64_t i = 0; i < work.num_encodes; ++i) {
    slots.push_back(work.encodes[i].source);
    blocks.push_back(work.encodes[i].destination);
  }
  kvarn_encode_params encode{};
  KVARN_INIT(encode);
  encode.staging = staging.data();
  encode.num_slots = 4;
  encode.records = records.data();
  encode.num_blocks = 4;
  encode.num_layers = 1;
  encode.slots = slots.data();
  encode.blocks = blocks.data();
  encode.num_tiles = work.num_encodes;
  ASSERT_SUCCEEDS(kvarn_encode(plan, &encode, nullptr));

  kvarn_decode_params decode{};
  KVARN_INIT(decode);
  std::vector<float> k_back(2 * kTile * kHeadDim), v_back(k_back.size());
  decode.records = records.data();
  decode.num_blocks = 4;
  decode.blocks = blocks.data();
  decode.num_tiles = decode.num_destinations = 2;
  decode.k = k_back.data();
  decode.v = v_back.data();
  ASSERT_SUCCEEDS(kvarn_decode(plan, &decode, nullptr));
  // The same by the oracle: the records byte for byte, the decoded values bit for bit.
  const kvarn::Format format{8, 8, kTile, 16};
  const size_t tile_values = size_t{kTile} * kHeadDim;
  for (size_t t = 0; t < 2; ++t) {
    std::vector<float> k_rotated(k.begin() + static_cast<ptrdiff_t>(t * tile_values),
                                 k.begin() + static_cast<ptrdiff_t>((t + 1) * tile_values));
    std::vector<float> v_rotated(v.begin() + static_cast<ptrdiff_t>(t * tile_values),
                                 v.begin() + static_cast<ptrdiff_t>((t + 1) * tile_values));
    for (size_t row = 0; row < kTile; ++row) {
      kvarn::ref::hadamard(&k_rotated[row * kHeadDim], kHeadDim, false);
      kvarn::ref::hadamard(&v_rotated[row * kHeadDim], kHeadDim, false);
    }
    std::vector<uint8_t> record(static_cast<size_t>(layout.record_bytes));
    kvarn::ref::encode_tile(k_rotated.data(), v_rotated.data(), format, kHeadDim, {}, record.data());
    const uint8_t* stored = &records[static_cast<size_t>(blocks[t] * layout.record_bytes)];
    EXPECT_EQ(std::memcmp(stored, record.data(), record.size()), 0) << "tile " << t;
    std::vector<float> k_expected(tile_values), v_expected(tile_values);
    kvarn::ref::decode_tile(record.data(), format, kHeadDim, false, k_expected.data(), v_expected.data());
    EXPECT_EQ(std::memcmp(&k_back[t * tile_values], k_expected.data(), tile_values * sizeof(float)), 0) << "tile " << t;
    EXPECT_EQ(std::memcmp(&v_back[t * tile_values], v_expected.data(), tile_values * sizeof(float)), 0) << "tile " << t;
  }

  std::vector<float> q(k.begin() + 7 * kHeadDim, k.begin() + 8 * kHeadDim), out(kHeadDim, 0.0f);
  std::vector<int32_t> table(3);
  ASSERT_SUCCEEDS(kvarn_sequence_table(pool, sequence, table.data(), 3));
  const int32_t cu_q_lens[2] = {0, 1}, seq_len = kTokens;
  float lse = 0;
  const size_t workspace_bytes = static_cast<size_t>(kvarn_plan_workspace_bytes(plan));
  std::vector<uint8_t> workspace_memory(workspace_bytes + 256);
  kvarn_attend_params attend{};
  KVARN_INIT(attend);
  attend.q = q.data();
  attend.out = out.data();
  attend.q_token_stride = attend.q_head_stride = attend.out_token_stride = attend.out_head_stride = kHeadDim;
  attend.lse = &lse;
  attend.cu_q_lens = cu_q_lens;
  attend.seq_lens = &seq_len;
  attend.block_table = table.data();
  attend.block_table_stride = 3;
  attend.num_seqs = 1;
  attend.num_q_tokens = 1;
  attend.records = records.data();
  attend.num_blocks = 4;
  attend.staging = staging.data();
  attend.num_slots = 4;
  attend.softmax_scale = 0.125f;
  attend.causal = 1;
  attend.workspace = workspace_memory.data() + (256 - reinterpret_cast<uintptr_t>(workspace_memory.data()) % 256) % 256;
  attend.workspace_bytes = static_cast<int64_t>(workspace_bytes);
  ASSERT_SUCCEEDS(kvarn_attend(plan, &attend, nullptr));
  kvarn::ref::AttendProblem problem{plan_params.config, 1, attend};
  std::vector<double> expected(kHeadDim);
  double expected_lse = 0;
  kvarn::ref::attend(problem, expected.data(), &expected_lse);
  double error = 0, norm = 0;
  for (size_t c = 0; c < kHeadDim; ++c) {
    error += (out[c] - expected[c]) * (out[c] - expected[c]);
    norm += expected[c] * expected[c];
  }
  // attend's budget: 5e-4 of a row's norm, and a score error that moves no weight by more than that.
  EXPECT_LE(std::sqrt(error / norm), 5e-4);
  EXPECT_NEAR(lse, expected_lse, 5e-4);
  kvarn_pool_destroy(pool);
  kvarn_plan_destroy(plan);
}

}  // namespace
