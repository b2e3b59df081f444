#include <string>

#include "checker.h"
#include "module.h"

namespace kvarn::python {
namespace {

struct Choice {
  const char* name;
  int32_t value;
};
constexpr Choice kNormalisations[] = {{"scale_invariant", KVARN_SCALE_INVARIANT}, {"published", KVARN_PUBLISHED}};
constexpr Choice kRoundings[] = {{"auto", KVARN_ROUNDING_AUTO}, {"minmax", KVARN_MINMAX}, {"unbiased", KVARN_UNBIASED}};

template <size_t N>
int32_t choose(const Checker& check, const char* argument, const Choice (&choices)[N], nb::handle object) {
  std::string names;
  for (const Choice& choice : choices) names += (names.empty() ? "one of " : ", ") + std::string(choice.name);
  const std::string name = text_arg({"encode", argument}, object, names.c_str());
  for (const Choice& choice : choices) {
    if (name == choice.name) return choice.value;
  }
  check.fail_value(argument, names, name);
}

// Bytes between layers of an array whose first dimension is the layer.
int64_t layer_stride_bytes(const TensorArg& tensor, bool layered) { return layered ? tensor.strides[0] * tensor.item_bytes() : 0; }

void encode(nb::handle plan_object, nb::handle staging, nb::handle records, nb::handle slots, nb::handle blocks, nb::handle normalisation,
            nb::handle rounding, nb::handle k_feedback, nb::handle v_feedback) {
  Plan& plan = plan_arg("encode", plan_object);
  const kvarn_config& c = plan.config;
  const unsigned dtype = dtypes_of(static_cast<kvarn_dtype>(c.dtype));
  Checker check("encode", plan);
  kvarn_encode_params params{};
  KVARN_INIT(params);
  params.normalisation = choose(check, "normalisation", kNormalisations, normalisation);
  params.rounding = choose(check, "rounding", kRoundings, rounding);

  // Both arrays have a layer axis, or neither has.
  TensorArg probe;
  const bool layered = borrow(staging, Access::kRead, &probe).empty() && probe.ndim == 6;
  const int64_t layers = layered ? probe.shape[0] : 1;
  const TensorArg source =
      layered
          ? check.read(
                "staging", staging,
                {.dtypes = dtype, .dims = {layers, "num_slots", 2, c.num_kv_heads, c.format.tile_tokens, c.head_dim}, .contiguous_dims = 5})
          : check.read("staging", staging, {.dtypes = dtype, .dims = {"num_slots", 2, c.num_kv_heads, c.format.tile_tokens, c.head_dim}});
  const TensorArg target =
      layered ? check.write("records", records,
                            {.dtypes = kU8, .dims = {layers, "num_blocks", c.num_kv_heads, plan.record_bytes}, .contiguous_dims = 3})
              : check.write("records", records, {.dtypes = kU8, .dims = {"num_blocks", c.num_kv_heads, plan.record_bytes}});
  const TensorArg from = check.read("slots", slots, {.dtypes = kI32, .dims = {"num_tiles"}});
  const TensorArg to = check.read("blocks", blocks, {.dtypes = kI32, .dims = {from.shape[0]}});
  const auto factors = [&](const char* name, nb::handle values) -> const float* {
    if (values.is_none()) return nullptr;
    const TensorArg tensor = layered ? check.read(name, values, {.dtypes = kF32, .dims = {layers, c.num_kv_heads, c.head_dim, c.head_dim}})
                                     : check.read(name, values, {.dtypes = kF32, .dims = {c.num_kv_heads, c.head_dim, c.head_dim}});
    return static_cast<const float*>(tensor.data);
  };
  params.k_feedback = factors("k_feedback", k_feedback);
  params.v_feedback = factors("v_feedback", v_feedback);
  if (layers == 0) return;

  params.staging = source.data;
  params.num_slots = source.shape[layered];
  params.records = static_cast<uint8_t*>(target.data);
  params.num_blocks = target.shape[layered];
  params.num_layers = static_cast<int32_t>(layers);
  params.staging_layer_stride_bytes = layer_stride_bytes(source, layered);
  params.records_layer_stride_bytes = layer_stride_bytes(target, layered);
  params.slots = static_cast<const int32_t*>(from.data);
  params.blocks = static_cast<const int32_t*>(to.data);
  params.num_tiles = from.shape[0];
  plan.run([&] { return kvarn_encode(plan.handle.get(), &params, check.stream()); });
}

}  // namespace

void bind_encode(nb::module_& m) {
  m.def("encode", &encode, nb::arg("plan").none(), nb::arg("staging").none(), nb::arg("records").none(), nb::arg("slots").none(),
        nb::arg("blocks").none(), nb::arg("normalisation").none(), nb::arg("rounding").none(), nb::arg("k_feedback").none(),
        nb::arg("v_feedback").none(), "Encodes staging slots into records. See kvarn.ops.encode.");
}

}  // namespace kvarn::python
