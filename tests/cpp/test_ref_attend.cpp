// The attention oracle against a second, even plainer one that works on dense K and V in the model's frame.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "ref/ref.h"

namespace kvarn::ref {
namespace {

constexpr int kTokens = 32;  // of a tile
constexpr int kHeadDim = 80;
constexpr int kKvHeads = 2;
const Format kFormat{4, 2, kTokens, 16};

// Two sequences over a shared pool: records for some tiles, staging slots for the others, in no order.
struct Cache {
  int group = 3;
  int dtype = KVARN_F32;
  std::vector<int32_t> seq_lens = {75, 33};
  std::vector<int32_t> cu_q_lens = {0, 4, 5};
  std::vector<int32_t> table = {2, ~1, ~0, 99, 0, ~2, 99, 99};  // 99: never read
  int stride = 4;
  std::vector<uint8_t> records;
  std::vector<float> staging;  // [slots][2][heads][tokens][head_dim]
  std::vector<float> q;
  kvarn_attend_params params{};

  explicit Cache(uint64_t seed) {
    Generator generator(seed);
    const auto fill = [&](std::vector<float>& values, size_t count) {
      values.resize(count);
      for (float& x : values) x = 2 * generator.next_value();
    };
    const int num_blocks = 3;
    const size_t tile = static_cast<size_t>(kTokens) * kHeadDim;
    const RecordLayout layout = make_layout(kFormat, kHeadDim);
    for (int i = 0; i < num_blocks * kKvHeads; ++i) {
      std::vector<float> k, v;
      fill(k, tile);
      fill(v, tile);
      std::vector<uint8_t> record(layout.record_bytes);
      encode_tile(k.data(), v.data(), kFormat, kHeadDim, {}, record.data());
      records.insert(records.end(), record.begin(), record.end());
    }
    fill(staging, 3 * 2 * kKvHeads * tile);
    fill(q, static_cast<size_t>(cu_q_lens.back()) * kKvHeads * group * kHeadDim);
    KVARN_INIT(params);
    params.softmax_scale = 0.11f;
    params.causal = 1;
  }

  int num_q_heads() const { return kKvHeads * group; }
  AttendProblem problem() {
    params.q = q.data();
    params.q_head_stride = kHeadDim;
    params.q_token_stride = static_cast<int64_t>(num_q_heads()) * kHeadDim;
    params.cu_q_lens = cu_q_lens.data();
    params.seq_lens = seq_lens.data();
    params.block_table = table.data();
    params.block_table_stride = stride;
    params.num_seqs = static_cast<int32_t>(seq_lens.size());
    params.num_q_tokens = cu_q_lens.back();
    params.records = records.data();
    params.num_blocks = 3;
    params.staging = staging.data();
    params.num_slots = 3;
    return {{{kFormat.k_bits, kFormat.v_bits, kTokens, 16}, kHeadDim, kKvHeads, dtype}, num_q_heads(), params};
  }
};

struct Result {
  std::vector<double> out, lse;
};
Result run(Cache& cache) {
  const AttendProblem problem = cache.problem();
  Result r{std::vector<double>(cache.q.size()), std::vector<double>(cache.q.size() / kHeadDim)};
  attend(problem, r.out.data(), r.lse.data());
  return r;
}

// One token of K or V of a sequence in the model's frame.
std::vector<double> token_of(const Cache& cache, int sequence, int kv_head, int token, bool is_k) {
  const int32_t entry = cache.table[sequence * cache.stride + token / kTokens];
  const size_t tile = static_cast<size_t>(kTokens) * kHeadDim;
  std::vector<double> row(kHeadDim);
  if (entry < 0) {
    const float* at = cache.staging.data() + ((static_cast<size_t>(~entry) * 2 + (is_k ? 0 : 1)) * kKvHeads + kv_head) * tile;
    std::copy_n(at + token % kTokens * kHeadDim, kHeadDim, row.begin());
  } else {
    const RecordLayout layout = make_layout(kFormat, kHeadDim);
    std::vector<double> k(tile), v(tile);
    decode_tile(cache.records.data() + static_cast<size_t>(entry * kKvHeads + kv_head) * layout.record_bytes, kFormat, kHeadDim, k.data(),
                v.data());
    std::copy_n((is_k ? k : v).begin() + token % kTokens * kHeadDim, kHeadDim, row.begin());
  }
  hadamard_exact(row.data(), kHeadDim, true);
  return row;
}

using Rows = std::vector<std::vector<double>>;
Rows tokens_of(const Cache& cache, int sequence, int kv_head, bool is_k) {
  Rows rows;
  for (int t = 0; t < cache.seq_lens[sequence]; ++t) rows.push_back(token_of(cache, sequence, kv_head, t, is_k));
  return rows;
}

// The definition, written as the formulas of kvarn.h: softmax over a list of (logit, value) pairs.
Result expected(const Cache& cache) {
  const kvarn_attend_params& p = cache.params;
  Result r;
  for (size_t sequence = 0; sequence < cache.seq_lens.size(); ++sequence) {
    const int s = static_cast<int>(sequence);
    const int q_len = cache.cu_q_lens[s + 1] - cache.cu_q_lens[s];
    std::vector<Rows> ks, vs;
    for (int kv_head = 0; kv_head < kKvHeads; ++kv_head) {
      ks.push_back(tokens_of(cache, s, kv_head, true));
      vs.push_back(tokens_of(cache, s, kv_head, false));
    }
    for (int i = 0; i < q_len; ++i) {
      const int position = cache.seq_lens[s] - q_len + i;
      for (int head = 0; head < cache.num_q_heads(); ++head) {
        const float* q = cache.q.data() + (static_cast<size_t>(cache.cu_q_lens[s] + i) * cache.num_q_heads() + head) * kHeadDim;
        double sum = 0;
        std::vector<double> out(kHeadDim, 0.0);
        for (int t = 0; t < cache.seq_lens[s]; ++t) {
          const bool hidden_by_order = p.causal != 0 && t > position;
          const bool hidden_by_window = p.window > 0 && !(t <= position && position - t < p.window);
          if (hidden_by_order || hidden_by_window) continue;
          const std::vector<double>& k = ks[head / cache.group][t];
          const std::vector<double>& v = vs[head / cache.group][t];
          double logit = p.softmax_scale * std::inner_product(k.begin(), k.end(), q, 0.0);
          if (p.logits_soft_cap > 0) logit = p.logits_soft_cap * std::tanh(logit / p.logits_soft_cap);
          if (p.alibi_slopes != nullptr) logit += p.alibi_slopes[head] * static_cast<double>(t - position);
          sum += std::exp(logit);
          for (int d = 0; d < kHeadDim; ++d) out[d] += std::exp(logit) * v[d];
        }
        if (p.sinks != nullptr) sum += std::exp(static_cast<double>(p.sinks[head]));
        for (const double x : out) r.out.push_back(sum > 0 ? x / sum : 0);
        r.lse.push_back(std::log(sum));
      }
    }
  }
  return r;
}

// Both are double: a few hundred roundings of 2^-53 on numbers of ordinary size.
void expect_equal(const Result& got, const Result& want) {
  ASSERT_EQ(got.out.size(), want.out.size());
  for (size_t i = 0; i < got.out.size(); ++i) ASSERT_NEAR(got.out[i], want.out[i], 1e-10) << i;
  for (size_t i = 0; i < got.lse.size(); ++i) {
    if (std::isinf(want.lse[i])) {
      ASSERT_EQ(got.lse[i], want.lse[i]);
    } else {
      ASSERT_NEAR(got.lse[i], want.lse[i], 1e-10) << i;
    }
  }
}

TEST(RefAttend, CausalOverRecordsAndStaging) {
  Cache cache(1);
  expect_equal(run(cache), expected(cache));
}

TEST(RefAttend, FullMaskInsideTheStep) {
  Cache cache(2);
  cache.params.causal = 0;
  expect_equal(run(cache), expected(cache));
}

TEST(RefAttend, SlidingWindow) {
  for (const int window : {1, 2, 33, 40, 1000}) {
    for (const int causal : {0, 1}) {
      Cache cache(3);
      cache.params.window = window;
      cache.params.causal = causal;
      expect_equal(run(cache), expected(cache));
    }
  }
}

TEST(RefAttend, SoftCapAlibiAndSinks) {
  const std::vector<float> slopes = {0.5f, 0.25f, 0.125f, 0.0f, -0.1f, 0.01f};
  const std::vector<float> sinks = {0.0f, 3.0f, -2.0f, 8.0f, -30.0f, 1.0f};
  Cache plain(4);
  const Result without = run(plain);
  for (const int mask : {1, 2, 4, 7}) {
    Cache cache(4);
    if ((mask & 1) != 0) cache.params.logits_soft_cap = 2.0f;
    if ((mask & 2) != 0) cache.params.alibi_slopes = slopes.data();
    if ((mask & 4) != 0) cache.params.sinks = sinks.data();
    const Result got = run(cache);
    expect_equal(got, expected(cache));
    EXPECT_NE(got.lse, without.lse) << "the option changed nothing";
  }
}

TEST(RefAttend, RotatedQueriesAndOutputs) {
  Cache cache(5);
  const Result want = run(cache);
  std::vector<double> rotated(kHeadDim);
  for (size_t row = 0; row < cache.q.size(); row += kHeadDim) {
    std::copy_n(cache.q.begin() + static_cast<ptrdiff_t>(row), kHeadDim, rotated.begin());
    hadamard_exact(rotated.data(), kHeadDim, false);
    std::copy(rotated.begin(), rotated.end(), cache.q.begin() + static_cast<ptrdiff_t>(row));
  }
  cache.params.q_rotated = 1;
  cache.params.out_rotated = 1;
  Result got = run(cache);
  for (size_t row = 0; row < got.out.size(); row += kHeadDim) hadamard_exact(got.out.data() + row, kHeadDim, true);
  // The rotated query was rounded to fp32 once: logits of about 20 move by 20 * 2^-24 * sqrt(D).
  for (size_t i = 0; i < got.out.size(); ++i) ASSERT_NEAR(got.out[i], want.out[i], 1e-4);
}

TEST(RefAttend, OneVisibleKeyGivesItsValue) {
  Cache cache(6);
  cache.params.window = 1;
  const Result got = run(cache);
  const std::vector<double> v = token_of(cache, 0, 1, 71, false);  // the first query of sequence 0 sits at 75 - 4
  for (int d = 0; d < kHeadDim; ++d) EXPECT_NEAR(got.out[static_cast<size_t>(4) * kHeadDim + d], v[d], 1e-12);
}

TEST(RefAttend, NothingToSeeGivesZeros) {
  Cache cache(7);
  cache.seq_lens = {0, 33};
  cache.cu_q_lens = {0, 1, 5};  // one query at position -1 sees nothing
  Result got = run(cache);
  for (int i = 0; i < cache.num_q_heads() * kHeadDim; ++i) ASSERT_EQ(got.out[i], 0.0);
  for (int head = 0; head < cache.num_q_heads(); ++head) ASSERT_EQ(got.lse[head], -std::numeric_limits<double>::infinity());
  const std::vector<float> sinks(cache.num_q_heads(), 0.75f);
  cache.params.sinks = sinks.data();
  got = run(cache);
  for (int i = 0; i < cache.num_q_heads() * kHeadDim; ++i) ASSERT_EQ(got.out[i], 0.0);
  for (int head = 0; head < cache.num_q_heads(); ++head) ASSERT_EQ(got.lse[head], 0.75);
}

// Tile 0 of sequence 0 is block 2; its head 1 becomes NaN. Rows of the other head, of the other sequence, and rows whose window starts
// later keep every bit.
TEST(RefAttend, NanStaysWithTheRowsThatSeeIt) {
  for (const int window : {0, 20}) {
    Cache cache(8);
    cache.params.window = window;
    const Result clean = run(cache);
    const RecordLayout layout = make_layout(kFormat, kHeadDim);
    uint8_t* record = cache.records.data() + static_cast<size_t>(2 * kKvHeads + 1) * layout.record_bytes;
    for (const Metadata which : {kKScale, kKZero, kKTokenScale}) set_metadata_nan(record, layout, which);
    const Result got = run(cache);
    for (int row = 0; row < 5 * cache.num_q_heads(); ++row) {
      const bool sees_it = window == 0 && row < 4 * cache.num_q_heads() && row % cache.num_q_heads() >= cache.group;
      for (int d = 0; d < kHeadDim; ++d) {
        const size_t i = static_cast<size_t>(row) * kHeadDim + d;
        if (sees_it) {
          ASSERT_TRUE(std::isnan(got.out[i]));
        } else {
          ASSERT_EQ(got.out[i], clean.out[i]);
        }
      }
      ASSERT_EQ(std::isnan(got.lse[row]), sees_it);
    }
  }
}

TEST(RefAttend, ABadQuerySpoilsItsOwnRowOnly) {
  for (const float bad : {NAN, INFINITY}) {
    Cache cache(9);
    const Result clean = run(cache);
    const int row = 7;
    cache.q[row * kHeadDim + 5] = bad;
    const Result got = run(cache);
    for (size_t i = 0; i < got.out.size(); ++i) {
      if (static_cast<int>(i / kHeadDim) == row) {
        ASSERT_TRUE(std::isnan(got.out[i]));
      } else {
        ASSERT_EQ(got.out[i], clean.out[i]);
      }
    }
    ASSERT_TRUE(std::isnan(got.lse[row]));
  }
}

}  // namespace
}  // namespace kvarn::ref
