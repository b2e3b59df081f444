// Attention over records and staging in double precision: one query row at a time, one key at a time.
#include <cmath>
#include <limits>
#include <vector>

#include "ref/ref.h"

namespace kvarn::ref {
namespace {

struct HeadHistory {  // K and V of one sequence and KV head, rotated, [tokens][head_dim]
  std::vector<double> k, v;
};

HeadHistory gather(const AttendProblem& problem, int sequence, int kv_head) {
  const auto& [config, num_q_heads, params] = problem;
  const Format format{config.format.k_bits, config.format.v_bits, config.format.tile_tokens, config.format.metadata_bits};
  const int d = config.head_dim;
  const int g = format.tile_tokens;
  const int64_t record_bytes = make_layout(format, d).record_bytes;
  const int tokens = params.seq_lens[sequence];
  const int tiles = (tokens + g - 1) / g;
  const int64_t tile_values = static_cast<int64_t>(g) * d;

  HeadHistory history;
  history.k.resize(tiles * tile_values);
  history.v.resize(tiles * tile_values);
  for (int tile = 0; tile < tiles; ++tile) {
    double* k = history.k.data() + tile * tile_values;
    double* v = history.v.data() + tile * tile_values;
    const int32_t entry = params.block_table[sequence * params.block_table_stride + tile];
    if (entry >= 0) {
      decode_tile(params.records + (static_cast<int64_t>(entry) * config.num_kv_heads + kv_head) * record_bytes, format, d, k, v);
      continue;
    }
    // Only the tokens that exist are read: what lies behind them in the slot is undefined.
    const int64_t values = static_cast<int64_t>(std::min(tokens - tile * g, g)) * d;
    const auto* staging = static_cast<const uint8_t*>(params.staging);
    const int64_t slot = ~entry;
    for (int operand = 0; operand < 2; ++operand) {
      const int64_t first = ((slot * 2 + operand) * config.num_kv_heads + kv_head) * tile_values;
      std::vector<float> loaded(values);
      load_values(staging + first * dtype_bytes(config.dtype), config.dtype, values, loaded.data());
      for (int64_t i = 0; i < values; ++i) (operand == 0 ? k : v)[i] = loaded[i];
    }
  }
  return history;
}

// One row of q against what it sees. out [head_dim]; returns the log-sum-exp.
double attend_row(const AttendProblem& problem, const HeadHistory& history, int tokens, int position, int head, const double* q,
                  double* out) {
  const kvarn_attend_params& params = problem.params;
  const int d = problem.config.head_dim;
  const double minus_infinity = -std::numeric_limits<double>::infinity();
  std::vector<double> logits(tokens, minus_infinity);
  std::vector<bool> seen(tokens, false);
  double most = params.sinks != nullptr ? static_cast<double>(params.sinks[head]) : minus_infinity;
  for (int t = 0; t < tokens; ++t) {
    if (params.causal != 0 && t > position) continue;
    if (params.window > 0 && (t > position || t <= position - params.window)) continue;
    double score = 0;
    for (int i = 0; i < d; ++i) score += q[i] * history.k[static_cast<size_t>(t) * d + i];
    score *= params.softmax_scale;
    if (params.logits_soft_cap > 0) score = params.logits_soft_cap * std::tanh(score / params.logits_soft_cap);
    if (params.alibi_slopes != nullptr) score += static_cast<double>(params.alibi_slopes[head]) * (t - position);
    logits[t] = score;
    seen[t] = true;
    if (std::isnan(score) || score > most) most = score;  // once NaN, it stays: no comparison with it is true
  }
  for (int i = 0; i < d; ++i) out[i] = 0;
  if (most == minus_infinity) return minus_infinity;  // nothing to see

  double sum = params.sinks != nullptr ? std::exp(params.sinks[head] - most) : 0;
  for (int t = 0; t < tokens; ++t) {
    if (!seen[t]) continue;
    const double weight = std::exp(logits[t] - most);
    sum += weight;
    for (int i = 0; i < d; ++i) out[i] += weight * history.v[static_cast<size_t>(t) * d + i];
  }
  for (int i = 0; i < d; ++i) out[i] /= sum;
  return most + std::log(sum);
}

}  // namespace

void attend(const AttendProblem& problem, double* out, double* lse) {
  const auto& [config, num_q_heads, params] = problem;
  const int d = config.head_dim;
  const int group = num_q_heads / config.num_kv_heads;
  for (int sequence = 0; sequence < params.num_seqs; ++sequence) {
    const int begin = params.cu_q_lens[sequence];
    const int end = params.cu_q_lens[sequence + 1];
    if (begin == end) continue;
    const int tokens = params.seq_lens[sequence];
    for (int kv_head = 0; kv_head < config.num_kv_heads; ++kv_head) {
      const HeadHistory history = gather(problem, sequence, kv_head);
      for (int token = begin; token < end; ++token) {
        const int position = tokens - (end - begin) + (token - begin);
        for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
          std::vector<float> loaded(d);
          const int64_t first = token * params.q_token_stride + head * params.q_head_stride;
          load_values(static_cast<const uint8_t*>(params.q) + first * dtype_bytes(config.dtype), config.dtype, d, loaded.data());
          std::vector<double> q(loaded.begin(), loaded.end());
          if (params.q_rotated == 0) hadamard_exact(q.data(), d, false);
          const int64_t row = static_cast<int64_t>(token) * num_q_heads + head;
          const double result = attend_row(problem, history, tokens, position, head, q.data(), out + row * d);
          if (params.out_rotated == 0) hadamard_exact(out + row * d, d, true);
          if (lse != nullptr) lse[row] = result;
        }
      }
    }
  }
}

}  // namespace kvarn::ref
