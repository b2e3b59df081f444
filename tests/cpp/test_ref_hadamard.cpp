// The rotation: orthonormal matrices, the fp32 definition against the plain product, and which way round they are.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "kvarn/hadamard_signs.h"
#include "ref/ref.h"

namespace kvarn::ref {
namespace {

class RefHadamard : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(HeadDims, RefHadamard, testing::Values(64, 80, 96, 112, 128, 160, 192, 256, 512));

TEST_P(RefHadamard, MatrixIsOrthonormal) {
  const int d = GetParam();
  const double unit = 1 / std::sqrt(static_cast<double>(d));
  std::vector<int> signs(static_cast<size_t>(d) * d);
  for (int i = 0; i < d * d; ++i) {
    const double entry = hadamard_entry(d, i / d, i % d);
    ASSERT_EQ(std::fabs(entry), unit);
    signs[i] = entry > 0 ? 1 : -1;
  }
  for (int a = 0; a < d; ++a) {
    for (int b = 0; b <= a; ++b) {
      int dot = 0;
      for (int i = 0; i < d; ++i) dot += signs[a * d + i] * signs[b * d + i];
      ASSERT_EQ(dot, a == b ? d : 0) << "rows " << a << " and " << b;
    }
  }
}

TEST_P(RefHadamard, ScaleIsTheNearestFloat) {
  const int d = GetParam();
  const float scale = hadamard_scale(d);
  const double exact = 1 / std::sqrt(static_cast<double>(d));
  const double error = std::fabs(scale - exact);
  EXPECT_LE(error, std::fabs(std::nextafterf(scale, 0) - exact));
  EXPECT_LE(error, std::fabs(std::nextafterf(scale, 1) - exact));
}

// x H of the i-th unit vector is row i, x H^T is column i; sums with one term other than zero are exact.
TEST_P(RefHadamard, UnitVectorsGiveRowsAndColumns) {
  const int d = GetParam();
  for (int i = 0; i < d; ++i) {
    std::vector<float> forward(d, 0.0f);
    std::vector<double> exact(d, 0.0);
    forward[i] = 1;
    exact[i] = 1;
    std::vector<float> inverse = forward;
    hadamard(forward.data(), d, false);
    hadamard(inverse.data(), d, true);
    hadamard_exact(exact.data(), d, false);
    for (int j = 0; j < d; ++j) {
      ASSERT_EQ(forward[j], std::copysign(hadamard_scale(d), static_cast<float>(hadamard_entry(d, i, j))));
      ASSERT_EQ(inverse[j], std::copysign(hadamard_scale(d), static_cast<float>(hadamard_entry(d, j, i))));
      ASSERT_EQ(exact[j], hadamard_entry(d, i, j));
    }
  }
}

// The unnormalised stages are orthogonal up to scale, so rounding at one stage adds at most u = 2^-24 of the row's norm there, and the sum
// of m terms at most (m - 1) u sqrt(m) of it: with the two roundings of the final product (k + (m - 1) sqrt(m) + 2) u relative to the norm.
TEST_P(RefHadamard, MatchesThePlainProduct) {
  const int d = GetParam();
  const int m = hadamard_odd_order(d);
  const double bound = (std::log2(d / m) + (m - 1) * std::sqrt(m) + 2) * 0x1p-24;
  Generator generator(d);
  for (const bool inverse : {false, true}) {
    std::vector<float> row(d);
    for (float& x : row) x = generator.next_value();
    std::vector<double> exact(row.begin(), row.end());
    hadamard(row.data(), d, inverse);
    hadamard_exact(exact.data(), d, inverse);
    double error = 0;
    double norm = 0;
    for (int i = 0; i < d; ++i) {
      error += (row[i] - exact[i]) * (row[i] - exact[i]);
      norm += exact[i] * exact[i];
    }
    EXPECT_LE(std::sqrt(error / norm), bound);
  }
}

TEST_P(RefHadamard, InverseUndoesForward) {
  const int d = GetParam();
  Generator generator(d + 1);
  std::vector<double> row(d);
  for (double& x : row) x = generator.next_value();
  std::vector<double> back = row;
  hadamard_exact(back.data(), d, false);
  hadamard_exact(back.data(), d, true);
  for (int i = 0; i < d; ++i) EXPECT_NEAR(back[i], row[i], d * 0x1p-50);  // d products of double precision, twice
}

TEST(RefHadamardMatrices, FirstRowsOfTheOddOrders) {
  const auto row = [](int m, int r) {
    std::string signs;
    for (int c = 0; c < m; ++c) signs += hadamard_sign(m, r, c) > 0 ? '+' : '-';
    return signs;
  };
  EXPECT_EQ(row(12, 0), "++++++++++++");
  EXPECT_EQ(row(12, 1), "-++-+++---+-");          // squares modulo 11: 1 3 4 5 9
  EXPECT_EQ(row(20, 1), "-++--++++-+-+----++-");  // squares modulo 19: 1 4 5 6 7 9 11 16 17
  EXPECT_EQ(row(28, 0), "+-++++++++++++++++++++++++++");
  EXPECT_EQ(row(28, 1), "--+-+-+-+-+-+-+-+-+-+-+-+-+-");
  EXPECT_EQ(row(28, 2), "+++-++--++++--------++++--++");  // squares modulo 13: 1 3 4 9 10 12
}

}  // namespace
}  // namespace kvarn::ref
