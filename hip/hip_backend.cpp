// The backend table: checks what only this backend asks for, fills the kernels' arguments, launches.
#include <algorithm>
#include <mutex>
#include <string>

#include "encode_args.h"
#include "plan.h"

namespace kvarn::hip {
namespace {

Plan& plan_of(void* state) { return *static_cast<Plan*>(state); }

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

template <class Args>
kvarn_status launch(const char* operation, const Plan& plan, hipFunction_t function, Grid grid, int threads, int shared_bytes, Args& args,
                    void* stream) {
  const DeviceScope scope(plan.device);
  KVARN_HIP(operation, "device", scope.error());
  void* pointers[] = {&args};
  KVARN_HIP(operation, "launch",
            runtime().hipModuleLaunchKernel(function, grid.x, grid.y, grid.z, static_cast<unsigned>(threads), 1, 1,
                                            static_cast<unsigned>(shared_bytes), stream, pointers, nullptr));
  return KVARN_OK;
}

// Blocks for rows that each take 32 lanes; a block walks through the rest.
Grid row_grid(const Plan& plan, int64_t rows) {
  const int64_t most = static_cast<int64_t>(plan.multiprocessors) * 64;
  return {static_cast<unsigned>(std::min((rows + kRowThreads / 32 - 1) / (kRowThreads / 32), most))};
}

// What the first device is, or why none can be used.
bool look_for_devices(int* devices, std::string* detail) {
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
  DeviceName name;
  hipError_t usable = name_device(0, &name);
  const DeviceScope scope(0);
  if (usable == kHipSuccess) usable = scope.error();
  if (usable == kHipSuccess) usable = load_bundles(0);
  *detail = name.name + " (" + name.target + ")";
  if (usable == kHipSuccess) return true;
  (void)r.hipGetLastError();
  *detail += ": built for " + std::string(kTargets) + ", and this device refused the kernels (" + error_text(usable) + ")";
  return false;
}

kvarn_status probe(kvarn_backend_info* info) {
  // The answer does not change while the process lives, and `detail` must outlive the call.
  static std::once_flag once;
  static std::string detail;
  static int devices = 0;
  static bool available = false;
  std::call_once(once, [] { available = look_for_devices(&devices, &detail); });
  info->name = "hip";
  info->available = available ? 1 : 0;
  info->detail = detail.c_str();
  info->num_devices = available ? devices : 0;
  info->num_threads = 0;
  return KVARN_OK;
}

kvarn_status plan_create(const kvarn_plan_params* params, void** state, int64_t* workspace_bytes, const char** description) {
  Plan* plan = nullptr;
  KVARN_TRY(make_plan(*params, &plan));
  *state = plan;
  *workspace_bytes = plan->workspace_bytes;
  *description = plan->description.c_str();
  return KVARN_OK;
}

void plan_destroy(void* state) { destroy_plan(static_cast<Plan*>(state)); }

kvarn_status hadamard(void* state, const kvarn_hadamard_params* p, void* stream) {
  const Plan& plan = plan_of(state);
  HadamardArgs a = hadamard_args(plan.rotation, *p);
  return launch("hadamard", plan, plan.hadamard, row_grid(plan, p->rows), kRowThreads, rotation_bytes(plan.config.head_dim), a, stream);
}

kvarn_status append(void* state, const kvarn_append_params* p, void* stream) {
  const Plan& plan = plan_of(state);
  AppendArgs a = append_args(plan.config, plan.rotation, *p);
  const Grid grid = row_grid(plan, p->num_tokens * plan.config.num_kv_heads * 2);
  return launch("append", plan, plan.append, grid, kRowThreads, rotation_bytes(plan.config.head_dim), a, stream);
}

kvarn_status encode(void* state, const kvarn_encode_params* p, void* stream) {
  const Plan& plan = plan_of(state);
  KVARN_TRY(check_encode(plan.config, *p));
  EncodeArgs a = encode_args(plan.config, plan.layout, *p);
  const Grid grid{static_cast<unsigned>(p->num_tiles * plan.config.num_kv_heads), 2, static_cast<unsigned>(p->num_layers)};
  const bool fed = a.k_feedback != nullptr || a.v_feedback != nullptr;
  const int shared_bytes = fed ? encode_feedback_bytes(a.head_dim, a.tile_tokens) : encode_plain_bytes(a.head_dim, a.tile_tokens);
  return launch("encode", plan, plan.encode, grid, kEncodeThreads, shared_bytes, a, stream);
}

kvarn_status decode(void* state, const kvarn_decode_params* p, void* stream) {
  const Plan& plan = plan_of(state);
  KVARN_TRY(check_decode(plan.config, *p));
  DecodeArgs a = decode_args(plan.config, plan.layout, plan.rotation, *p);
  const int d = plan.config.head_dim;
  const Grid grid{static_cast<unsigned>(p->num_tiles * plan.config.num_kv_heads), 2};
  return launch("decode", plan, plan.decode, grid, kRowThreads, rotation_bytes(d) + decode_bytes(d, plan.config.format.tile_tokens), a,
                stream);
}

kvarn_status attend(void* state, const kvarn_attend_params* p, void* stream) {
  Plan& plan = plan_of(state);
  KVARN_TRY(check_attend(*p));
  const AttendLaunch& chosen = plan.attend_launch((p->num_q_tokens + p->num_seqs - 1) / p->num_seqs * plan.group);
  AttendArgs a = attend_args(plan.config, plan.layout, plan.rotation, plan.group, plan.max_tiles, *p);
  a.partial_out = static_cast<float*>(p->workspace);
  a.partial_sums = reinterpret_cast<float2*>(a.partial_out + plan.slots * plan.max_block_rows * plan.config.head_dim);
  a.counters = plan.sets.of(p->workspace);
  a.block_rows = chosen.block_rows;
  a.run_tiles = plan.run_tiles;
  return launch("attend", plan, chosen.function, {static_cast<unsigned>(chosen.blocks)}, chosen.threads, chosen.shared_bytes, a, stream);
}

constexpr BackendTable kTable{kBackendAbiVersion, "hip", probe, plan_create, plan_destroy, hadamard, append, encode, decode, attend};

}  // namespace
}  // namespace kvarn::hip

extern "C" __attribute__((visibility("default"))) const kvarn::BackendTable* kvarn_backend_table(const kvarn::HostServices* host) {
  kvarn::cuda::g_host = host;
  return &kvarn::hip::kTable;
}
