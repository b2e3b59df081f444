// How many threads this process may keep busy.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#include "cpu/thread_pool.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace kvarn::cpu {
namespace {

// The start of a file, which for these is all of it; "" when it cannot be read.
std::string read_file(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "r");
  if (file == nullptr) return "";
  char text[4096];
  const size_t size = std::fread(text, 1, sizeof(text), file);
  std::fclose(file);
  return std::string(text, size);
}

int whole_cpus(long long quota, long long period) {
  if (quota <= 0 || period <= 0) return 0;
  const long long cpus = (quota + period - 1) / period;
  return cpus > 1 << 20 ? 1 << 20 : static_cast<int>(cpus);
}

int smaller_limit(int a, int b) { return a == 0 ? b : b == 0 || a < b ? a : b; }

// v2, cpu.max: "200000 100000" or "max 100000".
int limit_v2(const std::string& folder) {
  long long quota, period;
  if (std::sscanf(read_file(folder + "/cpu.max").c_str(), "%lld %lld", &quota, &period) != 2) return 0;
  return whole_cpus(quota, period);
}

// v1: two files; a quota of -1 is none.
int limit_v1(const std::string& folder) {
  long long quota, period;
  if (std::sscanf(read_file(folder + "/cpu.cfs_quota_us").c_str(), "%lld", &quota) != 1) return 0;
  if (std::sscanf(read_file(folder + "/cpu.cfs_period_us").c_str(), "%lld", &period) != 1) return 0;
  return whole_cpus(quota, period);
}

// The smallest limit of the group and all groups above it. Inside a container the path may not exist below the mount; its root then holds
// the container's own limit.
template <class Limit>
int limit_of_path(const std::string& mount, std::string path, const Limit& limit) {
  int least = 0;
  while (true) {
    least = smaller_limit(least, limit(mount + (path == "/" ? "" : path)));
    if (path.empty() || path == "/") return least;
    path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
  }
}

}  // namespace

int cgroup_cpu_limit(const char* proc_self_cgroup, const char* root) {
  int least = 0;
  // Lines "<hierarchy>:<controllers>:<path>"; v2 is "0::<path>".
  for (const char* line = proc_self_cgroup; *line != '\0';) {
    const char* const newline = std::strchr(line, '\n');
    const std::string text = newline != nullptr ? std::string(line, newline) : std::string(line);
    line = newline != nullptr ? newline + 1 : line + text.size();
    const size_t first = text.find(':');
    const size_t second = first == std::string::npos ? first : text.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = text.substr(first + 1, second - first - 1);
    const std::string path = text.substr(second + 1);
    if (controllers.empty()) {
      least = smaller_limit(least, limit_of_path(root, path, limit_v2));
      least = smaller_limit(least, limit_of_path(std::string(root) + "/unified", path, limit_v2));
    } else if (("," + controllers + ",").find(",cpu,") != std::string::npos) {
      least = smaller_limit(least, limit_of_path(std::string(root) + "/" + controllers, path, limit_v1));
      least = smaller_limit(least, limit_of_path(std::string(root) + "/cpu", path, limit_v1));
    }
  }
  return least;
}

int available_threads() {
  int threads = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  // More CPUs than a fixed cpu_set_t holds make the call fail; the set grows until it fits.
  for (int cpus = 1024; cpus <= 1 << 20; cpus *= 2) {
    cpu_set_t* const set = CPU_ALLOC(static_cast<size_t>(cpus));
    if (set == nullptr) break;
    const size_t bytes = CPU_ALLOC_SIZE(static_cast<size_t>(cpus));
    const bool known = sched_getaffinity(0, bytes, set) == 0;
    if (known) threads = CPU_COUNT_S(bytes, set);
    CPU_FREE(set);
    if (known) break;
  }
  const int limit = cgroup_cpu_limit(read_file("/proc/self/cgroup").c_str(), "/sys/fs/cgroup");
  if (limit > 0 && limit < threads) threads = limit;
#endif
  return threads > 0 ? threads : 1;
}

}  // namespace kvarn::cpu
