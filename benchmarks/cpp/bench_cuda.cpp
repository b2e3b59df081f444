// Times kvarn on a GPU: attention over records at the shapes of docs/DESIGN.md, encoding, and a plain copy in the same run.
//
//   bench_cuda [substring of a row's name]
//
// Every time is the median of 30 single calls with a cold L2 cache, between two events on the stream. GB/s counts the bytes of records and
// staging that a call must read, once; "of copy" compares with what a device-to-device copy of 1 GiB reads and writes.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kvarn/format.h"
#include "kvarn/kvarn.h"

namespace {

#define CHECK_CUDA(call)                                                              \
  do {                                                                                \
    if (const cudaError_t e = (call); e != cudaSuccess) {                             \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(e)); \
      std::exit(1);                                                                   \
    }                                                                                 \
  } while (false)
#define CHECK_KVARN(call)                                                          \
  do {                                                                             \
    if ((call) != KVARN_OK) {                                                      \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, kvarn_last_error()); \
      std::exit(1);                                                                \
    }                                                                              \
  } while (false)

struct Memory {
  void* data = nullptr;
  explicit Memory(size_t bytes) { CHECK_CUDA(cudaMalloc(&data, std::max<size_t>(bytes, 256))); }
  template <class T>
  explicit Memory(const std::vector<T>& from) : Memory(from.size() * sizeof(T)) {
    CHECK_CUDA(cudaMemcpy(data, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { cudaFree(data); }
};

constexpr size_t kFlushBytes = size_t{256} << 20;

template <class Call>
double median_us(void* flush, Call call, int repeats = 30) {
  cudaEvent_t begin, end;
  CHECK_CUDA(cudaEventCreate(&begin));
  CHECK_CUDA(cudaEventCreate(&end));
  std::vector<double> times;
  for (int i = 0; i < repeats + 3; ++i) {
    if (flush != nullptr) CHECK_CUDA(cudaMemsetAsync(flush, i, kFlushBytes, nullptr));
    CHECK_CUDA(cudaEventRecord(begin, nullptr));
    call();
    CHECK_CUDA(cudaEventRecord(end, nullptr));
    CHECK_CUDA(cudaEventSynchronize(end));
    float ms = 0;
    CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 3) times.push_back(ms * 1e3);
  }
  CHECK_CUDA(cudaEventDestroy(begin));
  CHECK_CUDA(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

double copy_gb_per_s() {
  constexpr size_t kBytes = size_t{1} << 30;
  Memory from(kBytes), to(kBytes);
  CHECK_CUDA(cudaMemset(from.data, 1, kBytes));
  const double us = median_us(nullptr, [&] { CHECK_CUDA(cudaMemcpyAsync(to.data, from.data, kBytes, cudaMemcpyDeviceToDevice, nullptr)); });
  return 2.0 * kBytes / us * 1e-3;
}

// An ordinary record: random codes, scales around 0.1 to 1.
std::vector<uint8_t> random_records(const kvarn::RecordLayout& layout, int count) {
  std::mt19937 random(1);
  std::vector<uint8_t> bytes(static_cast<size_t>(layout.record_bytes) * count);
  for (uint8_t& b : bytes) b = static_cast<uint8_t>(random());
  const auto half = [](float x) {  // of a normal fp16 number
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits >> 16 & 0x8000) | (((bits >> 23 & 255) - 112) << 10) | (bits >> 13 & 1023));
  };
  for (int r = 0; r < count; ++r) {
    for (int which = 0; which < kvarn::kMetadataCount; ++which) {
      const bool zero = which == kvarn::kKZero || which == kvarn::kVZero;
      for (int i = 0; i < layout.metadata_count[which]; ++i) {
        const float x = (zero ? -0.6f : 0.3f) + 0.1f * static_cast<float>(random() % 1000) / 1000.0f;
        const uint16_t h = half(x);
        std::memcpy(&bytes[static_cast<size_t>(r) * layout.record_bytes + layout.metadata_offset[which] + 2 * i], &h, 2);
      }
    }
  }
  return bytes;
}

struct AttendRow {
  std::string name;
  kvarn::Format format{4, 2, 128, 16};
  int head_dim = 128;
  int q_heads = 32, kv_heads = 8;
  std::vector<int> contexts;  // tokens of each sequence
  int q_len = 1;
  bool sinks = false;  // the first tile and an unfinished last one in staging, else every tile encoded
};

double g_copy = 0;

void run_attend(const AttendRow& row, void* flush) {
  const kvarn::RecordLayout layout = make_layout(row.format, row.head_dim);
  const int g = row.format.tile_tokens;
  const int seqs = static_cast<int>(row.contexts.size());
  int64_t blocks = 0, slots = 0, staging_tokens = 0;
  int most = 1;
  for (const int c : row.contexts) most = std::max(most, (c + g - 1) / g);
  std::vector<int32_t> table(static_cast<size_t>(seqs) * most, 0), cu(seqs + 1, 0);
  for (int s = 0; s < seqs; ++s) {
    const int tiles = (row.contexts[s] + g - 1) / g;
    cu[s + 1] = cu[s] + row.q_len;
    for (int t = 0; t < tiles; ++t) {
      const bool staged = (t + 1) * g > row.contexts[s] || (row.sinks && t == 0);
      table[static_cast<size_t>(s) * most + t] = static_cast<int32_t>(staged ? ~slots++ : blocks++);
      if (staged) staging_tokens += std::min(g, row.contexts[s] - t * g);
    }
  }
  const size_t record_bytes = static_cast<size_t>(blocks) * row.kv_heads * layout.record_bytes;
  Memory records(record_bytes);
  const std::vector<uint8_t> some = random_records(layout, 64);
  for (size_t at = 0; at < record_bytes; at += some.size()) {
    CHECK_CUDA(cudaMemcpy(static_cast<uint8_t*>(records.data) + at, some.data(), std::min(some.size(), record_bytes - at),
                          cudaMemcpyHostToDevice));
    if (at > 0) break;
  }
  // The rest by doubling.
  for (size_t have = std::min(record_bytes, some.size()); have < record_bytes; have *= 2) {
    CHECK_CUDA(cudaMemcpy(static_cast<uint8_t*>(records.data) + have, records.data, std::min(have, record_bytes - have),
                          cudaMemcpyDeviceToDevice));
  }
  const size_t staging_values = static_cast<size_t>(slots) * kvarn::slot_values(row.kv_heads, g, row.head_dim);
  Memory staging(staging_values * 2);
  {
    std::vector<uint16_t> values(std::min<size_t>(staging_values, 1 << 20));
    std::mt19937 random(2);
    for (uint16_t& v : values) v = static_cast<uint16_t>((random() & 0x83ff) | 0x3800);  // +-0.5 to 1
    for (size_t at = 0; at < staging_values; at += values.size()) {
      CHECK_CUDA(cudaMemcpy(static_cast<uint16_t*>(staging.data) + at, values.data(), std::min(values.size(), staging_values - at) * 2,
                            cudaMemcpyHostToDevice));
    }
  }
  const int q_tokens = cu.back();
  std::vector<uint16_t> q(static_cast<size_t>(q_tokens) * row.q_heads * row.head_dim);
  std::mt19937 random(3);
  for (uint16_t& v : q) v = static_cast<uint16_t>((random() & 0x83ff) | 0x3800);
  Memory device_q(q), out(q.size() * 2), device_table(table), device_cu(cu), lens(row.contexts);

  kvarn_plan_params pp{};
  KVARN_INIT(pp);
  pp.backend = "cuda";
  pp.config = {{row.format.k_bits, row.format.v_bits, g, row.format.metadata_bits}, row.head_dim, row.kv_heads, KVARN_F16};
  pp.num_q_heads = row.q_heads;
  pp.max_num_seqs = seqs;
  pp.max_q_tokens = q_tokens;
  pp.max_tiles = most;
  kvarn_plan* plan = nullptr;
  CHECK_KVARN(kvarn_plan_create(&pp, &plan));
  const int64_t workspace_bytes = kvarn_plan_workspace_bytes(plan);
  Memory workspace(static_cast<size_t>(workspace_bytes));
  kvarn_attend_params p{};
  KVARN_INIT(p);
  p.q = device_q.data;
  p.out = out.data;
  p.q_head_stride = p.out_head_stride = row.head_dim;
  p.q_token_stride = p.out_token_stride = static_cast<int64_t>(row.q_heads) * row.head_dim;
  p.cu_q_lens = static_cast<int32_t*>(device_cu.data);
  p.seq_lens = static_cast<int32_t*>(lens.data);
  p.block_table = static_cast<int32_t*>(device_table.data);
  p.block_table_stride = most;
  p.num_seqs = seqs;
  p.num_q_tokens = q_tokens;
  p.records = static_cast<uint8_t*>(records.data);
  p.num_blocks = blocks;
  p.staging = staging.data;
  p.num_slots = slots;
  p.softmax_scale = 1.0f / std::sqrt(static_cast<float>(row.head_dim));
  p.causal = 1;
  p.workspace = workspace.data;
  p.workspace_bytes = workspace_bytes;
  CHECK_KVARN(kvarn_attend(plan, &p, nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());
  const double us = median_us(flush, [&] { CHECK_KVARN(kvarn_attend(plan, &p, nullptr)); });
  const double bytes = static_cast<double>(record_bytes) + static_cast<double>(staging_tokens) * row.kv_heads * row.head_dim * 4;
  int64_t tokens = 0;
  for (const int c : row.contexts) tokens += c;
  const double fp16_us = static_cast<double>(tokens) * row.kv_heads * row.head_dim * 4 / (g_copy * 1e3);
  std::printf("%-44s %9.1f us %7.0f GB/s %5.1f %% of copy, %5.2f x fp16 at copy speed\n", row.name.c_str(), us, bytes / us * 1e-3,
              bytes / us * 1e-3 / g_copy * 100, fp16_us / us);
  std::fflush(stdout);
  kvarn_plan_destroy(plan);
}

struct EncodeRow {
  const char* name;
  kvarn::Format format{4, 2, 128, 16};
  int head_dim = 128;
  int rounding = KVARN_ROUNDING_AUTO;
  bool feedback = false;  // of K and V
  int tiles = 256;        // of 8 KV heads each
};

void run_encode(const EncodeRow& row) {
  const kvarn::RecordLayout layout = make_layout(row.format, row.head_dim);
  constexpr int kHeads = 8;
  const size_t values = static_cast<size_t>(row.tiles) * kvarn::slot_values(kHeads, row.format.tile_tokens, row.head_dim);
  std::vector<uint16_t> host(values);
  std::mt19937 random(4);
  for (uint16_t& v : host) v = static_cast<uint16_t>((random() & 0x8fff) | 0x3000);
  Memory staging(host), records(static_cast<size_t>(row.tiles) * kHeads * layout.record_bytes);
  std::vector<int32_t> index(row.tiles);
  for (int i = 0; i < row.tiles; ++i) index[i] = i;
  Memory indices(index);
  // Shares of other channels' errors of up to 0.05, channels in any order.
  std::vector<float> shares(row.feedback ? static_cast<size_t>(kHeads) * row.head_dim * row.head_dim : 0);
  for (float& share : shares) share = 1e-4f * (static_cast<float>(random() % 1000) - 500.0f);
  std::vector<int> channels(row.head_dim);
  std::iota(channels.begin(), channels.end(), 0);
  for (size_t head = 0; head < shares.size(); head += static_cast<size_t>(row.head_dim) * row.head_dim) {
    std::shuffle(channels.begin(), channels.end(), random);
    for (int k = 0; k < row.head_dim; ++k) shares[head + k * (row.head_dim + 1)] = static_cast<float>(channels[k]);
  }
  Memory factors(shares);
  kvarn_plan_params pp{};
  KVARN_INIT(pp);
  pp.backend = "cuda";
  pp.config = {{row.format.k_bits, row.format.v_bits, row.format.tile_tokens, row.format.metadata_bits}, row.head_dim, kHeads, KVARN_F16};
  kvarn_plan* plan = nullptr;
  CHECK_KVARN(kvarn_plan_create(&pp, &plan));
  kvarn_encode_params p{};
  KVARN_INIT(p);
  p.staging = staging.data;
  p.num_slots = row.tiles;
  p.records = static_cast<uint8_t*>(records.data);
  p.num_blocks = row.tiles;
  p.num_layers = 1;
  p.slots = p.blocks = static_cast<int32_t*>(indices.data);
  p.num_tiles = row.tiles;
  p.rounding = row.rounding;
  if (row.feedback) p.k_feedback = p.v_feedback = static_cast<const float*>(factors.data);
  const double us = median_us(nullptr, [&] { CHECK_KVARN(kvarn_encode(plan, &p, nullptr)); });
  std::printf("%-44s %9.1f us %7.2f million tiles/s (K and V counted apart)\n", row.name, us, 2.0 * row.tiles * kHeads / us);
  std::fflush(stdout);
  kvarn_plan_destroy(plan);
}

std::vector<EncodeRow> encode_rows() {
  const kvarn::Format k4v2{4, 2, 128, 16};
  return {{"encode k4v2 D128"},
          {"encode k4v4 D128 minmax", {4, 4, 128, 16}, 128, KVARN_MINMAX},
          {"encode k2v2 D128", {2, 2, 128, 16}},
          {"encode k4v2 D64", k4v2, 64},
          {"encode k4v2 D256", k4v2, 256},
          {"encode k4v2_g32 D128", {4, 2, 32, 16}},
          {"encode k4v2_g64 D64", {4, 2, 64, 16}, 64},
          {"encode k4v2_g64 D128", {4, 2, 64, 16}},
          {"encode k4v2_g64 D256", {4, 2, 64, 16}, 256},
          {"encode k4v2_g256 D128", {4, 2, 256, 16}},
          {"encode k4v2 D96, any shape", k4v2, 96},
          {"encode k4v2 D128, 1,024 tiles", k4v2, 128, KVARN_ROUNDING_AUTO, false, 1024},
          {"encode k4v2 D128, 8 tiles", k4v2, 128, KVARN_ROUNDING_AUTO, false, 8},
          {"encode k4v2 D128, 1 tile", k4v2, 128, KVARN_ROUNDING_AUTO, false, 1},
          {"encode k4v2 D64 feedback", k4v2, 64, KVARN_ROUNDING_AUTO, true},
          {"encode k4v2 D128 feedback", k4v2, 128, KVARN_ROUNDING_AUTO, true},
          {"encode k4v2 D256 feedback", k4v2, 256, KVARN_ROUNDING_AUTO, true}};
}

AttendRow uniform(std::string name, int batch, int q_heads, int kv_heads, int context) {
  AttendRow row;
  row.name = std::move(name);
  row.q_heads = q_heads;
  row.kv_heads = kv_heads;
  row.contexts.assign(batch, context);
  return row;
}

std::vector<AttendRow> attend_rows() {
  std::vector<AttendRow> rows;
  for (const auto& [b, hq, hk, context] : std::vector<std::array<int, 4>>{{1, 32, 8, 8192},
                                                                          {1, 32, 8, 32768},
                                                                          {1, 32, 8, 131072},
                                                                          {16, 32, 8, 2048},
                                                                          {16, 32, 8, 32768},
                                                                          {64, 32, 8, 8192},
                                                                          {16, 64, 8, 32768},
                                                                          {32, 8, 8, 16384}}) {
    rows.push_back(
        uniform("k4v2 B" + std::to_string(b) + " " + std::to_string(hq) + "/" + std::to_string(hk) + " " + std::to_string(context), b, hq,
                hk, context));
  }
  for (const int group : {1, 3, 4, 5, 8, 12, 16, 24}) rows.push_back(uniform("group " + std::to_string(group), 64, 8 * group, 8, 8192));
  for (const int q_len : {2, 4, 8}) {
    rows.push_back(uniform("group 4, q_len " + std::to_string(q_len), 64, 32, 8, 8192));
    rows.back().q_len = q_len;
  }
  for (const auto& [k, v] : std::vector<std::pair<int, int>>{{2, 2}, {3, 2}, {3, 3}, {4, 4}, {8, 4}, {8, 8}}) {
    rows.push_back(uniform("k" + std::to_string(k) + "v" + std::to_string(v) + " B64 32/8 8192", 64, 32, 8, 8192));
    rows.back().format = {k, v, 128, 16};
  }
  for (const int d : {64, 256}) {
    rows.push_back(uniform("head_dim " + std::to_string(d), 64, 32, 8, d == 64 ? 16384 : 4096));
    rows.back().head_dim = d;
  }
  for (const int context : {200, 1100, 8292}) {
    rows.push_back(uniform("sinks and open tile, B64, " + std::to_string(context), 64, 32, 8, context));
    rows.back().sinks = true;
  }
  AttendRow ragged = uniform("ragged, 64 of 100 to 60,000", 64, 32, 8, 0);
  for (size_t i = 0; i < ragged.contexts.size(); ++i) ragged.contexts[i] = static_cast<int>(100 * std::pow(600.0, i / 63.0));
  ragged.sinks = true;
  rows.push_back(ragged);
  return rows;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string filter = argc > 1 ? argv[1] : "";
  cudaDeviceProp properties;
  CHECK_CUDA(cudaGetDeviceProperties(&properties, 0));
  int clock_khz = 0, memory_khz = 0;
  cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, 0);
  cudaDeviceGetAttribute(&memory_khz, cudaDevAttrMemoryClockRate, 0);
  std::printf("%s, %d multiprocessors, at most %d MHz, memory %d MHz\n", properties.name, properties.multiProcessorCount, clock_khz / 1000,
              memory_khz / 1000);
  g_copy = copy_gb_per_s();
  std::printf("copy, read and written: %.0f GB/s\n", g_copy);
  Memory flush(kFlushBytes);
  for (const AttendRow& row : attend_rows()) {
    if (row.name.find(filter) != std::string::npos) run_attend(row, flush.data);
  }
  for (const EncodeRow& row : encode_rows()) {
    if (std::string(row.name).find(filter) != std::string::npos) run_encode(row);
  }
  return 0;
}
