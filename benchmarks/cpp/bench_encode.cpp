// Encoding tiles from staging into records, per instruction set, thread count, format and rounding: microseconds per tile (K and V) and
// core.
#include <cmath>
#include <random>

#include "kvarn/format.h"
#include "measure.h"

namespace kvarn::bench {
namespace {

int run(int argc, char** argv) {
  Arguments arguments(argc, argv);
  const int calls = static_cast<int>(arguments.number("calls", "30", "timed calls of a line"));
  const double seconds = arguments.number("seconds", "2", "time limit of a line");
  const int kv_heads = static_cast<int>(arguments.number("kv-heads", "8", ""));
  const int head_dim = static_cast<int>(arguments.number("head-dim", "128", ""));
  const int slots = static_cast<int>(arguments.number("slots", "128", "staging slots a call encodes"));
  const auto isas = split(arguments.get("isa", kvarn_cpu_isas(), "instruction sets"));
  const auto threads = arguments.numbers("threads", thread_counts(default_threads()), "");
  const auto formats = split(arguments.get("formats", "k4v2_g128,k4v4_g128,k2v2_g128,k8v4_g128", ""));
  const std::string json_path = arguments.get("json", "", "file for the results");
  arguments.done();

  std::printf("%s; kvarn %s; head_dim %d, %d tiles a call\n", cpu_name().c_str(), kvarn_version(), head_dim, slots * kv_heads);
  std::printf("%-11s %-12s %-9s %3s | %14s %8s %8s %5s | %12s\n", "format", "isa", "rounding", "thr", "us/tile*core", "p10", "p90", "calls",
              "tiles/s");
  JsonRows json;
  for (const std::string& name : formats) {
    kvarn_format format;
    require(kvarn_format_parse(name.c_str(), &format));
    const RecordLayout layout = make_layout({format.k_bits, format.v_bits, format.tile_tokens, format.metadata_bits}, head_dim);
    const int64_t values = slots * slot_values(kv_heads, format.tile_tokens, head_dim);
    std::vector<float> staging(static_cast<size_t>(values));
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (float& x : staging) x = normal(random);
    std::vector<uint8_t> records(static_cast<size_t>(slots) * kv_heads * layout.record_bytes);
    std::vector<int32_t> indices;
    for (int i = 0; i < slots; ++i) indices.push_back(i);

    for (const std::string& isa : isas) {
      for (const int thread_count : threads) {
        for (const int rounding : {KVARN_ROUNDING_AUTO, KVARN_MINMAX}) {
          kvarn_plan_params plan_params{};
          KVARN_INIT(plan_params);
          plan_params.config = {format, head_dim, kv_heads, KVARN_F32};
          plan_params.cpu_isa = isa.c_str();
          plan_params.num_threads = thread_count;
          kvarn_plan* plan = nullptr;
          require(kvarn_plan_create(&plan_params, &plan));
          kvarn_encode_params p{};
          KVARN_INIT(p);
          p.staging = staging.data();
          p.num_slots = slots;
          p.records = records.data();
          p.num_blocks = slots;
          p.num_layers = 1;
          p.slots = indices.data();
          p.blocks = indices.data();
          p.num_tiles = slots;
          p.rounding = rounding;
          const Spread t = time_calls(calls, seconds, [&] { require(kvarn_encode(plan, &p, nullptr)); });
          kvarn_plan_destroy(plan);
          const double tiles = static_cast<double>(slots) * kv_heads, us = 1e6 * thread_count / tiles;
          const char* const rounding_name = rounding == KVARN_MINMAX ? "minmax" : "auto";
          std::printf("%-11s %-12s %-9s %3d | %14.2f %8.2f %8.2f %5d | %12.0f\n", name.c_str(), isa.c_str(), rounding_name, thread_count,
                      t.median * us, t.low * us, t.high * us, t.count, tiles / t.median);
          std::fflush(stdout);
          json.begin();
          json.add("cpu", cpu_name());
          json.add("format", name);
          json.add("isa", isa);
          json.add("rounding", rounding_name);
          json.add("threads", thread_count);
          json.add("head_dim", head_dim);
          json.add("calls", t.count);
          json.add("us_per_tile_and_core", t.median * us);
          json.add("p10_us", t.low * us);
          json.add("p90_us", t.high * us);
          json.add("tiles_per_s", tiles / t.median);
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
