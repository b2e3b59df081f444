// One function per file of bindings; module.cpp calls them all.
#pragma once

#include <nanobind/nanobind.h>

namespace kvarn::python {

void bind_format(nanobind::module_& m);
void bind_plan(nanobind::module_& m);
void bind_pool(nanobind::module_& m);
void bind_hadamard(nanobind::module_& m);
void bind_append(nanobind::module_& m);
void bind_encode(nanobind::module_& m);
void bind_decode(nanobind::module_& m);
void bind_attend(nanobind::module_& m);

}  // namespace kvarn::python
