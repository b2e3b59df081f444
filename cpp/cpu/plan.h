// State of one CPU plan, shared by the operations.
#pragma once

#include <atomic>
#include <memory>

#include "core/backend.h"
#include "cpu/kernels.h"

namespace kvarn::cpu {

struct AttendPlan;  // attend.cpp: schedule and workspace layout
struct AttendPlanDeleter {
  void operator()(AttendPlan* plan) const;
};

struct Plan {
  kvarn_config config;
  RecordLayout layout;
  const Kernels* kernels;
  int num_threads;  // workers of a region at most
  kvarn_parallel_for parallel_for;
  void* parallel_user;
  bool owns_pool;  // parallel_for is the library's own pool
  char description[64];

  // One piece of scratch per worker, 64-byte aligned.
  std::unique_ptr<uint8_t[]> scratch_memory;
  uint8_t* scratch;
  int64_t scratch_stride_bytes;

  std::unique_ptr<AttendPlan, AttendPlanDeleter> attend;

  void* worker_scratch(int64_t worker) const { return scratch + worker * scratch_stride_bytes; }
};

// In attend.cpp. Called last at plan creation when params.num_q_heads > 0; fills plan.attend and the workspace size.
kvarn_status create_attend_plan(const kvarn_plan_params& params, Plan& plan, int64_t* workspace_bytes);
kvarn_status attend(Plan& plan, const kvarn_attend_params& params);

// printf-style: stores the message "[kvarn.<operation>] ..." for this thread and returns `status`.
kvarn_status fail(kvarn_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Puts the floating-point environment of the calling thread into its default state (nearest even, subnormals kept) until the end of the
// scope: results are defined to the bit, and callers may have switched to flush-to-zero.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment();
  ~DefaultFloatEnvironment();
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  unsigned saved_;
};

// Runs f(task, worker) for every task in [0, count), spread over the plan's threads as they become free. `worker` < num_threads is
// used by one thread at a time. f must not throw.
template <class Function>
void run_tasks(const Plan& plan, int64_t count, const Function& f) {
  struct Region {
    const Function* f;
    std::atomic<int64_t> next;
    int64_t count;
  } region{&f, {0}, count};
  const int64_t workers = count < plan.num_threads ? count : plan.num_threads;
  const auto body = [](void* context, int64_t worker) {
    Region& r = *static_cast<Region*>(context);
    const DefaultFloatEnvironment environment;
    for (int64_t task = r.next.fetch_add(1, std::memory_order_relaxed); task < r.count;
         task = r.next.fetch_add(1, std::memory_order_relaxed)) {
      (*r.f)(task, worker);
    }
  };
  if (workers <= 1) {
    if (count > 0) body(&region, 0);
    return;
  }
  plan.parallel_for(plan.parallel_user, workers, body, &region);
}

}  // namespace kvarn::cpu
