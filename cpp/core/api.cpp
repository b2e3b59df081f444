// The operations of the C ABI: adopt the caller's struct, validate it, hand it to the plan's backend.
#include "core/plan.h"
#include "core/status.h"
#include "core/structs.h"
#include "core/validate.h"

namespace kvarn {
namespace {

template <class Params>
kvarn_status run(const char* operation, kvarn_plan* plan, const Params* given, void* stream,
                 kvarn_status (*BackendTable::*call)(void*, const Params*, void*)) noexcept {
  if (plan == nullptr) return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] plan: expected a pointer, got NULL", operation);
  Params params;
  if (const kvarn_status status = adopt_struct(operation, given, params); status != KVARN_OK) return status;
  bool nothing_to_do = false;
  if (const kvarn_status status = validate(*plan, params, nothing_to_do); status != KVARN_OK) return status;
  if (plan->host_memory && stream != nullptr) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] stream: expected NULL for backend %s, got %p", operation, plan->table->name, stream);
  }
  if (nothing_to_do) return KVARN_OK;
  return (plan->table->*call)(plan->state, &params, stream);
}

}  // namespace
}  // namespace kvarn

extern "C" {

kvarn_status kvarn_hadamard(kvarn_plan* plan, const kvarn_hadamard_params* params, void* stream) {
  return kvarn::run("hadamard", plan, params, stream, &kvarn::BackendTable::hadamard);
}

kvarn_status kvarn_append(kvarn_plan* plan, const kvarn_append_params* params, void* stream) {
  return kvarn::run("append", plan, params, stream, &kvarn::BackendTable::append);
}

kvarn_status kvarn_encode(kvarn_plan* plan, const kvarn_encode_params* params, void* stream) {
  return kvarn::run("encode", plan, params, stream, &kvarn::BackendTable::encode);
}

kvarn_status kvarn_decode(kvarn_plan* plan, const kvarn_decode_params* params, void* stream) {
  return kvarn::run("decode", plan, params, stream, &kvarn::BackendTable::decode);
}

kvarn_status kvarn_attend(kvarn_plan* plan, const kvarn_attend_params* params, void* stream) {
  return kvarn::run("attend", plan, params, stream, &kvarn::BackendTable::attend);
}

}  // extern "C"
