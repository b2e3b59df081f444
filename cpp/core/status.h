// The thread's last error, and the one way to set it.
#pragma once

#include "core/backend.h"

namespace kvarn {

inline constexpr int kMaxErrorBytes = 1024;

// Stores the message and returns `status`: `return fail(KVARN_INVALID_ARGUMENT, "[kvarn.attend] q: expected ..., got ...")`.
[[gnu::format(printf, 2, 3)]] kvarn_status fail(kvarn_status status, const char* format, ...);

const char* last_error();

// What backends are lent: `fail` without formatting.
const HostServices* host_services();

}  // namespace kvarn
