// A loadable backend for test_registry.cpp, built once for each way in which loading may go. The Python tests see through it what reaches a
// backend.
#include <cstdio>

#include "core/backend.h"

namespace {

const kvarn::HostServices* g_host = nullptr;

kvarn_status probe(kvarn_backend_info* info) {
  info->available = FAKE_AVAILABLE;
  info->detail = FAKE_AVAILABLE ? "two devices" : "no device today";
  info->num_devices = FAKE_AVAILABLE ? 2 : 0;
  return KVARN_OK;
}

kvarn_status plan_create(const kvarn_plan_params* params, void** state, int64_t* workspace_bytes, const char** description) {
  if (params->device > 1) return g_host->fail(KVARN_INVALID_ARGUMENT, "[kvarn.plan_create] device: expected 0 or 1");
  *state = nullptr;
  *workspace_bytes = 256;
  *description = "a backend for tests";
  return KVARN_OK;
}

void plan_destroy(void*) {}

kvarn_status hadamard(void*, const kvarn_hadamard_params* params, void* stream) {
  char text[128];
  std::snprintf(text, sizeof text, "[kvarn.hadamard] the test backend never launches %lld rows on stream %p",
                static_cast<long long>(params->rows), stream);
  return g_host->fail(KVARN_LAUNCH_FAILED, text);
}

}  // namespace

extern "C" KVARN_API const kvarn::BackendTable* kvarn_backend_table(const kvarn::HostServices* host) {
  g_host = host;
  static const kvarn::BackendTable table = [] {
    kvarn::BackendTable t{};
    t.abi_version = FAKE_ABI;
    t.name = FAKE_NAME;
    t.probe = &probe;
    t.plan_create = &plan_create;
    t.plan_destroy = &plan_destroy;
    t.hadamard = &hadamard;
    return t;
  }();
  return &table;
}
