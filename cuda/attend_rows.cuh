// The two ends of an attention run, one warp a row: reading and rotating q, and turning sums into output, alone or by merging the parts of
// an item. The part that arrives last merges all of them in a fixed order, so the result does not depend on who was last.
#pragma once

#include "attend_schedule.cuh"
#include "numbers.cuh"

namespace kvarn::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// exp2(x - y) where equal infinities give 1.
__device__ __forceinline__ float exp2_difference(float x, float y) { return x == y ? 1.0f : exp2_approx(x - y); }

// Values of a row that one lane holds: [lane*E, (lane+1)*E) with E = D/32, D a power of two. D = 0: the head dimension is known at run time
// only, and a lane holds lane + 32*i.
template <int D>
struct RowLanes {
  static constexpr int E = D == 0 ? kMaxHeadDim / 32 : D / 32;
  static __device__ __forceinline__ int index(int lane, int i) { return D == 0 ? i * 32 + lane : lane * E + i; }
  static __device__ __forceinline__ int count(const AttendArgs& a) { return D == 0 ? a.head_dim : D; }
};

// `scratch` is a row of shared memory owned by the warp; needed when D = 0.
template <int D>
__device__ __forceinline__ void rotate_row(const AttendArgs& a, float (&x)[RowLanes<D>::E], bool inverse, int lane, float* scratch) {
  using Lanes = RowLanes<D>;
  if constexpr (D != 0) {
    rotate_registers(x, lane, a.rotation.scale);
  } else {
#pragma unroll
    for (int i = 0; i < Lanes::E; ++i) {
      if (Lanes::index(lane, i) < a.head_dim) scratch[Lanes::index(lane, i)] = x[i];
    }
    __syncwarp();
    rotate_shared(scratch, a.rotation, inverse, lane);
#pragma unroll
    for (int i = 0; i < Lanes::E; ++i) x[i] = Lanes::index(lane, i) < a.head_dim ? scratch[Lanes::index(lane, i)] : 0.0f;
    __syncwarp();
  }
}

template <int D>
__device__ __forceinline__ void load_q_row(const AttendArgs& a, const Run& run, int row, int lane, float* scratch,
                                           float (&x)[RowLanes<D>::E]) {
  using Lanes = RowLanes<D>;
  const int64_t token = run.q_begin + row / a.group;
  const int64_t head = static_cast<int64_t>(run.kv_head) * a.group + row % a.group;
  const int64_t at = token * a.q_token_stride + head * a.q_head_stride;
#pragma unroll
  for (int i = 0; i < Lanes::E; ++i) {
    const int d = Lanes::index(lane, i);
    x[i] = d < Lanes::count(a) ? load_value(a.q, at + d, a.dtype) : 0.0f;
  }
  if (a.q_rotated == 0) rotate_row<D>(a, x, false, lane, scratch);
}

// x: the row's unnormalised output; m: its maximum logit in base 2; l: its sum of exponentials.
template <int D>
__device__ __forceinline__ void write_out_row(const AttendArgs& a, const Run& run, int row, int lane, float* scratch,
                                              float (&x)[RowLanes<D>::E], float m, float l) {
  using Lanes = RowLanes<D>;
  const int64_t token = run.q_begin + row / a.group;
  const int64_t head = static_cast<int64_t>(run.kv_head) * a.group + row % a.group;
  float factor = 1.0f;
  if (a.sinks != nullptr) {
    const float sink = a.sinks[head] * kLog2E;
    const float most = fmaxf(m, sink);
    factor = exp2_difference(m, most);
    l = l * factor + (sink == -INFINITY ? 0.0f : exp2_difference(sink, most));
    m = most;
  }
  factor = l == 0.0f ? 0.0f : factor / l;
#pragma unroll
  for (int i = 0; i < Lanes::E; ++i) x[i] = l == 0.0f ? 0.0f : x[i] * factor;
  if (a.out_rotated == 0) rotate_row<D>(a, x, true, lane, scratch);
  const int64_t at = token * a.out_token_stride + head * a.out_head_stride;
#pragma unroll
  for (int i = 0; i < Lanes::E; ++i) {
    if (Lanes::index(lane, i) < Lanes::count(a)) store_value(a.out, at + Lanes::index(lane, i), a.dtype, x[i]);
  }
  if (a.lse != nullptr && lane == 0) {
    a.lse[token * static_cast<int64_t>(a.num_kv_heads) * a.group + head] = l == 0.0f ? -INFINITY : (m + log2f(l)) * kLn2;
  }
}

// This lane's values of a row of partial output at `row`. They come from other blocks: past the L1 cache.
template <int D>
__device__ __forceinline__ void load_partial(const AttendArgs& a, const float* row, int lane, float (&x)[RowLanes<D>::E]) {
  using Lanes = RowLanes<D>;
#pragma unroll
  for (int i = 0; i < Lanes::E; ++i) {
    if constexpr (D != 0 && Lanes::E % 4 == 0) {
      if (i % 4 != 0) continue;
      const float4 v = __ldcg(reinterpret_cast<const float4*>(row + Lanes::index(lane, i)));
      x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
    } else {
      const int d = Lanes::index(lane, i);
      x[i] = d < Lanes::count(a) ? __ldcg(row + d) : 0.0f;
    }
  }
}
template <int D>
__device__ __forceinline__ void store_partial(const AttendArgs& a, float* row, int lane, const float (&x)[RowLanes<D>::E]) {
  using Lanes = RowLanes<D>;
#pragma unroll
  for (int i = 0; i < Lanes::E; ++i) {
    if constexpr (D != 0 && Lanes::E % 4 == 0) {
      if (i % 4 == 0) __stcg(reinterpret_cast<float4*>(row + Lanes::index(lane, i)), make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]));
    } else if (const int d = Lanes::index(lane, i); d < Lanes::count(a)) {
      __stcg(row + d, x[i]);
    }
  }
}

// x: this lane's values of one row of an item out of its partial results; returns the row's maximum and sum.
template <int D>
__device__ __forceinline__ float2 merge_parts(const AttendArgs& a, const Run& run, int row_in_block, int lane, float (&x)[RowLanes<D>::E]) {
  using Lanes = RowLanes<D>;
  constexpr int kTogether = 32 / Lanes::E;  // parts whose values are on their way together
  const auto row_of = [&](int part) -> int64_t {
    const int slot = part == 0 ? run.slot_first : run.slot_rest + part * run.slot_step;
    return static_cast<int64_t>(slot) * a.block_rows + row_in_block;
  };
  const auto sums_of = [&](int part) { return __ldcg(a.partial_sums + row_of(part)); };
  float most = -INFINITY;
  for (int part = lane; part < run.parts; part += 32) most = fmaxf(most, sums_of(part).x);
#pragma unroll
  for (int h = 16; h >= 1; h /= 2) most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, h));

#pragma unroll
  for (int e = 0; e < Lanes::E; ++e) x[e] = 0.0f;
  float sum = 0.0f;
#pragma unroll 1
  for (int base = 0; base < run.parts; base += 32) {  // one a lane
    const float2 s = base + lane < run.parts ? sums_of(base + lane) : make_float2(-INFINITY, 0.0f);
    const float weight = base + lane < run.parts ? exp2_difference(s.x, most) : 0.0f;
    sum = fmaf(s.y, weight, sum);
    const int count = min(32, run.parts - base);
#pragma unroll 1
    for (int i = 0; i < count; i += kTogether) {
      float values[kTogether][Lanes::E];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        // Past the last part, that one again: a load more costs less than a branch.
        load_partial<D>(a, a.partial_out + row_of(base + min(i + j, count - 1)) * Lanes::count(a), lane, values[j]);
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const float w = __shfl_sync(kFullWarp, weight, i + j);
        if (i + j >= count) continue;
#pragma unroll
        for (int e = 0; e < Lanes::E; ++e) x[e] = fmaf(values[j][e], w, x[e]);
      }
    }
  }
#pragma unroll
  for (int h = 16; h >= 1; h /= 2) sum += __shfl_xor_sync(kFullWarp, sum, h);
  return make_float2(most, sum);
}

// Ends row `r` of a run; one warp. Rows: load(r, lane, x) gives the row's unnormalised output with maximum and sum, scratch(r) memory of a
// row for write_out_row.
template <int D, class Rows>
__device__ __forceinline__ void finish_row(const AttendArgs& a, const Run& run, const Rows& rows, int r, int lane) {
  float x[RowLanes<D>::E];
  float2 sums = rows.load(r, lane, x);
  if (run.parts > 1) {
    const int64_t slot_row = static_cast<int64_t>(run.slot) * a.block_rows + r;
    store_partial<D>(a, a.partial_out + slot_row * RowLanes<D>::count(a), lane, x);
    if (lane == 0) __stcg(a.partial_sums + slot_row, sums);
    __threadfence();
    __syncwarp();
    const unsigned last = static_cast<unsigned>(run.parts - 1);
    unsigned before = 0;
    // Wraps to zero at the last arrival: the counter is ready for the next launch.
    if (lane == 0) before = atomicInc(a.counters + static_cast<int64_t>(run.counter) * a.block_rows + r, last);
    if (__shfl_sync(kFullWarp, before, 0) != last) return;
    __threadfence();
    sums = merge_parts<D>(a, run, r, lane, x);
  }
  __syncwarp();
  write_out_row<D>(a, run, run.first_row + r, lane, rows.scratch(r), x, sums.x, sums.y);
}

}  // namespace kvarn::cuda
