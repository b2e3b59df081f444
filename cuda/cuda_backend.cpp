// The backend table: checks what only this backend asks for, fills the kernels' arguments, launches.
#include <algorithm>
#include <cmath>
#include <mutex>
#include <string>

#include "plan.h"

namespace kvarn::cuda {
namespace {

constexpr int64_t kAlignment = 16;  // of records, and of staging where it is read 16 bytes at a time
constexpr int64_t kMostBlocks = INT32_MAX;
constexpr int kMostGridZ = 65535;
constexpr int kMostGridY = 65535;

Plan& plan_of(void* state) { return *static_cast<Plan*>(state); }

kvarn_status check_aligned(const char* operation, const char* argument, const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % kAlignment == 0) return KVARN_OK;
  return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] %s: expected an address aligned to %lld bytes, got %p", operation, argument,
              static_cast<long long>(kAlignment), p);
}

#define KVARN_TRY(expression)                                                                    \
  do {                                                                                           \
    if (const kvarn_status try_status = (expression); try_status != KVARN_OK) return try_status; \
  } while (false)

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
  HadamardArgs a{p->x, p->out, p->rows, p->dtype, p->inverse, plan.rotation};
  return launch("hadamard", plan, plan.hadamard, row_grid(plan, p->rows), kRowThreads, rotation_bytes(plan.config.head_dim), a, stream);
}

kvarn_status append(void* state, const kvarn_append_params* p, void* stream) {
  const Plan& plan = plan_of(state);
  AppendArgs a{};
  a.k = p->k;
  a.v = p->v;
  a.k_token_stride = p->k_token_stride;
  a.k_head_stride = p->k_head_stride;
  a.v_token_stride = p->v_token_stride;
  a.v_head_stride = p->v_head_stride;
  a.slot_mapping = p->slot_mapping;
  a.num_tokens = p->num_tokens;
  a.staging = p->staging;
  a.num_slots = p->num_slots;
  a.num_kv_heads = plan.config.num_kv_heads;
  a.tile_tokens = plan.config.format.tile_tokens;
  a.dtype = plan.config.dtype;
  a.rotated = p->rotated;
  a.rotation = plan.rotation;
  const dim3 grid = row_grid(plan, p->num_tokens * plan.config.num_kv_heads * 2);
  return launch("append", plan, plan.append, grid, kRowThreads, rotation_bytes(plan.config.head_dim), a, stream);
}

kvarn_status encode(void* state, const kvarn_encode_params* p, void* stream) {
  const Plan& plan = plan_of(state);
  KVARN_TRY(check_aligned("encode", "records", p->records));
  if (p->num_layers > 1 && p->records_layer_stride_bytes % kAlignment != 0) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.encode] records_layer_stride_bytes: expected a multiple of %lld, got %lld",
                static_cast<long long>(kAlignment), static_cast<long long>(p->records_layer_stride_bytes));
  }
  const int64_t tiles = p->num_tiles * plan.config.num_kv_heads;
  if (tiles > kMostBlocks || p->num_layers > kMostGridZ) {
    return fail(KVARN_UNSUPPORTED,
                "[kvarn.encode] num_tiles, num_layers: expected at most %lld tiles of one head and %d layers, got %lld and %d",
                static_cast<long long>(kMostBlocks), kMostGridZ, static_cast<long long>(tiles), p->num_layers);
  }
  const auto unbiased = [&](int bits) {
    return p->rounding == KVARN_UNBIASED || (p->rounding == KVARN_ROUNDING_AUTO && bits <= 3) ? 1 : 0;
  };
  EncodeArgs a{};
  a.staging = static_cast<const uint8_t*>(p->staging);
  a.records = p->records;
  a.slots = p->slots;
  a.blocks = p->blocks;
  a.staging_layer_stride = p->num_layers > 1 ? p->staging_layer_stride_bytes : 0;
  a.records_layer_stride = p->num_layers > 1 ? p->records_layer_stride_bytes : 0;
  a.num_slots = p->num_slots;
  a.num_blocks = p->num_blocks;
  a.num_kv_heads = plan.config.num_kv_heads;
  a.head_dim = plan.config.head_dim;
  a.tile_tokens = plan.config.format.tile_tokens;
  a.dtype = plan.config.dtype;
  a.published = p->normalisation == KVARN_PUBLISHED ? 1 : 0;
  a.unbiased_k = unbiased(plan.config.format.k_bits);
  a.unbiased_v = unbiased(plan.config.format.v_bits);
  a.k_feedback = p->k_feedback;
  a.v_feedback = p->v_feedback;
  a.layout = plan.layout;
  const EncodeKernel& kernel = a.k_feedback != nullptr || a.v_feedback != nullptr ? plan.encode_feedback : plan.encode;
  const dim3 grid(static_cast<unsigned>(tiles), 2, static_cast<unsigned>(p->num_layers));
  return launch("encode", plan, kernel.function, grid, kEncodeThreads, kernel.shared_bytes, a, stream);
}

kvarn_status decode(void* state, const kvarn_decode_params* p, void* stream) {
  const Plan& plan = plan_of(state);
  KVARN_TRY(check_aligned("decode", "records", p->records));
  const int64_t tiles = p->num_tiles * plan.config.num_kv_heads;
  if (tiles > kMostBlocks) {
    return fail(KVARN_UNSUPPORTED, "[kvarn.decode] num_tiles: expected at most %lld tiles of one head, got %lld",
                static_cast<long long>(kMostBlocks), static_cast<long long>(tiles));
  }
  DecodeArgs a{};
  a.records = p->records;
  a.num_blocks = p->num_blocks;
  a.blocks = p->blocks;
  a.destinations = p->destinations;
  a.num_destinations = p->num_destinations;
  a.k = p->k;
  a.v = p->v;
  a.tile_stride = p->tile_stride;
  a.head_stride = p->head_stride;
  a.num_kv_heads = plan.config.num_kv_heads;
  a.dtype = p->dtype;
  a.rotated = p->rotated;
  a.layout = plan.layout;
  a.rotation = plan.rotation;
  const int d = plan.config.head_dim;
  return launch("decode", plan, plan.decode, dim3(static_cast<unsigned>(tiles), 2), kRowThreads,
                rotation_bytes(d) + decode_bytes(d, plan.config.format.tile_tokens), a, stream);
}

// With more items than blocks, a block has several: it begins one, in tiles' time, in 8 to 16 tiles. With fewer, every block begins one.
int item_units(const Plan& plan, const kvarn_attend_params& p, const AttendLaunch& launch) {
  constexpr int kItemUnits = 12;
  return static_cast<int64_t>(p.num_seqs) * plan.config.num_kv_heads > launch.blocks ? kItemUnits : 0;
}

kvarn_status attend(void* state, const kvarn_attend_params* p, void* stream) {
  Plan& plan = plan_of(state);
  KVARN_TRY(check_aligned("attend", "records", p->records));
  KVARN_TRY(check_aligned("attend", "staging", p->staging));
  const AttendLaunch chosen = plan.attend_launch((p->num_q_tokens + p->num_seqs - 1) / p->num_seqs * plan.group);
  AttendArgs a{};
  a.q = p->q;
  a.out = p->out;
  a.q_token_stride = p->q_token_stride;
  a.q_head_stride = p->q_head_stride;
  a.out_token_stride = p->out_token_stride;
  a.out_head_stride = p->out_head_stride;
  a.lse = p->lse;
  a.cu_q_lens = p->cu_q_lens;
  a.seq_lens = p->seq_lens;
  a.block_table = p->block_table;
  a.block_table_stride = p->block_table_stride;
  a.max_tiles = static_cast<int>(std::min<int64_t>(p->block_table_stride, plan.max_tiles));
  a.records = p->records;
  a.staging = static_cast<const uint8_t*>(p->staging);
  a.alibi_slopes = p->alibi_slopes;
  a.sinks = p->sinks;
  a.partial_out = static_cast<float*>(p->workspace);
  a.partial_sums = reinterpret_cast<float2*>(a.partial_out + plan.slots * plan.max_block_rows * plan.config.head_dim);
  a.counters = plan.sets.of(p->workspace);
  a.record_bytes = plan.layout.record_bytes;
  a.num_blocks = p->num_blocks;
  a.num_slots = p->num_slots;
  a.num_q_tokens = p->num_q_tokens;
  a.num_seqs = p->num_seqs;
  a.num_kv_heads = plan.config.num_kv_heads;
  a.group = plan.group;
  a.dtype = plan.config.dtype;
  a.head_dim = plan.config.head_dim;
  a.tile_tokens = plan.config.format.tile_tokens;
  a.softmax_scale = p->softmax_scale;
  a.soft_cap = p->logits_soft_cap;
  a.causal = p->causal;
  a.window = p->window;
  a.q_rotated = p->q_rotated;
  a.out_rotated = p->out_rotated;
  a.block_rows = chosen.block_rows;
  a.run_tiles = plan.run_tiles;
  a.item_units = item_units(plan, *p, chosen);
  a.rotation = plan.rotation;
  a.k_bits = plan.config.format.k_bits;
  a.v_bits = plan.config.format.v_bits;
  a.v_offset = plan.layout.v_low_offset;
  a.metadata_offset = plan.layout.metadata_offset[kKScale];
  a.row_groups = chosen.row_groups;
  a.tile_owners = chosen.tile_owners;
  a.k_stages = chosen.k_stages;
  a.k_stage_bytes = chosen.k_stage_bytes;
  a.num_k_stages = chosen.num_k_stages;
  a.v_stages = chosen.v_stages;
  a.v_stage_bytes = chosen.v_stage_bytes;
  a.num_v_stages = chosen.num_v_stages;
  a.layout = plan.layout;
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
