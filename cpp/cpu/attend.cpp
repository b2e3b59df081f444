// Host side of attend: which rows and tiles make a unit of work, where partial results lie, and how they are combined.
//
// A job is up to kAttendMaxRows query rows of one sequence that share a KV head (heads of the group times query tokens, flattened), with
// the tiles they see. Every KV head of a job is split into `splits` runs of tiles; job, KV head and split make a unit. Units are taken in
// order by the workers. A unit of an unsplit head finishes its rows itself; otherwise the last unit of a head to arrive combines the
// partial results in the order of the splits, so that the result does not depend on who arrived when.
#include "cpu/attend.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>

#include "cpu/attend_scratch.h"
#include "cpu/plan.h"

namespace kvarn::cpu {

int64_t attend_scratch_bytes(const RecordLayout& layout) {
  return attend_scratch(nullptr, layout.head_dim, layout.format.tile_tokens).bytes;
}

namespace {

constexpr float kLn2 = 0.693147181f;
constexpr float kLog2E = 1.44269504f;
constexpr int64_t kUnitsPerWorker = 8;       // so that a slow worker costs an eighth of its share at most
constexpr int64_t kSmallUnitTiles = 4;       // fewer tiles than this do not pay for a combination while every worker has work
constexpr int64_t kInvariantUnitTiles = 16;  // with batch_invariant a unit has about so many tiles, whatever else is going on
constexpr int64_t kMaxSplits = 1024;
constexpr int64_t kPartialRowsPerWorker = 1024;  // rows of partial results in the workspace

// Relative costs of a tile and of a row in a tile.
constexpr int64_t kTileCost = 1;
constexpr int64_t kRowCost = 1;

struct Job {
  int32_t sequence;
  int32_t first_row, rows;  // flattened query rows of one KV head: query token * group + head of the group
  int32_t first_tile, end_tile;
  int32_t splits;
  int64_t first_unit;
  int64_t first_head;  // index of the job's KV head 0 among the heads of split jobs
};

// Progress of one KV head of a split job.
struct HeadProgress {
  std::atomic<int32_t> arrived;
  std::atomic<int32_t> region;  // of partial results; kNoRegion until its first unit starts
};
constexpr int32_t kNoRegion = -1;

// Free regions of partial results. A head holds one from its first unit's start to its combination. Units are taken in order, so heads
// that hold one either have a unit in a worker's hands or are the one whose units are being handed out: there are never more of them than
// workers.
struct RegionList {
  std::atomic_flag lock = ATOMIC_FLAG_INIT;
  int32_t free_count;
  int32_t* free;

  class Guard {
   public:
    explicit Guard(RegionList& list) : list_(list) {
      while (list_.lock.test_and_set(std::memory_order_acquire)) {
      }
    }
    ~Guard() { list_.lock.clear(std::memory_order_release); }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

   private:
    RegionList& list_;
  };
};

template <class T>
T divide_up(T a, T b) {
  return (a + b - 1) / b;
}

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Floats of the state of `rows` rows: acc, peak, sum, flags.
int64_t state_floats(int64_t rows, int head_dim) { return rows * (head_dim + 4); }

AttendState state_at(float* base, int rows, int head_dim) {
  float* const peak = base + static_cast<int64_t>(rows) * head_dim;
  return {base, peak, peak + rows, reinterpret_cast<int32_t*>(peak + 2 * rows)};
}

}  // namespace

struct AttendPlan {
  int num_q_heads;
  int group;  // query heads per KV head
  bool batch_invariant;
  int64_t max_jobs;
  int64_t kernel_scratch_bytes;

  // Workspace: offsets in bytes.
  int64_t jobs_offset, heads_offset, free_offset, partials_offset, workers_offset;
  int64_t worker_bytes;  // q and result rows, state, rows' ranges, kernel scratch, rotation scratch
  int64_t workspace_bytes;
};

void AttendPlanDeleter::operator()(AttendPlan* plan) const { delete plan; }

namespace {

// A worker's piece of the workspace.
struct Worker {
  float* rows;   // [kAttendMaxRows][head_dim]: q, then results
  float* state;  // of an unsplit unit
  int32_t *see_begin, *see_end, *positions;
  float* alibi_slopes;
  float* rotation;
  void* kernel;
};

int64_t divide_worker(const AttendPlan& plan, int head_dim, uint8_t* base, Worker* worker) {
  ScratchPieces pieces{base};
  Worker w;
  w.rows = pieces.take<float>(static_cast<int64_t>(kAttendMaxRows) * head_dim);
  w.state = pieces.take<float>(state_floats(kAttendMaxRows, head_dim));
  w.see_begin = pieces.take<int32_t>(kAttendMaxRows);
  w.see_end = pieces.take<int32_t>(kAttendMaxRows);
  w.positions = pieces.take<int32_t>(kAttendMaxRows);
  w.alibi_slopes = pieces.take<float>(kAttendMaxRows);
  w.rotation = pieces.take<float>(kRotateScratchFloats);
  w.kernel = pieces.take<uint8_t>(plan.kernel_scratch_bytes);
  if (worker != nullptr) *worker = w;
  return pieces.bytes;
}

// One call.
class Attention {
 public:
  Attention(const Plan& plan, const kvarn_attend_params& params) : plan_(plan), a_(*plan.attend), p_(params), d_(plan.config.head_dim) {
    auto* base = static_cast<uint8_t*>(params.workspace);
    jobs_ = reinterpret_cast<Job*>(base + a_.jobs_offset);
    heads_ = reinterpret_cast<HeadProgress*>(base + a_.heads_offset);
    regions_.free = reinterpret_cast<int32_t*>(base + a_.free_offset);
    partials_ = reinterpret_cast<float*>(base + a_.partials_offset);
    workers_ = base + a_.workers_offset;
  }

  void make_schedule();
  void run();

 private:
  void add_jobs(int32_t sequence);
  int64_t cost(const Job& job) const { return (job.end_tile - job.first_tile) * (kTileCost + kRowCost * job.rows); }
  int32_t splits(const Job& job, int64_t unit_cost) const;

  void see(const Job& job, int row, int32_t* begin, int32_t* end, int32_t* position) const;
  const Job& job_of(int64_t unit) const;
  void run_unit(int64_t unit, const Worker& worker);
  void load_queries(const Job& job, int kv_head, const Worker& worker) const;
  void fill_rows(const Job& job, int kv_head, const Worker& worker) const;
  float* partial(int32_t region, const Job& job, int split) const {
    return partials_ + region * region_floats_ + split * state_floats(job.rows, d_);
  }
  int32_t take_region(HeadProgress& head);
  void give_back_region(int32_t region);
  void finish(const Job& job, int kv_head, const float* states, const Worker& worker) const;
  void store_results(const Job& job, int kv_head, const Worker& worker) const;

  // Calls f(first, rows, query token, query head) for runs of a job's rows that are heads of one query token.
  template <class Function>
  void for_each_token(const Job& job, int kv_head, const Function& f) const {
    for (int done = 0; done < job.rows;) {
      const int row = job.first_row + done;
      const int head = row % a_.group;
      const int count = std::min(job.rows - done, a_.group - head);
      f(done, count, p_.cu_q_lens[job.sequence] + row / a_.group, kv_head * a_.group + head);
      done += count;
    }
  }

  const Plan& plan_;
  const AttendPlan& a_;
  const kvarn_attend_params& p_;
  const int d_;
  Job* jobs_;
  HeadProgress* heads_;
  RegionList regions_;
  float* partials_;
  uint8_t* workers_;
  int64_t num_jobs_ = 0, num_units_ = 0, num_heads_ = 0;
  int64_t region_floats_ = 0;
};

// What row `row` of a job sees: positions [begin, end).
void Attention::see(const Job& job, int row, int32_t* begin, int32_t* end, int32_t* position) const {
  const int32_t seq_len = p_.seq_lens[job.sequence];
  const int32_t q_len = p_.cu_q_lens[job.sequence + 1] - p_.cu_q_lens[job.sequence];
  *position = seq_len - q_len + (job.first_row + row) / a_.group;
  const bool bounded = p_.causal != 0 || p_.window > 0;
  *end = std::clamp(bounded ? *position + 1 : seq_len, 0, seq_len);
  *begin = p_.window > 0 ? std::max(*position - p_.window + 1, 0) : 0;
  if (*begin > *end) *begin = *end;
}

// ---- schedule ----

void Attention::add_jobs(int32_t sequence) {
  const int64_t rows = static_cast<int64_t>(p_.cu_q_lens[sequence + 1] - p_.cu_q_lens[sequence]) * a_.group;
  const int tokens = plan_.layout.format.tile_tokens;
  for (int64_t first = 0; first < rows; first += kAttendMaxRows) {
    Job job{};
    job.sequence = sequence;
    job.first_row = static_cast<int32_t>(first);
    job.rows = static_cast<int32_t>(std::min<int64_t>(kAttendMaxRows, rows - first));
    // Later rows see later positions, so the first and the last row bound what the job sees.
    int32_t begin, end, unused, position;
    see(job, 0, &begin, &unused, &position);
    see(job, job.rows - 1, &unused, &end, &position);
    job.first_tile = begin / tokens;
    job.end_tile = std::max(divide_up(end, tokens), job.first_tile);
    job.splits = 1;
    jobs_[num_jobs_++] = job;
  }
}

int32_t Attention::splits(const Job& job, int64_t unit_cost) const {
  const int64_t tiles = job.end_tile - job.first_tile;
  int64_t limit = std::min(tiles, kMaxSplits);
  int64_t wanted;
  if (a_.batch_invariant) {
    // Nothing but the sequence may enter here.
    wanted = divide_up(tiles, kInvariantUnitTiles);
    limit = std::min(limit, kPartialRowsPerWorker / job.rows);
  } else {
    wanted = divide_up(cost(job), unit_cost);
    limit = std::min(limit, region_floats_ / state_floats(job.rows, d_));
  }
  return static_cast<int32_t>(std::max<int64_t>(1, std::min(wanted, limit)));
}

void Attention::make_schedule() {
  for (int32_t s = 0; s < p_.num_seqs; ++s) add_jobs(s);
  const int64_t kv_heads = plan_.config.num_kv_heads;
  int64_t total = 0, most_rows = 1;
  for (int64_t i = 0; i < num_jobs_; ++i) {
    total += cost(jobs_[i]) * kv_heads;
    most_rows = std::max<int64_t>(most_rows, jobs_[i].rows);
  }
  const int64_t workers = plan_.num_threads;
  const int64_t small_unit = kSmallUnitTiles * (kTileCost + kRowCost * most_rows);
  const int64_t unit_cost =
      std::max<int64_t>({1, divide_up(total, workers * kUnitsPerWorker), std::min(divide_up(total, workers), small_unit)});

  const int64_t regions = a_.batch_invariant ? workers : std::min(workers, num_jobs_ * kv_heads);
  region_floats_ = regions == 0 ? 0 : workers * state_floats(kPartialRowsPerWorker, d_) / regions;
  for (int64_t i = 0; i < num_jobs_; ++i) {
    Job& job = jobs_[i];
    job.splits = workers == 1 && !a_.batch_invariant ? 1 : splits(job, unit_cost);
    job.first_unit = num_units_;
    num_units_ += job.splits * kv_heads;
    job.first_head = num_heads_;
    if (job.splits > 1) num_heads_ += kv_heads;
  }
  for (int64_t i = 0; i < num_heads_; ++i) {
    HeadProgress* head = new (heads_ + i) HeadProgress;
    head->arrived.store(0, std::memory_order_relaxed);
    head->region.store(kNoRegion, std::memory_order_relaxed);
  }
  regions_.free_count = static_cast<int32_t>(regions);
  for (int32_t i = 0; i < regions_.free_count; ++i) regions_.free[i] = i;
}

// ---- a unit ----

const Job& Attention::job_of(int64_t unit) const {
  const Job* next = std::upper_bound(jobs_, jobs_ + num_jobs_, unit, [](int64_t u, const Job& job) { return u < job.first_unit; });
  return *(next - 1);
}

void Attention::load_queries(const Job& job, int kv_head, const Worker& worker) const {
  const int dtype = plan_.config.dtype;
  const auto* q = static_cast<const uint8_t*>(p_.q);
  const int64_t value_bytes = dtype == KVARN_F32 ? 4 : 2;
  for_each_token(job, kv_head, [&](int first, int rows, int64_t token, int head) {
    const void* in = q + (token * p_.q_token_stride + head * p_.q_head_stride) * value_bytes;
    float* out = worker.rows + static_cast<int64_t>(first) * d_;
    if (p_.q_rotated != 0) {
      plan_.kernels->attend->load_rows(in, dtype, p_.q_head_stride, rows, d_, out);
    } else {
      plan_.kernels->rotate_rows({in, out, rows, p_.q_head_stride, d_, dtype, KVARN_F32, d_, false, worker.rotation});
    }
  });
}

void Attention::fill_rows(const Job& job, int kv_head, const Worker& worker) const {
  for (int r = 0; r < job.rows; ++r) see(job, r, &worker.see_begin[r], &worker.see_end[r], &worker.positions[r]);
  if (p_.alibi_slopes == nullptr) return;
  for_each_token(job, kv_head, [&](int first, int rows, int64_t, int head) {
    for (int r = 0; r < rows; ++r) worker.alibi_slopes[first + r] = p_.alibi_slopes[head + r] * kLog2E;
  });
}

int32_t Attention::take_region(HeadProgress& head) {
  int32_t region = head.region.load(std::memory_order_acquire);
  if (region != kNoRegion) return region;
  const RegionList::Guard guard(regions_);
  region = head.region.load(std::memory_order_relaxed);
  if (region == kNoRegion) {
    region = regions_.free[--regions_.free_count];
    head.region.store(region, std::memory_order_release);
  }
  return region;
}

void Attention::give_back_region(int32_t region) {
  const RegionList::Guard guard(regions_);
  regions_.free[regions_.free_count++] = region;
}

void Attention::run_unit(int64_t unit, const Worker& worker) {
  const Job& job = job_of(unit);
  const int kv_head = static_cast<int>((unit - job.first_unit) / job.splits);
  const int split = static_cast<int>((unit - job.first_unit) % job.splits);
  HeadProgress* head = job.splits > 1 ? heads_ + job.first_head + kv_head : nullptr;
  const int32_t region = head != nullptr ? take_region(*head) : 0;
  float* state = head != nullptr ? partial(region, job, split) : worker.state;

  load_queries(job, kv_head, worker);
  fill_rows(job, kv_head, worker);

  const RecordLayout& layout = plan_.layout;
  const int64_t tiles = job.end_tile - job.first_tile;
  const int64_t tile_bytes = static_cast<int64_t>(layout.format.tile_tokens) * d_ * (plan_.config.dtype == KVARN_F32 ? 4 : 2);
  const int64_t kv_heads = plan_.config.num_kv_heads;
  AttendUnit u;
  u.layout = &layout;
  u.dtype = plan_.config.dtype;
  u.rows = job.rows;
  u.q = worker.rows;
  u.see_begin = worker.see_begin;
  u.see_end = worker.see_end;
  u.alibi_slopes = p_.alibi_slopes != nullptr ? worker.alibi_slopes : nullptr;
  u.positions = worker.positions;
  u.soft_cap = p_.logits_soft_cap;
  u.table = p_.block_table + job.sequence * p_.block_table_stride;
  u.first_tile = static_cast<int>(job.first_tile + tiles * split / job.splits);
  u.end_tile = static_cast<int>(job.first_tile + tiles * (split + 1) / job.splits);
  // Either may be null when the table names none of its kind.
  u.records = p_.records != nullptr ? p_.records + static_cast<int64_t>(kv_head) * layout.record_bytes : nullptr;
  u.block_bytes = kv_heads * layout.record_bytes;
  const uint8_t* staging = static_cast<const uint8_t*>(p_.staging);
  u.staging_k = staging != nullptr ? staging + kv_head * tile_bytes : nullptr;
  u.staging_v = staging != nullptr ? u.staging_k + kv_heads * tile_bytes : nullptr;
  u.slot_bytes = 2 * kv_heads * tile_bytes;
  u.state = state_at(state, job.rows, d_);
  u.scratch = worker.kernel;
  plan_.kernels->attend->begin(worker.rows, job.rows, d_, p_.softmax_scale * (p_.logits_soft_cap > 0 ? 1.0f : kLog2E), u.state);
  plan_.kernels->attend->run(u);

  if (head == nullptr) return finish(job, kv_head, state, worker);
  // The last to arrive has seen everybody's partial results.
  if (head->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < job.splits) return;
  finish(job, kv_head, partial(region, job, 0), worker);
  give_back_region(region);
}

// ---- combination and results ----

void Attention::finish(const Job& job, int kv_head, const float* states, const Worker& worker) const {
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  const int64_t stride = state_floats(job.rows, d_);
  const auto state_of = [&](int split) { return state_at(const_cast<float*>(states) + split * stride, job.rows, d_); };
  for_each_token(job, kv_head, [&](int first, int rows, int64_t token, int q_head) {
    for (int r = first; r < first + rows; ++r) {
      const int head = q_head + r - first;
      float* out = worker.rows + static_cast<int64_t>(r) * d_;
      const float sink = p_.sinks != nullptr ? p_.sinks[head] * kLog2E : -infinity;
      float peak = sink;
      int32_t flags = std::isnan(sink) ? kRowIsNan : 0;
      for (int s = 0; s < job.splits; ++s) {
        const AttendState state = state_of(s);
        peak = std::max(peak, state.peak[r]);
        flags |= state.flags[r];
      }
      std::fill(out, out + d_, 0.0f);
      // A row that sees nothing has no use for its q.
      if (worker.see_begin[r] == worker.see_end[r]) flags &= std::isnan(sink) ? kRowIsNan : 0;
      float sum = peak > -infinity && sink > -infinity ? std::exp2(sink - peak) : 0.0f;
      if (peak > -infinity && flags == 0) {
        for (int s = 0; s < job.splits; ++s) {
          const AttendState state = state_of(s);
          if (!(state.peak[r] > -infinity)) continue;
          const float weight = std::exp2(state.peak[r] - peak);
          sum += weight * state.sum[r];
          const float* acc = state.acc + static_cast<int64_t>(r) * d_;
          for (int i = 0; i < d_; ++i) out[i] += weight * acc[i];
        }
        const float inverse = 1.0f / sum;
        for (int i = 0; i < d_; ++i) out[i] *= inverse;
      } else if (flags != 0) {
        std::fill(out, out + d_, nan);
        for (int s = 0; s < job.splits; ++s) {
          const AttendState state = state_of(s);
          if (state.peak[r] > -infinity) sum += std::exp2(state.peak[r] - peak) * state.sum[r];
        }
      }
      if (p_.lse != nullptr) {
        const float lse = peak > -infinity ? (peak + std::log2(sum)) * kLn2 : -infinity;
        p_.lse[token * a_.num_q_heads + head] = (flags & kRowIsNan) != 0 ? nan : lse;
      }
    }
  });
  store_results(job, kv_head, worker);
}

void Attention::store_results(const Job& job, int kv_head, const Worker& worker) const {
  const int dtype = plan_.config.dtype;
  auto* out = static_cast<uint8_t*>(p_.out);
  const int64_t value_bytes = dtype == KVARN_F32 ? 4 : 2;
  for_each_token(job, kv_head, [&](int first, int rows, int64_t token, int head) {
    void* to = out + (token * p_.out_token_stride + head * p_.out_head_stride) * value_bytes;
    const float* in = worker.rows + static_cast<int64_t>(first) * d_;
    if (p_.out_rotated != 0) {
      plan_.kernels->attend->store_rows(in, dtype, p_.out_head_stride, rows, d_, to);
    } else {
      plan_.kernels->rotate_rows({in, to, rows, d_, p_.out_head_stride, KVARN_F32, dtype, d_, true, worker.rotation});
    }
  });
}

void Attention::run() {
  run_tasks(plan_, num_units_, [&](int64_t unit, int64_t worker_index) {
    Worker worker;
    divide_worker(a_, d_, workers_ + worker_index * a_.worker_bytes, &worker);
    run_unit(unit, worker);
  });
}

}  // namespace

kvarn_status create_attend_plan(const kvarn_plan_params& params, Plan& plan, int64_t* workspace_bytes) {
  std::unique_ptr<AttendPlan, AttendPlanDeleter> attend(new (std::nothrow) AttendPlan{});
  if (attend == nullptr) return fail(KVARN_OUT_OF_MEMORY, "[kvarn.plan_create] attend: expected memory for the plan, got none");
  AttendPlan& a = *attend;
  const int d = plan.config.head_dim;
  const int64_t kv_heads = plan.config.num_kv_heads, workers = plan.num_threads;
  a.num_q_heads = params.num_q_heads;
  a.group = params.num_q_heads / plan.config.num_kv_heads;
  a.batch_invariant = params.batch_invariant != 0;
  // Every sequence ends in a job that may be short.
  a.max_jobs = params.max_num_seqs + params.max_q_tokens * a.group / kAttendMaxRows;
  a.kernel_scratch_bytes = attend_scratch_bytes(plan.layout);
  a.worker_bytes = divide_worker(a, d, nullptr, nullptr);

  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t offset = at;
    at += aligned(bytes);
    return offset;
  };
  a.jobs_offset = take(a.max_jobs * static_cast<int64_t>(sizeof(Job)));
  a.heads_offset = take(a.max_jobs * kv_heads * static_cast<int64_t>(sizeof(HeadProgress)));
  a.free_offset = take(workers * static_cast<int64_t>(sizeof(int32_t)));
  a.partials_offset = take(workers * state_floats(kPartialRowsPerWorker, d) * static_cast<int64_t>(sizeof(float)));
  a.workers_offset = take(workers * a.worker_bytes);
  a.workspace_bytes = (at + 255) / 256 * 256;
  *workspace_bytes = a.workspace_bytes;
  plan.attend = std::move(attend);
  return KVARN_OK;
}

kvarn_status attend(Plan& plan, const kvarn_attend_params& params) {
  Attention attention(plan, params);
  attention.make_schedule();
  attention.run();
  return KVARN_OK;
}

}  // namespace kvarn::cpu
