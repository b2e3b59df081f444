// Device memory and streams for the tests of the CUDA backend, and of the HIP backend on an NVIDIA GPU (tests/hip/nvidia). Tests skip
// themselves, saying why, where there is no GPU.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "attend_case.h"
#include "kvarn/kvarn.h"

#if !defined(KVARN_TEST_BACKEND)
#define KVARN_TEST_BACKEND "cuda"
#endif

namespace kvarn::test {

inline std::string why_no_gpu() {
  for (int i = 0; i < kvarn_backend_count(); ++i) {
    kvarn_backend_info info{};
    KVARN_INIT(info);
    if (kvarn_backend_get(i, &info) != KVARN_OK || std::strcmp(info.name, KVARN_TEST_BACKEND) != 0) continue;
    return info.available != 0 ? "" : info.detail;
  }
  return "no backend " KVARN_TEST_BACKEND;
}

#define KVARN_NEEDS_GPU() \
  if (const std::string why = ::kvarn::test::why_no_gpu(); !why.empty()) GTEST_SKIP() << why

#define EXPECT_CUDA(call)                                                 \
  do {                                                                    \
    const cudaError_t cuda_error = (call);                                \
    EXPECT_EQ(cuda_error, cudaSuccess) << cudaGetErrorString(cuda_error); \
  } while (false)

// Device memory with 256 bytes of canary on either side.
class DeviceBytes {
 public:
  DeviceBytes() = default;
  explicit DeviceBytes(size_t bytes, uint8_t fill = 0xff) : bytes_(bytes) {
    EXPECT_CUDA(cudaMalloc(&memory_, padded()));
    EXPECT_CUDA(cudaMemset(memory_, kCanary, padded()));
    if (bytes > 0) EXPECT_CUDA(cudaMemset(data(), fill, bytes));
    EXPECT_CUDA(cudaDeviceSynchronize());
  }
  DeviceBytes(const void* from, size_t bytes) : DeviceBytes(bytes) { set(from, bytes); }
  template <class T>
  explicit DeviceBytes(const std::vector<T>& from) : DeviceBytes(from.data(), from.size() * sizeof(T)) {}
  DeviceBytes(DeviceBytes&& other) noexcept : memory_(other.memory_), bytes_(other.bytes_) { other.memory_ = nullptr; }
  DeviceBytes& operator=(DeviceBytes&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~DeviceBytes() {
    if (memory_ != nullptr) EXPECT_CUDA(cudaFree(memory_));
  }
  void set(const void* from, size_t bytes) {
    if (bytes > 0) EXPECT_CUDA(cudaMemcpy(data(), from, bytes, cudaMemcpyHostToDevice));
  }
  uint8_t* data() const { return static_cast<uint8_t*>(memory_) + kGuard; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data());
  }
  size_t size() const { return bytes_; }
  std::vector<uint8_t> bytes() const {
    std::vector<uint8_t> host(bytes_);
    EXPECT_CUDA(cudaDeviceSynchronize());
    if (bytes_ > 0) EXPECT_CUDA(cudaMemcpy(host.data(), data(), bytes_, cudaMemcpyDeviceToHost));
    return host;
  }
  bool intact() const {
    std::vector<uint8_t> host(padded());
    EXPECT_CUDA(cudaMemcpy(host.data(), memory_, host.size(), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < host.size(); ++i) {
      if ((i < kGuard || i >= kGuard + bytes_) && host[i] != kCanary) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kGuard = 256;
  static constexpr uint8_t kCanary = 0x5c;
  size_t padded() const { return bytes_ + 2 * kGuard; }
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

// An AttendCase on the device: its memory, a plan, outputs.
class DeviceAttend {
 public:
  DeviceAttend(AttendCase& c, const kvarn_attend_params& host, bool batch_invariant = false, const kvarn_plan_params* plan_params = nullptr)
      : case_(c), params_(host) {
    const AttendShape& s = c.shape();
    const size_t value_bytes = static_cast<size_t>(c.value_bytes());
    const size_t seqs = s.seq_lens.size();
    q_ = DeviceBytes(host.q, static_cast<size_t>(c.q_tokens()) * host.q_token_stride * value_bytes);
    out_ = DeviceBytes(q_.size(), 0xa5);
    lse_ = DeviceBytes(static_cast<size_t>(c.rows()) * sizeof(float));
    cu_ = DeviceBytes(host.cu_q_lens, (seqs + 1) * sizeof(int32_t));
    lens_ = DeviceBytes(host.seq_lens, seqs * sizeof(int32_t));
    table_ = DeviceBytes(host.block_table, seqs * host.block_table_stride * sizeof(int32_t));
    records_ = DeviceBytes(host.records, static_cast<size_t>(host.num_blocks) * s.kv_heads * c.layout().record_bytes);
    staging_ = DeviceBytes(host.staging,
                           static_cast<size_t>(host.num_slots) * slot_values(s.kv_heads, s.format.tile_tokens, s.head_dim) * value_bytes);
    params_.q = q_.data();
    params_.out = out_.data();
    params_.lse = lse_.as<float>();
    params_.cu_q_lens = cu_.as<int32_t>();
    params_.seq_lens = lens_.as<int32_t>();
    params_.block_table = table_.as<int32_t>();
    params_.records = records_.data();
    params_.staging = staging_.data();
    if (host.alibi_slopes != nullptr) {
      slopes_ = DeviceBytes(host.alibi_slopes, s.q_heads() * sizeof(float));
      params_.alibi_slopes = slopes_.as<float>();
    }
    if (host.sinks != nullptr) {
      sinks_ = DeviceBytes(host.sinks, s.q_heads() * sizeof(float));
      params_.sinks = sinks_.as<float>();
    }
    kvarn_plan_params p = plan_params != nullptr ? *plan_params : c.plan_params("");
    p.backend = KVARN_TEST_BACKEND;
    p.cpu_isa = nullptr;
    p.num_threads = 0;
    p.batch_invariant = batch_invariant ? 1 : 0;
    EXPECT_EQ(kvarn_plan_create(&p, &plan_), KVARN_OK) << kvarn_last_error();
    workspace_ = DeviceBytes(static_cast<size_t>(kvarn_plan_workspace_bytes(plan_)), 0xff);
    params_.workspace = workspace_.data();
    params_.workspace_bytes = static_cast<int64_t>(workspace_.size());
  }
  ~DeviceAttend() { kvarn_plan_destroy(plan_); }
  DeviceAttend(const DeviceAttend&) = delete;
  DeviceAttend& operator=(const DeviceAttend&) = delete;

  kvarn_attend_params& params() { return params_; }
  kvarn_plan* plan() { return plan_; }
  DeviceBytes& seq_lens() { return lens_; }
  DeviceBytes& table() { return table_; }
  DeviceBytes& q() { return q_; }
  DeviceBytes& out() { return out_; }
  std::string description() const { return kvarn_plan_describe(plan_); }

  kvarn_status launch(cudaStream_t stream = nullptr) { return kvarn_attend(plan_, &params_, stream); }
  AttendCase::Result run() {
    EXPECT_CUDA(cudaMemset(out_.data(), 0xa5, out_.size()));
    EXPECT_CUDA(cudaMemset(lse_.data(), 0xff, lse_.size()));
    const kvarn_status status = launch();
    return result(status);
  }
  AttendCase::Result result(kvarn_status status = KVARN_OK) {
    AttendCase::Result r;
    r.status = status;
    EXPECT_CUDA(cudaDeviceSynchronize());
    const AttendShape& s = case_.shape();
    r.out.resize(static_cast<size_t>(case_.rows()) * s.head_dim);
    r.lse.resize(static_cast<size_t>(case_.rows()));
    const std::vector<uint8_t> out = out_.bytes(), lse = lse_.bytes();
    if (!lse.empty()) std::memcpy(r.lse.data(), lse.data(), lse.size());
    for (int t = 0; t < case_.q_tokens(); ++t) {
      for (int h = 0; h < s.q_heads(); ++h) {
        ref::load_values(out.data() + (t * params_.out_token_stride + h * params_.out_head_stride) * case_.value_bytes(), s.dtype,
                         s.head_dim, r.out.data() + (static_cast<int64_t>(t) * s.q_heads() + h) * s.head_dim);
      }
    }
    EXPECT_TRUE(out_.intact() && lse_.intact() && workspace_.intact());
    return r;
  }

 private:
  AttendCase& case_;
  kvarn_attend_params params_;
  kvarn_plan* plan_ = nullptr;
  DeviceBytes q_, out_, lse_, cu_, lens_, table_, records_, staging_, slopes_, sinks_, workspace_;
};

}  // namespace kvarn::test
