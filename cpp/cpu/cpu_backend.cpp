// The CPU backend: plans, and the four operations that go tile by tile or row by row. Attend has a file of its own.
#include <atomic>
#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu/isa.h"
#include "cpu/plan.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace kvarn::cpu {

namespace {

constexpr char kThreadsVariable[] = "KVARN_NUM_THREADS";
constexpr int kMaxThreads = 1024;
constexpr int64_t kScratchAlignment = 64;
// Below this many bytes moved, waking threads costs more than they save.
constexpr int64_t kSerialBytes = 256 * 1024;
// Rows of one task: enough to make its bookkeeping cheap, few enough to balance.
constexpr int64_t kTaskBytes = 64 * 1024;

std::atomic<const HostServices*> g_host{nullptr};

int64_t value_bytes(int dtype) { return dtype == KVARN_F32 ? 4 : 2; }

kvarn_status choose_num_threads(const kvarn_plan_params& params, int* num_threads) {
  *num_threads = params.num_threads;
  if (*num_threads > 0) return KVARN_OK;
  const char* text = std::getenv(kThreadsVariable);
  if (text == nullptr || *text == '\0') {
    *num_threads = available_threads();
    if (*num_threads > kMaxThreads) *num_threads = kMaxThreads;
    return KVARN_OK;
  }
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  if (*end != '\0' || value < 1 || value > kMaxThreads) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.plan_create] %s: expected 1 to %d, got \"%.64s\"", kThreadsVariable, kMaxThreads, text);
  }
  *num_threads = static_cast<int>(value);
  return KVARN_OK;
}

void destroy_plan(Plan* plan) {
  if (plan->owns_pool) release_pool();
  delete plan;
}

kvarn_status fill_plan(const kvarn_plan_params& params, Plan& plan, int64_t* workspace_bytes) {
  const kvarn_format& format = params.config.format;
  plan.config = params.config;
  plan.layout = make_layout({format.k_bits, format.v_bits, format.tile_tokens, format.metadata_bits}, params.config.head_dim);
  if (const kvarn_status status = choose_isa(params.cpu_isa, &plan.kernels); status != KVARN_OK) return status;
  if (const kvarn_status status = choose_num_threads(params, &plan.num_threads); status != KVARN_OK) return status;

  const int64_t encode_bytes = encode_scratch(nullptr, plan.layout.head_dim, format.tile_tokens).bytes;
  const int64_t decode_bytes = decode_scratch(nullptr, plan.layout.head_dim, format.tile_tokens, kRotateScratchFloats).bytes;
  const int64_t bytes = encode_bytes > decode_bytes ? encode_bytes : decode_bytes;
  // An odd number of cache lines between workers keeps their rows out of each other's cache sets.
  plan.scratch_stride_bytes = (bytes + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment + 17 * kScratchAlignment;
  const int64_t total = plan.scratch_stride_bytes * plan.num_threads + kScratchAlignment;
  plan.scratch_memory.reset(new (std::nothrow) uint8_t[static_cast<size_t>(total)]);
  if (plan.scratch_memory == nullptr) {
    return fail(KVARN_OUT_OF_MEMORY, "[kvarn.plan_create] scratch: expected %lld bytes, got none", static_cast<long long>(total));
  }
  const auto address = reinterpret_cast<uintptr_t>(plan.scratch_memory.get());
  plan.scratch = plan.scratch_memory.get() + (kScratchAlignment - address % kScratchAlignment) % kScratchAlignment;

  if (params.parallel_for != nullptr) {
    plan.parallel_for = params.parallel_for;
    plan.parallel_user = params.parallel_user;
  } else {
    plan.parallel_for = pool_parallel_for;
    plan.parallel_user = reinterpret_cast<void*>(static_cast<intptr_t>(plan.num_threads));
    plan.owns_pool = acquire_pool(plan.num_threads);
    if (!plan.owns_pool) {
      return fail(KVARN_OUT_OF_MEMORY, "[kvarn.plan_create] num_threads: expected %d threads, the system gave fewer", plan.num_threads);
    }
  }
  std::snprintf(plan.description, sizeof(plan.description), "cpu/%s, %d thread%s", plan.kernels->name, plan.num_threads,
                plan.num_threads == 1 ? "" : "s");
  *workspace_bytes = 0;
  return params.num_q_heads > 0 ? create_attend_plan(params, plan, workspace_bytes) : KVARN_OK;
}

kvarn_status plan_create(const kvarn_plan_params* params, void** state, int64_t* workspace_bytes, const char** description) {
  Plan* const plan = new (std::nothrow) Plan{};
  if (plan == nullptr) return fail(KVARN_OUT_OF_MEMORY, "[kvarn.plan_create] plan: expected %zu bytes, got none", sizeof(Plan));
  const kvarn_status status = fill_plan(*params, *plan, workspace_bytes);
  if (status != KVARN_OK) {
    destroy_plan(plan);
    return status;
  }
  *state = plan;
  *description = plan->description;
  return KVARN_OK;
}

void plan_destroy(void* state) { destroy_plan(static_cast<Plan*>(state)); }

kvarn_status probe(kvarn_backend_info* info) {
  info->available = 1;
  info->detail = runnable_isas();
  info->num_devices = 1;
  info->num_threads = available_threads();
  return KVARN_OK;
}

// Runs f(first, end, worker) over [0, count) in runs of about kTaskBytes; on the calling thread alone when there is little to do.
template <class Function>
void run_rows(const Plan& plan, int64_t count, int64_t bytes_each, const Function& f) {
  if (count * bytes_each <= kSerialBytes) {
    const DefaultFloatEnvironment environment;
    f(int64_t{0}, count, int64_t{0});
    return;
  }
  const int64_t rows = bytes_each >= kTaskBytes ? 1 : kTaskBytes / bytes_each;
  const int64_t tasks = (count + rows - 1) / rows;
  run_tasks(plan, tasks, [&](int64_t task, int64_t worker) {
    const int64_t first = task * rows;
    f(first, first + rows < count ? first + rows : count, worker);
  });
}

kvarn_status hadamard(void* state, const kvarn_hadamard_params* p, void*) {
  const Plan& plan = *static_cast<const Plan*>(state);
  const int64_t head_dim = plan.layout.head_dim;
  const int64_t row_bytes = head_dim * value_bytes(p->dtype);
  run_rows(plan, p->rows, 2 * row_bytes, [&](int64_t first, int64_t end, int64_t worker) {
    RotateRows rows{};
    rows.in = static_cast<const uint8_t*>(p->x) + first * row_bytes;
    rows.out = static_cast<uint8_t*>(p->out) + first * row_bytes;
    rows.rows = end - first;
    rows.in_stride = rows.out_stride = head_dim;
    rows.in_dtype = rows.out_dtype = p->dtype;
    rows.head_dim = plan.layout.head_dim;
    rows.inverse = p->inverse != 0;
    rows.scratch = static_cast<float*>(plan.worker_scratch(worker));
    plan.kernels->rotate_rows(rows);
  });
  return KVARN_OK;
}

// All heads of one token of K or V into its slot.
void append_token(const Plan& plan, const uint8_t* token, int64_t head_stride, uint8_t* to, bool rotated, void* scratch) {
  const int64_t head_dim = plan.layout.head_dim;
  const int64_t tile_values = plan.layout.format.tile_tokens * head_dim;
  const int64_t bytes = value_bytes(plan.config.dtype);
  if (rotated) {
    for (int64_t h = 0; h < plan.config.num_kv_heads; ++h) {
      std::memcpy(to + h * tile_values * bytes, token + h * head_stride * bytes, static_cast<size_t>(head_dim * bytes));
    }
    return;
  }
  RotateRows rows{};
  rows.in = token;
  rows.out = to;
  rows.rows = plan.config.num_kv_heads;
  rows.in_stride = head_stride;
  rows.out_stride = tile_values;
  rows.in_dtype = rows.out_dtype = plan.config.dtype;
  rows.head_dim = plan.layout.head_dim;
  rows.scratch = static_cast<float*>(scratch);
  plan.kernels->rotate_rows(rows);
}

kvarn_status append(void* state, const kvarn_append_params* p, void*) {
  const Plan& plan = *static_cast<const Plan*>(state);
  const int64_t head_dim = plan.layout.head_dim;
  const int64_t tokens = plan.layout.format.tile_tokens;
  const int64_t heads = plan.config.num_kv_heads;
  const int64_t bytes = value_bytes(plan.config.dtype);
  const int64_t operand_bytes = heads * tokens * head_dim * bytes;  // K or V of one slot
  const bool rotated = p->rotated != 0;
  run_rows(plan, p->num_tokens, 4 * heads * head_dim * bytes, [&](int64_t first, int64_t end, int64_t worker) {
    void* const scratch = plan.worker_scratch(worker);
    for (int64_t t = first; t < end; ++t) {
      const int64_t at = p->slot_mapping[t];
      if (at < 0) continue;
      uint8_t* const k = static_cast<uint8_t*>(p->staging) + at / tokens * 2 * operand_bytes + at % tokens * head_dim * bytes;
      append_token(plan, static_cast<const uint8_t*>(p->k) + t * p->k_token_stride * bytes, p->k_head_stride, k, rotated, scratch);
      append_token(plan, static_cast<const uint8_t*>(p->v) + t * p->v_token_stride * bytes, p->v_head_stride, k + operand_bytes, rotated,
                   scratch);
    }
  });
  return KVARN_OK;
}

bool is_unbiased(int rounding, int bits) { return rounding == KVARN_UNBIASED || (rounding == KVARN_ROUNDING_AUTO && bits <= 3); }

kvarn_status encode(void* state, const kvarn_encode_params* p, void*) {
  const Plan& plan = *static_cast<const Plan*>(state);
  const RecordLayout& layout = plan.layout;
  const int64_t heads = plan.config.num_kv_heads;
  const int64_t tile_bytes = int64_t{layout.format.tile_tokens} * layout.head_dim * value_bytes(plan.config.dtype);
  run_tasks(plan, p->num_layers * p->num_tiles * heads, [&](int64_t task, int64_t worker) {
    const int64_t head = task % heads;
    const int64_t tile_index = task / heads % p->num_tiles;
    const int64_t layer = task / heads / p->num_tiles;
    EncodeTile tile{};
    const uint8_t* const staging = static_cast<const uint8_t*>(p->staging) + (layer == 0 ? 0 : layer * p->staging_layer_stride_bytes);
    uint8_t* const records = p->records + (layer == 0 ? 0 : layer * p->records_layer_stride_bytes);
    tile.k = staging + (int64_t{2} * p->slots[tile_index] * heads + head) * tile_bytes;
    tile.v = static_cast<const uint8_t*>(tile.k) + heads * tile_bytes;
    tile.record = records + (p->blocks[tile_index] * heads + head) * layout.record_bytes;
    tile.layout = &layout;
    tile.dtype = plan.config.dtype;
    tile.normalisation = p->normalisation;
    tile.k_unbiased = is_unbiased(p->rounding, layout.format.k_bits);
    tile.v_unbiased = is_unbiased(p->rounding, layout.format.v_bits);
    tile.scratch = plan.worker_scratch(worker);
    const int64_t factor = (layer * heads + head) * layout.head_dim * layout.head_dim;
    tile.k_feedback = p->k_feedback != nullptr ? p->k_feedback + factor : nullptr;
    tile.v_feedback = p->v_feedback != nullptr ? p->v_feedback + factor : nullptr;
    plan.kernels->encode_tile(tile);
  });
  return KVARN_OK;
}

kvarn_status decode(void* state, const kvarn_decode_params* p, void*) {
  const Plan& plan = *static_cast<const Plan*>(state);
  const RecordLayout& layout = plan.layout;
  const int64_t heads = plan.config.num_kv_heads;
  const int64_t bytes = value_bytes(p->dtype);
  run_tasks(plan, p->num_tiles * heads, [&](int64_t task, int64_t worker) {
    const int64_t head = task % heads;
    const int64_t tile_index = task / heads;
    const int64_t destination = p->destinations != nullptr ? p->destinations[tile_index] : tile_index;
    const int64_t at = (destination * p->tile_stride + head * p->head_stride) * bytes;
    DecodeTile tile{};
    tile.record = p->records + (p->blocks[tile_index] * heads + head) * layout.record_bytes;
    tile.layout = &layout;
    tile.k = p->k != nullptr ? static_cast<uint8_t*>(p->k) + at : nullptr;
    tile.v = p->v != nullptr ? static_cast<uint8_t*>(p->v) + at : nullptr;
    tile.dtype = p->dtype;
    tile.rotated = p->rotated != 0;
    tile.scratch = plan.worker_scratch(worker);
    plan.kernels->decode_tile(tile);
  });
  return KVARN_OK;
}

kvarn_status attend_entry(void* state, const kvarn_attend_params* p, void*) { return attend(*static_cast<Plan*>(state), *p); }

constexpr BackendTable kTable = {
    kBackendAbiVersion, "cpu", probe, plan_create, plan_destroy, hadamard, append, encode, decode, attend_entry,
};

}  // namespace

kvarn_status fail(kvarn_status status, const char* format, ...) {
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  const HostServices* const host = g_host.load(std::memory_order_acquire);
  return host != nullptr ? host->fail(status, message) : status;
}

#if defined(__x86_64__) || defined(__i386__)
// All exceptions masked, nearest even, no flush-to-zero, no denormals-are-zero.
constexpr unsigned kDefaultMxcsr = 0x1f80;
DefaultFloatEnvironment::DefaultFloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(kDefaultMxcsr); }
DefaultFloatEnvironment::~DefaultFloatEnvironment() { _mm_setcsr(saved_); }
#else
DefaultFloatEnvironment::DefaultFloatEnvironment() : saved_(0) {}
DefaultFloatEnvironment::~DefaultFloatEnvironment() = default;
#endif

}  // namespace kvarn::cpu

namespace kvarn {

const BackendTable* cpu_backend_table(const HostServices* host) {
  cpu::g_host.store(host, std::memory_order_release);
  return &cpu::kTable;
}

}  // namespace kvarn

extern "C" const char* kvarn_cpu_isas(void) { return kvarn::cpu::runnable_isas(); }
