// Attention's AVX-512 kernels on machines without AVX-512: their source over emulated instructions, against the oracle.
#include "attend_case.h"
#include "cpu/plan.h"

namespace kvarn {
namespace cpu {
extern const Kernels attend_avx512_emulated;
extern const Kernels attend_avx512_vnni_emulated;
}  // namespace cpu
namespace test {
namespace {

void serially(void*, int64_t count, kvarn_parallel_body body, void* context) {
  for (int64_t i = 0; i < count; ++i) body(context, i);
}

AttendCase::Result run_emulated(AttendCase& c, const cpu::Kernels& kernels, kvarn_attend_params p) {
  cpu::Plan plan{};
  plan.config = c.config();
  plan.layout = c.layout();
  plan.kernels = &kernels;
  plan.num_threads = 2;
  plan.parallel_for = serially;
  AttendCase::Result result;
  int64_t workspace_bytes = 0;
  const kvarn_plan_params plan_params = c.plan_params("");
  result.status = cpu::create_attend_plan(plan_params, plan, &workspace_bytes);
  if (result.status != KVARN_OK) return result;
  const int d = c.shape().head_dim;
  Guarded workspace(static_cast<size_t>(workspace_bytes), 0xff);
  std::vector<uint8_t> out(static_cast<size_t>(c.rows()) * d * c.value_bytes());
  result.out.resize(static_cast<size_t>(c.rows()) * d);
  result.lse.resize(static_cast<size_t>(c.rows()));
  p.out = out.data();
  p.out_head_stride = d;
  p.out_token_stride = static_cast<int64_t>(c.shape().q_heads()) * d;
  p.lse = result.lse.data();
  p.workspace = workspace.data();
  p.workspace_bytes = workspace_bytes;
  result.status = cpu::attend(plan, p);
  ref::load_values(out.data(), c.shape().dtype, c.rows() * d, result.out.data());
  EXPECT_TRUE(workspace.intact());
  return result;
}

void check(AttendCase& c, const kvarn_attend_params& p, const std::string& what) {
  const AttendCase::Expected expected = c.oracle(p);
  c.expect_oracle(run_emulated(c, cpu::attend_avx512_emulated, p), expected, what + " on avx512");
  c.expect_oracle(run_emulated(c, cpu::attend_avx512_vnni_emulated, p), expected, what + " on avx512_vnni");
}

constexpr int kWidths[] = {2, 3, 4, 5, 6, 8};

TEST(CpuAttendEmulated, EveryHeadDimAndTileLength) {
  int i = 0;
  for (const int head_dim : {64, 80, 96, 112, 128, 160, 192, 256, 512}) {
    for (const int tokens : {32, 64, 128, 256}) {
      AttendShape shape;
      shape.format = {kWidths[i % 6], kWidths[(i / 6 + i) % 6], tokens, i % 5 == 0 ? 8 : 16};
      shape.head_dim = head_dim;
      shape.kv_heads = 1;
      shape.group = 1 + i % 4;
      shape.dtype = i % 3;
      shape.seq_lens = {2 * tokens + 7};
      shape.seed = static_cast<uint32_t>(++i);
      AttendCase c(shape);
      check(c, c.params(), "shape " + std::to_string(i));
    }
  }
}

TEST(CpuAttendEmulated, EveryPairOfWidths) {
  for (const int k_bits : kWidths) {
    for (const int v_bits : kWidths) {
      AttendShape shape;
      shape.format = {k_bits, v_bits, 32, 16};
      shape.head_dim = 80;
      shape.kv_heads = 1;
      shape.group = 7;
      shape.seq_lens = {100};
      AttendCase c(shape);
      check(c, c.params(), "k" + std::to_string(k_bits) + "v" + std::to_string(v_bits));
    }
  }
}

TEST(CpuAttendEmulated, LargeScoresAndRules) {
  for (const double q_size : {0.1, 3.0, 100.0}) {
    AttendShape shape;
    shape.seq_lens = {300};
    shape.q_lens = {3};
    shape.q_size = q_size;
    std::vector<float> slopes, sinks;
    for (int h = 0; h < shape.q_heads(); ++h) {
      slopes.push_back(0.1f * static_cast<float>(h));
      sinks.push_back(static_cast<float>(h));
    }
    AttendCase c(shape);
    kvarn_attend_params p = c.params();
    check(c, p, "plain");
    p.window = 140;
    p.logits_soft_cap = 5;
    p.alibi_slopes = slopes.data();
    p.sinks = sinks.data();
    check(c, p, "with rules");
  }
}

}  // namespace
}  // namespace test
}  // namespace kvarn
