#include <algorithm>

#include "checker.h"
#include "module.h"

namespace kvarn::python {
namespace {

void hadamard(Plan& plan, nb::handle x, nb::handle out, bool inverse) {
  Checker check("hadamard", plan);
  const TensorArg source = check.read("x", x, {.dtypes = kValues, .dims = {plan.config.head_dim}, .any_leading = true});
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
  params.inverse = inverse;
  plan.run([&] { return kvarn_hadamard(plan.handle.get(), &params, check.stream()); });
}

}  // namespace

void bind_hadamard(nb::module_& m) {
  m.def("hadamard", &hadamard, nb::arg("plan"), nb::arg("x").none(), nb::arg("out").none(), nb::arg("inverse"),
        "Rotates rows. See kvarn.ops.hadamard.");
}

}  // namespace kvarn::python
