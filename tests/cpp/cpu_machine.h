// What the tests of the CPU backend share: the instruction sets of this machine, plans, and reproducible values.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "expect.h"
#include "kvarn/kvarn.h"
#include "ref/ref.h"

namespace kvarn::test {

// Everything this machine runs, best first.
inline std::vector<std::string> machine_isas() {
  std::vector<std::string> isas;
  std::stringstream names(kvarn_cpu_isas());
  for (std::string name; std::getline(names, name, ',');) isas.push_back(name);
  return isas;
}

struct PlanDeleter {
  void operator()(kvarn_plan* plan) const { kvarn_plan_destroy(plan); }
};
using PlanPointer = std::unique_ptr<kvarn_plan, PlanDeleter>;

inline kvarn_plan_params plan_params(const Format& format, int head_dim, int num_kv_heads, int dtype, const char* isa,
                                     int num_threads = 1) {
  kvarn_plan_params params{};
  KVARN_INIT(params);
  params.backend = "cpu";
  params.config = {{format.k_bits, format.v_bits, format.tile_tokens, format.metadata_bits}, head_dim, num_kv_heads, dtype};
  params.cpu_isa = isa;
  params.num_threads = num_threads;
  return params;
}

inline PlanPointer make_plan(const kvarn_plan_params& params) {
  kvarn_plan* plan = nullptr;
  EXPECT_SUCCEEDS(kvarn_plan_create(&params, &plan));
  // The forced choice is the one that runs.
  if (plan != nullptr && params.cpu_isa != nullptr) {
    EXPECT_EQ(std::string(kvarn_plan_describe(plan)).rfind(std::string("cpu/") + params.cpu_isa + ",", 0), 0u) << kvarn_plan_describe(plan);
  }
  return PlanPointer(plan);
}
inline PlanPointer make_plan(const Format& format, int head_dim, int num_kv_heads, int dtype, const std::string& isa, int num_threads = 1) {
  return make_plan(plan_params(format, head_dim, num_kv_heads, dtype, isa.c_str(), num_threads));
}

// `values` rounded to `dtype`, as bytes.
inline std::vector<uint8_t> to_dtype(const std::vector<float>& values, int dtype) {
  std::vector<uint8_t> bytes(values.size() * static_cast<size_t>(ref::dtype_bytes(dtype)));
  ref::store_values(values.data(), dtype, static_cast<int64_t>(values.size()), bytes.data());
  return bytes;
}
inline std::vector<float> from_dtype(const std::vector<uint8_t>& bytes, int dtype) {
  std::vector<float> values(bytes.size() / static_cast<size_t>(ref::dtype_bytes(dtype)));
  ref::load_values(bytes.data(), dtype, static_cast<int64_t>(values.size()), values.data());
  return values;
}

// About normally distributed values, times `scale`.
inline std::vector<float> random_values(size_t count, uint64_t seed, float scale = 1.0f) {
  ref::Generator generator(seed);
  std::vector<float> values(count);
  for (float& value : values) value = generator.next_value() * scale;
  return values;
}

// Random values in which channels differ in size, some tokens are outliers, and values repeat (ties of rounding included).
inline std::vector<float> tile_values(int tokens, int channels, uint64_t seed, float scale = 1.0f) {
  ref::Generator generator(seed);
  std::vector<float> values(static_cast<size_t>(tokens) * channels);
  for (int t = 0; t < tokens; ++t) {
    const float token_size = t % 37 == 5 ? 12.0f : 1.0f;
    for (int d = 0; d < channels; ++d) {
      const float channel_size = 0.25f + 0.125f * static_cast<float>((d * 7) % 23);
      values[static_cast<size_t>(t) * channels + d] = generator.next_value() * token_size * channel_size * scale;
    }
  }
  return values;
}

// Feedback factors [matrices][head_dim][head_dim], whose steps take the channels in any order or as they lie; what is below the diagonal
// must not be read, and is NaN.
enum class Order { kAny, kNatural };
inline std::vector<float> feedback_factors(int matrices, int head_dim, uint64_t seed, Order order = Order::kAny) {
  ref::Generator generator(seed);
  std::vector<float> factors(static_cast<size_t>(matrices) * head_dim * head_dim);
  for (size_t i = 0; i < factors.size(); ++i) {
    const auto at = static_cast<int>(i % (static_cast<size_t>(head_dim) * head_dim));
    // Rows whose entries add up to about 1 keep the fed back errors from growing.
    factors[i] = at % head_dim > at / head_dim ? generator.next_value() * 2.0f / static_cast<float>(head_dim) : std::nanf("");
  }
  std::vector<int> channels(head_dim);
  for (int64_t m = 0; m < matrices; ++m) {
    std::iota(channels.begin(), channels.end(), 0);
    for (int k = head_dim - 1; k > 0 && order == Order::kAny; --k) std::swap(channels[k], channels[generator.next() % (k + 1)]);
    for (int k = 0; k < head_dim; ++k) factors[(m * head_dim + k) * head_dim + k] = static_cast<float>(channels[k]);
  }
  return factors;
}

constexpr int kHeadDims[] = {64, 80, 96, 112, 128, 160, 192, 256, 512};
constexpr int kWidths[] = {2, 3, 4, 5, 6, 8};
constexpr int kTileTokens[] = {32, 64, 128, 256};
constexpr int kDtypes[] = {KVARN_F32, KVARN_F16, KVARN_BF16};

}  // namespace kvarn::test
