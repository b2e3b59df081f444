#include "core/status.h"

#include <cstdarg>
#include <cstdio>

namespace kvarn {
namespace {

thread_local char t_message[kMaxErrorBytes] = "";

kvarn_status fail_plain(kvarn_status status, const char* message) { return fail(status, "%s", message); }

}  // namespace

kvarn_status fail(kvarn_status status, const char* format, ...) {
  // Formatted aside first: an argument may be the current message.
  char message[kMaxErrorBytes];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  std::snprintf(t_message, sizeof t_message, "%s", message);
  return status;
}

const char* last_error() { return t_message; }

const HostServices* host_services() {
  static constexpr HostServices services{&fail_plain};
  return &services;
}

}  // namespace kvarn

extern "C" {

const char* kvarn_status_name(kvarn_status status) {
  switch (status) {
    case KVARN_OK:
      return "ok";
    case KVARN_INVALID_ARGUMENT:
      return "invalid argument";
    case KVARN_UNSUPPORTED:
      return "unsupported";
    case KVARN_OUT_OF_MEMORY:
      return "out of memory";
    case KVARN_OUT_OF_BLOCKS:
      return "out of blocks";
    case KVARN_STALE_HANDLE:
      return "stale handle";
    case KVARN_UNAVAILABLE:
      return "unavailable";
    case KVARN_LAUNCH_FAILED:
      return "launch failed";
    case KVARN_CORRUPT:
      return "corrupt";
    case KVARN_INTERNAL:
      return "internal error";
  }
  return "unknown status";
}

const char* kvarn_last_error(void) { return kvarn::last_error(); }

const char* kvarn_version(void) { return KVARN_VERSION_STRING; }

}  // extern "C"
