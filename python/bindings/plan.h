// A plan and what the argument checks need to know of it.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "errors.h"
#include "kvarn/kvarn.h"

namespace kvarn::python {

namespace nb = nanobind;

struct PlanDeleter {
  void operator()(kvarn_plan* plan) const { kvarn_plan_destroy(plan); }
};

// Where a backend's arrays live, as DLPack names it.
enum class Memory { kHost, kCuda, kRocm };

struct Plan {
  explicit Plan(const kvarn_plan_params& params);

  std::unique_ptr<kvarn_plan, PlanDeleter> handle;
  kvarn_config config{};
  int32_t num_q_heads = 0;
  std::string backend;
  Memory memory = Memory::kHost;
  int32_t device = 0;
  int64_t record_bytes = 0;
  int64_t workspace_bytes = 0;
  std::mutex mutex;  // a C plan serves one thread at a time

  // Workspace of host plans for calls that bring none: made by the first of them, 256-byte aligned. Guarded by `mutex`.
  void* own_workspace();

  // Runs `operation` without the GIL and raises its failure.
  template <class Operation>
  void run(Operation&& operation) {
    kvarn_status status;
    {
      nb::gil_scoped_release unlocked;
      std::scoped_lock lock(mutex);
      status = operation();
    }
    check_status(status);
  }

 private:
  std::unique_ptr<char[]> workspace_;
};

}  // namespace kvarn::python
