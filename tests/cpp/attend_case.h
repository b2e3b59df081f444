// A problem for kvarn_attend with its memory, made from a few numbers, and the comparison of its result with the oracle's.
#pragma once

#include <gtest/gtest.h>

#include <cctype>
#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "kvarn/format.h"
#include "kvarn/kvarn.h"
#include "ref/ref.h"

namespace kvarn::test {

// Every instruction set that this machine runs.
inline std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  std::stringstream list(kvarn_cpu_isas());
  for (std::string name; std::getline(list, name, ',');) names.push_back(name);
  return names;
}

struct AttendShape {
  Format format{4, 2, 128, 16};
  int head_dim = 128;
  int kv_heads = 2;
  int group = 4;  // query heads per KV head
  int dtype = KVARN_F32;
  std::vector<int> seq_lens{300};
  std::vector<int> q_lens{1};
  int sink_tiles = 1;      // of every sequence, in staging; its unfinished last tile always is
  double q_size = 1.0;     // standard deviation of q
  double mean_size = 0.3;  // standard deviation of the channels' means, relative to the values'
  int stride_padding = 0;  // values between heads and between tokens of q and out
  uint32_t seed = 1;

  int q_heads() const { return kv_heads * group; }
};

// Bytes with a canary on either side.
class Guarded {
 public:
  explicit Guarded(size_t bytes, uint8_t fill = 0xa5) : bytes_(bytes), memory_(bytes + 2 * kGuard, kCanary) {
    std::memset(data(), fill, bytes);
  }
  uint8_t* data() { return memory_.data() + kGuard + (64 - reinterpret_cast<uintptr_t>(memory_.data() + kGuard) % 64) % 64; }
  bool intact() {
    const uint8_t* const begin = memory_.data();
    for (const uint8_t* p = begin; p < begin + memory_.size(); ++p) {
      if ((p < data() || p >= data() + bytes_) && *p != kCanary) return false;
    }
    return true;
  }
  size_t size() const { return bytes_; }

 private:
  static constexpr size_t kGuard = 256;
  static constexpr uint8_t kCanary = 0x5c;
  size_t bytes_;
  std::vector<uint8_t> memory_;
};

class AttendCase {
 public:
  explicit AttendCase(const AttendShape& shape) : shape_(shape), layout_(make_layout(shape.format, shape.head_dim)), random_(shape.seed) {
    const int g = shape.format.tile_tokens;
    const size_t seqs = shape.seq_lens.size();
    int most_tiles = 1;
    for (const int tokens : shape.seq_lens) most_tiles = std::max(most_tiles, (tokens + g - 1) / g);
    stride_ = most_tiles;
    table_.assign(seqs * stride_, kUnused);
    cu_q_lens_.assign(1, 0);
    for (const int q : shape.q_lens) cu_q_lens_.push_back(cu_q_lens_.back() + q);

    // Blocks and slots in shuffled order.
    int blocks = 0, slots = 0;
    for (const int tokens : shape.seq_lens) {
      for (int t = 0; t * g < tokens; ++t) ++(in_staging(t, tokens) ? slots : blocks);
    }
    std::vector<int> block_order(blocks), slot_order(slots);
    for (int i = 0; i < blocks; ++i) block_order[i] = i;
    for (int i = 0; i < slots; ++i) slot_order[i] = i;
    std::shuffle(block_order.begin(), block_order.end(), random_);
    std::shuffle(slot_order.begin(), slot_order.end(), random_);
    num_blocks_ = blocks;
    num_slots_ = slots;
    for (size_t s = 0; s < seqs; ++s) {
      for (int t = 0; t * g < shape.seq_lens[s]; ++t) {
        table_[s * stride_ + t] = in_staging(t, shape.seq_lens[s]) ? ~slot_order[--slots] : block_order[--blocks];
      }
    }
    records_.resize(static_cast<size_t>(num_blocks_) * shape.kv_heads * layout_.record_bytes);
    for (int b = 0; b < num_blocks_; ++b) {
      for (int h = 0; h < shape.kv_heads; ++h) fill_record(record(b, h));
    }
    fill_values(staging_, static_cast<size_t>(num_slots_) * slot_values(shape.kv_heads, g, shape.head_dim), 1.0);
    q_head_stride_ = shape.head_dim + shape.stride_padding;
    q_token_stride_ = shape.q_heads() * q_head_stride_ + shape.stride_padding;
    fill_values(q_, static_cast<size_t>(q_tokens()) * q_token_stride_, shape.q_size);
  }

  const AttendShape& shape() const { return shape_; }
  const RecordLayout& layout() const { return layout_; }
  int q_tokens() const { return cu_q_lens_.back(); }
  int64_t rows() const { return static_cast<int64_t>(q_tokens()) * shape_.q_heads(); }
  int value_bytes() const { return shape_.dtype == KVARN_F32 ? 4 : 2; }
  uint8_t* record(int block, int head) {
    return records_.data() + (static_cast<size_t>(block) * shape_.kv_heads + head) * layout_.record_bytes;
  }
  int32_t& entry(int sequence, int tile) { return table_[sequence * stride_ + tile]; }
  uint8_t* staging_value(int slot, int operand, int head, int token, int channel) {
    const int64_t g = shape_.format.tile_tokens;
    return staging_.data() +
           ((((slot * int64_t{2} + operand) * shape_.kv_heads + head) * g + token) * shape_.head_dim + channel) * value_bytes();
  }
  uint8_t* q_value(int token, int head, int channel) {
    return q_.data() + (token * q_token_stride_ + head * q_head_stride_ + channel) * static_cast<int64_t>(value_bytes());
  }
  void set_value(uint8_t* at, float value) const { ref::store_values(&value, shape_.dtype, 1, at); }

  kvarn_config config() const {
    return {{shape_.format.k_bits, shape_.format.v_bits, shape_.format.tile_tokens, shape_.format.metadata_bits},
            shape_.head_dim,
            shape_.kv_heads,
            shape_.dtype};
  }

  kvarn_plan_params plan_params(const std::string& isa) const {
    kvarn_plan_params p{};
    KVARN_INIT(p);
    p.config = config();
    p.num_q_heads = shape_.q_heads();
    p.max_num_seqs = static_cast<int32_t>(shape_.seq_lens.size());
    p.max_q_tokens = std::max(q_tokens(), 1);
    p.max_tiles = static_cast<int32_t>(stride_);
    p.cpu_isa = isa.c_str();
    p.num_threads = 2;
    return p;
  }

  // Everything but the outputs and the workspace.
  kvarn_attend_params params() {
    kvarn_attend_params p{};
    KVARN_INIT(p);
    p.q = q_.data();
    p.q_token_stride = p.out_token_stride = q_token_stride_;
    p.q_head_stride = p.out_head_stride = q_head_stride_;
    p.cu_q_lens = cu_q_lens_.data();
    p.seq_lens = shape_.seq_lens.data();
    p.block_table = table_.data();
    p.block_table_stride = stride_;
    p.num_seqs = static_cast<int32_t>(shape_.seq_lens.size());
    p.num_q_tokens = q_tokens();
    p.records = records_.data();
    p.num_blocks = num_blocks_;
    p.staging = staging_.data();
    p.num_slots = num_slots_;
    p.softmax_scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
    p.causal = 1;
    return p;
  }

  struct Result {
    kvarn_status status = KVARN_OK;
    std::vector<float> out;  // [rows][head_dim]
    std::vector<float> lse;  // [rows]
  };

  // Runs the plan; checks that nothing outside the outputs and the workspace is written.
  Result run(kvarn_plan_params plan_params, kvarn_attend_params p) {
    Result result;
    kvarn_plan* plan = nullptr;
    result.status = kvarn_plan_create(&plan_params, &plan);
    EXPECT_EQ(result.status, KVARN_OK) << kvarn_last_error();
    if (result.status != KVARN_OK) return result;
    Guarded out(static_cast<size_t>(q_tokens()) * q_token_stride_ * value_bytes());
    Guarded lse(static_cast<size_t>(rows()) * sizeof(float));
    const auto workspace_bytes = static_cast<size_t>(kvarn_plan_workspace_bytes(plan));
    Guarded workspace(workspace_bytes + 256, 0xff);
    p.out = out.data();
    p.lse = reinterpret_cast<float*>(lse.data());
    p.workspace = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 255) / 256 * 256);
    p.workspace_bytes = static_cast<int64_t>(workspace_bytes);
    result.status = kvarn_attend(plan, &p, nullptr);
    kvarn_plan_destroy(plan);
    EXPECT_TRUE(out.intact() && lse.intact() && workspace.intact());
    result.out.resize(static_cast<size_t>(rows()) * shape_.head_dim);
    result.lse.resize(static_cast<size_t>(rows()));
    if (rows() != 0) std::memcpy(result.lse.data(), lse.data(), lse.size());
    for (int t = 0; t < q_tokens(); ++t) {
      for (int h = 0; h < shape_.q_heads(); ++h) {
        ref::load_values(out.data() + (t * q_token_stride_ + h * q_head_stride_) * value_bytes(), shape_.dtype, shape_.head_dim,
                         result.out.data() + (static_cast<int64_t>(t) * shape_.q_heads() + h) * shape_.head_dim);
      }
    }
    if (shape_.stride_padding > 0 && result.status == KVARN_OK) {
      for (int t = 0; t < q_tokens(); ++t) {
        for (int h = 0; h < shape_.q_heads(); ++h) {
          const uint8_t* gap = out.data() + (t * q_token_stride_ + h * q_head_stride_ + shape_.head_dim) * value_bytes();
          for (int i = 0; i < shape_.stride_padding * value_bytes(); ++i) EXPECT_EQ(gap[i], 0xa5) << "between the rows of out";
        }
      }
    }
    return result;
  }

  struct Expected {
    std::vector<double> out, lse;
  };
  Expected oracle(const kvarn_attend_params& p) {
    Expected expected{std::vector<double>(static_cast<size_t>(rows()) * shape_.head_dim), std::vector<double>(static_cast<size_t>(rows()))};
    ref::attend({config(), shape_.q_heads(), p}, expected.out.data(), expected.lse.data());
    return expected;
  }

  // Relative L2 error of the worst row. A row that should be NaN or zero must be so exactly (then it counts as 0).
  double worst_error(const Result& result, const Expected& expected) const {
    const int d = shape_.head_dim;
    // Stored values are rounded once, by half a unit in the last place at most: the error that this adds is taken off.
    const double rounding = shape_.dtype == KVARN_F32 ? 0x1p-24 : shape_.dtype == KVARN_F16 ? 0x1p-11 : 0x1p-8;
    double worst = 0;
    for (int64_t r = 0; r < rows(); ++r) {
      double error = 0, size = 0;
      bool nan = false;
      for (int i = 0; i < d; ++i) {
        const double want = expected.out[r * d + i], got = result.out[r * d + i];
        if (std::isnan(want)) {
          nan = true;
          EXPECT_TRUE(std::isnan(got)) << "row " << r;
          continue;
        }
        const double slack = std::max(rounding * std::abs(want), shape_.dtype == KVARN_F16 ? 0x1p-25 : 0.0);
        const double off = std::max(0.0, std::abs(got - want) - slack);
        error += std::isnan(got) ? INFINITY : off * off;
        size += want * want;
      }
      if (nan) continue;
      if (size == 0) {
        EXPECT_EQ(error, 0) << "row " << r;
      } else {
        worst = std::max(worst, std::sqrt(error / size));
      }
    }
    return worst;
  }

  // The bound of the specification is on the output; a score is allowed the same, absolutely, so the log-sum-exp is too.
  static constexpr double kTolerance = 5e-4;

  // `lse_relative`: what fp32 sums of large scores may be off by.
  void expect_oracle(const Result& result, const Expected& expected, const std::string& what, double lse_relative = 1e-6) const {
    ASSERT_EQ(result.status, KVARN_OK) << what << ": " << kvarn_last_error();
    const double error = worst_error(result, expected);
    EXPECT_LE(error, kTolerance) << what;
    ::testing::Test::RecordProperty(property_name(what), std::to_string(error));
    for (int64_t r = 0; r < rows(); ++r) {
      const double want = expected.lse[r], got = result.lse[r];
      if (std::isnan(want)) {
        EXPECT_TRUE(std::isnan(got)) << what << ", lse of row " << r;
      } else if (std::isinf(want)) {
        EXPECT_EQ(got, want) << what << ", lse of row " << r;
      } else {
        EXPECT_NEAR(got, want, kTolerance + std::abs(want) * lse_relative) << what << ", lse of row " << r;
      }
    }
  }

  // Every instruction set against the oracle.
  void expect_oracle_on_every_isa(const kvarn_attend_params& p, const std::string& what) {
    const Expected expected = oracle(p);
    for (const std::string& isa : runnable_isas()) expect_oracle(run(plan_params(isa), p), expected, what + " on " + isa);
  }

  double normal() { return normal_(random_); }
  double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(random_); }

 private:
  static std::string property_name(std::string what) {
    for (char& c : what) c = std::isalnum(static_cast<unsigned char>(c)) != 0 ? c : '_';
    return "error_" + what;
  }

  static constexpr int32_t kUnused = 0x7fffffff;  // behind a sequence's tiles; must not be read

  bool in_staging(int tile, int tokens) const { return tile < shape_.sink_tiles || (tile + 1) * shape_.format.tile_tokens > tokens; }

  void fill_values(std::vector<uint8_t>& bytes, size_t count, double size) {
    std::vector<float> values(count);
    for (float& v : values) v = static_cast<float>(size * normal());
    bytes.resize(count * value_bytes());
    ref::store_values(values.data(), shape_.dtype, static_cast<int64_t>(count), bytes.data());
  }

  // Uniform codes under scales that give values of about unit size.
  void fill_record(uint8_t* bytes) {
    std::memset(bytes, 0, layout_.record_bytes);
    const int d = shape_.head_dim, g = shape_.format.tile_tokens;
    const int k_top = (1 << shape_.format.k_bits) - 1, v_top = (1 << shape_.format.v_bits) - 1;
    for (int t = 0; t < g; ++t) {
      for (int c = 0; c < d; ++c) {
        ref::set_k_code(bytes, layout_, t, c, static_cast<int>(random_() % (k_top + 1)));
        ref::set_v_code(bytes, layout_, t, c, static_cast<int>(random_() % (v_top + 1)));
      }
    }
    // Uniform codes have a standard deviation of about top / sqrt(12).
    const auto vector = [&](Metadata which, int count, const std::function<double(int)>& value) {
      std::vector<float> values(count);
      for (int i = 0; i < count; ++i) values[i] = static_cast<float>(value(i));
      ref::set_metadata(bytes, layout_, which, values.data());
    };
    std::vector<double> scale(std::max(d, g));
    const auto scales = [&](int top) {
      return [&scale, top, this](int i) { return scale[i] = std::sqrt(12.0) / top * uniform(0.6, 1.4); };
    };
    const auto zeros = [&](int top) { return [&scale, top, this](int i) { return -0.5 * top * scale[i] + shape_.mean_size * normal(); }; };
    vector(kKScale, d, scales(k_top));
    vector(kKZero, d, zeros(k_top));
    vector(kKTokenScale, g, [&](int) { return uniform(0.6, 1.4); });
    vector(kVScale, g, scales(v_top));
    vector(kVZero, g, zeros(v_top));
    vector(kVChannelScale, d, [&](int) { return uniform(0.6, 1.4); });
  }

  AttendShape shape_;
  RecordLayout layout_;
  std::mt19937 random_;
  std::normal_distribution<double> normal_;
  int64_t stride_ = 1;
  int num_blocks_ = 0, num_slots_ = 0;
  int64_t q_token_stride_ = 0, q_head_stride_ = 0;
  std::vector<int32_t> table_, cu_q_lens_;
  std::vector<uint8_t> records_, staging_, q_;
};

}  // namespace kvarn::test
