#include "checker.h"
#include "module.h"

namespace kvarn::python {
namespace {

void append(nb::handle plan_object, nb::handle k, nb::handle v, nb::handle slot_mapping, nb::handle staging, nb::handle rotated) {
  Plan& plan = plan_arg("append", plan_object);
  const kvarn_config& c = plan.config;
  const unsigned dtype = dtypes_of(static_cast<kvarn_dtype>(c.dtype));
  Checker check("append", plan);
  const TensorArg keys = check.read("k", k, {.dtypes = dtype, .dims = {"num_tokens", c.num_kv_heads, c.head_dim}, .contiguous_dims = 1});
  const int64_t tokens = keys.shape[0];
  const TensorArg values = check.read("v", v, {.dtypes = dtype, .dims = {tokens, c.num_kv_heads, c.head_dim}, .contiguous_dims = 1});
  const TensorArg mapping = check.read("slot_mapping", slot_mapping, {.dtypes = kI64, .dims = {tokens}});
  const TensorArg slots =
      check.write("staging", staging, {.dtypes = dtype, .dims = {"num_slots", 2, c.num_kv_heads, c.format.tile_tokens, c.head_dim}});
  kvarn_append_params params{};
  KVARN_INIT(params);
  params.k = keys.data;
  params.v = values.data;
  params.k_token_stride = keys.strides[0];
  params.k_head_stride = keys.strides[1];
  params.v_token_stride = values.strides[0];
  params.v_head_stride = values.strides[1];
  params.slot_mapping = static_cast<const int64_t*>(mapping.data);
  params.num_tokens = tokens;
  params.staging = slots.data;
  params.num_slots = slots.shape[0];
  params.rotated = check.flag("rotated", rotated);
  plan.run([&] { return kvarn_append(plan.handle.get(), &params, check.stream()); });
}

}  // namespace

void bind_append(nb::module_& m) {
  m.def("append", &append, nb::arg("plan").none(), nb::arg("k").none(), nb::arg("v").none(), nb::arg("slot_mapping").none(),
        nb::arg("staging").none(), nb::arg("rotated").none(), "Rotates new K, V and writes them into staging slots. See kvarn.ops.append.");
}

}  // namespace kvarn::python
