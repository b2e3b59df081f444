// The library's own threads, and other people's.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <set>
#include <thread>
#include <vector>

#include "cpu/thread_pool.h"
#include "cpu_machine.h"

namespace kvarn {
namespace {

using cpu::cgroup_cpu_limit;
using cpu::pool_parallel_for;

class Pool : public ::testing::Test {
 protected:
  explicit Pool(int num_threads = 4) { EXPECT_TRUE(cpu::acquire_pool(num_threads)); }
  ~Pool() override { cpu::release_pool(); }

  template <class Function>
  static void run(int64_t count, const Function& f, int most = 0) {
    pool_parallel_for(
        reinterpret_cast<void*>(static_cast<intptr_t>(most)), count,
        [](void* context, int64_t i) { (*static_cast<const Function*>(context))(i); }, const_cast<Function*>(&f));
  }
};

TEST_F(Pool, EveryIndexRunsOnce) {
  for (const int64_t count : {0, 1, 2, 3, 4, 5, 17, 1000}) {
    for (int repeat = 0; repeat < 50; ++repeat) {
      std::vector<std::atomic<int>> runs(static_cast<size_t>(count));
      run(count, [&](int64_t i) { runs[static_cast<size_t>(i)].fetch_add(1); });
      for (const auto& r : runs) ASSERT_EQ(r.load(), 1);
    }
  }
}

TEST_F(Pool, WhatRegionsWriteIsThereWhenTheyReturn) {
  std::vector<int64_t> values(64);
  for (int64_t repeat = 1; repeat <= 2000; ++repeat) {
    run(64, [&](int64_t i) { values[static_cast<size_t>(i)] = repeat * i; });
    for (int64_t i = 0; i < 64; ++i) ASSERT_EQ(values[static_cast<size_t>(i)], repeat * i);
  }
}

TEST_F(Pool, NoMoreThreadsThanAskedFor) {
  for (const int most : {1, 2, 3}) {
    std::atomic<int> inside{0}, peak{0};
    run(
        64,
        [&](int64_t) {
          const int now = inside.fetch_add(1) + 1;
          for (int p = peak.load(); p < now && !peak.compare_exchange_weak(p, now);) {
          }
          std::this_thread::sleep_for(std::chrono::microseconds(200));
          inside.fetch_sub(1);
        },
        most);
    EXPECT_LE(peak.load(), most);
    EXPECT_GE(peak.load(), 1);
  }
}

TEST_F(Pool, SeveralThreadsTakePart) {
  // Every body waits until a second one runs: alone, the region would never end.
  std::atomic<int> inside{0};
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  run(2, [&](int64_t) {
    inside.fetch_add(1);
    while (inside.load() < 2 && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
  });
  EXPECT_EQ(inside.load(), 2);
}

TEST_F(Pool, NestedRegionsRunOnTheirCaller) {
  std::atomic<int> elsewhere{0}, total{0};
  run(8, [&](int64_t) {
    const auto self = std::this_thread::get_id();
    run(8, [&](int64_t) {
      total.fetch_add(1);
      if (std::this_thread::get_id() != self) elsewhere.fetch_add(1);
    });
  });
  EXPECT_EQ(total.load(), 64);
  EXPECT_EQ(elsewhere.load(), 0);
}

TEST_F(Pool, RegionsOfSeveralCallersDoNotMix) {
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&, c] {
      for (int repeat = 0; repeat < 500; ++repeat) {
        std::vector<std::atomic<int>> runs(32);
        run(32, [&](int64_t i) { runs[static_cast<size_t>(i)].fetch_add(c + 1); });
        for (const auto& r : runs) wrong.fetch_add(r.load() != c + 1);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong.load(), 0);
}

TEST_F(Pool, IdleThreadsSleep) {
  run(64, [](int64_t) {});
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  timespec before{}, after{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
  const double used = static_cast<double>(after.tv_sec - before.tv_sec) + 1e-9 * static_cast<double>(after.tv_nsec - before.tv_nsec);
  // One spinning thread alone would use up to 0.2 s.
  EXPECT_LT(used, 0.05);
}

TEST_F(Pool, TheChildOfAForkKeepsWorking) {
  run(8, [](int64_t) {});
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    std::atomic<int> total{0};
    for (int repeat = 0; repeat < 10; ++repeat) run(8, [&](int64_t) { total.fetch_add(1); });
    // New threads can be had.
    const bool grown = cpu::acquire_pool(3);
    for (int repeat = 0; repeat < 10; ++repeat) run(8, [&](int64_t) { total.fetch_add(1); });
    cpu::release_pool();
    _exit(grown && total.load() == 160 ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

int threads_of_this_process() {
  int threads = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/task")) ++threads;
  return threads;
}

TEST(PoolLife, ThreadsEndWithTheLastPlan) {
  if (!std::filesystem::exists("/proc/self/task")) GTEST_SKIP() << "no /proc";
  const int before = threads_of_this_process();
  {
    const auto a = test::make_plan({4, 2, 128, 16}, 128, 1, KVARN_F16, "generic", 3);
    EXPECT_EQ(threads_of_this_process(), before + 2);
    {
      const auto b = test::make_plan({4, 2, 128, 16}, 128, 1, KVARN_F16, "generic", 5);
      EXPECT_EQ(threads_of_this_process(), before + 4);
    }
    const auto c = test::make_plan({4, 2, 128, 16}, 128, 1, KVARN_F16, "generic", 2);
    EXPECT_EQ(threads_of_this_process(), before + 4);
  }
  EXPECT_EQ(threads_of_this_process(), before);
}

// A parallel-for of the caller's.
struct Calls {
  int regions = 0;
  int64_t most = 0;
  bool backwards = false;
};
void counting_parallel_for(void* user, int64_t count, kvarn_parallel_body body, void* context) {
  Calls& calls = *static_cast<Calls*>(user);
  ++calls.regions;
  calls.most = count > calls.most ? count : calls.most;
  for (int64_t i = 0; i < count; ++i) body(context, calls.backwards ? count - 1 - i : i);
}

TEST(InjectedParallelFor, IsUsedAndNeedNotBeParallel) {
  constexpr int kHeadDim = 128;
  constexpr int64_t kRows = 4096;
  const std::vector<float> x = test::random_values(kRows * kHeadDim, 1);
  std::vector<float> expected = x;
  for (int64_t r = 0; r < kRows; ++r) ref::hadamard(expected.data() + r * kHeadDim, kHeadDim, false);
  const int before = std::filesystem::exists("/proc/self/task") ? threads_of_this_process() : 0;
  for (const bool backwards : {false, true}) {
    Calls calls;
    calls.backwards = backwards;
    kvarn_plan_params params = test::plan_params({4, 2, 128, 16}, kHeadDim, 1, KVARN_F32, "generic", 5);
    params.parallel_for = counting_parallel_for;
    params.parallel_user = &calls;
    const auto plan = test::make_plan(params);
    std::vector<float> out(x.size());
    kvarn_hadamard_params p{};
    KVARN_INIT(p);
    p.x = x.data();
    p.out = out.data();
    p.rows = kRows;
    p.dtype = KVARN_F32;
    ASSERT_SUCCEEDS(kvarn_hadamard(plan.get(), &p, nullptr));
    EXPECT_EQ(out, expected);
    EXPECT_EQ(calls.regions, 1);
    EXPECT_EQ(calls.most, 5);
    if (before != 0) {
      EXPECT_EQ(threads_of_this_process(), before) << "the library's own threads were started";
    }
  }
}

// ---- limits ----

class Cgroup : public ::testing::Test {
 protected:
  Cgroup() {
    std::string name = (std::filesystem::temp_directory_path() / "kvarn_cgroup_XXXXXX").string();
    root_ = mkdtemp(name.data());
  }
  ~Cgroup() override { std::filesystem::remove_all(root_); }
  void write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text;
  }
  int limit(const char* groups) { return cgroup_cpu_limit(groups, root_.c_str()); }

  std::filesystem::path root_;
};

TEST_F(Cgroup, NoneWithoutFiles) {
  EXPECT_EQ(limit(""), 0);
  EXPECT_EQ(limit("0::/a/b\n"), 0);
  EXPECT_EQ(limit("garbage\n:\n::\n"), 0);
}

TEST_F(Cgroup, Version2) {
  write("a/b/cpu.max", "250000 100000\n");
  EXPECT_EQ(limit("0::/a/b\n"), 3) << "rounded up";
  write("a/b/cpu.max", "max 100000\n");
  EXPECT_EQ(limit("0::/a/b\n"), 0);
  write("a/cpu.max", "100000 100000\n");
  EXPECT_EQ(limit("0::/a/b\n"), 1) << "the group above counts";
  EXPECT_EQ(limit("0::/\n"), 0);
}

TEST_F(Cgroup, Version2InsideAContainer) {
  write("cpu.max", "400000 100000\n");
  EXPECT_EQ(limit("0::/some/path/of/the/host\n"), 4);
  EXPECT_EQ(limit("0::/\n"), 4);
}

TEST_F(Cgroup, Version1) {
  write("cpu,cpuacct/docker/x/cpu.cfs_quota_us", "150000\n");
  write("cpu,cpuacct/docker/x/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(limit("5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n"), 2);
  write("cpu,cpuacct/docker/x/cpu.cfs_quota_us", "-1\n");
  EXPECT_EQ(limit("4:cpu,cpuacct:/docker/x\n"), 0);
  EXPECT_EQ(limit("4:cpuset:/docker/x\n"), 0) << "another controller";
}

TEST(AvailableThreads, IsPositiveAndRespectsAffinity) {
  EXPECT_GE(cpu::available_threads(), 1);
#if defined(__linux__)
  cpu_set_t before, one;
  ASSERT_EQ(sched_getaffinity(0, sizeof(before), &before), 0);
  CPU_ZERO(&one);
  for (int i = 0; i < CPU_SETSIZE; ++i) {
    if (!CPU_ISSET(i, &before)) continue;
    CPU_SET(i, &one);
    break;
  }
  ASSERT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
  EXPECT_EQ(cpu::available_threads(), 1);
  ASSERT_EQ(sched_setaffinity(0, sizeof(before), &before), 0);
#endif
}

}  // namespace
}  // namespace kvarn
