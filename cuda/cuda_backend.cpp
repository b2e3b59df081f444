// The backend table: checks what only this backend asks for, fills the kernels' arguments, launches.
#include <string>

#include "gpu/operations.h"
#include "plan.h"

namespace kvarn::cuda {
namespace {

struct Driver {
  using Plan = cuda::Plan;
  static constexpr char kName[] = "cuda";

  static bool look_for_devices(int* devices, std::string* detail) {
    const cudaError_t error = cudaGetDeviceCount(devices);
    if (error != cudaSuccess || *devices == 0) {
      (void)cudaGetLastError();
      *detail = error == cudaSuccess ? "no CUDA device" : std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
      return false;
    }
    cudaDeviceProp properties;
    cudaFuncAttributes attributes;
    cudaError_t usable = cudaGetDeviceProperties(&properties, 0);
    if (usable == cudaSuccess) usable = cudaFuncGetAttributes(&attributes, find_hadamard(128));
    if (usable != cudaSuccess) {
      (void)cudaGetLastError();
      *detail = std::string(cudaGetErrorName(usable)) + ": " + cudaGetErrorString(usable);
      return false;
    }
    *detail = std::string(properties.name) + " (sm_" + std::to_string(properties.major) + std::to_string(properties.minor) + ")";
    return true;
  }

  template <class Args>
  static kvarn_status launch(const char* operation, const Plan& plan, const void* function, Grid grid, int threads, int shared_bytes,
                             Args& args, void* stream) {
    const DeviceScope scope(plan.device);
    KVARN_GPU(operation, "device", scope.error());
    void* pointers[] = {&args};
    KVARN_GPU(operation, "launch",
              cudaLaunchKernel(function, dim3(grid.x, grid.y, grid.z), dim3(threads), pointers, static_cast<size_t>(shared_bytes),
                               static_cast<cudaStream_t>(stream)));
    return KVARN_OK;
  }
};
using Shared = Operations<Driver>;

kvarn_status encode(void* state, const kvarn_encode_params* p, void* stream) {
  const Plan& plan = Shared::plan_of(state);
  KVARN_TRY(check_encode(plan.config, *p));
  EncodeArgs a = encode_args(plan, *p);
  const EncodeKernel& kernel = a.k_feedback != nullptr || a.v_feedback != nullptr ? plan.encode_feedback : plan.encode;
  return Driver::launch("encode", plan, kernel.function, tile_grid(plan, p->num_tiles, p->num_layers), kernel.threads, kernel.shared_bytes,
                        a, stream);
}

// With more items than blocks, a block has several: what an item costs besides its whole tiles, its unfinished one included, is some 20
// tiles' time. With fewer, every block begins one.
int item_units(const Plan& plan, const kvarn_attend_params& p, const AttendLaunch& launch) {
  constexpr int kItemUnits = 20;
  return static_cast<int64_t>(p.num_seqs) * plan.config.num_kv_heads > launch.blocks ? kItemUnits : 0;
}

kvarn_status attend(void* state, const kvarn_attend_params* p, void* stream) {
  Plan& plan = Shared::plan_of(state);
  KVARN_TRY(check_attend(*p));
  const AttendLaunch chosen = plan.attend_launch((p->num_q_tokens + p->num_seqs - 1) / p->num_seqs * plan.group);
  AttendArgs a = attend_args(plan, *p, chosen.block_rows);
  a.item_units = item_units(plan, *p, chosen);
  a.row_groups = chosen.row_groups;
  a.group_rows = chosen.group_rows;
  a.tile_owners = chosen.tile_owners;
  a.k_stages = chosen.k_stages;
  a.k_stage_bytes = chosen.k_stage_bytes;
  a.num_k_stages = chosen.num_k_stages;
  a.v_stages = chosen.v_stages;
  a.v_stage_bytes = chosen.v_stage_bytes;
  a.num_v_stages = chosen.num_v_stages;
  return Driver::launch("attend", plan, chosen.kernel.function, {static_cast<unsigned>(chosen.blocks)}, chosen.kernel.threads,
                        chosen.shared_bytes, a, stream);
}

constexpr BackendTable kTable{kBackendAbiVersion, Driver::kName,  Shared::probe, Shared::plan_create, Shared::plan_destroy,
                              Shared::hadamard,   Shared::append, encode,        Shared::decode,      attend};

}  // namespace
}  // namespace kvarn::cuda

extern "C" __attribute__((visibility("default"))) const kvarn::BackendTable* kvarn_backend_table(const kvarn::HostServices* host) {
  kvarn::gpu::g_host = host;
  return &kvarn::cuda::kTable;
}
