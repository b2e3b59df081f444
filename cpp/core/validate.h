// Everything kvarn.h promises about arguments, checked before a backend sees them. A validate function also fills in defaults, and sets
// `nothing_to_do` when the call is valid and has no work.
#pragma once

#include "core/backend.h"
#include "core/plan.h"

namespace kvarn {

// Bytes of one value; 0 for an unknown dtype.
constexpr int64_t dtype_bytes(int32_t dtype) { return dtype == KVARN_F32 ? 4 : dtype == KVARN_F16 || dtype == KVARN_BF16 ? 2 : 0; }
bool is_host_backend(const char* name);

// What holds on every backend, then what depends on the one that was found (params.backend is its name).
kvarn_status validate_plan(const kvarn_plan_params& params);
kvarn_status validate_plan_backend(const kvarn_plan_params& params);

kvarn_status validate(const kvarn_plan& plan, const kvarn_hadamard_params& p, bool& nothing_to_do);
kvarn_status validate(const kvarn_plan& plan, const kvarn_append_params& p, bool& nothing_to_do);
kvarn_status validate(const kvarn_plan& plan, const kvarn_encode_params& p, bool& nothing_to_do);
kvarn_status validate(const kvarn_plan& plan, kvarn_decode_params& p, bool& nothing_to_do);
kvarn_status validate(const kvarn_plan& plan, const kvarn_attend_params& p, bool& nothing_to_do);

}  // namespace kvarn
