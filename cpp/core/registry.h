// Which backends exist here, and their tables.
#pragma once

#include "core/backend.h"

namespace kvarn {

// Set by the environment.
inline constexpr char kBackendVariable[] = "KVARN_BACKEND";           // the backend of plans that name none
inline constexpr char kBackendPathVariable[] = "KVARN_BACKEND_PATH";  // absolute folder of the loadable backends; default: libkvarn's own

// The table of `name` (NULL: KVARN_BACKEND, else "cpu"), loaded on first use. Unknown names are errors that list the choices; a backend
// that cannot run here is KVARN_UNAVAILABLE with the reason. Thread-safe.
kvarn_status find_backend(const char* operation, const char* name, const BackendTable** table);

}  // namespace kvarn
