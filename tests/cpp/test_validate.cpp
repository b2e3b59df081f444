// What kvarn.h promises about arguments, against a backend that only counts its calls: a refused call never reaches it.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "core/plan.h"
#include "core/structs.h"
#include "core/validate.h"
#include "expect.h"

namespace {

int g_calls = 0;
kvarn_decode_params g_decode{};

template <class Params>
kvarn_status count(void*, const Params*, void*) {
  ++g_calls;
  return KVARN_OK;
}
kvarn_status keep_decode(void*, const kvarn_decode_params* params, void*) {
  ++g_calls;
  g_decode = *params;
  return KVARN_OK;
}

kvarn::BackendTable counting_table(const char* name) {
  kvarn::BackendTable table{};
  table.abi_version = kvarn::kBackendAbiVersion;
  table.name = name;
  table.hadamard = &count<kvarn_hadamard_params>;
  table.append = &count<kvarn_append_params>;
  table.encode = &count<kvarn_encode_params>;
  table.decode = &keep_decode;
  table.attend = &count<kvarn_attend_params>;
  return table;
}

constexpr int kHeadDim = 64, kKvHeads = 2, kQHeads = 4, kTile = 32, kBlocks = 3, kSlots = 4;

// A plan of fp16, k4v2_g32, and valid arguments for every operation; tests break one at a time.
class ValidateTest : public ::testing::Test {
 protected:
  explicit ValidateTest(const char* backend = "cpu") : table_(counting_table(backend)) {
    plan_.table = &table_;
    plan_.description = backend;
    plan_.config = kvarn_config{{4, 2, kTile, 16}, kHeadDim, kKvHeads, KVARN_F16};
    plan_.record_bytes = kvarn::make_layout({4, 2, kTile, 16}, kHeadDim).record_bytes;
    plan_.value_bytes = 2;
    plan_.num_q_heads = kQHeads;
    plan_.max_num_seqs = 3;
    plan_.max_q_tokens = 8;
    plan_.max_tiles = 5;
    plan_.workspace_bytes = 512;
    plan_.host_memory = kvarn::is_host_backend(backend);

    KVARN_INIT(hadamard_);
    hadamard_.x = values_;
    hadamard_.out = values_;
    hadamard_.rows = 4;
    hadamard_.dtype = KVARN_F16;

    KVARN_INIT(append_);
    append_.k = append_.v = values_;
    append_.k_token_stride = append_.v_token_stride = kKvHeads * kHeadDim;
    append_.k_head_stride = append_.v_head_stride = kHeadDim;
    append_.slot_mapping = mapping_;
    append_.num_tokens = 3;
    append_.staging = far(1);
    append_.num_slots = kSlots;

    KVARN_INIT(encode_);
    encode_.staging = far(1);
    encode_.num_slots = kSlots;
    encode_.records = static_cast<uint8_t*>(far(2));
    encode_.num_blocks = kBlocks;
    encode_.num_layers = 1;
    encode_.slots = slots_;
    encode_.blocks = blocks_;
    encode_.num_tiles = 2;

    KVARN_INIT(decode_);
    decode_.records = static_cast<uint8_t*>(far(2));
    decode_.num_blocks = kBlocks;
    decode_.blocks = blocks_;
    decode_.num_tiles = 2;
    decode_.destinations = destinations_;
    decode_.num_destinations = 6;
    decode_.k = far(3);
    decode_.v = far(4);
    decode_.dtype = KVARN_F32;

    KVARN_INIT(attend_);
    attend_.q = far(1);
    attend_.out = far(2);
    attend_.q_token_stride = attend_.out_token_stride = kQHeads * kHeadDim;
    attend_.q_head_stride = attend_.out_head_stride = kHeadDim;
    attend_.lse = lse_;
    attend_.cu_q_lens = cu_q_lens_;
    attend_.seq_lens = seq_lens_;
    attend_.block_table = block_table_;
    attend_.block_table_stride = 3;
    attend_.num_seqs = 2;
    attend_.num_q_tokens = 3;
    attend_.records = static_cast<uint8_t*>(far(3));
    attend_.num_blocks = kBlocks;
    attend_.staging = far(4);
    attend_.num_slots = kSlots;
    attend_.softmax_scale = 0.125f;
    attend_.causal = 1;
    attend_.workspace = workspace_;
    attend_.workspace_bytes = sizeof workspace_;
    g_calls = 0;
  }

  kvarn_status run(const kvarn_hadamard_params& p) { return kvarn_hadamard(&plan_, &p, nullptr); }
  kvarn_status run(const kvarn_append_params& p) { return kvarn_append(&plan_, &p, nullptr); }
  kvarn_status run(const kvarn_encode_params& p) { return kvarn_encode(&plan_, &p, nullptr); }
  kvarn_status run(const kvarn_decode_params& p) { return kvarn_decode(&plan_, &p, nullptr); }
  kvarn_status run(const kvarn_attend_params& p) { return kvarn_attend(&plan_, &p, nullptr); }

  // Addresses with room for any of the sizes below between them; nothing reads or writes there.
  static void* far(uintptr_t i) { return reinterpret_cast<void*>(i << 52); }

  // `good` passes, and with `change` it fails with `text` and without a call of the backend.
  template <class Params, class Change>
  void refuses(const Params& good, Change change, const char* text, kvarn_status status = KVARN_INVALID_ARGUMENT) {
    g_calls = 0;
    EXPECT_SUCCEEDS(run(good));
    EXPECT_EQ(g_calls, 1);
    Params bad = good;
    change(bad);
    EXPECT_FAILS(run(bad), status, text);
    EXPECT_EQ(g_calls, 1) << text;
  }
  template <class Params, class Change>
  void accepts(const Params& good, Change change, int calls = 1) {
    g_calls = 0;
    Params other = good;
    change(other);
    EXPECT_SUCCEEDS(run(other));
    EXPECT_EQ(g_calls, calls);
  }

  kvarn::BackendTable table_;
  kvarn_plan plan_;
  kvarn_hadamard_params hadamard_{};
  kvarn_append_params append_{};
  kvarn_encode_params encode_{};
  kvarn_decode_params decode_{};
  kvarn_attend_params attend_{};

  // Nothing reads or writes these; only their addresses count.
  alignas(256) uint8_t workspace_[512]{};
  alignas(16) uint8_t values_[4 * kHeadDim * 2 + 2]{};
  float lse_[1]{};
  int64_t mapping_[3] = {-1, 5, kSlots* kTile - 1};
  int32_t slots_[2] = {kSlots - 1, 0};
  int32_t blocks_[2] = {0, kBlocks - 1};
  int32_t destinations_[2] = {5, 0};
  int32_t cu_q_lens_[3] = {0, 2, 3};
  int32_t seq_lens_[2] = {40, 96};
  int32_t block_table_[6] = {0, ~0, 99, 2, 1, ~3};
};

class DeviceValidateTest : public ValidateTest {
 protected:
  DeviceValidateTest() : ValidateTest("cuda") {}
};

TEST_F(ValidateTest, PlanAndParams) {
  EXPECT_FAILS(kvarn_hadamard(nullptr, &hadamard_, nullptr), KVARN_INVALID_ARGUMENT, "[kvarn.hadamard] plan: expected a pointer, got NULL");
  EXPECT_FAILS(kvarn_attend(&plan_, nullptr, nullptr), KVARN_INVALID_ARGUMENT, "[kvarn.attend] params: expected a pointer, got NULL");
  int stream = 0;
  EXPECT_FAILS(kvarn_encode(&plan_, &encode_, &stream), KVARN_INVALID_ARGUMENT,
               "[kvarn.encode] stream: expected NULL for backend cpu, got 0x");
  refuses(decode_, [](auto& p) { p.struct_size = 0; }, "[kvarn.decode] params.struct_size: expected");
  refuses(decode_, [](auto& p) { p.struct_size -= 1; }, "[kvarn.decode] params.struct_size: expected");
  refuses(decode_, [](auto& p) { p.struct_size = SIZE_MAX; }, "[kvarn.decode] params.struct_size: expected");
}

TEST_F(ValidateTest, ACallerWithANewerHeaderIsServedAsLongAsItAsksForNothingNew) {
  struct {
    kvarn_hadamard_params known;
    uint64_t added;
  } newer{hadamard_, 0};
  newer.known.struct_size = sizeof newer;
  EXPECT_SUCCEEDS(kvarn_hadamard(&plan_, &newer.known, nullptr));
  newer.added = 1;
  EXPECT_FAILS(kvarn_hadamard(&plan_, &newer.known, nullptr), KVARN_UNSUPPORTED, "[kvarn.hadamard] params: expected zeros past byte");
  EXPECT_EQ(g_calls, 1);
}

TEST(Structs, ACallerWithAnOlderHeaderGetsZerosAndIsWrittenNoFurther) {
  struct Grown {
    size_t struct_size;
    int64_t old_field, new_field;
  };
  constexpr size_t kOldSize = offsetof(Grown, new_field);
  Grown given{kOldSize, 7, 99};
  Grown own{};
  ASSERT_SUCCEEDS(kvarn::adopt_struct("test", &given, own, kOldSize));
  EXPECT_EQ(own.old_field, 7);
  EXPECT_EQ(own.new_field, 0) << "past the caller's struct_size lies something else";
  EXPECT_EQ(own.struct_size, sizeof(Grown));
  kvarn::give_struct(Grown{sizeof(Grown), 1, 2}, &given);
  EXPECT_EQ(given.old_field, 1);
  EXPECT_EQ(given.new_field, 99);
  EXPECT_EQ(given.struct_size, kOldSize);
  given.struct_size = kOldSize - 1;
  EXPECT_FAILS(kvarn::adopt_struct("test", &given, own, kOldSize), KVARN_INVALID_ARGUMENT, "[kvarn.test] params.struct_size: expected 24");
}

TEST_F(ValidateTest, Hadamard) {
  refuses(hadamard_, [](auto& p) { p.rows = -1; }, "[kvarn.hadamard] rows: expected at least 0, got -1");
  refuses(hadamard_, [](auto& p) { p.rows = INT64_MAX / 64; }, "[kvarn.hadamard] x: expected at most 2^63 - 1 bytes, got more");
  refuses(
      hadamard_, [](auto& p) { p.dtype = 3; }, "[kvarn.hadamard] dtype: expected KVARN_F32 (0), KVARN_F16 (1) or KVARN_BF16 (2), got 3");
  refuses(hadamard_, [](auto& p) { p.inverse = 2; }, "[kvarn.hadamard] inverse: expected 0 or 1, got 2");
  refuses(hadamard_, [](auto& p) { p.x = nullptr; }, "[kvarn.hadamard] x: expected a pointer, got NULL");
  refuses(hadamard_, [](auto& p) { p.out = nullptr; }, "[kvarn.hadamard] out: expected a pointer, got NULL");
  refuses(hadamard_, [&](auto& p) { p.x = values_ + 1; }, "[kvarn.hadamard] x: expected an address aligned to 2 bytes, got 0x");
  refuses(
      hadamard_, [&](auto& p) { p.out = values_ + 16; },
      "[kvarn.hadamard] out: expected x itself or memory apart from it, got an overlap at a distance of 16 bytes");
  accepts(hadamard_, [&](auto& p) { p.out = values_ + 4 * kHeadDim * 2; });
  accepts(hadamard_, [](auto& p) { p.x = p.out = nullptr, p.rows = 0; }, 0);
}

TEST_F(ValidateTest, Append) {
  refuses(append_, [](auto& p) { p.num_tokens = -1; }, "[kvarn.append] num_tokens: expected at least 0, got -1");
  refuses(append_, [](auto& p) { p.k = nullptr; }, "[kvarn.append] k: expected a pointer, got NULL");
  refuses(append_, [&](auto& p) { p.v = values_ + 1; }, "[kvarn.append] v: expected an address aligned to 2 bytes");
  refuses(append_, [](auto& p) { p.slot_mapping = nullptr; }, "[kvarn.append] slot_mapping: expected a pointer, got NULL");
  refuses(append_, [](auto& p) { p.staging = nullptr; }, "[kvarn.append] staging: expected a pointer, got NULL");
  refuses(append_, [](auto& p) { p.num_slots = -1; }, "[kvarn.append] num_slots: expected 0 to 2147483647, got -1");
  refuses(append_, [](auto& p) { p.rotated = -1; }, "[kvarn.append] rotated: expected 0 or 1, got -1");
  refuses(append_, [](auto& p) { p.k_token_stride = -1; }, "[kvarn.append] k_token_stride: expected at least 0, got -1");
  refuses(
      append_, [](auto& p) { p.v_head_stride = INT64_MAX / 2; },
      "[kvarn.append] v_token_stride, v_head_stride: expected an extent below 2^63 bytes, got strides 128 and 4611686018427387903");
  refuses(
      append_, [&](auto&) { mapping_[1] = kSlots * kTile; },
      "[kvarn.append] slot_mapping[1]: expected 0 to 127 (4 slots of 32 tokens), or less than 0 to skip the token, got 128");
  mapping_[1] = 5;
  refuses(
      append_, [&](auto&) { mapping_[2] = 5; },
      "[kvarn.append] slot_mapping[2]: expected entries that are all different, got 5 again (first at 1)");
  mapping_[2] = INT64_MIN;
  accepts(append_, [&](auto&) { mapping_[0] = INT64_MIN; });                  // tokens that are skipped may repeat
  accepts(append_, [](auto& p) { p.k_token_stride = p.k_head_stride = 0; });  // one row for all
  accepts(append_, [](auto& p) { p.num_tokens = 0, p.k = p.v = nullptr, p.slot_mapping = nullptr; }, 0);
}

TEST_F(ValidateTest, Encode) {
  refuses(encode_, [](auto& p) { p.num_tiles = -1; }, "[kvarn.encode] num_tiles: expected at least 0, got -1");
  refuses(encode_, [](auto& p) { p.num_layers = 0; }, "[kvarn.encode] num_layers: expected at least 1, got 0");
  refuses(encode_, [](auto& p) { p.normalisation = 2; }, "[kvarn.encode] normalisation: expected 0 to 1, got 2");
  refuses(encode_, [](auto& p) { p.rounding = -1; }, "[kvarn.encode] rounding: expected 0 to 2, got -1");
  refuses(
      encode_, [&](auto& p) { p.k_feedback = reinterpret_cast<const float*>(values_ + 1); },
      "[kvarn.encode] k_feedback: expected an address aligned to 4 bytes");
  refuses(
      encode_, [&](auto& p) { p.v_feedback = reinterpret_cast<const float*>(values_ + 1); },
      "[kvarn.encode] v_feedback: expected an address aligned to 4 bytes");
  accepts(encode_, [&](auto& p) { p.k_feedback = lse_; });
  accepts(encode_, [&](auto& p) { p.v_feedback = lse_; });
  refuses(encode_, [](auto& p) { p.records = nullptr; }, "[kvarn.encode] records: expected a pointer, got NULL");
  refuses(encode_, [](auto& p) { p.slots = nullptr; }, "[kvarn.encode] slots: expected a pointer, got NULL");
  refuses(encode_, [](auto& p) { p.blocks = nullptr; }, "[kvarn.encode] blocks: expected a pointer, got NULL");
  refuses(encode_, [](auto& p) { p.num_tiles = 4; }, "[kvarn.encode] num_tiles: expected 0 to 3, got 4");
  refuses(encode_, [&](auto&) { slots_[1] = kSlots; }, "[kvarn.encode] slots[1]: expected 0 to 3, got 4");
  slots_[1] = 0;
  refuses(encode_, [&](auto&) { blocks_[0] = -1; }, "[kvarn.encode] blocks[0]: expected 0 to 2, got -1");
  blocks_[0] = 0;
  refuses(
      encode_, [&](auto&) { blocks_[1] = 0; },
      "[kvarn.encode] blocks[1]: expected entries that are all different, got 0 again (first at 0)");
  blocks_[1] = 2;
  const int64_t staging_bytes = int64_t{kSlots} * 2 * kKvHeads * kTile * kHeadDim * 2;
  const int64_t records_bytes = int64_t{kBlocks} * kKvHeads * plan_.record_bytes;
  kvarn_encode_params layers = encode_;
  layers.num_layers = 3;
  layers.staging_layer_stride_bytes = staging_bytes;
  layers.records_layer_stride_bytes = records_bytes;
  refuses(
      layers, [&](auto& p) { --p.staging_layer_stride_bytes; },
      "[kvarn.encode] staging_layer_stride_bytes: expected at least 65536, got 65535");
  refuses(
      layers, [&](auto& p) { ++p.staging_layer_stride_bytes; },
      "[kvarn.encode] staging_layer_stride_bytes: expected a multiple of 2, got 65537");
  refuses(layers, [&](auto& p) { --p.records_layer_stride_bytes; }, "[kvarn.encode] records_layer_stride_bytes: expected at least");
  refuses(
      layers, [&](auto& p) { p.records_layer_stride_bytes = INT64_MAX / 2; },
      "[kvarn.encode] records_layer_stride_bytes: expected at most 2^63 - 1 bytes, got more");
  accepts(encode_, [](auto& p) { p.num_tiles = 0, p.slots = p.blocks = nullptr; }, 0);
}

TEST_F(ValidateTest, SizesBeyondSixtyThreeBitsAreRefused) {
  plan_.config.num_kv_heads = 1024;
  plan_.config.head_dim = 512;
  plan_.record_bytes = int64_t{1} << 24;
  kvarn_encode_params p = encode_;
  p.num_blocks = INT32_MAX;  // 2^31 * 2^10 * 2^24 bytes
  EXPECT_FAILS(run(p), KVARN_INVALID_ARGUMENT, "[kvarn.encode] records: expected at most 2^63 - 1 bytes, got more");
}

TEST_F(ValidateTest, Decode) {
  refuses(decode_, [](auto& p) { p.num_tiles = -1; }, "[kvarn.decode] num_tiles: expected at least 0, got -1");
  refuses(decode_, [](auto& p) { p.num_destinations = -1; }, "[kvarn.decode] num_destinations: expected at least 0, got -1");
  refuses(decode_, [](auto& p) { p.dtype = -1; }, "[kvarn.decode] dtype: expected KVARN_F32 (0), KVARN_F16 (1) or KVARN_BF16 (2), got -1");
  refuses(decode_, [](auto& p) { p.rotated = 2; }, "[kvarn.decode] rotated: expected 0 or 1, got 2");
  refuses(decode_, [](auto& p) { p.blocks = nullptr; }, "[kvarn.decode] blocks: expected a pointer, got NULL");
  refuses(decode_, [&](auto& p) { p.k = values_ + 2; }, "[kvarn.decode] k: expected an address aligned to 4 bytes");
  refuses(
      decode_, [](auto& p) { p.destinations = nullptr, p.num_destinations = 1; },
      "[kvarn.decode] num_destinations: expected at least 2, got 1");
  refuses(decode_, [&](auto&) { blocks_[1] = 3; }, "[kvarn.decode] blocks[1]: expected 0 to 2, got 3");
  blocks_[1] = 2;
  refuses(decode_, [&](auto&) { destinations_[0] = 6; }, "[kvarn.decode] destinations[0]: expected 0 to 5, got 6");
  destinations_[0] = 5;
  refuses(
      decode_, [&](auto&) { destinations_[1] = 5; },
      "[kvarn.decode] destinations[1]: expected entries that are all different, got 5 again (first at 0)");
  destinations_[1] = 0;
  const int64_t tile = kTile * kHeadDim;
  refuses(decode_, [&](auto& p) { p.head_stride = tile - 1; }, "[kvarn.decode] head_stride: expected at least 2048 values, got 2047");
  refuses(
      decode_, [&](auto& p) { p.tile_stride = tile; },
      "[kvarn.decode] tile_stride, head_stride: expected rows of 2048 values that do not overlap, got strides 2048 and 2048");
  refuses(decode_, [&](auto& p) { p.tile_stride = -1; }, "[kvarn.decode] tile_stride: expected at least 0, got -1");
  refuses(decode_, [&](auto& p) { p.head_stride = -1; }, "[kvarn.decode] head_stride: expected at least 0, got -1");
  accepts(decode_, [&](auto& p) { p.tile_stride = tile, p.head_stride = 6 * tile; });  // heads outside, tiles inside
  // The backend sees the defaults as numbers.
  accepts(decode_, [](auto&) {});
  EXPECT_EQ(g_decode.head_stride, tile);
  EXPECT_EQ(g_decode.tile_stride, kKvHeads * tile);
  accepts(decode_, [](auto& p) { p.k = nullptr; });
  accepts(decode_, [](auto& p) { p.k = p.v = nullptr; }, 0);
  accepts(decode_, [](auto& p) { p.num_tiles = 0, p.blocks = nullptr; }, 0);
}

TEST_F(ValidateTest, WhatIsWrittenLiesApartFromWhatIsRead) {
  const auto plus = [](void* address, int64_t bytes) { return static_cast<uint8_t*>(address) + bytes; };
  const int64_t staging_bytes = int64_t{kSlots} * 2 * kKvHeads * kTile * kHeadDim * 2;
  const int64_t records_bytes = int64_t{kBlocks} * kKvHeads * plan_.record_bytes;
  const int64_t kv_bytes = 3 * kKvHeads * kHeadDim * 2;
  const char* const k = "[kvarn.append] staging: expected memory apart from k, got";
  refuses(append_, [&](auto& p) { p.k = plus(far(1), staging_bytes - 2); }, k);
  refuses(append_, [&](auto& p) { p.k = plus(far(1), 2 - kv_bytes); }, k);
  refuses(append_, [&](auto& p) { p.v = far(1); }, "[kvarn.append] staging: expected memory apart from v, got");
  accepts(append_, [&](auto& p) { p.k = plus(far(1), staging_bytes), p.v = plus(far(1), -kv_bytes); });

  const char* const records = "[kvarn.encode] records: expected memory apart from staging, got";
  refuses(encode_, [&](auto& p) { p.records = plus(far(1), staging_bytes - 1); }, records);
  refuses(encode_, [&](auto& p) { p.records = plus(far(1), 1 - records_bytes); }, records);
  // Layers of one arena: staging, then records, and so on.
  kvarn_encode_params arena = encode_;
  arena.num_layers = 5;
  arena.records = plus(far(1), staging_bytes);
  arena.staging_layer_stride_bytes = arena.records_layer_stride_bytes = staging_bytes + records_bytes;
  accepts(arena, [](auto&) {});
  refuses(arena, [&](auto& p) { p.records = plus(far(1), staging_bytes + 2); }, records);  // the end of each runs into the next layer
  refuses(arena, [&](auto& p) { p.records_layer_stride_bytes += 2; }, records);            // from the second layer on
  refuses(arena, [&](auto& p) { p.staging = plus(far(1), 4 * p.staging_layer_stride_bytes + 2); }, records);

  refuses(
      decode_, [&](auto& p) { p.k = plus(far(2), records_bytes - records_bytes % 4 - 4); },
      "[kvarn.decode] k: expected memory apart from records, got");
  refuses(decode_, [&](auto& p) { p.v = far(2); }, "[kvarn.decode] v: expected memory apart from records, got");
  const int64_t tile_bytes = kTile * kHeadDim * 4;
  const char* const v = "[kvarn.decode] v: expected memory apart from k, got rows that overlap";
  for (const int64_t distance : {int64_t{0}, tile_bytes - 4, 4 - tile_bytes, 5 * tile_bytes, -11 * tile_bytes, 12 * tile_bytes - 4}) {
    refuses(decode_, [&](auto& p) { p.v = plus(p.k, distance); }, v);  // six tiles of two heads, contiguous
  }
  accepts(decode_, [&](auto& p) { p.v = plus(p.k, 12 * tile_bytes); });
  accepts(decode_, [&](auto& p) { p.v = p.k, p.k = nullptr; });
  // As in staging: K and V of a slot one after the other.
  const auto in_slots = [&](auto& p) { p.tile_stride = 2 * kKvHeads * tile_bytes / 4, p.v = plus(p.k, kKvHeads * tile_bytes); };
  accepts(decode_, in_slots);
  refuses(decode_, [&](auto& p) { in_slots(p), p.v = plus(p.v, -4); }, v);
  refuses(decode_, [&](auto& p) { in_slots(p), p.v = plus(p.v, 4); }, v);
}

// Places in any order, over a range of many bitmaps of the check; one of them twice.
TEST_F(ValidateTest, RepeatedPlacesAreFoundInAnyOrderAndRange) {
  constexpr int64_t kTokens = 1000;
  std::vector<int64_t> mapping(kTokens);
  append_.num_slots = 1 << 20;
  append_.num_tokens = kTokens;
  append_.slot_mapping = mapping.data();
  append_.k_token_stride = append_.v_token_stride = 0;
  for (const int64_t step : {int64_t{1}, int64_t{31}, int64_t{33554393}}) {  // odd: all different modulo 2^25
    for (int64_t i = 0; i < kTokens; ++i) mapping[i] = i % 7 == 3 ? -1 : (i + 5) * step * 12347 % (int64_t{1} << 25);
    accepts(append_, [](auto&) {});
    for (const auto& [first, again] : {std::pair{0, 999}, {501, 502}, {998, 999}}) {
      const int64_t was = mapping[again];
      ASSERT_GE(mapping[first], 0);
      const std::string text = "slot_mapping[" + std::to_string(again) + "]: expected entries that are all different, got " +
                               std::to_string(mapping[first]) + " again (first at " + std::to_string(first) + ")";
      refuses(append_, [&, first = first, again = again](auto&) { mapping[again] = mapping[first]; }, text.c_str());
      mapping[again] = was;
    }
  }
}

TEST_F(ValidateTest, AttendKeepsWhatItWritesApart) {
  const char* const apart[] = {"[kvarn.attend] out: expected memory apart from q", "[kvarn.attend] out: expected memory apart from records",
                               "[kvarn.attend] out: expected memory apart from staging",
                               "[kvarn.attend] lse: expected memory apart from out",
                               "[kvarn.attend] workspace: expected memory apart from out"};
  refuses(attend_, [](auto& p) { p.out = static_cast<uint8_t*>(far(1)) + 2; }, apart[0]);
  refuses(attend_, [](auto& p) { p.out = far(3); }, apart[1]);
  refuses(attend_, [](auto& p) { p.out = static_cast<uint8_t*>(far(4)) + 1024; }, apart[2]);
  refuses(attend_, [](auto& p) { p.lse = static_cast<float*>(far(2)); }, apart[3]);
  refuses(attend_, [](auto& p) { p.workspace = far(2); }, apart[4]);
  // The first value after the other's last.
  const int64_t bytes = 3 * kQHeads * kHeadDim * 2;
  accepts(attend_, [&](auto& p) { p.out = static_cast<uint8_t*>(far(1)) + bytes; });
}

TEST_F(ValidateTest, Attend) {
  refuses(attend_, [](auto& p) { p.num_seqs = 4; }, "[kvarn.attend] num_seqs: expected 0 to 3, got 4");
  refuses(attend_, [](auto& p) { p.num_q_tokens = 9; }, "[kvarn.attend] num_q_tokens: expected 0 to 8, got 9");
  refuses(attend_, [](auto& p) { p.causal = 2; }, "[kvarn.attend] causal: expected 0 or 1, got 2");
  refuses(attend_, [](auto& p) { p.q_rotated = 2; }, "[kvarn.attend] q_rotated: expected 0 or 1, got 2");
  refuses(attend_, [](auto& p) { p.out_rotated = 2; }, "[kvarn.attend] out_rotated: expected 0 or 1, got 2");
  refuses(attend_, [](auto& p) { p.window = -1; }, "[kvarn.attend] window: expected at least 0, got -1");
  refuses(attend_, [](auto& p) { p.softmax_scale = NAN; }, "[kvarn.attend] softmax_scale: expected a finite number, got nan");
  refuses(
      attend_, [](auto& p) { p.logits_soft_cap = -1; }, "[kvarn.attend] logits_soft_cap: expected 0 or a finite positive number, got -1");
  refuses(
      attend_, [](auto& p) { p.logits_soft_cap = INFINITY; },
      "[kvarn.attend] logits_soft_cap: expected 0 or a finite positive number, got inf");
  refuses(attend_, [](auto& p) { p.q = nullptr; }, "[kvarn.attend] q: expected a pointer, got NULL");
  refuses(attend_, [](auto& p) { p.out = nullptr; }, "[kvarn.attend] out: expected a pointer, got NULL");
  refuses(attend_, [](auto& p) { p.cu_q_lens = nullptr; }, "[kvarn.attend] cu_q_lens: expected a pointer, got NULL");
  refuses(attend_, [](auto& p) { p.seq_lens = nullptr; }, "[kvarn.attend] seq_lens: expected a pointer, got NULL");
  refuses(attend_, [](auto& p) { p.block_table = nullptr; }, "[kvarn.attend] block_table: expected a pointer, got NULL");
  refuses(attend_, [](auto& p) { p.records = nullptr; }, "[kvarn.attend] records: expected a pointer, got NULL");
  refuses(attend_, [](auto& p) { p.staging = nullptr; }, "[kvarn.attend] staging: expected a pointer, got NULL");
  refuses(
      attend_, [&](auto& p) { p.lse = reinterpret_cast<float*>(values_ + 2); },
      "[kvarn.attend] lse: expected an address aligned to 4 bytes");
  refuses(attend_, [](auto& p) { p.q_head_stride = -64; }, "[kvarn.attend] q_head_stride: expected at least 0, got -64");
  refuses(attend_, [](auto& p) { p.out_head_stride = 32; }, "[kvarn.attend] out_head_stride: expected at least 64 values, got 32");
  refuses(
      attend_, [](auto& p) { p.out_token_stride = 128; },
      "[kvarn.attend] out_token_stride, out_head_stride: expected rows of 64 values that do not overlap, got strides 128 and 64");
  accepts(attend_, [](auto& p) { p.out_token_stride = 64, p.out_head_stride = 192; });  // [heads, tokens, head_dim]
  accepts(attend_, [](auto& p) { p.q_token_stride = 0; });
  refuses(attend_, [](auto& p) { p.workspace_bytes = 511; }, "[kvarn.attend] workspace_bytes: expected at least 512, got 511");
  refuses(attend_, [](auto& p) { p.workspace = nullptr; }, "[kvarn.attend] workspace: expected a pointer, got NULL");
  refuses(attend_, [&](auto& p) { p.workspace = workspace_ + 128; }, "[kvarn.attend] workspace: expected an address aligned to 256 bytes");
  refuses(attend_, [](auto& p) { p.block_table_stride = 6; }, "[kvarn.attend] block_table_stride: expected 0 to 5, got 6");
  accepts(attend_, [](auto& p) { p.lse = nullptr; });
  accepts(attend_, [](auto& p) { p.num_seqs = 0, p.num_q_tokens = 0, p.cu_q_lens = nullptr; }, 0);
  refuses(attend_, [](auto& p) { p.num_seqs = 0; }, "[kvarn.attend] num_q_tokens: expected 0 to 0, got 3");
  plan_.num_q_heads = 0;
  EXPECT_FAILS(run(attend_), KVARN_INVALID_ARGUMENT, "[kvarn.attend] plan: expected one made with num_q_heads > 0, got 0");
}

TEST_F(ValidateTest, AttendTables) {
  const auto with = [&](int32_t& entry, int32_t value, const char* text) {
    const int32_t kept = entry;
    refuses(attend_, [&](auto&) { entry = value; }, text);
    entry = kept;
  };
  with(cu_q_lens_[0], 1, "[kvarn.attend] cu_q_lens[0]: expected 0, got 1");
  with(cu_q_lens_[1], 4, "[kvarn.attend] cu_q_lens[2]: expected at least 4, got 3");
  with(cu_q_lens_[2], 2, "[kvarn.attend] cu_q_lens[2]: expected num_q_tokens = 3, got 2");
  with(seq_lens_[0], -1, "[kvarn.attend] seq_lens[0]: expected 0 to 96, got -1");
  with(seq_lens_[1], 97, "[kvarn.attend] seq_lens[1]: expected 0 to 96, got 97");
  with(block_table_[1], 3, "[kvarn.attend] block_table[0][1]: expected a block below 3 or ~slot with a slot below 4, got 3");
  with(block_table_[5], ~4, "[kvarn.attend] block_table[1][2]: expected a block below 3 or ~slot with a slot below 4, got -5 (a slot)");
  with(block_table_[3], INT32_MIN, "[kvarn.attend] block_table[1][0]: expected a block below 3");
  // One sequence alone may have a wider table than the plan, but no more tiles.
  accepts(attend_, [&](auto& p) { p.num_seqs = 1, p.num_q_tokens = 2, p.block_table_stride = 1000; });
  seq_lens_[0] = 161;
  kvarn_attend_params one = attend_;
  one.num_seqs = 1, one.num_q_tokens = 2, one.block_table_stride = 1000;
  EXPECT_FAILS(run(one), KVARN_INVALID_ARGUMENT, "[kvarn.attend] seq_lens[0]: expected 0 to 160, got 161");
}

// Indices in device memory are the backend's to check; the rest is the same.
TEST_F(DeviceValidateTest, IndicesAreNotRead) {
  int stream = 0;
  attend_.cu_q_lens = attend_.seq_lens = attend_.block_table = reinterpret_cast<const int32_t*>(uintptr_t{4});
  append_.slot_mapping = reinterpret_cast<const int64_t*>(uintptr_t{8});
  encode_.slots = encode_.blocks = decode_.blocks = decode_.destinations = reinterpret_cast<const int32_t*>(uintptr_t{4});
  EXPECT_SUCCEEDS(kvarn_attend(&plan_, &attend_, &stream));
  EXPECT_SUCCEEDS(kvarn_append(&plan_, &append_, &stream));
  EXPECT_SUCCEEDS(kvarn_encode(&plan_, &encode_, &stream));
  EXPECT_SUCCEEDS(kvarn_decode(&plan_, &decode_, &stream));
  EXPECT_EQ(g_calls, 4);
  refuses(attend_, [](auto& p) { p.out_head_stride = 32; }, "[kvarn.attend] out_head_stride: expected at least 64 values, got 32");
}

TEST(ValidatePlan, Params) {
  kvarn_plan_params good{};
  KVARN_INIT(good);
  good.backend = "cpu";
  good.config = kvarn_config{{4, 2, 128, 16}, 128, 8, KVARN_BF16};
  good.num_q_heads = 32;
  good.max_num_seqs = 1;
  good.max_q_tokens = 1;
  good.max_tiles = 1;
  ASSERT_SUCCEEDS(kvarn::validate_plan(good));
  const auto refuses = [&](auto change, const char* text) {
    kvarn_plan_params bad = good;
    change(bad);
    EXPECT_FAILS(kvarn::validate_plan(bad), KVARN_INVALID_ARGUMENT, text);
  };
  refuses([](auto& p) { p.config.format.k_bits = 7; }, "[kvarn.plan_create] format.k_bits: expected 2, 3, 4, 5, 6 or 8, got 7");
  refuses([](auto& p) { p.config.format.v_bits = 1; }, "[kvarn.plan_create] format.v_bits: expected 2, 3, 4, 5, 6 or 8, got 1");
  refuses([](auto& p) { p.config.format.tile_tokens = 16; }, "[kvarn.plan_create] format.tile_tokens: expected 32, 64, 128 or 256, got 16");
  refuses([](auto& p) { p.config.format.metadata_bits = 4; }, "[kvarn.plan_create] format.metadata_bits: expected 16 or 8, got 4");
  refuses([](auto& p) { p.config.head_dim = 72; },
          "[kvarn.plan_create] head_dim: expected 64, 80, 96, 112, 128, 160, 192, 256 or 512, got 72");
  refuses([](auto& p) { p.config.num_kv_heads = 0; }, "[kvarn.plan_create] num_kv_heads: expected 1 to 1024, got 0");
  refuses([](auto& p) { p.config.dtype = 9; }, "[kvarn.plan_create] dtype: expected KVARN_F32 (0), KVARN_F16 (1) or KVARN_BF16 (2), got 9");
  refuses([](auto& p) { p.num_q_heads = 12; }, "[kvarn.plan_create] num_q_heads: expected a multiple of num_kv_heads = 8, got 12");
  refuses([](auto& p) { p.num_q_heads = -8; }, "[kvarn.plan_create] num_q_heads: expected 0 to 65536, got -8");
  refuses([](auto& p) { p.max_num_seqs = 0; }, "[kvarn.plan_create] max_num_seqs: expected at least 1, got 0");
  refuses([](auto& p) { p.max_q_tokens = 0; }, "[kvarn.plan_create] max_q_tokens: expected 1 to 2147483647, got 0");
  refuses([](auto& p) { p.max_tiles = 1 << 24; }, "[kvarn.plan_create] max_tiles: expected 1 to 16777215, got 16777216");
  refuses([](auto& p) { p.device = -1; }, "[kvarn.plan_create] device: expected at least 0, got -1");
  refuses([](auto& p) { p.batch_invariant = 3; }, "[kvarn.plan_create] batch_invariant: expected 0 or 1, got 3");
  refuses([](auto& p) { p.num_threads = -1; }, "[kvarn.plan_create] num_threads: expected 0 to 1024, got -1");
  refuses([](auto& p) { p.parallel_user = &p; }, "[kvarn.plan_create] parallel_user: expected NULL without parallel_for, got 0x");
  // Without attention its limits do not matter.
  kvarn_plan_params no_attend = good;
  no_attend.num_q_heads = no_attend.max_num_seqs = no_attend.max_tiles = 0;
  no_attend.max_q_tokens = 0;
  EXPECT_SUCCEEDS(kvarn::validate_plan(no_attend));

  kvarn_plan_params device = good;
  device.device = 1;
  EXPECT_FAILS(kvarn::validate_plan_backend(device), KVARN_INVALID_ARGUMENT, "[kvarn.plan_create] device: expected 0 to 0, got 1");
  device.backend = "cuda";
  EXPECT_SUCCEEDS(kvarn::validate_plan_backend(device));
  device.cpu_isa = "avx2";
  EXPECT_FAILS(kvarn::validate_plan_backend(device), KVARN_INVALID_ARGUMENT,
               "[kvarn.plan_create] cpu_isa: expected nothing for backend cuda, got a setting of backend cpu");
}

}  // namespace
