// Checks of arguments that are no arrays. Every refusal reads "[kvarn.<operation>] <argument>: expected <what>, got <what>".
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <limits>
#include <string>

namespace kvarn::python {

namespace nb = nanobind;

// The operation and the argument that a message names.
struct ArgumentName {
  const char* operation;
  const char* argument;
};

// "builtins" is left out: "list", "numpy.ndarray", "None".
std::string type_text(nb::handle object);

// A whole number: anything with __index__ but a bool. Values that T cannot hold are refused here, ranges by libkvarn.
int64_t whole_number(ArgumentName name, nb::handle object, int64_t low, int64_t high);
template <class T>
T integer_arg(ArgumentName name, nb::handle object) {
  return static_cast<T>(whole_number(name, object, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
}
// A number: anything with __float__ or __index__.
float number_arg(ArgumentName name, nb::handle object);
// True or False, numpy's included.
bool flag_arg(ArgumentName name, nb::handle object);
// A str, of which `expected` says more.
std::string text_arg(ArgumentName name, nb::handle object, const char* expected);

}  // namespace kvarn::python
