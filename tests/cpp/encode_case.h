// Tiles to encode and the records they should become, for the tests of every backend.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cpu_machine.h"

namespace kvarn::test {

struct EncodeCase {
  Format format;
  int head_dim;
  int heads = 1;
  int dtype = KVARN_F32;
  int normalisation = KVARN_SCALE_INVARIANT;
  int rounding = KVARN_ROUNDING_AUTO;
  const float* k_feedback = nullptr;  // [heads][head_dim][head_dim]
  const float* v_feedback = nullptr;
};

inline std::string describe(const EncodeCase& c) {
  std::ostringstream text;
  text << "k" << c.format.k_bits << "v" << c.format.v_bits << "_g" << c.format.tile_tokens << "_m" << c.format.metadata_bits << " D"
       << c.head_dim << " dtype " << c.dtype << " normalisation " << c.normalisation << " rounding " << c.rounding
       << (c.k_feedback != nullptr ? " K feedback" : "") << (c.v_feedback != nullptr ? " V feedback" : "");
  return text.str();
}

// The record of one tile of `head`; values are rounded to the dtype first.
inline std::vector<uint8_t> expected_record(const EncodeCase& c, const std::vector<float>& k, const std::vector<float>& v, int head = 0) {
  const RecordLayout layout = make_layout(c.format, c.head_dim);
  std::vector<uint8_t> record(static_cast<size_t>(layout.record_bytes), 0xee);
  const std::vector<float> k_rounded = from_dtype(to_dtype(k, c.dtype), c.dtype);
  const std::vector<float> v_rounded = from_dtype(to_dtype(v, c.dtype), c.dtype);
  const auto of_head = [&](const float* factors) {
    return factors == nullptr ? nullptr : factors + int64_t{head} * c.head_dim * c.head_dim;
  };
  ref::encode_tile(k_rounded.data(), v_rounded.data(), c.format, c.head_dim,
                   {c.normalisation, c.rounding, of_head(c.k_feedback), of_head(c.v_feedback)}, record.data());
  return record;
}

// Where two records first differ, in words; "" where they do not.
inline std::string first_difference(const EncodeCase& c, const std::vector<uint8_t>& got, const std::vector<uint8_t>& expected) {
  const RecordLayout layout = make_layout(c.format, c.head_dim);
  if (got.size() != expected.size()) return describe(c) + ": " + std::to_string(got.size()) + " bytes";
  for (size_t i = 0; i < got.size(); ++i) {
    if (got[i] == expected[i]) continue;
    const int at = static_cast<int>(i);
    const char* part = at < layout.v_low_offset ? "K codes" : at < layout.metadata_offset[0] ? "V codes" : "metadata";
    return describe(c) + ": byte " + std::to_string(i) + " (" + part + "): expected " + std::to_string(expected[i]) + ", got " +
           std::to_string(got[i]);
  }
  return "";
}

// ---- cases: each function calls check(case, seed) or check(case, seed, scale) ----

// The widths take turns, so that all of them meet K and V, full and short chunks, in every shape twice.
template <class Check>
void for_every_width_and_shape(const Check& check) {
  uint64_t seed = 100;
  for (const int head_dim : kHeadDims) {
    for (const int tokens : kTileTokens) {
      for (int i = 0; i < 6; ++i) {
        if ((tokens == 256 || head_dim == 512) && i % 3 != 0) continue;
        const int v_bits = kWidths[(i + 1 + static_cast<int>(seed) % 5) % 6];
        check(EncodeCase{{kWidths[i], v_bits, tokens, 16}, head_dim}, seed);
        ++seed;
      }
    }
  }
}

// Every normalisation, rounding, metadata width, dtype and code width in each of some shapes, {tile_tokens, head_dim}.
template <class Check>
void for_every_option(const std::vector<std::pair<int, int>>& shapes, const Check& check) {
  uint64_t seed = 500;
  for (const int normalisation : {KVARN_SCALE_INVARIANT, KVARN_PUBLISHED}) {
    for (const int rounding : {KVARN_ROUNDING_AUTO, KVARN_MINMAX, KVARN_UNBIASED}) {
      for (const int metadata_bits : {16, 8}) {
        for (const int dtype : kDtypes) {
          for (const int width : kWidths) {
            for (const auto& [tokens, head_dim] : shapes) {
              check(EncodeCase{{width, width, tokens, metadata_bits}, head_dim, 1, dtype, normalisation, rounding}, seed++);
            }
          }
        }
      }
    }
  }
  // 8-bit codes over the longest rows: their sum of squares passes 2^24.
  check(EncodeCase{{8, 8, 256, 16}, 512, 1, KVARN_F32, KVARN_SCALE_INVARIANT, KVARN_UNBIASED}, seed);
}

// Values from the smallest subnormal to just below what becomes NaN, in two shapes of which the second is given.
template <class Check>
void for_every_size(const Format& format, int head_dim, const Check& check) {
  for (const int normalisation : {KVARN_SCALE_INVARIANT, KVARN_PUBLISHED}) {
    for (const int exponent : {-149, -140, -126, -100, -80, -62, -60, -58, -30, -10, 10, 14, 24}) {
      const float scale = std::ldexp(1.0f, exponent);
      check(EncodeCase{{2, 3, 64, 16}, 64, 1, KVARN_F32, normalisation}, static_cast<uint64_t>(exponent + 1000), scale);
      check(EncodeCase{format, head_dim, 1, KVARN_F32, normalisation}, static_cast<uint64_t>(exponent + 2000), scale);
    }
  }
}

// Feedback of K, of V and of both in every shape, with the other options taking turns.
template <class Check>
void for_every_feedback(int heads, const Check& check) {
  uint64_t seed = 3000;
  for (const int head_dim : kHeadDims) {
    const std::vector<float> factors = feedback_factors(2 * heads, head_dim, seed);
    const float* const k = factors.data();
    const float* const v = k + heads * head_dim * head_dim;
    for (const int tokens : kTileTokens) {
      if (tokens == 256 && head_dim > 128) continue;
      for (const int rounding : {KVARN_MINMAX, KVARN_UNBIASED}) {
        for (int which = 1; which <= 3; ++which) {
          const int normalisation = seed % 3 == 0 ? KVARN_PUBLISHED : KVARN_SCALE_INVARIANT;
          const Format format{kWidths[seed % 6], kWidths[(seed / 6 + 1) % 6], tokens, seed % 4 == 0 ? 8 : 16};
          check(EncodeCase{format, head_dim, heads, kDtypes[seed % 3], normalisation, rounding, (which & 1) != 0 ? k : nullptr,
                           (which & 2) != 0 ? v : nullptr},
                seed);
          ++seed;
        }
      }
    }
  }
}

// Factors whose diagonal is no order of the channels, of K and then of V: the operand is written as one that cannot be encoded.
template <class Check>
void for_every_bad_order(const Check& check) {
  for (const int head_dim : {64, 80, 128}) {
    const std::vector<float> factors = feedback_factors(2, head_dim, 51);
    const int64_t matrix = int64_t{head_dim} * head_dim;
    const int64_t at = int64_t{head_dim - 3} * (head_dim + 1), other = 5 * (head_dim + 1);
    for (const float bad : {factors[other], -1.0f, static_cast<float>(head_dim), 7.5f, std::nanf(""), 3e9f, -INFINITY}) {
      for (const int operand : {0, 1}) {
        std::vector<float> wrong = factors;
        wrong[operand * matrix + at] = operand == 0 || bad != factors[other] ? bad : factors[matrix + other];
        check(
            EncodeCase{
                {4, 2, 128, 16}, head_dim, 1, KVARN_F16, KVARN_SCALE_INVARIANT, KVARN_ROUNDING_AUTO, wrong.data(), wrong.data() + matrix},
            52);
      }
    }
  }
}

// Tiles without a range somewhere, with ties of rounding, or with what no scale can hold.
inline std::vector<std::vector<float>> degenerate_tiles(int tokens, int channels) {
  const size_t count = static_cast<size_t>(tokens) * channels;
  const std::vector<float> random = tile_values(tokens, channels, 9);
  std::vector<std::vector<float>> tiles;
  for (const float constant : {0.0f, -0.0f, 3.25f, -1e-20f}) tiles.emplace_back(count, constant);
  std::vector<float> one(count, 0.0f), constant_channels(count), constant_tokens(count), mixed = random, signs(count), steps(count);
  one[77] = 5.0f;
  for (int t = 0; t < tokens; ++t) {
    for (int d = 0; d < channels; ++d) {
      const size_t i = static_cast<size_t>(t) * channels + d;
      constant_channels[i] = static_cast<float>(d - 20);
      constant_tokens[i] = static_cast<float>(t - 10);
      if (d % 5 == 0) mixed[i] = 2.0f;   // some channels without a range among others
      if (t % 11 == 0) mixed[i] = 0.0f;  // and some tokens
      signs[i] = (t + d) % 2 == 0 ? 1.0f : -1.0f;
      steps[i] = static_cast<float>((t * 5 + d * 3) % 8) * 0.5f;
    }
  }
  std::vector<float> nan = random, infinite = random;
  nan.back() = std::numeric_limits<float>::quiet_NaN();
  infinite[3] = std::numeric_limits<float>::infinity();
  for (const auto& tile : {one, constant_channels, constant_tokens, mixed, signs, steps, nan, infinite}) tiles.push_back(tile);
  return tiles;
}

}  // namespace kvarn::test
