// C status codes and failed checks become the exceptions of kvarn._errors.
#pragma once

#include <string>

#include "kvarn/kvarn.h"

namespace kvarn::python {

// Raises kvarn._errors.<exception>(message).
[[noreturn]] void raise(const char* exception, const std::string& message);

// Raises the exception of `status`, with this thread's last error message, unless it is KVARN_OK.
void check_status(kvarn_status status);

}  // namespace kvarn::python
