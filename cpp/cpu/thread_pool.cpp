#include "cpu/thread_pool.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

namespace kvarn::cpu {
namespace {

// How long a helper looks for the next region before it sleeps. Regions of one decoding step follow each other within some tens of
// microseconds, and waking a sleeper costs about as much.
constexpr std::chrono::microseconds kSpin{20};

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// Waits until ready(), spinning for kSpin; false when it is not ready by then.
template <class Ready>
bool spin_until(const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      pause_cpu();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

thread_local bool t_inside_region = false;

class Pool {
 public:
  bool acquire(int num_threads) {
    const std::lock_guard lock(threads_mutex_);
    if (!grow(num_threads - 1)) return false;
    ++users_;
    return true;
  }

  void release() {
    const std::lock_guard lock(threads_mutex_);
    if (--users_ > 0) return;
    stop_threads();
  }

  void run(int64_t most_threads, int64_t count, kvarn_parallel_body body, void* context) {
    const int helpers = num_threads_.load(std::memory_order_acquire);
    const bool alone = count == 1 || most_threads == 1 || helpers == 0 || t_inside_region;
    if (alone || busy_.exchange(true, std::memory_order_acquire)) {
      for (int64_t i = 0; i < count; ++i) body(context, i);
      return;
    }
    body_ = body;
    context_ = context;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    left_.store(0, std::memory_order_relaxed);
    int64_t wanted = count - 1;
    if (most_threads > 0 && most_threads - 1 < wanted) wanted = most_threads - 1;
    if (helpers < wanted) wanted = helpers;
    // The gate opens: whoever enters it may read the fields above.
    gate_.store(kOpen | static_cast<uint32_t>(wanted) << kRoomShift, std::memory_order_release);
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      for (int64_t i = 0; i < wanted; ++i) epoch_.notify_one();
    }

    t_inside_region = true;
    work();
    t_inside_region = false;

    // Nobody enters from here on. A helper that never woke up is not waited for.
    const uint32_t entered = gate_.exchange(0, std::memory_order_acq_rel) & kEnteredMask;
    const auto all_left = [&] { return left_.load(std::memory_order_acquire) == entered; };
    while (!spin_until(all_left)) {
      const uint32_t now = left_.load(std::memory_order_acquire);
      if (now != entered) left_.wait(now, std::memory_order_acquire);
    }
    busy_.store(false, std::memory_order_release);
  }

  // The child of a fork has only the thread that called it: forget the helpers, which are gone, and any region of another thread.
  void after_fork() {
    new (&threads_mutex_) std::mutex;
    new (&threads_) std::vector<pthread_t>;
    num_threads_.store(0);
    sleepers_.store(0);
    gate_.store(0);
    busy_.store(false);
    stop_.store(false);
  }

 private:
  // gate_: open, how many may still enter, how many have entered.
  static constexpr uint32_t kOpen = 1u << 31;
  static constexpr int kRoomShift = 12;
  static constexpr uint32_t kEnteredMask = (1u << kRoomShift) - 1;

  void work() {
    for (int64_t i = next_.fetch_add(1, std::memory_order_relaxed); i < count_; i = next_.fetch_add(1, std::memory_order_relaxed)) {
      body_(context_, i);
    }
  }

  bool enter() {
    uint32_t gate = gate_.load(std::memory_order_relaxed);
    while ((gate & kOpen) != 0 && ((gate & ~kOpen) >> kRoomShift) > 0) {
      if (gate_.compare_exchange_weak(gate, gate - (1u << kRoomShift) + 1, std::memory_order_acq_rel, std::memory_order_relaxed))
        return true;
    }
    return false;
  }

  void help() {
    t_inside_region = true;
    uint32_t seen = epoch_.load(std::memory_order_acquire);
    while (!stop_.load(std::memory_order_acquire)) {
      if (enter()) {
        work();
        left_.fetch_add(1, std::memory_order_acq_rel);
        left_.notify_one();
      }
      if (!spin_until([&] { return epoch_.load(std::memory_order_acquire) != seen; })) {
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        epoch_.wait(seen, std::memory_order_seq_cst);
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
      }
      seen = epoch_.load(std::memory_order_acquire);
    }
  }

  static void* thread_main(void* pool) {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "kvarn");
#endif
    static_cast<Pool*>(pool)->help();
    return nullptr;
  }

  bool grow(int helpers) {
    // Signals go to the program's own threads.
    sigset_t all, before;
    sigfillset(&all);
    bool complete = true;
    try {
      threads_.reserve(static_cast<size_t>(helpers > 0 ? helpers : 0));
    } catch (...) {
      return false;
    }
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const size_t had = threads_.size();
    while (threads_.size() < static_cast<size_t>(helpers > 0 ? helpers : 0)) {
      pthread_t thread;
      if (pthread_create(&thread, nullptr, thread_main, this) != 0) {
        complete = false;
        break;
      }
      threads_.push_back(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    num_threads_.store(static_cast<int>(threads_.size()), std::memory_order_release);
    if (!complete && users_ == 0 && had == 0) stop_threads();
    return complete;
  }

  void stop_threads() {
    num_threads_.store(0, std::memory_order_release);
    stop_.store(true, std::memory_order_release);
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    epoch_.notify_all();
    for (const pthread_t thread : threads_) pthread_join(thread, nullptr);
    threads_.clear();
    stop_.store(false, std::memory_order_release);
  }

  std::mutex threads_mutex_;  // guards threads_ and users_
  std::vector<pthread_t> threads_;
  int users_ = 0;
  std::atomic<int> num_threads_{0};

  std::atomic<bool> busy_{false};  // one region at a time
  std::atomic<bool> stop_{false};
  std::atomic<uint32_t> epoch_{0};  // counts regions; helpers sleep on it
  std::atomic<int> sleepers_{0};
  std::atomic<uint32_t> gate_{0};
  std::atomic<uint32_t> left_{0};  // helpers that are done with the region
  std::atomic<int64_t> next_{0};
  // Written by the caller before the gate opens.
  kvarn_parallel_body body_ = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
};

// Leaked on purpose: plans may outlive static destructors. Its threads end with the last plan.
Pool& pool() {
  static Pool* const instance = [] {
    Pool* const created = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool().after_fork(); });
    return created;
  }();
  return *instance;
}

}  // namespace

bool acquire_pool(int num_threads) { return pool().acquire(num_threads); }
void release_pool() { pool().release(); }

void pool_parallel_for(void* user, int64_t count, kvarn_parallel_body body, void* context) {
  pool().run(static_cast<int64_t>(reinterpret_cast<intptr_t>(user)), count, body, context);
}

}  // namespace kvarn::cpu
