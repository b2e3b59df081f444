// Timing, memory and the machine's limits, for the benchmarks of this folder.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "kvarn/kvarn.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvarn::bench {

inline void require(kvarn_status status) {
  if (status == KVARN_OK) return;
  std::fprintf(stderr, "%s: %s\n", kvarn_status_name(status), kvarn_last_error());
  std::exit(1);
}

inline std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  std::stringstream in(list);
  for (std::string part; std::getline(in, part, ',');) parts.push_back(part);
  return parts;
}

// --name value pairs; an unknown name is an error.
class Arguments {
 public:
  Arguments(int argc, char** argv) {
    for (int i = 1; i + 1 < argc; i += 2) values_.push_back({argv[i], argv[i + 1]});
    if (argc % 2 == 0) fail(argv[argc - 1]);
  }
  std::string get(const std::string& name, const std::string& otherwise, const char* help) {
    help_ += "  --" + name + " (" + otherwise + "): " + help + "\n";
    std::string value = otherwise;
    for (auto& [key, given] : values_) {
      if (key == "--" + name) value = given, key.clear();
    }
    return value;
  }
  double number(const std::string& name, const std::string& otherwise, const char* help) {
    return std::atof(get(name, otherwise, help).c_str());
  }
  std::vector<int> numbers(const std::string& name, const std::string& otherwise, const char* help) {
    std::vector<int> out;
    for (const std::string& part : split(get(name, otherwise, help))) out.push_back(std::atoi(part.c_str()));
    return out;
  }
  // After the last get.
  void done() {
    for (const auto& [key, value] : values_) {
      if (!key.empty()) fail(key);
    }
  }

 private:
  [[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "unexpected argument %s; options (default):\n%s", what.c_str(), help_.c_str());
    std::exit(2);
  }
  std::vector<std::pair<std::string, std::string>> values_;
  std::string help_;
};

inline double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Spread {
  double median = 0, low = 0, high = 0;  // 10th and 90th percentile
  int count = 0;
};
inline Spread spread_of(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  const size_t n = times.size();
  return {times[n / 2], times[n / 10], times[n - 1 - n / 10], static_cast<int>(n)};
}

// Calls f up to `calls` times, or until `seconds` have passed and it ran three times.
inline Spread time_calls(int calls, double seconds, const std::function<void()>& f) {
  f();
  std::vector<double> times;
  const double start = now();
  while (static_cast<int>(times.size()) < calls && (times.size() < 3 || now() - start < seconds)) {
    const double before = now();
    f();
    times.push_back(now() - before);
  }
  return spread_of(std::move(times));
}

// Threads that all start a piece of work at once; run returns the seconds until the last one is done.
class Team {
 public:
  explicit Team(int threads) : threads_(threads), gate_(threads + 1) {
    for (int i = 0; i < threads; ++i) {
      members_.emplace_back([this, i] {
        for (;;) {
          gate_.arrive_and_wait();
          if (!work_) return;
          work_(i);
          gate_.arrive_and_wait();
        }
      });
    }
  }
  ~Team() {
    work_ = nullptr;
    gate_.arrive_and_wait();
    for (std::thread& t : members_) t.join();
  }
  double run(const std::function<void(int)>& work) {
    work_ = work;
    const double start = now();
    gate_.arrive_and_wait();
    gate_.arrive_and_wait();
    return now() - start;
  }
  int threads() const { return threads_; }

 private:
  int threads_;
  std::barrier<> gate_;
  std::function<void(int)> work_;
  std::vector<std::thread> members_;
};

// Memory with transparent huge pages where the system has them.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_((bytes + (2u << 20) - 1) >> 21 << 21) {
    data_ = static_cast<uint8_t*>(std::aligned_alloc(2u << 20, bytes_));
    if (data_ == nullptr) std::abort();
    madvise(data_, bytes_, MADV_HUGEPAGE);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  uint8_t* data() { return data_; }
  size_t size() const { return bytes_; }

 private:
  size_t bytes_;
  uint8_t* data_;
};

inline volatile uint64_t g_sink;

#if defined(__x86_64__)
__attribute__((target("avx2"))) inline void read_avx2(const uint8_t* p, size_t bytes) {
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
  for (size_t i = 0; i + 128 <= bytes; i += 128) {
    const auto* q = reinterpret_cast<const __m256i*>(p + i);
    a = _mm256_xor_si256(a, _mm256_loadu_si256(q));
    b = _mm256_xor_si256(b, _mm256_loadu_si256(q + 1));
    c = _mm256_xor_si256(c, _mm256_loadu_si256(q + 2));
    d = _mm256_xor_si256(d, _mm256_loadu_si256(q + 3));
  }
  g_sink = static_cast<uint64_t>(_mm256_extract_epi64(_mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d)), 0));
}
__attribute__((target("avx512f"))) inline void read_avx512(const uint8_t* p, size_t bytes) {
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
  for (size_t i = 0; i + 256 <= bytes; i += 256) {
    a = _mm512_xor_si512(a, _mm512_loadu_si512(p + i));
    b = _mm512_xor_si512(b, _mm512_loadu_si512(p + i + 64));
    c = _mm512_xor_si512(c, _mm512_loadu_si512(p + i + 128));
    d = _mm512_xor_si512(d, _mm512_loadu_si512(p + i + 192));
  }
  uint64_t lanes[8];
  _mm512_storeu_si512(lanes, _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d)));
  g_sink = lanes[0];
}

// Register-only loops of the dot-product step, 12 independent sums; return the number of steps. Written out, so that no compiler finds that
// all sums are the same.
#define KVARN_DOT_LOOP(name, isa, vector, zero, step)                                                               \
  __attribute__((target(isa))) inline int64_t name(int64_t rounds) {                                                \
    vector s0 = zero, s1 = zero, s2 = zero, s3 = zero, s4 = zero;                                                   \
    vector s5 = zero, s6 = zero, s7 = zero, s8 = zero, s9 = zero;                                                   \
    vector s10 = zero, s11 = zero, x = zero, y = zero, product = zero;                                              \
    (void)product;                                                                                                  \
    for (int64_t i = 0; i < rounds; ++i) {                                                                          \
      step(s0) step(s1) step(s2) step(s3) step(s4) step(s5) step(s6) step(s7) step(s8) step(s9) step(s10) step(s11) \
    }                                                                                                               \
    return rounds * 12;                                                                                             \
  }
#define KVARN_MADD(s) asm volatile("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(s), "=&v"(product) : "v"(x), "v"(y));
#define KVARN_DPBUSD(s) asm volatile("vpdpbusd %2, %1, %0" : "+v"(s) : "v"(x), "v"(y));
KVARN_DOT_LOOP(dot_steps_avx2, "avx2", __m256i, _mm256_setzero_si256(), KVARN_MADD)
KVARN_DOT_LOOP(dot_steps_avx512, "avx512f,avx512bw", __m512i, _mm512_setzero_si512(), KVARN_MADD)
KVARN_DOT_LOOP(dot_steps_vnni, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512(), KVARN_DPBUSD)
#undef KVARN_MADD
#undef KVARN_DPBUSD
#undef KVARN_DOT_LOOP
#endif

inline void read_portable(const uint8_t* p, size_t bytes) {
  uint64_t a = 0, b = 0;
  for (size_t i = 0; i + 16 <= bytes; i += 16) {
    uint64_t x[2];
    std::memcpy(x, p + i, 16);
    a ^= x[0];
    b ^= x[1];
  }
  g_sink = a ^ b;
}

inline void read_all(const uint8_t* p, size_t bytes) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return read_avx512(p, bytes);
  if (__builtin_cpu_supports("avx2")) return read_avx2(p, bytes);
#endif
  read_portable(p, bytes);
}

// Bytes per second of a plain read of [data, data + bytes) by the team.
inline double plain_read_rate(Team& team, const uint8_t* data, size_t bytes) {
  const auto threads = static_cast<size_t>(team.threads());
  const double seconds = team.run([&](int i) {
    const size_t begin = bytes * static_cast<size_t>(i) / threads / 256 * 256,
                 end = bytes * static_cast<size_t>(i + 1) / threads / 256 * 256;
    read_all(data + begin, end - begin);
  });
  return static_cast<double>(bytes) / seconds;
}

// How an instruction set multiplies: query and code values in one dot-product step, and how many steps one code value takes part in.
struct DotStep {
  int codes;
  int query_planes;
};
inline DotStep dot_step(const std::string& isa) {
  if (isa == "avx512_vnni") return {64, 2};
  if (isa == "avx512") return {32, 1};
  if (isa == "avx2") return {16, 1};
  return {8, 1};
}

// Dot-product steps per second of the whole team, out of registers; 0 when unknown. The best of a few short runs.
inline double dot_rate(Team& team, const std::string& isa) {
#if defined(__x86_64__)
  int64_t (*steps)(int64_t) = isa == "avx512_vnni" ? dot_steps_vnni
                              : isa == "avx512"    ? dot_steps_avx512
                              : isa == "avx2"      ? dot_steps_avx2
                                                   : nullptr;
  if (steps == nullptr) return 0;
  constexpr int64_t kRounds = 400000;
  double best = 0;
  for (int i = 0; i < 10; ++i) {
    const double seconds = team.run([&](int) { g_sink = static_cast<uint64_t>(steps(kRounds)); });
    best = std::max(best, static_cast<double>(kRounds) * 12 * team.threads() / seconds);
  }
  return best;
#else
  (void)team, (void)isa;
  return 0;
#endif
}

inline std::string cpu_name() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

// A JSON array of flat objects, written on close.
class JsonRows {
 public:
  void begin() { rows_ += rows_.empty() ? "  {" : ",\n  {", first_ = true; }
  void add(const char* key, const std::string& value) { field(key, "\"" + value + "\""); }
  void add(const char* key, double value) {
    char text[32];
    std::snprintf(text, sizeof(text), "%.6g", value);
    field(key, text);
  }
  void end() { rows_ += "}"; }
  void write(const std::string& path) const {
    if (path.empty()) return;
    std::ofstream out(path);
    out << "[\n" << rows_ << "\n]\n";
  }

 private:
  void field(const char* key, const std::string& value) {
    rows_ += (first_ ? "\"" : ", \"") + std::string(key) + "\": " + value;
    first_ = false;
  }
  std::string rows_;
  bool first_ = true;
};

inline int default_threads() {
  kvarn_backend_info info{};
  KVARN_INIT(info);
  require(kvarn_backend_get(0, &info));
  return std::max(info.num_threads, 1);
}

// 1, 2, 4, ... and n.
inline std::string thread_counts(int n) {
  std::string list;
  for (int t = 1; t < n; t *= 2) list += std::to_string(t) + ",";
  return list + std::to_string(n);
}

}  // namespace kvarn::bench
