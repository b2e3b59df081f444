#include "errors.h"

#include <nanobind/nanobind.h>

namespace nb = nanobind;

namespace kvarn::python {
namespace {

const char* exception_of(kvarn_status status) {
  switch (status) {
    case KVARN_INVALID_ARGUMENT:
      return "InvalidArgumentError";
    case KVARN_UNSUPPORTED:
      return "UnsupportedError";
    case KVARN_OUT_OF_MEMORY:
      return "OutOfMemoryError";
    case KVARN_OUT_OF_BLOCKS:
      return "OutOfBlocksError";
    case KVARN_STALE_HANDLE:
      return "StaleHandleError";
    case KVARN_UNAVAILABLE:
      return "UnavailableError";
    case KVARN_LAUNCH_FAILED:
      return "LaunchError";
    case KVARN_CORRUPT:
      return "CorruptError";
    default:
      return "InternalError";
  }
}

}  // namespace

void raise(const char* exception, const std::string& message) {
  nb::object type = nb::module_::import_("kvarn._errors").attr(exception);
  PyErr_SetString(type.ptr(), message.c_str());
  throw nb::python_error();
}

void check_status(kvarn_status status) {
  if (status != KVARN_OK) raise(exception_of(status), kvarn_last_error());
}

}  // namespace kvarn::python
