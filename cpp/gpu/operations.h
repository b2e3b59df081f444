// The operations of a GPU backend in which nothing differs from one vendor to the other: checks, arguments, grids, launches.
#pragma once

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>
#include <string>

#include "gpu/arguments.h"

namespace kvarn::gpu {

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

// Tiles of one head, K and V, layers.
inline Grid tile_grid(const PlanBase& plan, int64_t num_tiles, int num_layers = 1) {
  return {static_cast<unsigned>(num_tiles * plan.config.num_kv_heads), 2, static_cast<unsigned>(num_layers)};
}

// Driver: the vendor's side.
//   Plan: a PlanBase with the kernels hadamard, append and decode; beside it fill_plan(params, plan) and empty_plan(plan)
//   kName: of the backend
//   look_for_devices(&devices, &detail): whether one can be used; what the first one is, or why not
//   launch(operation, plan, kernel, grid, threads, shared_bytes, args, stream)
template <class Driver>
struct Operations {
  using Plan = typename Driver::Plan;

  static Plan& plan_of(void* state) { return *static_cast<Plan*>(state); }

  static kvarn_status probe(kvarn_backend_info* info) {
    // The answer does not change while the process lives, and `detail` must outlive the call.
    static std::once_flag once;
    static std::string detail;
    static int devices = 0;
    static bool available = false;
    std::call_once(once, [] { available = Driver::look_for_devices(&devices, &detail); });
    info->name = Driver::kName;
    info->available = available ? 1 : 0;
    info->detail = detail.c_str();
    info->num_devices = available ? devices : 0;
    info->num_threads = 0;
    return KVARN_OK;
  }

  static kvarn_status plan_create(const kvarn_plan_params* params, void** state, int64_t* workspace_bytes, const char** description) {
    auto* plan = new (std::nothrow) Plan;
    if (plan == nullptr) return fail(KVARN_OUT_OF_MEMORY, "[kvarn.plan_create] plan: expected host memory, got none");
    if (const kvarn_status status = fill_plan(*params, *plan); status != KVARN_OK) {
      plan_destroy(plan);
      return status;
    }
    *state = plan;
    *workspace_bytes = plan->workspace_bytes;
    *description = plan->description.c_str();
    return KVARN_OK;
  }
  static void plan_destroy(void* state) {
    auto* plan = static_cast<Plan*>(state);
    if (plan == nullptr) return;
    empty_plan(*plan);
    delete plan;
  }

  // Blocks for rows that each take 32 lanes; a block walks through the rest.
  static Grid row_grid(const Plan& plan, int64_t rows) {
    const int64_t most = static_cast<int64_t>(plan.multiprocessors) * 64;
    return {static_cast<unsigned>(std::min((rows + kRowThreads / 32 - 1) / (kRowThreads / 32), most))};
  }
  static kvarn_status hadamard(void* state, const kvarn_hadamard_params* p, void* stream) {
    const Plan& plan = plan_of(state);
    HadamardArgs a = hadamard_args(plan, *p);
    return Driver::launch("hadamard", plan, plan.hadamard, row_grid(plan, p->rows), kRowThreads, rotation_bytes(plan.config.head_dim), a,
                          stream);
  }
  static kvarn_status append(void* state, const kvarn_append_params* p, void* stream) {
    const Plan& plan = plan_of(state);
    AppendArgs a = append_args(plan, *p);
    const Grid grid = row_grid(plan, p->num_tokens * plan.config.num_kv_heads * 2);
    return Driver::launch("append", plan, plan.append, grid, kRowThreads, rotation_bytes(plan.config.head_dim), a, stream);
  }
  static kvarn_status decode(void* state, const kvarn_decode_params* p, void* stream) {
    const Plan& plan = plan_of(state);
    KVARN_TRY(check_decode(plan.config, *p));
    DecodeArgs a = decode_args(plan, *p);
    const int d = plan.config.head_dim;
    return Driver::launch("decode", plan, plan.decode, tile_grid(plan, p->num_tiles), kRowThreads,
                          rotation_bytes(d) + decode_bytes(d, plan.config.format.tile_tokens), a, stream);
  }
};

}  // namespace kvarn::gpu
