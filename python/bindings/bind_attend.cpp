#include <nanobind/stl/pair.h>

#include <cmath>
#include <string>
#include <utility>

#include "checker.h"
#include "module.h"

namespace kvarn::python {
namespace {

// Address of an optional array; null when it is None.
template <class T>
T* address_of(const TensorArg& tensor) {
  return static_cast<T*>(tensor.data);
}

std::pair<nb::object, nb::object> attend(nb::handle plan_object, nb::handle q, nb::handle records, nb::handle staging,
                                         nb::handle block_table, nb::handle seq_lens, nb::handle cu_q_lens, nb::object out, nb::object lse,
                                         nb::object workspace, nb::handle alibi_slopes, nb::handle sinks, nb::handle softmax_scale,
                                         nb::handle causal, nb::handle window, nb::handle logits_soft_cap, nb::handle q_rotated,
                                         nb::handle out_rotated, nb::handle return_lse, nb::handle empty) {
  Plan& plan = plan_arg("attend", plan_object);
  const kvarn_config& c = plan.config;
  const unsigned dtype = dtypes_of(static_cast<kvarn_dtype>(c.dtype));
  Checker check("attend", plan);
  if (plan.num_q_heads == 0)
    check.fail_value("plan", "a plan made with num_q_heads, max_num_seqs, max_q_tokens and max_tiles", "num_q_heads = 0");
  const int64_t heads = plan.num_q_heads;

  const TensorArg queries = check.read("q", q, {.dtypes = dtype, .dims = {"num_q_tokens", heads, c.head_dim}, .contiguous_dims = 1});
  const int64_t tokens = queries.shape[0];
  const TensorArg encoded = check.read("records", records, {.dtypes = kU8, .dims = {"num_blocks", c.num_kv_heads, plan.record_bytes}});
  const TensorArg slots =
      check.read("staging", staging, {.dtypes = dtype, .dims = {"num_slots", 2, c.num_kv_heads, c.format.tile_tokens, c.head_dim}});
  const TensorArg lengths = check.read("seq_lens", seq_lens, {.dtypes = kI32, .dims = {"num_seqs"}});
  const int64_t seqs = lengths.shape[0];
  const TensorArg table = check.read("block_table", block_table, {.dtypes = kI32, .dims = {seqs, "max_tiles"}});
  const TensorArg starts = check.read("cu_q_lens", cu_q_lens, {.dtypes = kI32, .dims = {seqs + 1}});
  TensorArg sums, slopes, sink_logits, scratch;
  if (!alibi_slopes.is_none()) slopes = check.read("alibi_slopes", alibi_slopes, {.dtypes = kF32, .dims = {heads}});
  if (!sinks.is_none()) sink_logits = check.read("sinks", sinks, {.dtypes = kF32, .dims = {heads}});

  kvarn_attend_params params{};
  KVARN_INIT(params);
  params.softmax_scale = softmax_scale.is_none() ? static_cast<float>(1.0 / std::sqrt(static_cast<double>(c.head_dim)))
                                                 : check.number("softmax_scale", softmax_scale);
  params.causal = check.flag("causal", causal);
  params.window = integer_arg<int32_t>({"attend", "window"}, window);
  params.logits_soft_cap = check.number("logits_soft_cap", logits_soft_cap);
  params.q_rotated = check.flag("q_rotated", q_rotated);
  params.out_rotated = check.flag("out_rotated", out_rotated);

  if (out.is_none()) out = check.allocate("out", empty, q, {tokens, heads, c.head_dim}, "");
  const TensorArg result = check.write("out", out, {.dtypes = dtype, .dims = {tokens, heads, c.head_dim}, .contiguous_dims = 1});
  if (check.flag("return_lse", return_lse) && lse.is_none()) lse = check.allocate("lse", empty, q, {tokens, heads}, "float32");
  if (!lse.is_none()) sums = check.write("lse", lse, {.dtypes = kF32, .dims = {tokens, heads}});
  if (workspace.is_none() && plan.memory != Memory::kHost)
    workspace = check.allocate("workspace", empty, q, {plan.workspace_bytes}, "uint8");
  if (!workspace.is_none()) {
    scratch = check.write("workspace", workspace, {.dtypes = kU8, .dims = {"workspace_bytes"}});
    if (scratch.shape[0] < plan.workspace_bytes || (scratch.shape[0] > 0 && reinterpret_cast<uintptr_t>(scratch.data) % 256 != 0)) {
      check.fail_value("workspace", "at least " + std::to_string(plan.workspace_bytes) + " bytes, 256-byte aligned",
                       std::to_string(scratch.shape[0]) + " bytes at " + std::to_string(reinterpret_cast<uintptr_t>(scratch.data) % 256) +
                           " modulo 256");
    }
  }

  params.q = queries.data;
  params.out = result.data;
  params.q_token_stride = queries.strides[0];
  params.q_head_stride = queries.strides[1];
  params.out_token_stride = result.strides[0];
  params.out_head_stride = result.strides[1];
  params.lse = address_of<float>(sums);
  params.cu_q_lens = address_of<const int32_t>(starts);
  params.seq_lens = address_of<const int32_t>(lengths);
  params.block_table = address_of<const int32_t>(table);
  params.block_table_stride = table.shape[1];
  params.num_seqs = static_cast<int32_t>(seqs);
  params.num_q_tokens = tokens;
  params.records = address_of<const uint8_t>(encoded);
  params.num_blocks = encoded.shape[0];
  params.staging = slots.data;
  params.num_slots = slots.shape[0];
  params.alibi_slopes = address_of<const float>(slopes);
  params.sinks = address_of<const float>(sink_logits);
  plan.run([&] {
    const bool own = scratch.data == nullptr;
    params.workspace = own ? plan.own_workspace() : scratch.data;
    params.workspace_bytes = own ? plan.workspace_bytes : scratch.shape[0];
    return kvarn_attend(plan.handle.get(), &params, check.stream());
  });
  return {out, lse};
}

}  // namespace

void bind_attend(nb::module_& m) {
  m.def("attend", &attend, nb::arg("plan").none(), nb::arg("q").none(), nb::arg("records").none(), nb::arg("staging").none(),
        nb::arg("block_table").none(), nb::arg("seq_lens").none(), nb::arg("cu_q_lens").none(), nb::arg("out").none(),
        nb::arg("lse").none(), nb::arg("workspace").none(), nb::arg("alibi_slopes").none(), nb::arg("sinks").none(),
        nb::arg("softmax_scale").none(), nb::arg("causal").none(), nb::arg("window").none(), nb::arg("logits_soft_cap").none(),
        nb::arg("q_rotated").none(), nb::arg("out_rotated").none(), nb::arg("return_lse").none() = false, nb::arg("empty") = nb::none(),
        "Softmax attention against records and staging; returns out and lse. See kvarn.ops.attend.");
}

}  // namespace kvarn::python
