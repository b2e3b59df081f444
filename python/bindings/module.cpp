#include "module.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

#include "kvarn/kvarn.h"

namespace nb = nanobind;

namespace {

// Path of the loaded libkvarn, "" where the system cannot tell.
const char* library_path() {
#if defined(__unix__) || defined(__APPLE__)
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(&kvarn_version), &info) != 0 && info.dli_fname) return info.dli_fname;
#endif
  return "";
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "Bindings of libkvarn's C ABI. Use the functions and classes of the package kvarn, which call these.";
  m.def("version", &kvarn_version, "Version of libkvarn, \"major.minor.patch\".");
  m.def("library_path", &library_path, "Path of the loaded libkvarn.");
  kvarn::python::bind_format(m);
  kvarn::python::bind_plan(m);
  kvarn::python::bind_pool(m);
  kvarn::python::bind_hadamard(m);
  kvarn::python::bind_append(m);
  kvarn::python::bind_encode(m);
  kvarn::python::bind_decode(m);
  kvarn::python::bind_attend(m);
}
