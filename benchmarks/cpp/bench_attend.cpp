// One decode step over many cached tokens, per instruction set, thread count, format and query heads per KV head.
//
// The limit of a line is the slower of two things measured in this process: a plain read of the same records, and the dot-product steps
// that the codes need at the rate of a register-only loop of such steps. `share` is limit / time.
#include <array>
#include <cmath>
#include <memory>
#include <random>

#include "kvarn/format.h"
#include "measure.h"

namespace kvarn::bench {
namespace {

uint16_t half_of(float value) {  // truncated; for normal fp16 values
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  return static_cast<uint16_t>(sign | (((bits >> 13) & 0x3ffff) - (112u << 10)));
}

// Random codes; scales that make values of about unit size.
void fill_record(uint8_t* record, const RecordLayout& layout, std::mt19937_64& random) {
  for (int i = 0; i < layout.record_bytes; ++i) record[i] = static_cast<uint8_t>(random());
  const auto put = [&](int which, int i, float value) {
    const uint16_t half = half_of(value);
    std::memcpy(record + layout.metadata_offset[which] + 2 * i, &half, 2);
  };
  const auto around_one = [&] { return 0.6f + 0.8f * static_cast<float>(random() >> 40) * 0x1p-24f; };
  for (const auto& [scale, zero, bits] :
       {std::array<int, 3>{kKScale, kKZero, layout.format.k_bits}, {kVScale, kVZero, layout.format.v_bits}}) {
    const float top = static_cast<float>((1 << bits) - 1);
    for (int i = 0; i < layout.metadata_count[scale]; ++i) {
      const float step = 3.4641f / top * around_one();
      put(scale, i, step);
      put(zero, i, -0.5f * top * step);
    }
  }
  for (const int which : {kKTokenScale, kVChannelScale}) {
    for (int i = 0; i < layout.metadata_count[which]; ++i) put(which, i, around_one());
  }
}

struct Settings {
  double megabytes, seconds;
  int calls, kv_heads, head_dim, seq_tokens, q_len;
};

// Records of a batch of sequences, and the table that names their blocks in shuffled order.
struct Cache {
  Cache(const kvarn_format& f, const Settings& s)
      : format(f), layout(make_layout({f.k_bits, f.v_bits, f.tile_tokens, f.metadata_bits}, s.head_dim)) {
    seq_tiles = s.seq_tokens / f.tile_tokens;
    const double seq_bytes = static_cast<double>(layout.record_bytes) * s.kv_heads * seq_tiles;
    num_seqs = std::max(1, static_cast<int>(std::ceil(s.megabytes * 1e6 / seq_bytes)));
    num_blocks = static_cast<int64_t>(num_seqs) * seq_tiles;
    bytes = static_cast<size_t>(num_blocks) * s.kv_heads * layout.record_bytes;
    records = std::make_unique<Buffer>(bytes);
    std::mt19937_64 random(1);
    std::vector<uint8_t> samples(static_cast<size_t>(layout.record_bytes) * 64);
    for (int i = 0; i < 64; ++i) fill_record(samples.data() + static_cast<size_t>(i) * layout.record_bytes, layout, random);
    for (int64_t i = 0; i < num_blocks * s.kv_heads; ++i) {
      std::memcpy(records->data() + i * layout.record_bytes, samples.data() + i % 64 * layout.record_bytes,
                  static_cast<size_t>(layout.record_bytes));
    }
    for (int64_t i = 0; i < num_blocks; ++i) table.push_back(static_cast<int32_t>(i));
    std::shuffle(table.begin(), table.end(), random);
    seq_lens.assign(static_cast<size_t>(num_seqs), seq_tiles * f.tile_tokens);
    for (int i = 0; i <= num_seqs; ++i) cu_q_lens.push_back(i * s.q_len);
  }

  kvarn_format format;
  RecordLayout layout;
  int seq_tiles, num_seqs;
  int64_t num_blocks;
  size_t bytes;
  std::unique_ptr<Buffer> records;
  std::vector<int32_t> table, seq_lens, cu_q_lens;
};

Spread time_attend(const Cache& cache, const Settings& s, const std::string& isa, int threads, int group) {
  kvarn_plan_params plan_params{};
  KVARN_INIT(plan_params);
  plan_params.config = {cache.format, s.head_dim, s.kv_heads, KVARN_F16};
  plan_params.num_q_heads = s.kv_heads * group;
  plan_params.max_num_seqs = cache.num_seqs;
  plan_params.max_q_tokens = cache.cu_q_lens.back();
  plan_params.max_tiles = cache.seq_tiles;
  plan_params.cpu_isa = isa.c_str();
  plan_params.num_threads = threads;
  kvarn_plan* plan = nullptr;
  require(kvarn_plan_create(&plan_params, &plan));

  const int64_t token_stride = static_cast<int64_t>(plan_params.num_q_heads) * s.head_dim;
  std::vector<uint16_t> q(static_cast<size_t>(cache.cu_q_lens.back() * token_stride)), out(q.size());
  std::mt19937 random(7);
  for (uint16_t& x : q) x = half_of((0.3f + 1.4f * static_cast<float>(random() >> 8) * 0x1p-24f) * (random() & 1 ? 1.0f : -1.0f));
  const int64_t workspace_bytes = kvarn_plan_workspace_bytes(plan);
  Buffer workspace(static_cast<size_t>(workspace_bytes));
  kvarn_attend_params p{};
  KVARN_INIT(p);
  p.q = q.data();
  p.out = out.data();
  p.q_token_stride = p.out_token_stride = token_stride;
  p.q_head_stride = p.out_head_stride = s.head_dim;
  p.cu_q_lens = cache.cu_q_lens.data();
  p.seq_lens = cache.seq_lens.data();
  p.block_table = cache.table.data();
  p.block_table_stride = cache.seq_tiles;
  p.num_seqs = cache.num_seqs;
  p.num_q_tokens = cache.cu_q_lens.back();
  p.records = cache.records->data();
  p.num_blocks = cache.num_blocks;
  p.softmax_scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
  p.causal = 1;
  p.workspace = workspace.data();
  p.workspace_bytes = workspace_bytes;
  const Spread spread = time_calls(s.calls, s.seconds, [&] { require(kvarn_attend(plan, &p, nullptr)); });
  kvarn_plan_destroy(plan);
  return spread;
}

int run(int argc, char** argv) {
  Arguments arguments(argc, argv);
  Settings s;
  s.megabytes = arguments.number("mb", "512", "megabytes of records, at least");
  s.calls = static_cast<int>(arguments.number("calls", "30", "timed calls of a line"));
  s.seconds = arguments.number("seconds", "3", "time limit of a line");
  s.kv_heads = static_cast<int>(arguments.number("kv-heads", "8", ""));
  s.head_dim = static_cast<int>(arguments.number("head-dim", "128", ""));
  s.seq_tokens = static_cast<int>(arguments.number("seq-tokens", "32768", "cached tokens of a sequence"));
  s.q_len = static_cast<int>(arguments.number("q-len", "1", "query tokens of a sequence"));
  const auto isas = split(arguments.get("isa", kvarn_cpu_isas(), "instruction sets"));
  const auto threads = arguments.numbers("threads", thread_counts(default_threads()), "");
  const auto groups = arguments.numbers("gqa", "1,4,8", "query heads per KV head");
  const auto formats = split(arguments.get("formats", "k4v2_g128,k4v4_g128,k2v2_g128,k8v4_g128", ""));
  const std::string json_path = arguments.get("json", "", "file for the results");
  arguments.done();

  std::printf("%s; kvarn %s; head_dim %d, %d KV heads, %d tokens a sequence, %d query tokens\n", cpu_name().c_str(), kvarn_version(),
              s.head_dim, s.kv_heads, s.seq_tokens, s.q_len);
  std::printf("%-11s %-12s %3s %3s | %9s %9s %9s %5s | %7s %7s %6s | %8s %7s | %8s %6s\n", "format", "isa", "thr", "gqa", "median ms",
              "p10", "p90", "calls", "GB/s", "read", "share", "dot us", "share", "us/tile", "share");
  JsonRows json;
  for (const std::string& name : formats) {
    kvarn_format format;
    require(kvarn_format_parse(name.c_str(), &format));
    const Cache cache(format, s);
    const double tiles = static_cast<double>(cache.num_blocks) * s.kv_heads;
    const auto bytes = static_cast<double>(cache.bytes);
    for (const int thread_count : threads) {
      Team team(thread_count);
      for (const std::string& isa : isas) {
        const double steps_per_second = dot_rate(team, isa);
        const DotStep step = dot_step(isa);
        for (const int group : groups) {
          std::vector<double> rates;
          for (int i = 0; i < 5; ++i) rates.push_back(plain_read_rate(team, cache.records->data(), cache.bytes));
          const Spread t = time_attend(cache, s, isa, thread_count, group);
          for (int i = 0; i < 5; ++i) rates.push_back(plain_read_rate(team, cache.records->data(), cache.bytes));
          const double read_rate = spread_of(rates).median, read_seconds = bytes / read_rate;
          // K and V of a tile: one dot-product step takes `codes` codes with one query plane.
          const double steps = tiles * 2.0 * s.head_dim * format.tile_tokens / step.codes * step.query_planes * group * s.q_len;
          const double dot_seconds = steps_per_second > 0 ? steps / steps_per_second : 0;
          const double limit = std::max(read_seconds, dot_seconds);
          const double core_us = t.median * thread_count / tiles * 1e6;
          std::printf("%-11s %-12s %3d %3d | %9.2f %9.2f %9.2f %5d | %7.2f %7.2f %5.0f%% | %8.3f %6.0f%% | %8.3f %5.0f%%\n", name.c_str(),
                      isa.c_str(), thread_count, group, t.median * 1e3, t.low * 1e3, t.high * 1e3, t.count, bytes / t.median * 1e-9,
                      read_rate * 1e-9, 100 * read_seconds / t.median, dot_seconds * thread_count / tiles * 1e6,
                      100 * dot_seconds / t.median, core_us, 100 * limit / t.median);
          std::fflush(stdout);
          json.begin();
          json.add("cpu", cpu_name());
          json.add("format", name);
          json.add("isa", isa);
          json.add("threads", thread_count);
          json.add("gqa", group);
          json.add("q_len", s.q_len);
          json.add("head_dim", s.head_dim);
          json.add("record_bytes", bytes);
          json.add("calls", t.count);
          json.add("median_ms", t.median * 1e3);
          json.add("p10_ms", t.low * 1e3);
          json.add("p90_ms", t.high * 1e3);
          json.add("gb_per_s", bytes / t.median * 1e-9);
          json.add("plain_read_gb_per_s", read_rate * 1e-9);
          json.add("dot_steps_per_s", steps_per_second);
          json.add("share_of_plain_read", read_seconds / t.median);
          json.add("share_of_dot_bound", dot_seconds / t.median);
          json.add("share_of_limit", limit / t.median);
          json.add("us_per_tile_and_core", core_us);
          json.end();
        }
      }
    }
  }
  json.write(json_path);
  return 0;
}

}  // namespace
}  // namespace kvarn::bench

int main(int argc, char** argv) { return kvarn::bench::run(argc, argv); }
