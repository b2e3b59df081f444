#include "plan.h"

#include <algorithm>
#include <string>
#include <utility>

#include "attend_shared.h"
#include "encode_args.h"

namespace kvarn::hip {
namespace {

std::string kernel_name(const char* stem, int head_dim) {
  const bool own = head_dim == 64 || head_dim == 128 || head_dim == 256 || head_dim == 512;
  return std::string("kvarn_") + stem + (own ? "_d" + std::to_string(head_dim) : "_any");
}

bool matrix_fits(const Plan& plan) {
  const Format& f = plan.layout.format;
  return f.tile_tokens == kMatrixTile && f.metadata_bits == 16 && is_matrix_width(f.k_bits) && is_matrix_width(f.v_bits) &&
         plan.config.dtype != KVARN_F32;
}

kvarn_status find_matrix_kernel(const Plan& plan, int rows, const DeviceName& device, AttendLaunch* launch) {
  const std::string name = "kvarn_attend_d" + std::to_string(plan.config.head_dim) + "_r" + std::to_string(rows);
  KVARN_TRY(find_kernel(plan.device, "attend_matrix", name.c_str(), &launch->function));
  launch->matrix = true;
  launch->threads = kMatrixWaves * plan.wave;
  launch->block_rows = rows;
  KernelResources resources;
  KVARN_TRY(find_resources("attend_matrix", device.target, name, &resources));
  launch->blocks = plan.multiprocessors * std::max(1, matrix_blocks(device.generation(), resources.registers, resources.shared_bytes));
  return KVARN_OK;
}

kvarn_status prepare_attend(Plan& plan, const DeviceName& device) {
  AttendLaunch& generic = plan.generic;
  KVARN_TRY(find_kernel(plan.device, "attend_generic", "kvarn_attend_generic", &generic.function));
  generic.threads = kGenericThreads;
  generic.block_rows = kGenericRows;
  generic.shared_bytes = attend_generic_bytes(plan.config.head_dim, plan.layout.format.tile_tokens);
  generic.blocks = plan.generic_blocks();

  if (matrix_fits(plan) && has_bundle("attend_matrix")) {
    for (const auto& [rows, launch] : {std::pair{8, &plan.few_rows}, std::pair{16, &plan.many_rows}}) {
      if (has_matrix_kernel(plan.config.head_dim, rows, plan.wave)) KVARN_TRY(find_matrix_kernel(plan, rows, device, launch));
    }
  }
  for (const AttendLaunch* launch : {&plan.generic, &plan.few_rows, &plan.many_rows}) {
    if (launch->function != nullptr && (!plan.batch_invariant || launch == &plan.attend_launch(1))) {
      plan.make_room(launch->block_rows, launch->blocks);
    }
  }
  plan.lay_out_workspace(1);

  const size_t bytes = static_cast<size_t>(plan.sets.per_set) * CounterSets::kSets * sizeof(unsigned);
  void* memory = nullptr;
  KVARN_HIP("plan_create", "counters", runtime().hipMalloc(&memory, bytes));
  plan.sets.counters = static_cast<unsigned*>(memory);
  KVARN_HIP("plan_create", "counters", runtime().hipMemset(memory, 0, bytes));
  KVARN_HIP("plan_create", "counters", runtime().hipDeviceSynchronize());
  return KVARN_OK;
}

}  // namespace

kvarn_status fill_plan(const kvarn_plan_params& params, Plan& plan) {
  int devices = 0;
  KVARN_HIP("plan_create", "device count", runtime().hipGetDeviceCount(&devices));
  KVARN_TRY(plan.set(params, devices));
  DeviceName name;
  KVARN_HIP("plan_create", "device", name_device(params.device, &name));
  if (!is_built_for(name)) {
    return fail(KVARN_UNAVAILABLE, "[kvarn.plan_create] device: expected one of %s, got %d: %s", kTargets, params.device,
                name.text().c_str());
  }
  const DeviceScope scope(params.device);
  KVARN_HIP("plan_create", "device", scope.error());
  const int d = params.config.head_dim;
  KVARN_HIP("plan_create", "device", runtime().hipDeviceGetAttribute(&plan.multiprocessors, kMultiprocessorCount, params.device));
  KVARN_HIP("plan_create", "device", runtime().hipDeviceGetAttribute(&plan.shared_limit, kMaxSharedMemoryPerBlock, params.device));
  KVARN_HIP("plan_create", "device", runtime().hipDeviceGetAttribute(&plan.wave, kWarpSize, params.device));

  KVARN_TRY(find_kernel(plan.device, "rows", kernel_name("hadamard", d).c_str(), &plan.hadamard));
  KVARN_TRY(find_kernel(plan.device, "rows", kernel_name("append", d).c_str(), &plan.append));
  KVARN_TRY(find_kernel(plan.device, "rows", kernel_name("decode", d).c_str(), &plan.decode));
  const char* const encode = params.config.dtype == KVARN_F32   ? "kvarn_encode_f32"
                             : params.config.dtype == KVARN_F16 ? "kvarn_encode_f16"
                                                                : "kvarn_encode_bf16";
  KVARN_TRY(find_kernel(plan.device, "encode", encode, &plan.encode));
  if (params.num_q_heads > 0) KVARN_TRY(prepare_attend(plan, name));
  plan.description = "hip:" + std::to_string(params.device) + ", " + name.text();
  if (params.num_q_heads > 0) plan.description += plan.attend_launch(1).matrix ? ", matrix cores" : ", generic attention";
  return KVARN_OK;
}

const AttendLaunch& Plan::attend_launch(int64_t rows) const {
  rows = launch_rows(rows);
  if (rows > few_rows.block_rows && many_rows.function != nullptr) return many_rows;
  return few_rows.function != nullptr ? few_rows : generic;
}

void empty_plan(Plan& plan) {
  if (plan.sets.counters == nullptr) return;
  const DeviceScope scope(plan.device);
  (void)runtime().hipFree(plan.sets.counters);
}

}  // namespace kvarn::hip
