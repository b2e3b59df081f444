// Rotation: byte-equal to the fp32 definition on every instruction set.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "cpu_machine.h"

namespace kvarn {
namespace {

using namespace test;

std::vector<uint8_t> rotated(std::vector<uint8_t> bytes, int dtype, int head_dim, bool inverse) {
  std::vector<float> values = from_dtype(bytes, dtype);
  for (size_t at = 0; at < values.size(); at += static_cast<size_t>(head_dim)) ref::hadamard(values.data() + at, head_dim, inverse);
  return to_dtype(values, dtype);
}

kvarn_status run_hadamard(kvarn_plan* plan, const void* x, void* out, int64_t rows, int dtype, bool inverse) {
  kvarn_hadamard_params p{};
  KVARN_INIT(p);
  p.x = x;
  p.out = out;
  p.rows = rows;
  p.dtype = dtype;
  p.inverse = inverse ? 1 : 0;
  return kvarn_hadamard(plan, &p, nullptr);
}

class CpuHadamard : public ::testing::TestWithParam<std::string> {};

TEST_P(CpuHadamard, EqualsTheDefinition) {
  for (const int head_dim : kHeadDims) {
    const auto plan = make_plan({4, 2, 128, 16}, head_dim, 2, KVARN_F16, GetParam(), 2);
    for (const int dtype : kDtypes) {
      for (const int64_t rows : {1, 3, 8, 16, 17, 37}) {
        for (const bool inverse : {false, true}) {
          const std::vector<uint8_t> x = to_dtype(random_values(static_cast<size_t>(rows * head_dim), 7 + rows), dtype);
          std::vector<uint8_t> out(x.size(), 0xa5);
          ASSERT_SUCCEEDS(run_hadamard(plan.get(), x.data(), out.data(), rows, dtype, inverse));
          ASSERT_EQ(out, rotated(x, dtype, head_dim, inverse))
              << head_dim << " dtype " << dtype << " rows " << rows << " inverse " << inverse;
          std::vector<uint8_t> in_place = x;
          ASSERT_SUCCEEDS(run_hadamard(plan.get(), in_place.data(), in_place.data(), rows, dtype, inverse));
          ASSERT_EQ(in_place, out);
        }
      }
    }
  }
}

TEST_P(CpuHadamard, ManyRowsOnManyThreads) {
  for (const int head_dim : {80, 128}) {
    const int64_t rows = 3001;
    const auto plan = make_plan({4, 2, 128, 16}, head_dim, 2, KVARN_F16, GetParam(), 3);
    const std::vector<uint8_t> x = to_dtype(random_values(static_cast<size_t>(rows * head_dim), 3), KVARN_BF16);
    std::vector<uint8_t> out(x.size());
    ASSERT_SUCCEEDS(run_hadamard(plan.get(), x.data(), out.data(), rows, KVARN_BF16, false));
    EXPECT_EQ(out, rotated(x, KVARN_BF16, head_dim, false));
  }
}

// Every 16-bit pattern through both conversions: one value alone in a row comes back as its multiple of the scale, which is 2^-3 here.
TEST_P(CpuHadamard, ConvertsEverySixteenBitValue) {
  constexpr int kHeadDim = 64;
  const auto plan = make_plan({4, 2, 128, 16}, kHeadDim, 1, KVARN_F16, GetParam());
  for (const int dtype : {KVARN_F16, KVARN_BF16}) {
    std::vector<uint8_t> x(size_t{65536} * kHeadDim * 2, 0);
    for (int pattern = 0; pattern < 65536; ++pattern) {
      const uint16_t half = static_cast<uint16_t>(pattern);
      std::memcpy(x.data() + static_cast<size_t>(pattern) * kHeadDim * 2, &half, 2);
    }
    std::vector<uint8_t> out(x.size());
    ASSERT_SUCCEEDS(run_hadamard(plan.get(), x.data(), out.data(), 65536, dtype, false));
    const std::vector<uint8_t> expected = rotated(x, dtype, kHeadDim, false);
    const std::vector<float> got_values = from_dtype(out, dtype);
    const std::vector<float> expected_values = from_dtype(expected, dtype);
    for (size_t i = 0; i < got_values.size(); ++i) {
      if (std::isnan(expected_values[i])) {
        ASSERT_TRUE(std::isnan(got_values[i])) << i;  // which NaN is not defined
      } else {
        ASSERT_EQ(std::memcmp(&got_values[i], &expected_values[i], 4), 0) << "pattern " << i / kHeadDim << " dtype " << dtype;
      }
    }
  }
}

TEST_P(CpuHadamard, RoundsToSixteenBitsLikeTheDefinition) {
  // Finite inputs of every size whose sums need rounding, up to overflow of the results and down to subnormal ones.
  for (const int head_dim : kHeadDims) {
    const auto plan = make_plan({4, 2, 128, 16}, head_dim, 1, KVARN_F16, GetParam());
    for (const int dtype : {KVARN_F16, KVARN_BF16}) {
      std::vector<float> values = random_values(size_t{64} * head_dim, 11);
      for (size_t i = 0; i < values.size(); ++i)
        values[i] *= std::ldexp(1.0f, static_cast<int>(i / static_cast<size_t>(head_dim)) % 42 - 26);
      const std::vector<uint8_t> x = to_dtype(values, dtype);
      std::vector<uint8_t> out(x.size());
      ASSERT_SUCCEEDS(run_hadamard(plan.get(), x.data(), out.data(), 64, dtype, true));
      ASSERT_EQ(out, rotated(x, dtype, head_dim, true)) << head_dim << " " << dtype;
    }
  }
}

TEST_P(CpuHadamard, NonFiniteRowsStayAmongThemselves) {
  for (const int head_dim : {112, 128}) {
    const auto plan = make_plan({4, 2, 128, 16}, head_dim, 1, KVARN_F16, GetParam());
    std::vector<float> values = random_values(size_t{16} * head_dim, 5);
    const std::vector<float> clean = values;
    values[static_cast<size_t>(head_dim) * 3 + 9] = std::numeric_limits<float>::quiet_NaN();
    values[static_cast<size_t>(head_dim) * 7 + 1] = std::numeric_limits<float>::infinity();
    std::vector<float> out(values.size());
    ASSERT_SUCCEEDS(run_hadamard(plan.get(), values.data(), out.data(), 16, KVARN_F32, false));
    std::vector<float> expected = clean;
    for (int r = 0; r < 16; ++r) ref::hadamard(expected.data() + r * head_dim, head_dim, false);
    for (int r = 0; r < 16; ++r) {
      for (int d = 0; d < head_dim; ++d) {
        const size_t i = static_cast<size_t>(r * head_dim + d);
        if (r == 3) {
          EXPECT_TRUE(std::isnan(out[i]));
        } else if (r == 7) {
          EXPECT_FALSE(std::isfinite(out[i]));
        } else {
          ASSERT_EQ(out[i], expected[i]) << r;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, CpuHadamard, ::testing::ValuesIn(machine_isas()), [](const auto& info) { return info.param; });

}  // namespace
}  // namespace kvarn
