// The backend table: checks what only this backend asks for, fills the kernels' arguments, launches.
#include <algorithm>
#include <cmath>
#include <mutex>
#include <string>

#include "arguments.h"
#include "plan.h"

namespace kvarn::cuda {
namespace {

Plan& plan_of(void* state) { return *static_cast<Plan*>(state); }

template <class Args>
kvarn_status launch(const char* operation, const Plan& plan, const void* function, dim3 grid, int threads, int shared_bytes, Args& args,
                    void* stream) {
  const DeviceScope scope(plan.device);
  KVARN_GPU(operation, "device", scope.error());
  void* pointers[] = {&args};
  KVARN_GPU(
      operation, "launch",
      cudaLaunchKernel(function, grid, dim3(threads), pointers, static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream)));
  return KVARN_OK;
}

// Blocks for rows that each take a warp; a block walks through the rest.
dim3 row_grid(const Plan& plan, int64_t rows) {
  const int64_t most = static_cast<int64_t>(plan.multiprocessors) * 64;
  return dim3(static_cast<unsigned>(std::min((rows + kRowThreads / 32 - 1) / (kRowThreads / 32), most)));
}

kvarn_status probe(kvarn_backend_info* info) {
  // The answer does not change while the process lives, and `detail` must outlive the call.
  static std::once_flag once;
  static std::string detail;
  static int devices = 0;
  static bool available = false;
  std::call_once(once, [] {
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0) {
      (void)cudaGetLastError();
      devices = 0;
      detail = error == cudaSuccess ? "no CUDA device" : std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
      return;
    }
    cudaDeviceProp properties;
    cudaFuncAttributes attributes;
    cudaError_t usable = cudaGetDeviceProperties(&properties, 0);
    if (usable == cudaSuccess) usable = cudaFuncGetAttributes(&attributes, find_hadamard(128));
    if (usable != cudaSuccess) {
      (void)cudaGetLastError();
      detail = std::string(cudaGetErrorName(usable)) + ": " + cudaGetErrorString(usable);
      return;
    }
    available = true;
    detail = std::string(properties.name) + " (sm_" + std::to_string(properties.major) + std::to_string(properties.minor) + ")";
  });
  info->name = "cuda";
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
  const dim3 grid = row_grid(plan, p->num_tokens * plan.config.num_kv_heads * 2);
  return launch("append", plan, plan.append, grid, kRowThreads, rotation_bytes(plan.config.head_dim), a, stream);
}

kvarn_status encode(void* state, const kvarn_encode_params* p, void* stream) {
  const Plan& plan = plan_of(state);
  KVARN_TRY(check_encode(plan.config, *p));
  EncodeArgs a = encode_args(plan.config, plan.layout, *p);
  const EncodeKernel& kernel = a.k_feedback != nullptr || a.v_feedback != nullptr ? plan.encode_feedback : plan.encode;
  const dim3 grid(static_cast<unsigned>(p->num_tiles * plan.config.num_kv_heads), 2, static_cast<unsigned>(p->num_layers));
  return launch("encode", plan, kernel.function, grid, kernel.threads, kernel.shared_bytes, a, stream);
}

kvarn_status decode(void* state, const kvarn_decode_params* p, void* stream) {
  const Plan& plan = plan_of(state);
  KVARN_TRY(check_decode(plan.config, *p));
  DecodeArgs a = decode_args(plan.config, plan.layout, plan.rotation, *p);
  const int d = plan.config.head_dim;
  return launch("decode", plan, plan.decode, dim3(static_cast<unsigned>(p->num_tiles * plan.config.num_kv_heads), 2), kRowThreads,
                rotation_bytes(d) + decode_bytes(d, plan.config.format.tile_tokens), a, stream);
}

// With more items than blocks, a block has several: it begins one, in tiles' time, in 8 to 16 tiles. With fewer, every block begins one.
int item_units(const Plan& plan, const kvarn_attend_params& p, const AttendLaunch& launch) {
  constexpr int kItemUnits = 12;
  return static_cast<int64_t>(p.num_seqs) * plan.config.num_kv_heads > launch.blocks ? kItemUnits : 0;
}

kvarn_status attend(void* state, const kvarn_attend_params* p, void* stream) {
  Plan& plan = plan_of(state);
  KVARN_TRY(check_attend(*p));
  const AttendLaunch chosen = plan.attend_launch((p->num_q_tokens + p->num_seqs - 1) / p->num_seqs * plan.group);
  AttendArgs a = attend_args(plan.config, plan.layout, plan.rotation, plan.group, plan.max_tiles, *p);
  a.partial_out = static_cast<float*>(p->workspace);
  a.partial_sums = reinterpret_cast<float2*>(a.partial_out + plan.slots * plan.max_block_rows * plan.config.head_dim);
  a.counters = plan.sets.of(p->workspace);
  a.block_rows = chosen.block_rows;
  a.run_tiles = plan.run_tiles;
  a.item_units = item_units(plan, *p, chosen);
  a.row_groups = chosen.row_groups;
  a.tile_owners = chosen.tile_owners;
  a.k_stages = chosen.k_stages;
  a.k_stage_bytes = chosen.k_stage_bytes;
  a.num_k_stages = chosen.num_k_stages;
  a.v_stages = chosen.v_stages;
  a.v_stage_bytes = chosen.v_stage_bytes;
  a.num_v_stages = chosen.num_v_stages;
  return launch("attend", plan, chosen.kernel.function, dim3(static_cast<unsigned>(chosen.blocks)), chosen.kernel.threads,
                chosen.shared_bytes, a, stream);
}

constexpr BackendTable kTable{kBackendAbiVersion, "cuda", probe, plan_create, plan_destroy, hadamard, append, encode, decode, attend};

}  // namespace
}  // namespace kvarn::cuda

extern "C" __attribute__((visibility("default"))) const kvarn::BackendTable* kvarn_backend_table(const kvarn::HostServices* host) {
  kvarn::cuda::g_host = host;
  return &kvarn::cuda::kTable;
}
