#include "scalar_arg.h"

#include <nanobind/stl/string.h>

#include "errors.h"

namespace kvarn::python {
namespace {

[[noreturn]] void refuse(const char* exception, ArgumentName name, const std::string& expected, const std::string& got) {
  raise(exception, std::string("[kvarn.") + name.operation + "] " + name.argument + ": expected " + expected + ", got " + got);
}

}  // namespace

std::string type_text(nb::handle object) {
  if (object.is_none()) return "None";
  nb::object type = nb::borrow(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())));
  const std::string module = nb::cast<std::string>(nb::str(nb::getattr(type, "__module__", nb::str("builtins"))));
  const std::string name = nb::cast<std::string>(nb::str(nb::getattr(type, "__name__", nb::str("object"))));
  return module == "builtins" ? name : module + "." + name;
}

int64_t whole_number(ArgumentName name, nb::handle object, int64_t low, int64_t high) {
  const nb::object number = nb::steal(PyBool_Check(object.ptr()) ? nullptr : PyNumber_Index(object.ptr()));
  if (!number.is_valid()) {
    PyErr_Clear();
    refuse("ArgumentTypeError", name, "an integer", type_text(object));
  }
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  if (overflow == 0 && value >= low && value <= high) return value;
  refuse("InvalidArgumentError", name, std::to_string(low) + " to " + std::to_string(high), nb::cast<std::string>(nb::str(number)));
}

float number_arg(ArgumentName name, nb::handle object) {
  const double value = PyFloat_AsDouble(object.ptr());
  if (value == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    refuse("ArgumentTypeError", name, "a number", type_text(object));
  }
  return static_cast<float>(value);
}

bool flag_arg(ArgumentName name, nb::handle object) {
  if (PyBool_Check(object.ptr())) return object.ptr() == Py_True;
  const std::string type = type_text(object);
  if (type != "numpy.bool" && type != "numpy.bool_") refuse("ArgumentTypeError", name, "True or False", type);
  return PyObject_IsTrue(object.ptr()) == 1;
}

std::string text_arg(ArgumentName name, nb::handle object, const char* expected) {
  if (!nb::isinstance<nb::str>(object)) refuse("ArgumentTypeError", name, expected, type_text(object));
  std::string text = nb::cast<std::string>(object);
  if (text.find('\0') != std::string::npos) refuse("InvalidArgumentError", name, expected, "a str with a zero character");
  return text;
}

}  // namespace kvarn::python
