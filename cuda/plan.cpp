#include "plan.h"

#include <algorithm>
#include <string>
#include <tuple>

namespace kvarn::cuda {
namespace {

constexpr int kTensorCoreTile = 128;
constexpr int kMostStages = 32;
constexpr int kMostBlockRows = 128;

constexpr int align_stage(int bytes) { return (bytes + 127) / 128 * 128; }

// The rings of stages in `bytes` of shared memory, behind `offset`. A stage holds K or V of a record, or 16 rows of staging. Loads go into
// K and V in turn, and a warp is done with its K first, so V gets more stages by half the warps.
bool lay_out_stages(const Plan& plan, int offset, int bytes, AttendLaunch& launch) {
  const RecordLayout& l = plan.layout;
  const int staging = 16 * (plan.config.head_dim * (plan.config.dtype == KVARN_F32 ? 4 : 2) + 16);
  launch.k_stage_bytes = align_stage(std::max(l.v_low_offset + l.metadata_offset[kVChannelScale] - l.metadata_offset[kKScale], staging));
  launch.v_stage_bytes = align_stage(
      std::max(l.metadata_offset[kKScale] - l.v_low_offset + l.metadata_range_offset - l.metadata_offset[kVChannelScale], staging));
  const int both = launch.k_stage_bytes + launch.v_stage_bytes;
  const int more = std::min(launch.kernel.warps / 2, std::max(0, (bytes - 2 * both) / launch.v_stage_bytes / 2));
  launch.num_k_stages = std::min((bytes - more * launch.v_stage_bytes) / both, kMostStages - more);
  launch.num_v_stages = launch.num_k_stages + more;
  launch.k_stages = offset;
  launch.v_stages = offset + launch.num_k_stages * launch.k_stage_bytes;
  launch.shared_bytes = launch.v_stages + launch.num_v_stages * launch.v_stage_bytes;
  return launch.num_k_stages >= 2;
}

AttendKernel find_tensor_cores(const Plan& plan, int rows_per_warp) {
  const auto width = [](int bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8; };
  const Format& f = plan.layout.format;
  if (f.tile_tokens != kTensorCoreTile || f.metadata_bits != 16 || !width(f.k_bits) || !width(f.v_bits)) return {};
  return find_attend_mma(plan.config.head_dim, rows_per_warp, f.k_bits, f.v_bits);
}

// Loads a kernel's code now and lets it have its shared memory, so that launching it later does nothing lazy.
kvarn_status prepare(const char* what, const void* function, int shared_bytes) {
  cudaFuncAttributes attributes;
  KVARN_GPU("plan_create", what, cudaFuncGetAttributes(&attributes, function));
  if (shared_bytes > 48 * 1024) {
    KVARN_GPU("plan_create", what, cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  return KVARN_OK;
}

kvarn_status prepare_attend(Plan& plan) {
  // Every launch that some number of rows can lead to.
  const int64_t most = plan.batch_invariant ? 1 : std::min<int64_t>(plan.max_q_tokens * plan.group, 4 * kMostBlockRows);
  for (int64_t rows = 1; rows <= most; ++rows) {
    const AttendLaunch launch = plan.attend_launch(rows);
    plan.make_room(launch.block_rows, launch.blocks);
  }
  for (int rows_per_warp = 8; rows_per_warp <= 16; rows_per_warp += 8) {
    const AttendKernel kernel = find_tensor_cores(plan, rows_per_warp);
    if (kernel.function == nullptr) continue;
    KVARN_TRY(prepare("attend kernel", kernel.function, plan.shared_limit));
  }
  const int generic_bytes = attend_generic_bytes(plan.config.head_dim, plan.layout.format.tile_tokens);
  KVARN_TRY(prepare("attend kernel", find_attend_generic().function, generic_bytes));

  plan.lay_out_workspace(plan.max_block_rows);  // every row of an item counts its parts
  const size_t bytes = static_cast<size_t>(plan.sets.per_set) * CounterSets::kSets * sizeof(unsigned);
  void* memory = nullptr;
  KVARN_GPU("plan_create", "counters", cudaMalloc(&memory, bytes));
  plan.sets.counters = static_cast<unsigned*>(memory);
  KVARN_GPU("plan_create", "counters", cudaMemset(memory, 0, bytes));
  KVARN_GPU("plan_create", "counters", cudaDeviceSynchronize());
  return KVARN_OK;
}

}  // namespace

kvarn_status fill_plan(const kvarn_plan_params& params, Plan& plan) {
  int devices = 0;
  KVARN_GPU("plan_create", "device count", cudaGetDeviceCount(&devices));
  KVARN_TRY(plan.set(params, devices));
  const DeviceScope scope(params.device);
  KVARN_GPU("plan_create", "device", scope.error());
  KVARN_GPU("plan_create", "device", cudaDeviceGetAttribute(&plan.multiprocessors, cudaDevAttrMultiProcessorCount, params.device));
  KVARN_GPU("plan_create", "device", cudaDeviceGetAttribute(&plan.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, params.device));

  const int d = params.config.head_dim, g = params.config.format.tile_tokens;
  plan.hadamard = find_hadamard(d);
  plan.append = find_append(d);
  plan.decode = find_decode(d);
  plan.encode = find_encode(d, g, false);
  plan.encode_feedback = find_encode(d, g, true);
  if (const int bytes = std::max(plan.encode.shared_bytes, plan.encode_feedback.shared_bytes); bytes > plan.shared_limit) {
    return fail(KVARN_UNSUPPORTED,
                "[kvarn.plan_create] config: expected a tile whose encoding takes at most %d bytes of shared memory, got %d",
                plan.shared_limit, bytes);
  }
  for (const auto& [what, function, bytes] :
       {std::tuple{"hadamard kernel", plan.hadamard, rotation_bytes(d)}, std::tuple{"append kernel", plan.append, rotation_bytes(d)},
        std::tuple{"decode kernel", plan.decode, rotation_bytes(d) + decode_bytes(d, g)},
        std::tuple{"encode kernel", plan.encode.function, plan.encode.shared_bytes},
        std::tuple{"encode kernel with feedback", plan.encode_feedback.function, plan.encode_feedback.shared_bytes}}) {
    KVARN_TRY(prepare(what, function, bytes));
  }
  if (params.num_q_heads > 0) {
    KVARN_TRY(prepare_attend(plan));
  }
  cudaDeviceProp properties;
  KVARN_GPU("plan_create", "device", cudaGetDeviceProperties(&properties, params.device));
  plan.description = "cuda:" + std::to_string(params.device) + ", " + properties.name + " (sm_" + std::to_string(properties.major) +
                     std::to_string(properties.minor) + ")";
  if (params.num_q_heads > 0) plan.description += plan.attend_launch(1).tensor_cores ? ", tensor cores" : ", generic attention";
  return KVARN_OK;
}

AttendLaunch Plan::attend_launch(int64_t rows) const {
  rows = launch_rows(rows);
  AttendLaunch launch;
  AttendKernel kernel = find_tensor_cores(*this, rows > 8 ? 16 : 8);
  if (kernel.function == nullptr) kernel = find_tensor_cores(*this, 8);
  if (kernel.function != nullptr) {
    const int most_groups = std::min(kernel.warps, kMostBlockRows / kernel.rows_per_warp);
    int groups = static_cast<int>(std::min<int64_t>((rows + kernel.rows_per_warp - 1) / kernel.rows_per_warp, most_groups));
    // More groups than this leave no warp to share the tiles with: then every warp takes rows of its own.
    if (groups > kernel.warps / 2) groups = most_groups;
    launch.kernel = kernel;
    launch.tensor_cores = true;
    launch.row_groups = groups;
    launch.tile_owners = kernel.warps / groups;
    // Fewer rows leave more memory to the stages.
    launch.group_rows = rows <= 4 ? 4 : kernel.rows_per_warp;
    launch.block_rows = groups * launch.group_rows;
    launch.blocks = multiprocessors;
    const int fixed = kernel.fixed_bytes(groups, launch.group_rows);
    if (lay_out_stages(*this, fixed, shared_limit - fixed, launch)) return launch;
  }
  launch = AttendLaunch{};
  launch.kernel = find_attend_generic();
  launch.block_rows = launch.kernel.rows_per_warp;
  launch.shared_bytes = attend_generic_bytes(config.head_dim, layout.format.tile_tokens);
  launch.blocks = generic_blocks();
  return launch;
}

void empty_plan(Plan& plan) {
  if (plan.sets.counters == nullptr) return;
  const DeviceScope scope(plan.device);
  (void)cudaFree(plan.sets.counters);
}

}  // namespace kvarn::cuda
