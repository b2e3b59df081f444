// The backend table: checks what only this backend asks for, fills the kernels' arguments, launches.
#include <string>

#include "encode_args.h"
#include "gpu/operations.h"
#include "plan.h"

namespace kvarn::hip {
namespace {

struct Driver {
  using Plan = hip::Plan;
  static constexpr char kName[] = "hip";

  static bool look_for_devices(int* devices, std::string* detail) {
    const Runtime& r = runtime();
    if (!r.reason.empty()) {
      *detail = r.reason;
      return false;
    }
    const hipError_t error = r.hipGetDeviceCount(devices);
    if (error != kHipSuccess || *devices == 0) {
      (void)r.hipGetLastError();
      *detail = r.file + ": " + (error == kHipSuccess ? "no AMD device" : error_text(error));
      return false;
    }
    // A machine may have devices of several targets, such as a graphics card and the graphics of its processor.
    std::string names, refused;
    bool usable = false, mixed = false, any_built = false;
    DeviceName first;
    for (int device = 0; device < *devices; ++device) {
      DeviceName name;
      if (const hipError_t unnamed = name_device(device, &name); unnamed != kHipSuccess) name = {error_text(unnamed), "no target"};
      if (device == 0) first = name;
      mixed = mixed || name.text() != first.text();
      const bool built = is_built_for(name);
      any_built = any_built || built;
      names += (device > 0 ? "; " : "") + std::to_string(device) + ": " + name.text() + (built ? "" : ", no kernels for it");
      // Loading takes memory of a device: of the first one that will do, to see that the runtime takes the kernels.
      if (!built || usable) continue;
      const DeviceScope scope(device);
      const hipError_t loaded = scope.error() == kHipSuccess ? load_bundles(device) : scope.error();
      usable = loaded == kHipSuccess;
      if (!usable) refused += (refused.empty() ? "" : ", ") + std::to_string(device) + " refused the kernels (" + error_text(loaded) + ")";
    }
    *detail = mixed ? names : first.text();
    (void)r.hipGetLastError();
    if (!usable) *detail += ": " + (any_built ? refused : "expected one of " + std::string(kTargets));
    return usable;
  }

  template <class Args>
  static kvarn_status launch(const char* operation, const Plan& plan, hipFunction_t function, Grid grid, int threads, int shared_bytes,
                             Args& args, void* stream) {
    const DeviceScope scope(plan.device);
    KVARN_HIP(operation, "device", scope.error());
    void* pointers[] = {&args};
    KVARN_HIP(operation, "launch",
              runtime().hipModuleLaunchKernel(function, grid.x, grid.y, grid.z, static_cast<unsigned>(threads), 1, 1,
                                              static_cast<unsigned>(shared_bytes), stream, pointers, nullptr));
    return KVARN_OK;
  }
};
using Shared = Operations<Driver>;

kvarn_status encode(void* state, const kvarn_encode_params* p, void* stream) {
  const Plan& plan = Shared::plan_of(state);
  KVARN_TRY(check_encode(plan.config, *p));
  EncodeArgs a = encode_args(plan, *p);
  const bool fed = a.k_feedback != nullptr || a.v_feedback != nullptr;
  const int shared_bytes = fed ? encode_feedback_bytes(a.head_dim, a.tile_tokens) : encode_plain_bytes(a.head_dim, a.tile_tokens);
  return Driver::launch("encode", plan, plan.encode, tile_grid(plan, p->num_tiles, p->num_layers), kEncodeThreads, shared_bytes, a, stream);
}

kvarn_status attend(void* state, const kvarn_attend_params* p, void* stream) {
  Plan& plan = Shared::plan_of(state);
  KVARN_TRY(check_attend(*p));
  const AttendLaunch& chosen = plan.attend_launch((p->num_q_tokens + p->num_seqs - 1) / p->num_seqs * plan.group);
  AttendArgs a = attend_args(plan, *p, chosen.block_rows);
  return Driver::launch("attend", plan, chosen.function, {static_cast<unsigned>(chosen.blocks)}, chosen.threads, chosen.shared_bytes, a,
                        stream);
}

constexpr BackendTable kTable{kBackendAbiVersion, Driver::kName,  Shared::probe, Shared::plan_create, Shared::plan_destroy,
                              Shared::hadamard,   Shared::append, encode,        Shared::decode,      attend};

}  // namespace
}  // namespace kvarn::hip

extern "C" __attribute__((visibility("default"))) const kvarn::BackendTable* kvarn_backend_table(const kvarn::HostServices* host) {
  kvarn::gpu::g_host = host;
  return &kvarn::hip::kTable;
}
