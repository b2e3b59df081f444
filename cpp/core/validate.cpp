#include "core/validate.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "core/format.h"
#include "core/status.h"

namespace kvarn {
namespace {

constexpr int64_t kMaxKvHeads = 1024;
constexpr int64_t kMaxQHeads = 65536;
constexpr int64_t kMaxThreads = 1024;
constexpr int64_t kWorkspaceAlignment = 256;

#define KVARN_CHECK(expression)                                                                        \
  do {                                                                                                 \
    if (const kvarn_status check_status = (expression); check_status != KVARN_OK) return check_status; \
  } while (false)

// a * b * ... of non-negative factors, or -1 when it passes int64.
template <class... Factors>
int64_t product(int64_t first, Factors... factors) {
  int64_t result = first;
  const bool fits = (!__builtin_mul_overflow(result, static_cast<int64_t>(factors), &result) && ...);
  return fits ? result : -1;
}

// Where a value of `values` comes a second time, or -1. Negative values do not count.
// Rising values, which is what a paged cache gives, are told in one pass. Others are marked in a bitmap on the stack, one window of the
// index range after the other, so that no memory is needed: a pass over the values per window that any of them lies in.
template <class Index>
int64_t find_repeated(const Index* values, int64_t count) {
  int64_t last = -1;
  int64_t low = INT64_MAX;
  bool rising = true;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t value = values[i];
    if (value < 0) continue;
    rising = rising && value > last;
    last = value;
    if (value < low) low = value;
  }
  constexpr int64_t kWindow = 1 << 17;  // indices, and 16 KiB of bits
  uint64_t seen[kWindow / 64];
  while (!rising && low != INT64_MAX) {
    std::memset(seen, 0, sizeof(seen));
    int64_t next_low = INT64_MAX;
    for (int64_t i = 0; i < count; ++i) {
      if (values[i] < low) continue;
      const int64_t at = values[i] - low;
      if (at >= kWindow) {
        if (values[i] < next_low) next_low = values[i];
        continue;
      }
      const uint64_t bit = uint64_t{1} << (at % 64);
      if ((seen[at / 64] & bit) != 0) return i;
      seen[at / 64] |= bit;
    }
    low = next_low;
  }
  return -1;
}

// The checks of one operation; each names its argument, what was expected and what came.
class Checker {
 public:
  explicit Checker(const char* operation) : operation_(operation) {}

  kvarn_status in_range(const char* argument, int64_t value, int64_t low, int64_t high) const {
    if (value >= low && value <= high) return KVARN_OK;
    if (high == INT64_MAX) {
      return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] %s: expected at least %lld, got %lld", operation_, argument, ll(low), ll(value));
    }
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] %s: expected %lld to %lld, got %lld", operation_, argument, ll(low), ll(high),
                ll(value));
  }
  kvarn_status at_least(const char* argument, int64_t value, int64_t low) const { return in_range(argument, value, low, INT64_MAX); }
  kvarn_status is_flag(const char* argument, int64_t value) const {
    if (value == 0 || value == 1) return KVARN_OK;
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] %s: expected 0 or 1, got %lld", operation_, argument, ll(value));
  }
  kvarn_status is_dtype(const char* argument, int32_t dtype) const {
    if (dtype_bytes(dtype) != 0) return KVARN_OK;
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] %s: expected KVARN_F32 (0), KVARN_F16 (1) or KVARN_BF16 (2), got %d", operation_,
                argument, dtype);
  }
  kvarn_status pointer(const char* argument, const void* address, int64_t alignment) const {
    if (address == nullptr) return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] %s: expected a pointer, got NULL", operation_, argument);
    return optional_pointer(argument, address, alignment);
  }
  kvarn_status optional_pointer(const char* argument, const void* address, int64_t alignment) const {
    if (reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(alignment) == 0) return KVARN_OK;
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] %s: expected an address aligned to %lld bytes, got %p", operation_, argument,
                ll(alignment), address);
  }
  // `bytes` comes from product().
  kvarn_status fits(const char* argument, int64_t bytes) const {
    if (bytes >= 0) return KVARN_OK;
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] %s: expected at most 2^63 - 1 bytes, got more", operation_, argument);
  }
  // Every entry of a host array lies in [low, high).
  template <class Index>
  kvarn_status indices(const char* argument, const Index* values, int64_t count, int64_t low, int64_t high) const {
    for (int64_t i = 0; i < count; ++i) {
      if (values[i] < low || values[i] >= high) {
        return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] %s[%lld]: expected %lld to %lld, got %lld", operation_, argument, ll(i), ll(low),
                    ll(high - 1), ll(values[i]));
      }
    }
    return KVARN_OK;
  }

  // No two entries of a host array name the same place. Negative entries do not count.
  template <class Index>
  kvarn_status all_different(const char* argument, const Index* values, int64_t count) const {
    const int64_t again = find_repeated(values, count);
    if (again < 0) return KVARN_OK;
    const Index* const first = std::find(values, values + count, values[again]);
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] %s[%lld]: expected entries that are all different, got %lld again (first at %lld)",
                operation_, argument, ll(again), ll(values[again]), ll(first - values));
  }

  // [outer, inner] rows of `row` values that are written: neither stride may make two rows overlap. `name` is the strides' common stem.
  kvarn_status output_strides(const char* outer_name, int64_t outer_stride, int64_t outer, const char* inner_name, int64_t inner_stride,
                              int64_t inner, int64_t row) const {
    KVARN_CHECK(input_strides(outer_name, outer_stride, outer, inner_name, inner_stride, inner, row));
    // A stride over a single row is never used.
    if (inner > 1 && inner_stride < row) return too_small(inner_name, row, inner_stride);
    if (outer > 1 && outer_stride < row) return too_small(outer_name, row, outer_stride);
    if (outer > 1 && inner > 1) {
      const int64_t inner_extent = (inner - 1) * inner_stride + row;
      const int64_t outer_extent = (outer - 1) * outer_stride + row;
      if (outer_stride < inner_extent && inner_stride < outer_extent) {
        return fail(KVARN_INVALID_ARGUMENT,
                    "[kvarn.%s] %s, %s: expected rows of %lld values that do not overlap, got strides %lld and %lld", operation_,
                    outer_name, inner_name, ll(row), ll(outer_stride), ll(inner_stride));
      }
    }
    return KVARN_OK;
  }
  // The same for rows that are only read: they may overlap.
  kvarn_status input_strides(const char* outer_name, int64_t outer_stride, int64_t outer, const char* inner_name, int64_t inner_stride,
                             int64_t inner, int64_t row) const {
    KVARN_CHECK(at_least(outer_name, outer_stride, 0));
    KVARN_CHECK(at_least(inner_name, inner_stride, 0));
    const int64_t outer_reach = outer > 1 ? product(outer - 1, outer_stride) : 0;
    const int64_t inner_reach = inner > 1 ? product(inner - 1, inner_stride) : 0;
    int64_t reach = 0;
    // Four bytes are the widest value.
    const bool too_far = outer_reach < 0 || inner_reach < 0 || __builtin_add_overflow(outer_reach, inner_reach, &reach) ||
                         __builtin_add_overflow(reach, row, &reach) || product(reach, 4) < 0;
    if (!too_far) return KVARN_OK;
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] %s, %s: expected an extent below 2^63 bytes, got strides %lld and %lld", operation_,
                outer_name, inner_name, ll(outer_stride), ll(inner_stride));
  }

  // Memory that is written lies apart from other memory of the call. Addresses compare on any device; empty ranges overlap nothing.
  struct Range {
    const char* name;
    const void* address;
    int64_t bytes;
  };
  kvarn_status apart(const Range& written, const Range& other) const {
    const auto a = reinterpret_cast<uintptr_t>(written.address), b = reinterpret_cast<uintptr_t>(other.address);
    if (a == 0 || b == 0 || written.bytes <= 0 || other.bytes <= 0) return KVARN_OK;
    const bool overlap = a < b ? b - a < static_cast<uintptr_t>(written.bytes) : a - b < static_cast<uintptr_t>(other.bytes);
    if (!overlap) return KVARN_OK;
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] %s: expected memory apart from %s, got %p and %p, which overlap", operation_,
                written.name, other.name, written.address, other.address);
  }
  // The same for `count` pieces of each, `stride` bytes from one to the next, which do not overlap among themselves.
  kvarn_status layers_apart(const Range& written, int64_t written_stride, const Range& other, int64_t other_stride, int64_t count) const {
    if (written.bytes <= 0 || other.bytes <= 0) return KVARN_OK;
    for (int64_t i = 0, j = 0; i < count && j < count;) {
      const auto at = [](const Range& range, int64_t stride, int64_t layer) {
        return Range{range.name, static_cast<const uint8_t*>(range.address) + (layer == 0 ? 0 : layer * stride), range.bytes};
      };
      const Range a = at(written, written_stride, i), b = at(other, other_stride, j);
      KVARN_CHECK(apart(a, b));
      // The one that ends first meets nothing of the other any more.
      const auto end = [](const Range& range) { return reinterpret_cast<uintptr_t>(range.address) + static_cast<uintptr_t>(range.bytes); };
      ++(end(a) <= end(b) ? i : j);
    }
    return KVARN_OK;
  }
  // Two sets of [outer, inner] rows of `row` values, written with the same strides from two addresses `distance` values apart.
  kvarn_status rows_apart(const char* first, const char* second, int64_t distance, int64_t outer_stride, int64_t outer,
                          int64_t inner_stride, int64_t inner, int64_t row) const {
    for (int64_t j = 1 - inner; j < inner; ++j) {
      // Rows i outer steps apart meet when |gap + i * outer_stride| < row: i is one of the two next to -gap / outer_stride.
      const int64_t gap = distance + j * inner_stride;
      const int64_t nearest = outer > 1 ? -gap / outer_stride : 0;
      for (int64_t i = nearest - 1; i <= nearest + 1; ++i) {
        if (std::abs(i) >= outer || std::abs(gap + i * outer_stride) >= row) continue;
        return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] %s: expected memory apart from %s, got rows that overlap", operation_, second,
                    first);
      }
    }
    return KVARN_OK;
  }
  // Bytes from the first to the last value of [outer, inner] rows whose strides have been checked.
  static int64_t extent_bytes(int64_t outer_stride, int64_t outer, int64_t inner_stride, int64_t inner, int64_t row, int64_t value_bytes) {
    return ((outer - 1) * outer_stride + (inner - 1) * inner_stride + row) * value_bytes;
  }

  kvarn_status staging(const kvarn_plan& plan, const void* address, int64_t num_slots) const {
    KVARN_CHECK(in_range("num_slots", num_slots, 0, INT32_MAX));
    if (num_slots == 0) return KVARN_OK;
    KVARN_CHECK(pointer("staging", address, plan.value_bytes));
    return fits("staging", staging_bytes(plan, num_slots));
  }
  kvarn_status records(const kvarn_plan& plan, const void* address, int64_t num_blocks) const {
    KVARN_CHECK(in_range("num_blocks", num_blocks, 0, INT32_MAX));
    if (num_blocks == 0) return KVARN_OK;
    KVARN_CHECK(pointer("records", address, 1));
    return fits("records", records_bytes(plan, num_blocks));
  }

  static int64_t staging_bytes(const kvarn_plan& plan, int64_t num_slots) {
    const kvarn_config& c = plan.config;
    return product(num_slots, slot_values(c.num_kv_heads, c.format.tile_tokens, c.head_dim), plan.value_bytes);
  }
  static int64_t records_bytes(const kvarn_plan& plan, int64_t num_blocks) {
    return product(num_blocks, plan.config.num_kv_heads, plan.record_bytes);
  }

 private:
  static long long ll(int64_t value) { return static_cast<long long>(value); }
  kvarn_status too_small(const char* name, int64_t least, int64_t value) const {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] %s: expected at least %lld values, got %lld", operation_, name, ll(least), ll(value));
  }

  const char* operation_;
};

kvarn_status validate_attend_tables(const Checker& check, const kvarn_plan& plan, const kvarn_attend_params& p) {
  if (p.cu_q_lens[0] != 0) return fail(KVARN_INVALID_ARGUMENT, "[kvarn.attend] cu_q_lens[0]: expected 0, got %d", p.cu_q_lens[0]);
  for (int32_t s = 0; s < p.num_seqs; ++s) {
    if (p.cu_q_lens[s + 1] < p.cu_q_lens[s]) {
      return fail(KVARN_INVALID_ARGUMENT, "[kvarn.attend] cu_q_lens[%d]: expected at least %d, got %d", s + 1, p.cu_q_lens[s],
                  p.cu_q_lens[s + 1]);
    }
  }
  if (p.cu_q_lens[p.num_seqs] != p.num_q_tokens) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.attend] cu_q_lens[%d]: expected num_q_tokens = %lld, got %d", p.num_seqs,
                static_cast<long long>(p.num_q_tokens), p.cu_q_lens[p.num_seqs]);
  }
  const int64_t tile_tokens = plan.config.format.tile_tokens;
  const int64_t columns = p.block_table_stride < plan.max_tiles ? p.block_table_stride : plan.max_tiles;
  KVARN_CHECK(check.indices("seq_lens", p.seq_lens, p.num_seqs, 0, columns * tile_tokens + 1));
  for (int32_t s = 0; s < p.num_seqs; ++s) {
    const int32_t* row = p.block_table + s * p.block_table_stride;
    const int64_t tiles = (p.seq_lens[s] + tile_tokens - 1) / tile_tokens;
    for (int64_t t = 0; t < tiles; ++t) {
      const bool inside = row[t] >= 0 ? row[t] < p.num_blocks : ~row[t] < p.num_slots;
      if (!inside) {
        return fail(KVARN_INVALID_ARGUMENT,
                    "[kvarn.attend] block_table[%d][%lld]: expected a block below %lld or ~slot with a slot below %lld, got %d%s", s,
                    static_cast<long long>(t), static_cast<long long>(p.num_blocks), static_cast<long long>(p.num_slots), row[t],
                    row[t] < 0 ? " (a slot)" : "");
      }
    }
  }
  return KVARN_OK;
}

}  // namespace

bool is_host_backend(const char* name) { return std::strcmp(name, "cpu") == 0; }

kvarn_status validate_plan(const kvarn_plan_params& p) {
  const Checker check("plan_create");
  KVARN_CHECK(check_format("plan_create", p.config.format));
  KVARN_CHECK(check_head_dim("plan_create", p.config.head_dim));
  KVARN_CHECK(check.in_range("num_kv_heads", p.config.num_kv_heads, 1, kMaxKvHeads));
  KVARN_CHECK(check.is_dtype("dtype", p.config.dtype));
  KVARN_CHECK(check.at_least("device", p.device, 0));
  KVARN_CHECK(check.is_flag("batch_invariant", p.batch_invariant));
  KVARN_CHECK(check.in_range("num_threads", p.num_threads, 0, kMaxThreads));
  if (p.parallel_for == nullptr && p.parallel_user != nullptr) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.plan_create] parallel_user: expected NULL without parallel_for, got %p", p.parallel_user);
  }
  KVARN_CHECK(check.in_range("num_q_heads", p.num_q_heads, 0, kMaxQHeads));
  if (p.num_q_heads == 0) return KVARN_OK;
  if (p.num_q_heads % p.config.num_kv_heads != 0) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.plan_create] num_q_heads: expected a multiple of num_kv_heads = %d, got %d",
                p.config.num_kv_heads, p.num_q_heads);
  }
  KVARN_CHECK(check.at_least("max_num_seqs", p.max_num_seqs, 1));
  KVARN_CHECK(check.in_range("max_q_tokens", p.max_q_tokens, 1, INT32_MAX));
  // Sequence lengths are int32.
  return check.in_range("max_tiles", p.max_tiles, 1, INT32_MAX / p.config.format.tile_tokens);
}

kvarn_status validate_plan_backend(const kvarn_plan_params& p) {
  if (is_host_backend(p.backend)) return Checker("plan_create").in_range("device", p.device, 0, 0);
  const char* argument = p.cpu_isa != nullptr        ? "cpu_isa"
                         : p.num_threads != 0        ? "num_threads"
                         : p.parallel_for != nullptr ? "parallel_for"
                                                     : nullptr;
  if (argument == nullptr) return KVARN_OK;
  return fail(KVARN_INVALID_ARGUMENT, "[kvarn.plan_create] %s: expected nothing for backend %s, got a setting of backend cpu", argument,
              p.backend);
}

kvarn_status validate(const kvarn_plan& plan, const kvarn_hadamard_params& p, bool& nothing_to_do) {
  const Checker check("hadamard");
  KVARN_CHECK(check.at_least("rows", p.rows, 0));
  KVARN_CHECK(check.is_dtype("dtype", p.dtype));
  KVARN_CHECK(check.is_flag("inverse", p.inverse));
  nothing_to_do = p.rows == 0;
  if (nothing_to_do) return KVARN_OK;
  const int64_t value_bytes = dtype_bytes(p.dtype);
  const int64_t bytes = product(p.rows, plan.config.head_dim, value_bytes);
  KVARN_CHECK(check.fits("x", bytes));
  KVARN_CHECK(check.pointer("x", p.x, value_bytes));
  KVARN_CHECK(check.pointer("out", p.out, value_bytes));
  const auto x = reinterpret_cast<uintptr_t>(p.x);
  const auto out = reinterpret_cast<uintptr_t>(p.out);
  const uintptr_t distance = x < out ? out - x : x - out;
  if (distance != 0 && distance < static_cast<uintptr_t>(bytes)) {
    return fail(KVARN_INVALID_ARGUMENT,
                "[kvarn.hadamard] out: expected x itself or memory apart from it, got an overlap at a distance of %llu bytes",
                static_cast<unsigned long long>(distance));
  }
  return KVARN_OK;
}

kvarn_status validate(const kvarn_plan& plan, const kvarn_append_params& p, bool& nothing_to_do) {
  const Checker check("append");
  const kvarn_config& c = plan.config;
  KVARN_CHECK(check.at_least("num_tokens", p.num_tokens, 0));
  KVARN_CHECK(check.is_flag("rotated", p.rotated));
  KVARN_CHECK(check.staging(plan, p.staging, p.num_slots));
  nothing_to_do = p.num_tokens == 0;
  if (nothing_to_do) return KVARN_OK;
  KVARN_CHECK(check.pointer("k", p.k, plan.value_bytes));
  KVARN_CHECK(check.pointer("v", p.v, plan.value_bytes));
  KVARN_CHECK(check.pointer("slot_mapping", p.slot_mapping, alignof(int64_t)));
  KVARN_CHECK(
      check.input_strides("k_token_stride", p.k_token_stride, p.num_tokens, "k_head_stride", p.k_head_stride, c.num_kv_heads, c.head_dim));
  KVARN_CHECK(
      check.input_strides("v_token_stride", p.v_token_stride, p.num_tokens, "v_head_stride", p.v_head_stride, c.num_kv_heads, c.head_dim));
  const Checker::Range staging{"staging", p.staging, Checker::staging_bytes(plan, p.num_slots)};
  const auto extent = [&](int64_t token_stride, int64_t head_stride) {
    return Checker::extent_bytes(token_stride, p.num_tokens, head_stride, c.num_kv_heads, c.head_dim, plan.value_bytes);
  };
  KVARN_CHECK(check.apart(staging, {"k", p.k, extent(p.k_token_stride, p.k_head_stride)}));
  KVARN_CHECK(check.apart(staging, {"v", p.v, extent(p.v_token_stride, p.v_head_stride)}));
  if (!plan.host_memory) return KVARN_OK;
  const int64_t positions = p.num_slots * c.format.tile_tokens;
  for (int64_t i = 0; i < p.num_tokens; ++i) {
    if (p.slot_mapping[i] >= positions) {
      return fail(
          KVARN_INVALID_ARGUMENT,
          "[kvarn.append] slot_mapping[%lld]: expected 0 to %lld (%lld slots of %d tokens), or less than 0 to skip the token, got %lld",
          static_cast<long long>(i), static_cast<long long>(positions - 1), static_cast<long long>(p.num_slots), c.format.tile_tokens,
          static_cast<long long>(p.slot_mapping[i]));
    }
  }
  return check.all_different("slot_mapping", p.slot_mapping, p.num_tokens);
}

kvarn_status validate(const kvarn_plan& plan, const kvarn_encode_params& p, bool& nothing_to_do) {
  const Checker check("encode");
  KVARN_CHECK(check.at_least("num_tiles", p.num_tiles, 0));
  KVARN_CHECK(check.at_least("num_layers", p.num_layers, 1));
  KVARN_CHECK(check.in_range("normalisation", p.normalisation, KVARN_SCALE_INVARIANT, KVARN_PUBLISHED));
  KVARN_CHECK(check.in_range("rounding", p.rounding, KVARN_ROUNDING_AUTO, KVARN_UNBIASED));
  KVARN_CHECK(check.staging(plan, p.staging, p.num_slots));
  KVARN_CHECK(check.records(plan, p.records, p.num_blocks));
  if (p.num_layers > 1) {
    KVARN_CHECK(check.at_least("staging_layer_stride_bytes", p.staging_layer_stride_bytes, Checker::staging_bytes(plan, p.num_slots)));
    KVARN_CHECK(check.at_least("records_layer_stride_bytes", p.records_layer_stride_bytes, Checker::records_bytes(plan, p.num_blocks)));
    if (p.staging_layer_stride_bytes % plan.value_bytes != 0) {
      return fail(KVARN_INVALID_ARGUMENT, "[kvarn.encode] staging_layer_stride_bytes: expected a multiple of %lld, got %lld",
                  static_cast<long long>(plan.value_bytes), static_cast<long long>(p.staging_layer_stride_bytes));
    }
    KVARN_CHECK(check.fits("staging_layer_stride_bytes", product(p.staging_layer_stride_bytes, p.num_layers)));
    KVARN_CHECK(check.fits("records_layer_stride_bytes", product(p.records_layer_stride_bytes, p.num_layers)));
  }
  nothing_to_do = p.num_tiles == 0;
  if (nothing_to_do) return KVARN_OK;
  KVARN_CHECK(check.layers_apart({"records", p.records, Checker::records_bytes(plan, p.num_blocks)}, p.records_layer_stride_bytes,
                                 {"staging", p.staging, Checker::staging_bytes(plan, p.num_slots)}, p.staging_layer_stride_bytes,
                                 p.num_layers));
  KVARN_CHECK(check.pointer("slots", p.slots, alignof(int32_t)));
  KVARN_CHECK(check.pointer("blocks", p.blocks, alignof(int32_t)));
  for (const auto& [name, factors] : {std::pair{"k_feedback", p.k_feedback}, std::pair{"v_feedback", p.v_feedback}}) {
    if (factors == nullptr) continue;
    KVARN_CHECK(check.pointer(name, factors, alignof(float)));
    const int64_t factor_bytes = product(plan.config.head_dim, plan.config.head_dim, sizeof(float));
    KVARN_CHECK(check.fits(name, product(p.num_layers, plan.config.num_kv_heads, factor_bytes)));
  }
  // The destinations are all different.
  KVARN_CHECK(check.in_range("num_tiles", p.num_tiles, 0, p.num_blocks));
  if (!plan.host_memory) return KVARN_OK;
  KVARN_CHECK(check.indices("slots", p.slots, p.num_tiles, 0, p.num_slots));
  KVARN_CHECK(check.indices("blocks", p.blocks, p.num_tiles, 0, p.num_blocks));
  return check.all_different("blocks", p.blocks, p.num_tiles);
}

kvarn_status validate(const kvarn_plan& plan, kvarn_decode_params& p, bool& nothing_to_do) {
  const Checker check("decode");
  const kvarn_config& c = plan.config;
  KVARN_CHECK(check.at_least("num_tiles", p.num_tiles, 0));
  KVARN_CHECK(check.at_least("num_destinations", p.num_destinations, 0));
  KVARN_CHECK(check.is_dtype("dtype", p.dtype));
  KVARN_CHECK(check.is_flag("rotated", p.rotated));
  KVARN_CHECK(check.records(plan, p.records, p.num_blocks));
  nothing_to_do = p.num_tiles == 0 || (p.k == nullptr && p.v == nullptr);
  if (nothing_to_do) return KVARN_OK;
  KVARN_CHECK(check.pointer("blocks", p.blocks, alignof(int32_t)));
  KVARN_CHECK(check.optional_pointer("destinations", p.destinations, alignof(int32_t)));
  KVARN_CHECK(check.optional_pointer("k", p.k, dtype_bytes(p.dtype)));
  KVARN_CHECK(check.optional_pointer("v", p.v, dtype_bytes(p.dtype)));
  const int64_t tile_values = int64_t{c.format.tile_tokens} * c.head_dim;
  if (p.head_stride == 0) p.head_stride = tile_values;
  if (p.tile_stride == 0) {
    KVARN_CHECK(check.at_least("head_stride", p.head_stride, 0));
    p.tile_stride = product(c.num_kv_heads, p.head_stride);
    KVARN_CHECK(check.fits("head_stride", p.tile_stride));
  }
  KVARN_CHECK(
      check.output_strides("tile_stride", p.tile_stride, p.num_destinations, "head_stride", p.head_stride, c.num_kv_heads, tile_values));
  if (p.destinations == nullptr) KVARN_CHECK(check.at_least("num_destinations", p.num_destinations, p.num_tiles));
  const int64_t value_bytes = dtype_bytes(p.dtype);
  const Checker::Range records{"records", p.records, Checker::records_bytes(plan, p.num_blocks)};
  const int64_t bytes = Checker::extent_bytes(p.tile_stride, p.num_destinations, p.head_stride, c.num_kv_heads, tile_values, value_bytes);
  KVARN_CHECK(check.apart({"k", p.k, bytes}, records));
  KVARN_CHECK(check.apart({"v", p.v, bytes}, records));
  if (p.k != nullptr && p.v != nullptr) {
    const int64_t distance = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p.v) - reinterpret_cast<uintptr_t>(p.k)) / value_bytes;
    KVARN_CHECK(check.rows_apart("k", "v", distance, p.tile_stride, p.num_destinations, p.head_stride, c.num_kv_heads, tile_values));
  }
  if (!plan.host_memory) return KVARN_OK;
  KVARN_CHECK(check.indices("blocks", p.blocks, p.num_tiles, 0, p.num_blocks));
  if (p.destinations == nullptr) return KVARN_OK;
  KVARN_CHECK(check.indices("destinations", p.destinations, p.num_tiles, 0, p.num_destinations));
  return check.all_different("destinations", p.destinations, p.num_tiles);
}

kvarn_status validate(const kvarn_plan& plan, const kvarn_attend_params& p, bool& nothing_to_do) {
  const Checker check("attend");
  const kvarn_config& c = plan.config;
  if (plan.num_q_heads == 0) return fail(KVARN_INVALID_ARGUMENT, "[kvarn.attend] plan: expected one made with num_q_heads > 0, got 0");
  KVARN_CHECK(check.in_range("num_seqs", p.num_seqs, 0, plan.max_num_seqs));
  KVARN_CHECK(check.in_range("num_q_tokens", p.num_q_tokens, 0, plan.max_q_tokens));
  KVARN_CHECK(check.is_flag("causal", p.causal));
  KVARN_CHECK(check.is_flag("q_rotated", p.q_rotated));
  KVARN_CHECK(check.is_flag("out_rotated", p.out_rotated));
  KVARN_CHECK(check.at_least("window", p.window, 0));
  if (!std::isfinite(p.softmax_scale)) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.attend] softmax_scale: expected a finite number, got %g",
                static_cast<double>(p.softmax_scale));
  }
  if (!std::isfinite(p.logits_soft_cap) || p.logits_soft_cap < 0) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.attend] logits_soft_cap: expected 0 or a finite positive number, got %g",
                static_cast<double>(p.logits_soft_cap));
  }
  KVARN_CHECK(check.records(plan, p.records, p.num_blocks));
  KVARN_CHECK(check.staging(plan, p.staging, p.num_slots));
  if (p.num_seqs == 0) KVARN_CHECK(check.in_range("num_q_tokens", p.num_q_tokens, 0, 0));
  nothing_to_do = p.num_seqs == 0 || p.num_q_tokens == 0;
  if (p.num_seqs == 0) return KVARN_OK;

  KVARN_CHECK(check.pointer("cu_q_lens", p.cu_q_lens, alignof(int32_t)));
  KVARN_CHECK(check.pointer("seq_lens", p.seq_lens, alignof(int32_t)));
  KVARN_CHECK(check.pointer("block_table", p.block_table, alignof(int32_t)));
  // Rows of a batch are as wide as the plan at most; one row alone may be a slice of anything.
  if (p.num_seqs == 1) {
    KVARN_CHECK(check.at_least("block_table_stride", p.block_table_stride, 0));
  } else {
    KVARN_CHECK(check.in_range("block_table_stride", p.block_table_stride, 0, plan.max_tiles));
  }
  if (plan.host_memory) KVARN_CHECK(validate_attend_tables(check, plan, p));
  if (nothing_to_do) return KVARN_OK;

  KVARN_CHECK(check.pointer("q", p.q, plan.value_bytes));
  KVARN_CHECK(check.pointer("out", p.out, plan.value_bytes));
  KVARN_CHECK(check.input_strides("q_token_stride", p.q_token_stride, p.num_q_tokens, "q_head_stride", p.q_head_stride, plan.num_q_heads,
                                  c.head_dim));
  KVARN_CHECK(check.output_strides("out_token_stride", p.out_token_stride, p.num_q_tokens, "out_head_stride", p.out_head_stride,
                                   plan.num_q_heads, c.head_dim));
  KVARN_CHECK(check.optional_pointer("lse", p.lse, alignof(float)));
  KVARN_CHECK(check.optional_pointer("alibi_slopes", p.alibi_slopes, alignof(float)));
  KVARN_CHECK(check.optional_pointer("sinks", p.sinks, alignof(float)));
  KVARN_CHECK(check.at_least("workspace_bytes", p.workspace_bytes, plan.workspace_bytes));
  if (plan.workspace_bytes > 0) KVARN_CHECK(check.pointer("workspace", p.workspace, kWorkspaceAlignment));

  const auto extent = [&](int64_t token_stride, int64_t head_stride) {
    return Checker::extent_bytes(token_stride, p.num_q_tokens, head_stride, plan.num_q_heads, c.head_dim, plan.value_bytes);
  };
  const Checker::Range read[] = {{"q", p.q, extent(p.q_token_stride, p.q_head_stride)},
                                 {"records", p.records, Checker::records_bytes(plan, p.num_blocks)},
                                 {"staging", p.staging, Checker::staging_bytes(plan, p.num_slots)}};
  const Checker::Range written[] = {{"out", p.out, extent(p.out_token_stride, p.out_head_stride)},
                                    {"lse", p.lse, product(p.num_q_tokens, plan.num_q_heads, int64_t{sizeof(float)})},
                                    {"workspace", p.workspace, plan.workspace_bytes}};
  for (const Checker::Range& w : written) {
    for (const Checker::Range& r : read) KVARN_CHECK(check.apart(w, r));
  }
  KVARN_CHECK(check.apart(written[1], written[0]));
  KVARN_CHECK(check.apart(written[2], written[0]));
  return check.apart(written[2], written[1]);
}

}  // namespace kvarn
