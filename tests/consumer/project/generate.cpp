// A decoding loop without a model: random keys and values go through a paged cache token by token, one query attends to all of them, and
// its output is compared with attention over the unquantised values.
//
//   generate [tokens [format]]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <kvarn/kvarn.hpp>
#include <new>
#include <random>
#include <vector>

namespace {

constexpr int kHeadDim = 128;

// One layer's memory with one KV head.
struct Cache {
  kvarn::Plan plan;
  kvarn::Pool pool;
  int num_blocks, num_slots;
  std::vector<uint8_t> records;  // [num_blocks, 1, record_bytes]
  std::vector<float> staging;    // [num_slots, 2, 1, tile_tokens, head_dim]

  size_t slot_values() const { return static_cast<size_t>(kvarn::slot_values(1, plan.layout().format.tile_tokens, kHeadDim)); }

  // Runs what a change of a sequence asks for; k and v belong to work.slot_mapping.
  kvarn::Status run(const kvarn::Work& work, const float* k = nullptr, const float* v = nullptr) {
    for (const kvarn_pair& pair : work.copies) {
      std::copy_n(&staging[pair.source * slot_values()], slot_values(), &staging[pair.destination * slot_values()]);
    }
    if (!work.slot_mapping.empty()) {
      auto p = kvarn::make<kvarn_append_params>();
      p.k = k;
      p.v = v;
      p.k_token_stride = p.v_token_stride = p.k_head_stride = p.v_head_stride = kHeadDim;
      p.slot_mapping = work.slot_mapping.data();
      p.num_tokens = static_cast<int64_t>(work.slot_mapping.size());
      p.staging = staging.data();
      p.num_slots = num_slots;
      if (auto status = plan.append(p); !status) return status;
    }
    std::vector<int32_t> slots, blocks;
    for (const kvarn_pair& pair : work.encodes) {
      slots.push_back(pair.source);
      blocks.push_back(pair.destination);
    }
    auto p = kvarn::make<kvarn_encode_params>();
    p.staging = staging.data();
    p.num_slots = num_slots;
    p.records = records.data();
    p.num_blocks = num_blocks;
    p.num_layers = 1;
    p.slots = slots.data();
    p.blocks = blocks.data();
    p.num_tiles = static_cast<int64_t>(slots.size());
    return plan.encode(p);
  }
};

int fail(const kvarn::Error& error) {
  std::fprintf(stderr, "%s\n", error.message.c_str());
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  const int tokens = argc > 1 ? std::atoi(argv[1]) : 1000;
  const auto format = kvarn::parse_format(argc > 2 ? argv[2] : "k4v4_g128");
  if (!format) return fail(format.error());
  const int max_tiles = (tokens + format->tile_tokens - 1) / format->tile_tokens;

  auto plan = kvarn::Plan::create({.format = *format,
                                   .head_dim = kHeadDim,
                                   .num_kv_heads = 1,
                                   .dtype = KVARN_F32,
                                   .num_q_heads = 1,
                                   .max_num_seqs = 1,
                                   .max_q_tokens = 1,
                                   .max_tiles = max_tiles});
  if (!plan) return fail(plan.error());
  // The sinks, the tile being filled, and none to spare.
  const int num_slots = 2;
  auto pool = kvarn::Pool::create(
      {.num_blocks = max_tiles, .num_slots = num_slots, .tile_tokens = format->tile_tokens, .sink_tokens = format->tile_tokens});
  if (!pool) return fail(pool.error());
  Cache cache{*std::move(plan), *std::move(pool), max_tiles, num_slots, {}, {}};
  cache.records.resize(static_cast<size_t>(max_tiles) * static_cast<size_t>(cache.plan.layout().record_bytes));
  cache.staging.resize(num_slots * cache.slot_values());

  auto sequence = cache.pool.sequence();
  if (!sequence) return fail(sequence.error());
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> k(static_cast<size_t>(tokens) * kHeadDim), v(k.size()), q(kHeadDim), out(kHeadDim);
  for (auto* values : {&k, &v, &q}) {
    for (float& x : *values) x = normal(random);
  }
  for (int t = 0; t < tokens; ++t) {
    const auto appended = sequence->append(1);
    if (!appended) return fail(appended.error());
    if (auto status = cache.run(*appended, &k[static_cast<size_t>(t) * kHeadDim], &v[static_cast<size_t>(t) * kHeadDim]); !status)
      return fail(status.error());
    const auto committed = sequence->commit(1);
    if (!committed) return fail(committed.error());
    if (auto status = cache.run(*committed); !status) return fail(status.error());
  }

  const std::vector<int32_t> table = sequence->table();
  const int32_t cu_q_lens[2] = {0, 1}, seq_len = tokens;
  const size_t workspace_bytes = static_cast<size_t>(cache.plan.workspace_bytes());
  void* workspace = ::operator new(workspace_bytes, std::align_val_t{256});
  auto p = kvarn::make<kvarn_attend_params>();
  p.q = q.data();
  p.out = out.data();
  p.q_token_stride = p.q_head_stride = p.out_token_stride = p.out_head_stride = kHeadDim;
  p.cu_q_lens = cu_q_lens;
  p.seq_lens = &seq_len;
  p.block_table = table.data();
  p.block_table_stride = max_tiles;
  p.num_seqs = 1;
  p.num_q_tokens = 1;
  p.records = cache.records.data();
  p.num_blocks = cache.num_blocks;
  p.staging = cache.staging.data();
  p.num_slots = cache.num_slots;
  p.softmax_scale = 1 / std::sqrt(static_cast<float>(kHeadDim));
  p.causal = 1;
  p.workspace = workspace;
  p.workspace_bytes = static_cast<int64_t>(workspace_bytes);
  const auto attended = cache.plan.attend(p);
  ::operator delete(workspace, std::align_val_t{256});
  if (!attended) return fail(attended.error());

  std::vector<double> exact(kHeadDim, 0.0);
  double weights = 0;
  for (int t = 0; t < tokens; ++t) {
    double score = 0;
    for (int c = 0; c < kHeadDim; ++c) score += double{q[static_cast<size_t>(c)]} * k[static_cast<size_t>(t * kHeadDim + c)];
    const double weight = std::exp(score / std::sqrt(double{kHeadDim}));
    weights += weight;
    for (int c = 0; c < kHeadDim; ++c) exact[static_cast<size_t>(c)] += weight * v[static_cast<size_t>(t * kHeadDim + c)];
  }
  double error = 0, norm = 0;
  for (size_t c = 0; c < kHeadDim; ++c) {
    error += (out[c] - exact[c] / weights) * (out[c] - exact[c] / weights);
    norm += exact[c] / weights * exact[c] / weights;
  }
  const kvarn_sequence_info info = sequence->info();
  std::printf("%d tokens in %d blocks and %d slots, %s: relative error of the output %.4f\n", tokens, info.num_blocks, info.num_slots,
              cache.plan.describe(), std::sqrt(error / norm));
  // 4 bits leave K and V with about 0.006 of relative squared error each; noise in V and in the weights adds up to some 0.1.
  return error / norm < 0.04 ? 0 : 1;
}
