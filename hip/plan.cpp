#include "plan.h"

#include <algorithm>
#include <memory>
#include <new>

#include "attend_shared.h"
#include "encode_args.h"

namespace kvarn::hip {
namespace {

constexpr int kMostGenericBlocks = 4;  // of one multiprocessor
constexpr int kMatrixBlocks = 2;       // of one multiprocessor: what its registers hold
constexpr int kInvariantRuns = 16;     // at most, of the longest sequence
constexpr int kInvariantTiles = 8;     // at least, of a run

std::string kernel_name(const char* stem, int head_dim) {
  const bool own = head_dim == 64 || head_dim == 128 || head_dim == 256 || head_dim == 512;
  return std::string("kvarn_") + stem + (own ? "_d" + std::to_string(head_dim) : "_any");
}

bool matrix_fits(const Plan& plan) {
  const Format& f = plan.layout.format;
  return f.tile_tokens == kMatrixTile && f.metadata_bits == 16 && is_matrix_width(f.k_bits) && is_matrix_width(f.v_bits) &&
         plan.config.dtype != KVARN_F32;
}

kvarn_status find_matrix_kernel(const Plan& plan, int rows, AttendLaunch* launch) {
  const std::string name = "kvarn_attend_d" + std::to_string(plan.config.head_dim) + "_r" + std::to_string(rows);
  KVARN_TRY(find_kernel(plan.device, "attend_matrix", name.c_str(), &launch->function));
  launch->matrix = true;
  launch->threads = kMatrixWaves * plan.wave;
  launch->block_rows = rows;
  launch->blocks = plan.multiprocessors * kMatrixBlocks;
  return KVARN_OK;
}

kvarn_status prepare_attend(Plan& plan, int shared_limit) {
  AttendLaunch& generic = plan.generic;
  KVARN_TRY(find_kernel(plan.device, "attend_generic", "kvarn_attend_generic", &generic.function));
  generic.threads = kGenericThreads;
  generic.block_rows = kGenericRows;
  generic.shared_bytes = attend_generic_bytes(plan.config.head_dim, plan.layout.format.tile_tokens);
  generic.blocks = plan.multiprocessors * std::max(1, std::min(kMostGenericBlocks, shared_limit / (generic.shared_bytes + 1024)));

  if (matrix_fits(plan) && has_bundle("attend_matrix")) {
    for (const auto& [rows, launch] : {std::pair{8, &plan.few_rows}, std::pair{16, &plan.many_rows}}) {
      if (has_matrix_kernel(plan.config.head_dim, rows, plan.wave)) KVARN_TRY(find_matrix_kernel(plan, rows, launch));
    }
  }
  for (const AttendLaunch* launch : {&plan.generic, &plan.few_rows, &plan.many_rows}) {
    if (launch->function == nullptr) continue;
    plan.max_block_rows = std::max(plan.max_block_rows, launch->block_rows);
    plan.slots = std::max<int64_t>(plan.slots, 2 * launch->blocks);
  }
  int64_t counters = plan.slots;
  if (plan.batch_invariant) {
    plan.run_tiles = std::max(kInvariantTiles, (plan.max_tiles + kInvariantRuns - 1) / kInvariantRuns);
    const int64_t runs = (plan.max_tiles + plan.run_tiles - 1) / plan.run_tiles;
    const int64_t least_rows = plan.attend_launch(1).block_rows;
    const int64_t row_blocks = plan.max_q_tokens * plan.group / least_rows + plan.max_num_seqs;
    plan.slots = counters = plan.config.num_kv_heads * row_blocks * runs;
  }
  const int64_t rows = plan.slots * plan.max_block_rows;
  plan.workspace_bytes = (rows * plan.config.head_dim * 4 + rows * 8 + 255) / 256 * 256;

  plan.sets.per_set = (counters + 31) / 32 * 32;
  const size_t bytes = static_cast<size_t>(plan.sets.per_set) * CounterSets::kSets * sizeof(unsigned);
  void* memory = nullptr;
  KVARN_HIP("plan_create", "counters", runtime().hipMalloc(&memory, bytes));
  plan.sets.counters = static_cast<unsigned*>(memory);
  KVARN_HIP("plan_create", "counters", runtime().hipMemset(memory, 0, bytes));
  KVARN_HIP("plan_create", "counters", runtime().hipDeviceSynchronize());
  return KVARN_OK;
}

kvarn_status fill_plan(const kvarn_plan_params& params, Plan& plan) {
  plan.config = params.config;
  const kvarn_format& f = params.config.format;
  const int d = params.config.head_dim;
  plan.layout = make_layout(Format{f.k_bits, f.v_bits, f.tile_tokens, f.metadata_bits}, d);
  plan.rotation = make_rotation(d);
  plan.device = params.device;
  plan.group = params.num_q_heads / params.config.num_kv_heads;
  plan.max_num_seqs = params.max_num_seqs;
  plan.max_tiles = params.max_tiles;
  plan.max_q_tokens = params.max_q_tokens;
  plan.batch_invariant = params.batch_invariant != 0;

  int devices = 0;
  KVARN_HIP("plan_create", "device count", runtime().hipGetDeviceCount(&devices));
  if (params.device >= devices) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.plan_create] device: expected 0 to %d, got %d", devices - 1, params.device);
  }
  const DeviceScope scope(params.device);
  KVARN_HIP("plan_create", "device", scope.error());
  int shared_limit = 0;
  KVARN_HIP("plan_create", "device", runtime().hipDeviceGetAttribute(&plan.multiprocessors, kMultiprocessorCount, params.device));
  KVARN_HIP("plan_create", "device", runtime().hipDeviceGetAttribute(&shared_limit, kMaxSharedMemoryPerBlock, params.device));
  KVARN_HIP("plan_create", "device", runtime().hipDeviceGetAttribute(&plan.wave, kWarpSize, params.device));
  DeviceName name;
  KVARN_HIP("plan_create", "device", name_device(params.device, &name));

  KVARN_TRY(find_kernel(plan.device, "rows", kernel_name("hadamard", d).c_str(), &plan.hadamard));
  KVARN_TRY(find_kernel(plan.device, "rows", kernel_name("append", d).c_str(), &plan.append));
  KVARN_TRY(find_kernel(plan.device, "rows", kernel_name("decode", d).c_str(), &plan.decode));
  const char* const encode = params.config.dtype == KVARN_F32   ? "kvarn_encode_f32"
                             : params.config.dtype == KVARN_F16 ? "kvarn_encode_f16"
                                                                : "kvarn_encode_bf16";
  KVARN_TRY(find_kernel(plan.device, "encode", encode, &plan.encode));
  if (params.num_q_heads > 0) KVARN_TRY(prepare_attend(plan, shared_limit));
  plan.description = "hip:" + std::to_string(params.device) + ", " + name.name + " (" + name.target + ")";
  if (params.num_q_heads > 0) plan.description += plan.attend_launch(1).matrix ? ", matrix cores" : ", generic attention";
  return KVARN_OK;
}

}  // namespace

const AttendLaunch& Plan::attend_launch(int64_t rows) const {
  // A result that depends on the sequence alone comes from a kernel that depends on the plan alone.
  if (batch_invariant) rows = std::max<int64_t>(1, max_q_tokens / max_num_seqs) * group;
  if (rows > few_rows.block_rows && many_rows.function != nullptr) return many_rows;
  return few_rows.function != nullptr ? few_rows : generic;
}

kvarn_status make_plan(const kvarn_plan_params& params, Plan** result) {
  std::unique_ptr<Plan, void (*)(Plan*)> plan(new (std::nothrow) Plan, destroy_plan);
  if (plan == nullptr) return fail(KVARN_OUT_OF_MEMORY, "[kvarn.plan_create] plan: expected host memory, got none");
  KVARN_TRY(fill_plan(params, *plan));
  *result = plan.release();
  return KVARN_OK;
}

void destroy_plan(Plan* plan) {
  if (plan == nullptr) return;
  if (plan->sets.counters != nullptr) {
    const DeviceScope scope(plan->device);
    (void)runtime().hipFree(plan->sets.counters);
  }
  delete plan;
}

}  // namespace kvarn::hip
