#include <algorithm>

#include "checker.h"
#include "module.h"

namespace kvarn::python {
namespace {

nb::object hadamard(nb::handle plan_object, nb::handle x, nb::object out, nb::handle inverse, nb::handle empty) {
  Plan& plan = plan_arg("hadamard", plan_object);
  Checker check("hadamard", plan);
  const TensorArg source = check.read("x", x, {.dtypes = kValues, .dims = {plan.config.head_dim}, .any_leading = true});
  const bool backwards = check.flag("inverse", inverse);
  if (out.is_none()) out = check.allocate("out", empty, x, {source.shape, source.shape + source.ndim}, "");
  const TensorArg target = check.write(
      "out", out, {.dtypes = static_cast<unsigned>(dtypes_of(value_dtype(source))), .dims = {plan.config.head_dim}, .any_leading = true});
  if (target.ndim != source.ndim || !std::equal(source.shape, source.shape + source.ndim, target.shape)) {
    check.fail_value("out", source.describe(), target.describe());
  }
  kvarn_hadamard_params params{};
  KVARN_INIT(params);
  params.x = source.data;
  params.out = target.data;
  params.rows = source.size() / plan.config.head_dim;
  params.dtype = value_dtype(source);
  params.inverse = backwards;
  plan.run([&] { return kvarn_hadamard(plan.handle.get(), &params, check.stream()); });
  return out;
}

}  // namespace

void bind_hadamard(nb::module_& m) {
  m.def("hadamard", &hadamard, nb::arg("plan").none(), nb::arg("x").none(), nb::arg("out").none(), nb::arg("inverse").none(),
        nb::arg("empty") = nb::none(), "Rotates rows and returns out. See kvarn.ops.hadamard.");
}

}  // namespace kvarn::python
