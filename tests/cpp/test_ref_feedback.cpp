// Error feedback in the encoder: what the mathematics promises.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "cpu_machine.h"
#include "kvarn/encode_constants.h"

namespace kvarn::ref {
namespace {

using test::random_values;

// A moment [n][n] with correlated channels, and the factor and the diagonal of its decomposition: F M F^T = diag(conditional).
struct Moment {
  explicit Moment(int n, uint64_t seed) : n(n), m(static_cast<size_t>(n) * n), conditional(n), factor(m.size()) {
    // Few directions and some of everything, as queries have it.
    const int directions = n / 8;
    const std::vector<float> a = random_values(static_cast<size_t>(directions) * n, seed);
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) {
        double sum = i == j ? 0.1 : 0.0;
        for (int d = 0; d < directions; ++d) sum += static_cast<double>(a[d * n + i]) * a[d * n + j];
        m[i * n + j] = sum;
      }
    }
    std::vector<double> left = m, f(m.size(), 0.0);
    for (int i = 0; i < n; ++i) f[i * n + i] = 1;
    for (int j = n - 1; j > 0; --j) {
      for (int i = 0; i < j; ++i) {
        const double share = left[i * n + j] / left[j * n + j];
        for (int k = 0; k < n; ++k) left[i * n + k] -= share * left[j * n + k];
        for (int k = 0; k < n; ++k) f[i * n + k] -= share * f[j * n + k];
      }
    }
    for (int i = 0; i < n; ++i) conditional[i] = left[i * n + i];
    for (int i = 0; i < n; ++i) f[i * n + i] = i;  // channels as they lie
    for (size_t i = 0; i < m.size(); ++i) factor[i] = static_cast<float>(f[i]);
  }
  double trace() const {
    double sum = 0;
    for (int i = 0; i < n; ++i) sum += m[i * n + i];
    return sum;
  }
  int n;
  std::vector<double> m, conditional;
  std::vector<float> factor;
};

// Sum over the tokens of e M e^T, e the error of the token's channels.
template <class Real>
double weighted_error(const std::vector<Real>& values, int tokens, const EncodedOperand<Real>& got, const Moment& moment, Axis channels) {
  const int n = moment.n;
  const int columns = channels == Axis::kRows ? tokens : n;
  double sum = 0;
  for (int t = 0; t < tokens; ++t) {
    std::vector<double> e(n);
    for (int d = 0; d < n; ++d) {
      const int r = channels == Axis::kRows ? d : t;
      const int c = channels == Axis::kRows ? t : d;
      e[d] = (got.codes[r * columns + c] * static_cast<double>(got.row_scale[r]) + got.row_zero[r]) * got.column_scale[c] -
             values[r * columns + c];
    }
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) sum += e[i] * moment.m[i * n + j] * e[j];
    }
  }
  return sum;
}

struct Case {
  int channels, tokens;
  Axis axis;
  int rows() const { return axis == Axis::kRows ? channels : tokens; }
  int columns() const { return axis == Axis::kRows ? tokens : channels; }
};
constexpr Case kCases[] = {{128, 128, Axis::kRows},  {128, 128, Axis::kColumns}, {80, 32, Axis::kRows},
                           {80, 32, Axis::kColumns}, {112, 64, Axis::kRows},     {112, 64, Axis::kColumns}};

template <class Real>
double error_of(const std::vector<Real>& values, const Case& c, int bits, int rounding, const Moment& moment, bool fed) {
  const Feedback feedback{fed ? moment.factor.data() : nullptr, c.axis};
  const auto got =
      encode_operand(values.data(), c.rows(), c.columns(), bits, {KVARN_SCALE_INVARIANT, rounding}, BestSoFar::kKeep, feedback);
  return weighted_error(values, c.tokens, got, moment, c.axis);
}

// Rounding errors of fine codes are independent and equally large: they cost the trace of M, and with feedback, which leaves of each
// channel's error what the channels after it cannot make up for, the sum of the conditional diagonal. More than that, because the two ends
// of a row are values themselves, and what is fed to them may push them past the grid: two of 32 values in the shortest rows, by a step or
// so instead of 1/12 of its square. Without feedback the ratio would be above 2.
TEST(RefFeedback, FineCodesCostWhatTheDecompositionSays) {
  for (const Case& c : kCases) {
    const Moment moment(c.channels, 5);
    double conditional = 0;
    for (const double d : moment.conditional) conditional += d;
    const std::vector<float> values = random_values(static_cast<size_t>(c.channels) * c.tokens, 6);
    const double plain = error_of(values, c, 8, KVARN_MINMAX, moment, false);
    const double fed = error_of(values, c, 8, KVARN_MINMAX, moment, true);
    const double expected = conditional / moment.trace();
    EXPECT_LT(expected, 0.5);
    EXPECT_GT(fed / plain, 0.8 * expected) << c.channels << " " << static_cast<int>(c.axis);
    EXPECT_LT(fed / plain, 1.5 * expected) << c.channels << " " << static_cast<int>(c.axis);
  }
}

TEST(RefFeedback, TheWeightedErrorFallsAtEveryWidth) {
  for (const Case& c : kCases) {
    const Moment moment(c.channels, 7);
    const std::vector<float> values = random_values(static_cast<size_t>(c.channels) * c.tokens, 8);
    for (const int bits : {2, 3, 4, 5, 6, 8}) {
      const double plain = error_of(values, c, bits, KVARN_ROUNDING_AUTO, moment, false);
      const double fed = error_of(values, c, bits, KVARN_ROUNDING_AUTO, moment, true);
      EXPECT_LT(fed, 0.7 * plain) << bits << " bits, " << c.channels << " " << static_cast<int>(c.axis);
    }
  }
}

// A value within rounding of a boundary changes the codes of its token after it, and leaves the error about as large: a token is one of at
// least 32, and few are touched.
TEST(RefFeedback, SinglePrecisionLosesNothing) {
  for (const Case& c : kCases) {
    const Moment moment(c.channels, 9);
    const std::vector<float> values = random_values(static_cast<size_t>(c.channels) * c.tokens, 10);
    const std::vector<double> exact(values.begin(), values.end());
    for (const int bits : {2, 4}) {
      const double single = error_of(values, c, bits, KVARN_ROUNDING_AUTO, moment, true);
      EXPECT_NEAR(single / error_of(exact, c, bits, KVARN_ROUNDING_AUTO, moment, true), 1.0, 0.02) << bits;
    }
  }
}

TEST(RefFeedback, OnlyTheCodesAndTheWidthOfUnbiasedGridsChange) {
  for (const Case& c : kCases) {
    const Moment moment(c.channels, 11);
    const std::vector<float> values = random_values(static_cast<size_t>(c.channels) * c.tokens, 12);
    for (const int bits : {2, 3, 4}) {
      const auto plain = encode_operand(values.data(), c.rows(), c.columns(), bits, {});
      const auto fed = encode_operand(values.data(), c.rows(), c.columns(), bits, {}, BestSoFar::kKeep, {moment.factor.data(), c.axis});
      EXPECT_EQ(fed.column_scale, plain.column_scale);
      EXPECT_NE(fed.codes, plain.codes);
      const float levels = static_cast<float>((1 << bits) - 1);
      const float widening = bits == 2 ? 1.125f : bits == 3 ? 1.0625f : 1.0f;
      for (int r = 0; r < c.rows(); ++r) {
        EXPECT_EQ(fed.row_scale[r], plain.row_scale[r] * widening);
        // The middle stays where it was, within a rounding of each end.
        const float middle = plain.row_zero[r] + plain.row_scale[r] * levels * 0.5f;
        EXPECT_NEAR(fed.row_zero[r] + fed.row_scale[r] * levels * 0.5f, middle, 4 * 0x1p-23 * plain.row_scale[r] * levels);
      }
    }
  }
}

// Channels that lie otherwise, with a factor that says so, get the codes that they had.
TEST(RefFeedback, TheDiagonalSaysWhichChannelAStepTakes) {
  for (const Case& c : kCases) {
    const Moment moment(c.channels, 13);
    const std::vector<float> values = random_values(static_cast<size_t>(c.channels) * c.tokens, 14);
    std::vector<double> as_they_lie(values.begin(), values.end()), moved(values.size());
    std::vector<float> factor = moment.factor;
    const auto place = [&](int k) { return (k * 3 + 7) % c.channels; };  // 3 divides none of the head dimensions
    for (int k = 0; k < c.channels; ++k) factor[k * c.channels + k] = static_cast<float>(place(k));
    const auto at = [&](int channel, int t) { return c.axis == Axis::kRows ? channel * c.tokens + t : t * c.channels + channel; };
    for (int k = 0; k < c.channels; ++k) {
      for (int t = 0; t < c.tokens; ++t) moved[at(place(k), t)] = as_they_lie[at(k, t)];
    }
    const auto encode = [&](const std::vector<double>& m, const std::vector<float>& f) {
      return encode_operand(m.data(), c.rows(), c.columns(), 3, {}, BestSoFar::kKeep, {f.data(), c.axis});
    };
    const auto first = encode(as_they_lie, moment.factor), second = encode(moved, factor);
    for (int k = 0; k < c.channels; ++k) {
      for (int t = 0; t < c.tokens; ++t) ASSERT_EQ(second.codes[at(place(k), t)], first.codes[at(k, t)]) << k << " " << t;
    }
  }
}

TEST(RefFeedback, AnOperandWhoseFactorLeavesAChannelOutCannotBeEncoded) {
  for (const Case& c : kCases) {
    const int n = c.channels;
    const std::vector<float> values = random_values(static_cast<size_t>(n) * c.tokens, 15);
    const std::vector<float> good = test::feedback_factors(1, n, 16);
    const auto finite = [&](float entry, int step) {
      std::vector<float> factor = good;
      factor[step * (n + 1)] = entry;
      return encode_operand(values.data(), c.rows(), c.columns(), 4, {}, BestSoFar::kKeep, {factor.data(), c.axis}).finite;
    };
    EXPECT_TRUE(finite(good[0], 0));
    for (const float bad : {good[n + 1], -1.0f, static_cast<float>(n), 7.5f, std::nanf(""), 3e9f, -INFINITY})
      EXPECT_FALSE(finite(bad, 0)) << bad;
    int step_of_zero = 0;
    while (good[step_of_zero * (n + 1)] != 0.0f) ++step_of_zero;
    EXPECT_TRUE(finite(-0.0f, step_of_zero));
  }
}

// The definition does not move: records of the factors and values of cpu_machine.h.
TEST(RefFeedback, RecordsStayAsTheyAre) {
  struct Golden {
    Format format;
    int head_dim, normalisation, rounding;
    test::Order order;
    uint32_t crc;
  };
  constexpr Golden kGoldens[] = {{{2, 2, 128, 16}, 128, KVARN_SCALE_INVARIANT, KVARN_ROUNDING_AUTO, test::Order::kNatural, 0xc66deed5},
                                 {{4, 3, 64, 8}, 80, KVARN_SCALE_INVARIANT, KVARN_ROUNDING_AUTO, test::Order::kNatural, 0x9974c7af},
                                 {{4, 4, 32, 16}, 112, KVARN_PUBLISHED, KVARN_UNBIASED, test::Order::kNatural, 0x259564ab},
                                 {{2, 2, 128, 16}, 128, KVARN_SCALE_INVARIANT, KVARN_ROUNDING_AUTO, test::Order::kAny, 0x68042129}};
  for (const Golden& g : kGoldens) {
    const std::vector<float> k = test::tile_values(g.format.tile_tokens, g.head_dim, 1);
    const std::vector<float> v = test::tile_values(g.format.tile_tokens, g.head_dim, 2);
    const std::vector<float> factors = test::feedback_factors(2, g.head_dim, 3, g.order);
    std::vector<uint8_t> record(static_cast<size_t>(make_layout(g.format, g.head_dim).record_bytes));
    encode_tile(k.data(), v.data(), g.format, g.head_dim,
                {g.normalisation, g.rounding, factors.data(), factors.data() + g.head_dim * g.head_dim}, record.data());
    EXPECT_EQ(crc32(record.data(), record.size()), g.crc) << std::hex << crc32(record.data(), record.size());
  }
}

}  // namespace
}  // namespace kvarn::ref
