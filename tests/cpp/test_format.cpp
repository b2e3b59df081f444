// docs/FORMAT.md: sizes, offsets, golden records, and the authors' layout through the C ABI.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "golden_records.h"
#include "kvarn/format.h"
#include "kvarn/kvarn.h"
#include "published_vectors.h"
#include "ref/ref.h"

namespace kvarn::test {
namespace {

constexpr int kWidths[] = {2, 3, 4, 5, 6, 8};
constexpr int kHeadDims[] = {64, 80, 96, 112, 128, 160, 192, 256, 512};
constexpr int kTileTokens[] = {32, 64, 128, 256};

const char* normalisation_name(int n) { return n == KVARN_PUBLISHED ? "published" : "scale_invariant"; }
const char* rounding_name(int r) { return r == KVARN_MINMAX ? "minmax" : r == KVARN_UNBIASED ? "unbiased" : "auto"; }

// ---- offsets ----

TEST(Format, RecordsHoldExactlyTheirParts) {
  for (const int k_bits : kWidths) {
    for (const int v_bits : kWidths) {
      for (const int g : kTileTokens) {
        for (const int d : kHeadDims) {
          for (const int metadata_bits : {16, 8}) {
            const RecordLayout r = make_layout({k_bits, v_bits, g, metadata_bits}, d);
            // Rows are whole 32-bit words.
            const auto row = [](int codes, int bits) { return (codes * bits + 31) / 32 * 4; };
            const auto rows = [&](int count, int codes, int bits) {
              return count * (bits == 3   ? row(codes, 2) + row(codes, 1)
                              : bits == 5 ? row(codes, 4) + row(codes, 1)
                              : bits == 6 ? row(codes, 4) + row(codes, 2)
                                          : row(codes, bits));
            };
            const int codes = rows(g, d, k_bits) + rows(d, g, v_bits);
            const int metadata = metadata_bits == 16 ? 2 * (3 * d + 3 * g) : 3 * d + 3 * g + 24;
            ASSERT_EQ(r.record_bytes, (codes + metadata + 15) / 16 * 16);
            ASSERT_EQ(r.metadata_offset[kKScale], codes);
            ASSERT_EQ(r.k_high_offset % 4, 0);
            ASSERT_EQ(r.v_low_offset % 4, 0);
            ASSERT_EQ(r.v_high_offset % 4, 0);
            ASSERT_EQ(codes % 4, 0);
          }
        }
      }
    }
  }
}

// Every word of a plane has its own four bytes, and together they fill it.
TEST(Format, WordsTileThePlane) {
  for (const int bits : {1, 2, 4, 8}) {
    for (const int codes : {32, 64, 80, 96, 112, 128, 160, 192, 256, 512}) {
      const Plane plane = make_plane(32, codes, bits);
      std::vector<int> seen(plane.bytes / 4, 0);
      for (int row = 0; row < plane.rows; ++row) {
        for (int word = 0; word < plane.row_bytes / 4; ++word) {
          const int offset = plane.word_offset(row, word);
          ASSERT_EQ(offset % 4, 0);
          ++seen.at(offset / 4);
        }
      }
      for (const int count : seen) ASSERT_EQ(count, 1) << bits << " bits, " << codes << " codes";
    }
  }
}

// The worked offsets of docs/FORMAT.md.
TEST(Format, WorkedOffsets) {
  const RecordLayout r = make_layout({4, 2, 128, 16}, 128);
  EXPECT_EQ(r.v_low_offset, 8192);
  const int expected[] = {12288, 12544, 12800, 13056, 13312, 13568};
  for (int i = 0; i < kMetadataCount; ++i) EXPECT_EQ(r.metadata_offset[i], expected[i]);
  EXPECT_EQ(r.record_bytes, 13824);
  // K code of token 6, channel 77: plane row 6, word 9, byte 1, high nibble.
  EXPECT_EQ(r.k_low.word_offset(6, code_word(77, 4)), 256 + 2 * 64 + 2 * 16 + 4);
  EXPECT_EQ(code_shift(77, 4), 12);
  std::vector<uint8_t> record(r.record_bytes, 0);
  ref::set_k_code(record.data(), r, 6, 77, 0xb);
  EXPECT_EQ(record[421], 0xb0);
  // V code of token 77, channel 6: plane row 6, word 4, byte 1, bits 6 and 7.
  ref::set_v_code(record.data(), r, 77, 6, 3);
  EXPECT_EQ(record[8192 + 128 + 64 + 32 + 1], 0xc0);

  // A short chunk: 80 channels of 4 bits are 40 bytes, two chunks of 16 and one of 8.
  const RecordLayout s = make_layout({4, 4, 32, 16}, 80);
  EXPECT_EQ(s.k_low.row_bytes, 40);
  EXPECT_EQ(s.k_low.word_offset(5, code_word(70, 4)), 160 + 2 * 64 + 1 * 8 + 0);
  EXPECT_EQ(code_shift(70, 4), 20);
  std::vector<uint8_t> short_record(s.record_bytes, 0);
  ref::set_k_code(short_record.data(), s, 5, 70, 0xd);
  EXPECT_EQ(short_record[298], 0xd0);

  const RecordLayout m = make_layout({4, 2, 128, 8}, 128);
  EXPECT_EQ(m.metadata_offset[kVZero], 12288 + 5 * 128);
  EXPECT_EQ(m.metadata_range_offset, 13056);
  EXPECT_EQ(m.record_bytes, 13088);
}

TEST(Format, TheAbiReportsTheSameLayout) {
  for (const char* name : {"k4v2_g128", "k3v5_g32_m8", "k6v8_g256"}) {
    for (const int d : kHeadDims) {
      kvarn_format f{};
      ASSERT_EQ(kvarn_format_parse(name, &f), KVARN_OK);
      kvarn_record_layout got{};
      ASSERT_EQ(kvarn_record_layout_of(f, d, &got), KVARN_OK);
      const RecordLayout r = make_layout({f.k_bits, f.v_bits, f.tile_tokens, f.metadata_bits}, d);
      EXPECT_EQ(got.record_bytes, r.record_bytes);
      EXPECT_EQ(got.k_low_offset, r.k_low_offset);
      EXPECT_EQ(got.k_low_bytes, r.k_low.bytes);
      EXPECT_EQ(got.k_high_offset, r.k_high_offset);
      EXPECT_EQ(got.k_high_bytes, r.k_high.bytes);
      EXPECT_EQ(got.v_low_offset, r.v_low_offset);
      EXPECT_EQ(got.v_low_bytes, r.v_low.bytes);
      EXPECT_EQ(got.v_high_offset, r.v_high_offset);
      EXPECT_EQ(got.v_high_bytes, r.v_high.bytes);
      for (int i = 0; i < kMetadataCount; ++i) {
        EXPECT_EQ(got.metadata_offset[i], r.metadata_offset[i]);
        EXPECT_EQ(got.metadata_count[i], r.metadata_count[i]);
      }
      EXPECT_EQ(got.metadata_range_offset, r.metadata_range_offset);
    }
  }
}

// ---- golden records ----

TEST(Format, GoldenRecordsHaveTheirHashes) {
  for (const GoldenRecord& golden : kGoldenRecords) {
    kvarn_format f{};
    ASSERT_EQ(kvarn_format_parse(golden.format, &f), KVARN_OK);
    const Format format{f.k_bits, f.v_bits, f.tile_tokens, f.metadata_bits};
    const GoldenTile tile = golden_tile(golden.seed, format.tile_tokens, golden.head_dim);
    std::vector<uint8_t> record(make_layout(format, golden.head_dim).record_bytes, 0xa5);
    ref::encode_tile(tile.k.data(), tile.v.data(), format, golden.head_dim, {golden.normalisation, golden.rounding}, record.data());
    const uint32_t crc = ref::crc32(record.data(), record.size());
    const std::string sha = ref::sha256(record.data(), record.size());
    EXPECT_EQ(crc, golden.crc32) << golden.format << ", head_dim " << golden.head_dim;
    EXPECT_EQ(sha, golden.sha256) << golden.format << ", head_dim " << golden.head_dim;
  }
}

// The CPU backend, through the C ABI and from every type that holds the values exactly, on every instruction set of this machine.
TEST(Format, TheCpuBackendWritesTheGoldenRecords) {
  std::vector<std::string> isas;
  std::stringstream names(kvarn_cpu_isas());
  for (std::string name; std::getline(names, name, ',');) isas.push_back(name);
  ASSERT_FALSE(isas.empty());
  for (const std::string& isa : isas) {
    for (const GoldenRecord& golden : kGoldenRecords) {
      for (const int dtype : {KVARN_F32, KVARN_F16}) {
        kvarn_plan_params plan_params{};
        KVARN_INIT(plan_params);
        ASSERT_EQ(kvarn_format_parse(golden.format, &plan_params.config.format), KVARN_OK);
        plan_params.config.head_dim = golden.head_dim;
        plan_params.config.num_kv_heads = 1;
        plan_params.config.dtype = dtype;
        plan_params.cpu_isa = isa.c_str();
        plan_params.num_threads = 1;
        kvarn_plan* plan = nullptr;
        ASSERT_EQ(kvarn_plan_create(&plan_params, &plan), KVARN_OK) << kvarn_last_error();

        const kvarn_format& f = plan_params.config.format;
        const GoldenTile tile = golden_tile(golden.seed, f.tile_tokens, golden.head_dim);
        const auto size = static_cast<int64_t>(tile.k.size());
        std::vector<uint8_t> staging(2 * size * ref::dtype_bytes(dtype));
        ref::store_values(tile.k.data(), dtype, size, staging.data());
        ref::store_values(tile.v.data(), dtype, size, staging.data() + size * ref::dtype_bytes(dtype));
        std::vector<uint8_t> record(make_layout({f.k_bits, f.v_bits, f.tile_tokens, f.metadata_bits}, golden.head_dim).record_bytes, 0xa5);
        const int32_t zero = 0;
        kvarn_encode_params params{};
        KVARN_INIT(params);
        params.staging = staging.data();
        params.num_slots = 1;
        params.records = record.data();
        params.num_blocks = 1;
        params.num_layers = 1;
        params.slots = &zero;
        params.blocks = &zero;
        params.num_tiles = 1;
        params.normalisation = golden.normalisation;
        params.rounding = golden.rounding;
        EXPECT_EQ(kvarn_encode(plan, &params, nullptr), KVARN_OK) << kvarn_last_error();
        EXPECT_EQ(ref::crc32(record.data(), record.size()), golden.crc32)
            << isa << ", " << golden.format << ", head_dim " << golden.head_dim;
        kvarn_plan_destroy(plan);
      }
    }
  }
}

TEST(Format, TheDocumentQuotesEveryGoldenRecord) {
  const std::vector<uint8_t> bytes = read_file(KVARN_GOLDEN_DIR "/../../docs/FORMAT.md");
  const std::string text(bytes.begin(), bytes.end());
  for (const GoldenRecord& golden : kGoldenRecords) {
    char row[256];
    std::snprintf(row, sizeof row, "| `%s` | %d | %s | %s | %llu | `%08x` | `%s` |", golden.format, golden.head_dim,
                  normalisation_name(golden.normalisation), rounding_name(golden.rounding), static_cast<unsigned long long>(golden.seed),
                  golden.crc32, golden.sha256);
    EXPECT_NE(text.find(row), std::string::npos) << "expected in docs/FORMAT.md:\n" << row;
  }
}

// ---- the authors' layout ----

TEST(Format, PublishedLayoutIsLossless) {
  for (const int k_bits : {2, 4, 8}) {
    for (const int v_bits : {2, 4, 8}) {
      for (const int g : kTileTokens) {
        for (const int d : {64, 80, 112, 256}) {
          const kvarn_format f{k_bits, v_bits, g, 16};
          const int64_t bytes = kvarn_published_bytes(f, d);
          ASSERT_EQ(bytes, d * g * (k_bits + v_bits) / 8 + 6 * (d + g));
          std::vector<uint8_t> published(bytes);
          ref::Generator generator(static_cast<uint64_t>(g + d));
          for (uint8_t& byte : published) byte = static_cast<uint8_t>(generator.next() >> 56);
          const RecordLayout layout = make_layout({k_bits, v_bits, g, 16}, d);
          std::vector<uint8_t> record(layout.record_bytes, 0xa5);
          std::vector<uint8_t> back(bytes, 0x5a);
          ASSERT_EQ(kvarn_import_published(f, d, published.data(), bytes, record.data(), layout.record_bytes), KVARN_OK);
          ASSERT_EQ(kvarn_export_published(f, d, record.data(), layout.record_bytes, back.data(), bytes), KVARN_OK);
          ASSERT_EQ(back, published);
          // One code of each operand, read out of the authors' arrays by hand.
          const int t = g - 3;
          const int c = d - 5;
          const int k_bit = t * k_bits;
          const int v_bit = c * v_bits;
          const int k = published[c * (g * k_bits / 8) + k_bit / 8] >> k_bit % 8 & ((1 << k_bits) - 1);
          const int v = published[d * g * k_bits / 8 + t * (d * v_bits / 8) + v_bit / 8] >> v_bit % 8 & ((1 << v_bits) - 1);
          ASSERT_EQ(ref::k_code(record.data(), layout, t, c), k);
          ASSERT_EQ(ref::v_code(record.data(), layout, t, c), v);
        }
      }
    }
  }
}

TEST(Format, PublishedLayoutRefusesWhatItCannotHold) {
  std::vector<uint8_t> published(13824), record(13824);
  const auto import = [&](kvarn_format f, int d, int64_t published_bytes, int64_t record_bytes) {
    return kvarn_import_published(f, d, published.data(), published_bytes, record.data(), record_bytes);
  };
  const auto said = [](const char* text) { return std::strstr(kvarn_last_error(), text) != nullptr; };
  EXPECT_EQ(kvarn_published_bytes({3, 2, 128, 16}, 128), -1);
  EXPECT_EQ(kvarn_published_bytes({4, 2, 128, 8}, 128), -1);
  EXPECT_EQ(kvarn_published_bytes({4, 2, 128, 16}, 100), -1);
  EXPECT_EQ(kvarn_published_bytes({4, 2, 128, 16}, 128), 13824);
  EXPECT_EQ(import({3, 2, 128, 16}, 128, 13824, 13824), KVARN_UNSUPPORTED);
  EXPECT_TRUE(said("k3v2_g128")) << kvarn_last_error();
  EXPECT_EQ(import({4, 2, 128, 8}, 128, 13824, 13824), KVARN_UNSUPPORTED);
  EXPECT_EQ(import({4, 2, 127, 16}, 128, 13824, 13824), KVARN_INVALID_ARGUMENT);
  EXPECT_EQ(import({4, 2, 128, 16}, 100, 13824, 13824), KVARN_INVALID_ARGUMENT);
  EXPECT_EQ(import({4, 2, 128, 16}, 128, 13823, 13824), KVARN_INVALID_ARGUMENT);
  EXPECT_TRUE(said("published_bytes: expected 13824, got 13823")) << kvarn_last_error();
  EXPECT_EQ(import({4, 2, 128, 16}, 128, 13824, 13840), KVARN_INVALID_ARGUMENT);
  EXPECT_EQ(kvarn_export_published({4, 2, 128, 16}, 128, nullptr, 13824, published.data(), 13824), KVARN_INVALID_ARGUMENT);
  EXPECT_TRUE(said("record: expected a pointer, got NULL")) << kvarn_last_error();
  EXPECT_EQ(import({4, 2, 128, 16}, 128, 13824, 13824), KVARN_OK);
}

}  // namespace
}  // namespace kvarn::test
