// The AVX-512 kernels on machines without AVX-512: their source over emulated instructions, against the oracle, byte for byte.
#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>

#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu_machine.h"

namespace kvarn {
namespace cpu {
extern const Kernels kernels_emulated;
}
namespace {

using namespace test;
using cpu::kernels_emulated;

class Avx512Emulated : public ::testing::Test {
 protected:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  // Enough for the largest tile.
  std::unique_ptr<void, Free> scratch_{std::aligned_alloc(64, 8 << 20)};
};

TEST_F(Avx512Emulated, Rotation) {
  constexpr int kRows = 19;  // one full vector of rows and a part of one
  for (const int head_dim : kHeadDims) {
    for (const int dtype : kDtypes) {
      for (const bool inverse : {false, true}) {
        const std::vector<uint8_t> in = to_dtype(random_values(static_cast<size_t>(kRows * head_dim), 5), dtype);
        std::vector<float> values = from_dtype(in, dtype);
        for (int r = 0; r < kRows; ++r) ref::hadamard(values.data() + r * head_dim, head_dim, inverse);
        std::vector<uint8_t> out(in.size());
        kernels_emulated.rotate_rows(
            {in.data(), out.data(), kRows, head_dim, head_dim, dtype, dtype, head_dim, inverse, static_cast<float*>(scratch_.get())});
        EXPECT_EQ(out, to_dtype(values, dtype)) << head_dim << " dtype " << dtype << " inverse " << inverse;
      }
    }
  }
}

TEST_F(Avx512Emulated, EncodeAndDecode) {
  int i = 0;
  for (const int head_dim : {64, 80, 112, 128, 256}) {
    const std::vector<float> factors = feedback_factors(2, head_dim, 77);
    for (const int tokens : {32, 64, 128}) {
      for (const int normalisation : {KVARN_SCALE_INVARIANT, KVARN_PUBLISHED}) {
        for (const int rounding : {KVARN_MINMAX, KVARN_UNBIASED}) {
          for (const int metadata_bits : {16, 8}) {
            ++i;
            const Format format{kWidths[i % 6], kWidths[(i / 6 + i + 1) % 6], tokens, metadata_bits};
            const int dtype = kDtypes[i % 3];
            const RecordLayout layout = make_layout(format, head_dim);
            std::vector<float> k = tile_values(tokens, head_dim, static_cast<uint64_t>(i));
            const std::vector<float> v = tile_values(tokens, head_dim, static_cast<uint64_t>(i + 1000));
            if (i % 17 == 0) k[5] = 3e38f;  // encodes as NaN
            const float* const k_factor = i % 3 != 0 ? factors.data() : nullptr;
            const float* const v_factor = i % 3 != 1 ? factors.data() + head_dim * head_dim : nullptr;
            const std::vector<uint8_t> k_bytes = to_dtype(k, dtype), v_bytes = to_dtype(v, dtype);
            std::vector<uint8_t> expected(static_cast<size_t>(layout.record_bytes)), record(expected.size(), 0xaa);
            ref::encode_tile(from_dtype(k_bytes, dtype).data(), from_dtype(v_bytes, dtype).data(), format, head_dim,
                             {normalisation, rounding, k_factor, v_factor}, expected.data());
            const bool unbiased = rounding == KVARN_UNBIASED;
            kernels_emulated.encode_tile({k_bytes.data(), v_bytes.data(), record.data(), &layout, dtype, normalisation, unbiased, unbiased,
                                          scratch_.get(), k_factor, v_factor});
            EXPECT_TRUE(record == expected) << "case " << i;
            if (i % 17 == 0) continue;

            for (const bool rotated : {false, true}) {
              std::vector<float> k_values(k.size()), v_values(v.size());
              ref::decode_tile(expected.data(), format, head_dim, rotated, k_values.data(), v_values.data());
              std::vector<uint8_t> k_out(k_bytes.size()), v_out(v_bytes.size());
              kernels_emulated.decode_tile({expected.data(), &layout, k_out.data(), v_out.data(), dtype, rotated, scratch_.get()});
              EXPECT_TRUE(k_out == to_dtype(k_values, dtype)) << "case " << i << " rotated " << rotated;
              EXPECT_TRUE(v_out == to_dtype(v_values, dtype)) << "case " << i << " rotated " << rotated;
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace kvarn
