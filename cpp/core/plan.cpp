#include "core/plan.h"

#include <memory>

#include "core/format.h"
#include "core/registry.h"
#include "core/status.h"
#include "core/structs.h"
#include "core/validate.h"

namespace kvarn {
namespace {

kvarn_status create_plan(const kvarn_plan_params* given, kvarn_plan** result) {
  kvarn_plan_params params;
  if (const kvarn_status status = adopt_struct("plan_create", given, params); status != KVARN_OK) return status;
  if (result == nullptr) return fail(KVARN_INVALID_ARGUMENT, "[kvarn.plan_create] plan: expected a pointer, got NULL");
  if (const kvarn_status status = validate_plan(params); status != KVARN_OK) return status;
  auto plan = std::make_unique<kvarn_plan>();
  if (const kvarn_status status = find_backend("plan_create", params.backend, &plan->table); status != KVARN_OK) return status;
  params.backend = plan->table->name;
  if (const kvarn_status status = validate_plan_backend(params); status != KVARN_OK) return status;
  if (params.num_q_heads == 0) {
    params.max_num_seqs = params.max_tiles = 0;
    params.max_q_tokens = 0;
  }
  plan->config = params.config;
  plan->record_bytes = make_layout(to_format(params.config.format), params.config.head_dim).record_bytes;
  plan->value_bytes = dtype_bytes(params.config.dtype);
  plan->num_q_heads = params.num_q_heads;
  plan->max_num_seqs = params.max_num_seqs;
  plan->max_q_tokens = params.max_q_tokens;
  plan->max_tiles = params.max_tiles;
  plan->host_memory = is_host_backend(plan->table->name);

  const char* description = nullptr;
  if (const kvarn_status status = plan->table->plan_create(&params, &plan->state, &plan->workspace_bytes, &description); status != KVARN_OK)
    return status;
  // From here on the state has an owner that would be skipped by an exception.
  try {
    plan->description = description != nullptr ? description : plan->table->name;
  } catch (...) {
    plan->table->plan_destroy(plan->state);
    throw;
  }
  *result = plan.release();
  return KVARN_OK;
}

}  // namespace
}  // namespace kvarn

extern "C" {

kvarn_status kvarn_plan_create(const kvarn_plan_params* params, kvarn_plan** plan) {
  return kvarn::guarded("plan_create", [&] { return kvarn::create_plan(params, plan); });
}

void kvarn_plan_destroy(kvarn_plan* plan) {
  if (plan == nullptr) return;
  plan->table->plan_destroy(plan->state);
  delete plan;
}

int64_t kvarn_plan_workspace_bytes(const kvarn_plan* plan) { return plan != nullptr ? plan->workspace_bytes : 0; }

const char* kvarn_plan_describe(const kvarn_plan* plan) { return plan != nullptr ? plan->description.c_str() : ""; }

}  // extern "C"
