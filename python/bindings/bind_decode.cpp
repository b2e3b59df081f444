#include <nanobind/stl/pair.h>

#include <utility>

#include "checker.h"
#include "module.h"

namespace kvarn::python {
namespace {

std::pair<nb::object, nb::object> decode(nb::handle plan_object, nb::handle records, nb::handle blocks, nb::object k, nb::object v,
                                         nb::handle destinations, nb::handle rotated, nb::handle empty) {
  Plan& plan = plan_arg("decode", plan_object);
  const kvarn_config& c = plan.config;
  Checker check("decode", plan);
  const TensorArg source = check.read("records", records, {.dtypes = kU8, .dims = {"num_blocks", c.num_kv_heads, plan.record_bytes}});
  const TensorArg tiles = check.read("blocks", blocks, {.dtypes = kI32, .dims = {"num_tiles"}});
  kvarn_decode_params params{};
  KVARN_INIT(params);
  params.records = static_cast<const uint8_t*>(source.data);
  params.num_blocks = source.shape[0];
  params.blocks = static_cast<const int32_t*>(tiles.data);
  params.num_tiles = tiles.shape[0];
  params.rotated = check.flag("rotated", rotated);
  TensorArg places;
  if (!destinations.is_none()) {
    places = check.read("destinations", destinations, {.dtypes = kI32, .dims = {params.num_tiles}});
    params.destinations = static_cast<const int32_t*>(places.data);
  }

  if (k.is_none() && v.is_none()) {
    // Indices into arrays that are not there: what lies between them would be undefined, and one large index would allocate without bound.
    if (!destinations.is_none()) check.fail_type("k", "k, v or both to write, because destinations count their tiles", "None for both");
    const std::vector<int64_t> shape = {params.num_tiles, c.num_kv_heads, c.format.tile_tokens, c.head_dim};
    const std::string dtype = names_of(dtypes_of(static_cast<kvarn_dtype>(c.dtype)));
    k = check.allocate("k", empty, records, shape, dtype);
    v = check.allocate("v", empty, records, shape, dtype);
  }

  TensorArg targets[2];
  const char* const names[2] = {"k", "v"};
  const nb::handle objects[2] = {k, v};
  int first = -1;
  for (int i = 0; i < 2; ++i) {
    if (objects[i].is_none()) continue;
    // One call has one dtype, one size and one pair of strides.
    const unsigned dtypes = first < 0 ? kValues : dtypes_of(value_dtype(targets[first]));
    const Dim room = first < 0 ? Dim("num_destinations") : Dim(targets[first].shape[0]);
    targets[i] = check.write(names[i], objects[i],
                             {.dtypes = dtypes, .dims = {room, c.num_kv_heads, c.format.tile_tokens, c.head_dim}, .contiguous_dims = 2});
    if (first < 0) {
      first = i;
      params.tile_stride = targets[i].strides[0];
      params.head_stride = targets[i].strides[1];
      params.num_destinations = targets[i].shape[0];
      params.dtype = value_dtype(targets[i]);
    } else if (targets[i].strides[0] != params.tile_stride || targets[i].strides[1] != params.head_stride) {
      check.fail_value("v", "the strides of k, " + list_of(targets[0].strides, 4), list_of(targets[1].strides, 4));
    }
  }
  params.k = targets[0].data;
  params.v = targets[1].data;

  plan.run([&] { return kvarn_decode(plan.handle.get(), &params, check.stream()); });
  return {k, v};
}

}  // namespace

void bind_decode(nb::module_& m) {
  m.def("decode", &decode, nb::arg("plan").none(), nb::arg("records").none(), nb::arg("blocks").none(), nb::arg("k").none(),
        nb::arg("v").none(), nb::arg("destinations").none(), nb::arg("rotated").none(), nb::arg("empty") = nb::none(),
        "Decodes records into K and V and returns them. See kvarn.ops.decode.");
}

}  // namespace kvarn::python
