// kvarn for C++20: RAII and std::span over the C ABI of kvarn.h, header only. Nothing here throws but Result::value(), and allocation of
// the few std::vector and std::string results.
//
//   auto pool = kvarn::Pool::create({.num_blocks = 1024, .num_slots = 64, .tile_tokens = 128});
//   if (!pool) return report(pool.error());
//   auto sequence = pool->sequence();
//   auto work = sequence->append(17);
#pragma once

#include <cassert>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "kvarn/format.h"
#include "kvarn/kvarn.h"

namespace kvarn {

// ---- results ---------------------------------------------------------------------------------------------------------------------

struct Error {
  kvarn_status status = KVARN_OK;
  std::string message;
};

// A value or an error. Discarding one is a warning.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}
  Result(Error error) : state_(std::in_place_index<1>, std::move(error)) {}

  bool ok() const { return state_.index() == 0; }
  explicit operator bool() const { return ok(); }
  kvarn_status status() const { return ok() ? KVARN_OK : std::get<1>(state_).status; }
  const Error& error() const {
    assert(!ok());
    return *std::get_if<1>(&state_);
  }
  T& operator*() & {
    assert(ok());
    return *std::get_if<0>(&state_);
  }
  const T& operator*() const& {
    assert(ok());
    return *std::get_if<0>(&state_);
  }
  T&& operator*() && { return std::move(**this); }
  T* operator->() { return &**this; }
  const T* operator->() const { return &**this; }
  // The value, or std::runtime_error with the message.
  T& value() & {
    check();
    return **this;
  }
  T&& value() && {
    check();
    return std::move(**this);
  }

 private:
  void check() const {
    if (!ok()) throw std::runtime_error(error().message);
  }
  std::variant<T, Error> state_;
};

// Success or an error.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Error error) : error_(std::move(error)) {}

  bool ok() const { return error_.status == KVARN_OK; }
  explicit operator bool() const { return ok(); }
  kvarn_status status() const { return error_.status; }
  const Error& error() const { return error_; }

 private:
  Error error_;
};

namespace detail {

inline Error last_error(kvarn_status status) { return Error{status, kvarn_last_error()}; }
inline Status to_status(kvarn_status status) { return status == KVARN_OK ? Status() : Status(last_error(status)); }

}  // namespace detail

// A zeroed params or info struct with its struct_size set.
template <class Struct>
Struct make() {
  Struct result{};
  KVARN_INIT(result);
  return result;
}

// ---- formats ---------------------------------------------------------------------------------------------------------------------

inline kvarn_format to_c(const Format& f) { return kvarn_format{f.k_bits, f.v_bits, f.tile_tokens, f.metadata_bits}; }

inline Result<Format> parse_format(const std::string& name) {
  kvarn_format f{};
  if (const kvarn_status status = kvarn_format_parse(name.c_str(), &f); status != KVARN_OK) return detail::last_error(status);
  return Format{f.k_bits, f.v_bits, f.tile_tokens, f.metadata_bits};
}

inline Result<std::string> name_of(const Format& format) {
  char name[32];
  if (const kvarn_status status = kvarn_format_name(to_c(format), name, sizeof name); status != KVARN_OK) return detail::last_error(status);
  return std::string(name);
}

// ---- element types ---------------------------------------------------------------------------------------------------------------

// 16-bit values as bits; any type of the same layout may be reinterpreted.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
inline constexpr int kDtypeOf = -1;
template <>
inline constexpr int kDtypeOf<float> = KVARN_F32;
template <>
inline constexpr int kDtypeOf<Half> = KVARN_F16;
template <>
inline constexpr int kDtypeOf<BFloat16> = KVARN_BF16;

// ---- plan ------------------------------------------------------------------------------------------------------------------------

// kvarn_plan_params without what the wrapper sets itself; see there.
struct PlanOptions {
  Format format;
  int32_t head_dim = 0;
  int32_t num_kv_heads = 0;
  kvarn_dtype dtype = KVARN_F16;
  int32_t num_q_heads = 0;
  int32_t max_num_seqs = 0;
  int64_t max_q_tokens = 0;
  int32_t max_tiles = 0;
  const char* backend = nullptr;
  int32_t device = 0;
  bool batch_invariant = false;
  const char* cpu_isa = nullptr;
  int32_t num_threads = 0;
  kvarn_parallel_for parallel_for = nullptr;
  void* parallel_user = nullptr;
};

class Plan {
 public:
  static Result<Plan> create(const PlanOptions& options) {
    auto params = make<kvarn_plan_params>();
    params.backend = options.backend;
    params.device = options.device;
    params.config = kvarn_config{to_c(options.format), options.head_dim, options.num_kv_heads, options.dtype};
    params.num_q_heads = options.num_q_heads;
    params.max_num_seqs = options.max_num_seqs;
    params.max_q_tokens = options.max_q_tokens;
    params.max_tiles = options.max_tiles;
    params.batch_invariant = options.batch_invariant ? 1 : 0;
    params.cpu_isa = options.cpu_isa;
    params.num_threads = options.num_threads;
    params.parallel_for = options.parallel_for;
    params.parallel_user = options.parallel_user;
    kvarn_plan* plan = nullptr;
    if (const kvarn_status status = kvarn_plan_create(&params, &plan); status != KVARN_OK) return detail::last_error(status);
    return Plan(plan, make_layout(options.format, options.head_dim));
  }

  const RecordLayout& layout() const { return layout_; }
  int64_t workspace_bytes() const { return kvarn_plan_workspace_bytes(plan_.get()); }
  const char* describe() const { return kvarn_plan_describe(plan_.get()); }
  kvarn_plan* get() const { return plan_.get(); }

  // The operations as kvarn.h describes them; struct_size is set here.
  Status hadamard(kvarn_hadamard_params params, void* stream = nullptr) { return run(&kvarn_hadamard, params, stream); }
  Status append(kvarn_append_params params, void* stream = nullptr) { return run(&kvarn_append, params, stream); }
  Status encode(kvarn_encode_params params, void* stream = nullptr) { return run(&kvarn_encode, params, stream); }
  Status decode(kvarn_decode_params params, void* stream = nullptr) { return run(&kvarn_decode, params, stream); }
  Status attend(kvarn_attend_params params, void* stream = nullptr) { return run(&kvarn_attend, params, stream); }

  // Rows of head_dim values; `out` may be `x`.
  template <class T>
  Status hadamard(std::span<const T> x, std::span<T> out, bool inverse = false, void* stream = nullptr) {
    static_assert(kDtypeOf<T> >= 0, "expected float, kvarn::Half or kvarn::BFloat16");
    const size_t row = static_cast<size_t>(layout_.head_dim);
    if (x.size() != out.size() || x.size() % row != 0) {
      return Error{KVARN_INVALID_ARGUMENT, "[kvarn.hadamard] x, out: expected the same multiple of " + std::to_string(row) +
                                               " values, got " + std::to_string(x.size()) + " and " + std::to_string(out.size())};
    }
    auto params = make<kvarn_hadamard_params>();
    params.x = x.data();
    params.out = out.data();
    params.rows = static_cast<int64_t>(x.size() / row);
    params.dtype = kDtypeOf<T>;
    params.inverse = inverse ? 1 : 0;
    return hadamard(params, stream);
  }

 private:
  struct Destroy {
    void operator()(kvarn_plan* plan) const { kvarn_plan_destroy(plan); }
  };
  Plan(kvarn_plan* plan, const RecordLayout& layout) : plan_(plan), layout_(layout) {}

  template <class Params>
  Status run(kvarn_status (*operation)(kvarn_plan*, const Params*, void*), Params& params, void* stream) {
    KVARN_INIT(params);
    return detail::to_status(operation(plan_.get(), &params, stream));
  }

  std::unique_ptr<kvarn_plan, Destroy> plan_;
  RecordLayout layout_;
};

// ---- paged cache -----------------------------------------------------------------------------------------------------------------

// What the caller must now run, in this order, on every layer's memory. Valid until the pool's next call.
struct Work {
  std::span<const kvarn_pair> copies;     // slot -> slot
  std::span<const kvarn_pair> decodes;    // block -> slot, rotated
  std::span<const int64_t> slot_mapping;  // for append
  std::span<const kvarn_pair> encodes;    // slot -> block
};

// A sequence of a pool; freed with the object, which also keeps the pool alive.
class Sequence {
 public:
  Sequence(Sequence&& other) noexcept : pool_(std::move(other.pool_)), handle_(std::exchange(other.handle_, 0)) {}
  Sequence& operator=(Sequence&& other) noexcept {
    std::swap(pool_, other.pool_);
    std::swap(handle_, other.handle_);
    return *this;
  }
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;
  ~Sequence() {
    if (pool_ != nullptr && handle_ != 0) kvarn_sequence_free(pool_.get(), handle_);
  }

  Result<Work> append(int64_t num_tokens) { return work(&kvarn_sequence_append, num_tokens); }
  Result<Work> commit(int64_t num_tokens) { return work(&kvarn_sequence_commit, num_tokens); }
  Result<Work> truncate(int64_t num_tokens) { return work(&kvarn_sequence_truncate, num_tokens); }
  Status rollback(int64_t num_tokens) { return detail::to_status(kvarn_sequence_rollback(pool_.get(), handle_, num_tokens)); }

  Result<Sequence> fork() const {
    kvarn_sequence handle = 0;
    if (const kvarn_status status = kvarn_sequence_fork(pool_.get(), handle_, &handle); status != KVARN_OK)
      return detail::last_error(status);
    return Sequence(pool_, handle);
  }
  Result<Sequence> share_prefix(int64_t num_tokens) const {
    kvarn_sequence handle = 0;
    if (const kvarn_status status = kvarn_sequence_share_prefix(pool_.get(), handle_, num_tokens, &handle); status != KVARN_OK) {
      return detail::last_error(status);
    }
    return Sequence(pool_, handle);
  }

  kvarn_sequence_info info() const {
    auto info = make<kvarn_sequence_info>();
    // Cannot fail for a live handle, and this object's is.
    kvarn_sequence_get_info(pool_.get(), handle_, &info);
    return info;
  }
  Status table(std::span<int32_t> entries) const {
    return detail::to_status(kvarn_sequence_table(pool_.get(), handle_, entries.data(), static_cast<int64_t>(entries.size())));
  }
  std::vector<int32_t> table() const {
    std::vector<int32_t> entries(static_cast<size_t>(info().num_tiles));
    kvarn_sequence_table(pool_.get(), handle_, entries.data(), static_cast<int64_t>(entries.size()));
    return entries;
  }
  kvarn_sequence handle() const { return handle_; }

 private:
  friend class Pool;
  Sequence(std::shared_ptr<kvarn_pool> pool, kvarn_sequence handle) : pool_(std::move(pool)), handle_(handle) {}

  Result<Work> work(kvarn_status (*call)(kvarn_pool*, kvarn_sequence, int64_t, kvarn_work*), int64_t num_tokens) {
    auto w = make<kvarn_work>();
    if (const kvarn_status status = call(pool_.get(), handle_, num_tokens, &w); status != KVARN_OK) return detail::last_error(status);
    return Work{{w.copies, static_cast<size_t>(w.num_copies)},
                {w.decodes, static_cast<size_t>(w.num_decodes)},
                {w.slot_mapping, static_cast<size_t>(w.num_tokens)},
                {w.encodes, static_cast<size_t>(w.num_encodes)}};
  }

  std::shared_ptr<kvarn_pool> pool_;
  kvarn_sequence handle_;
};

struct PoolOptions {
  int32_t num_blocks = 0;
  int32_t num_slots = 0;
  int32_t tile_tokens = 128;
  int32_t sink_tokens = 128;
  int32_t recent_tokens = 0;
};

class Pool {
 public:
  static Result<Pool> create(const PoolOptions& options) {
    auto params = make<kvarn_pool_params>();
    params.num_blocks = options.num_blocks;
    params.num_slots = options.num_slots;
    params.tile_tokens = options.tile_tokens;
    params.sink_tokens = options.sink_tokens;
    params.recent_tokens = options.recent_tokens;
    kvarn_pool* pool = nullptr;
    if (const kvarn_status status = kvarn_pool_create(&params, &pool); status != KVARN_OK) return detail::last_error(status);
    return Pool(std::shared_ptr<kvarn_pool>(pool, &kvarn_pool_destroy));
  }

  Result<Sequence> sequence() {
    kvarn_sequence handle = 0;
    if (const kvarn_status status = kvarn_sequence_create(pool_.get(), &handle); status != KVARN_OK) return detail::last_error(status);
    return Sequence(pool_, handle);
  }
  kvarn_pool_info info() const {
    auto info = make<kvarn_pool_info>();
    kvarn_pool_get_info(pool_.get(), &info);
    return info;
  }
  kvarn_pool* get() const { return pool_.get(); }

 private:
  explicit Pool(std::shared_ptr<kvarn_pool> pool) : pool_(std::move(pool)) {}
  std::shared_ptr<kvarn_pool> pool_;
};

// ---- backends --------------------------------------------------------------------------------------------------------------------

inline Result<std::vector<kvarn_backend_info>> backends() {
  std::vector<kvarn_backend_info> result;
  for (int32_t i = 0; i < kvarn_backend_count(); ++i) {
    auto info = make<kvarn_backend_info>();
    if (const kvarn_status status = kvarn_backend_get(i, &info); status != KVARN_OK) return detail::last_error(status);
    result.push_back(info);
  }
  return result;
}

}  // namespace kvarn
