// The table through which the core reaches a backend. A backend sees only this header and the public ones.
#pragma once

#include "kvarn/format.h"
#include "kvarn/kvarn.h"

namespace kvarn {

inline constexpr uint32_t kBackendAbiVersion = 1;

// What the core lends a backend.
struct HostServices {
  // Stores the thread's error message (truncated to 1 KiB) and returns `status`: `return host->fail(KVARN_UNSUPPORTED, "...")`.
  kvarn_status (*fail)(kvarn_status status, const char* message);
};

// Every call has been validated by the core as far as host memory allows: struct sizes, null pointers, ranges, strides, the plan's
// limits; for "cpu" also every entry of the index arrays (block tables, lengths, mappings). What lies in device memory is the backend's
// to check; a GPU backend treats an index outside its table as a NaN result of that sequence alone.
// The core has also filled in every default (decode strides are never 0) and answers calls with nothing to do (no rows, tokens or tiles)
// by itself; a pointer may still be null where the count it belongs to is 0 (num_blocks, num_slots).
struct BackendTable {
  uint32_t abi_version;
  const char* name;
  // `info->detail` stays valid for the life of the process.
  kvarn_status (*probe)(kvarn_backend_info* info);
  kvarn_status (*plan_create)(const kvarn_plan_params* params, void** state, int64_t* workspace_bytes, const char** description);
  void (*plan_destroy)(void* state);
  kvarn_status (*hadamard)(void* state, const kvarn_hadamard_params* params, void* stream);
  kvarn_status (*append)(void* state, const kvarn_append_params* params, void* stream);
  kvarn_status (*encode)(void* state, const kvarn_encode_params* params, void* stream);
  kvarn_status (*decode)(void* state, const kvarn_decode_params* params, void* stream);
  kvarn_status (*attend)(void* state, const kvarn_attend_params* params, void* stream);
};

// Exported by a loadable backend under the name "kvarn_backend_table"; the CPU backend is linked in as `cpu_backend_table`.
using BackendEntry = const BackendTable* (*)(const HostServices* host);
const BackendTable* cpu_backend_table(const HostServices* host);

}  // namespace kvarn
