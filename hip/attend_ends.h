// The two ends of an attention run on AMD: what cuda/attend_rows.cuh does in registers happens here in shared memory, in loops, which need
// neither a kernel a head dimension nor its registers. A row belongs to 32 lanes.
#pragma once

#include "attend_rows.cuh"

namespace kvarn::cuda {

struct RowPlace {
  int64_t token, head;
};
__device__ __forceinline__ RowPlace row_place(const AttendArgs& a, const Run& run, int row) {
  return {run.q_begin + row / a.group, static_cast<int64_t>(run.kv_head) * a.group + row % a.group};
}

// Row `row` of the run's sequence, rotated, to `to`, [head_dim] floats of the caller's 32 lanes.
__device__ __forceinline__ void load_q(const AttendArgs& a, const Run& run, int row, int lane, float* to) {
  const RowPlace place = row_place(a, run, row);
  const int64_t at = place.token * a.q_token_stride + place.head * a.q_head_stride;
#pragma unroll 1
  for (int d = lane; d < a.head_dim; d += 32) to[d] = load_value(a.q, at + d, a.dtype);
  __syncwarp();
  if (a.q_rotated == 0) rotate_shared(to, a.rotation, false, lane);
}

// x: the row's unnormalised output, [head_dim], overwritten; m: its maximum logit in base 2; l: its sum of exponentials.
__device__ __forceinline__ void write_out(const AttendArgs& a, const Run& run, int row, int lane, float* x, float m, float l) {
  const RowPlace place = row_place(a, run, row);
  float factor = 1.0f;
  if (a.sinks != nullptr) {
    const float sink = a.sinks[place.head] * kLog2E;
    const float most = fmaxf(m, sink);
    factor = exp2_difference(m, most);
    l = l * factor + (sink == -INFINITY ? 0.0f : exp2_difference(sink, most));
    m = most;
  }
  factor = l == 0.0f ? 0.0f : factor / l;
#pragma unroll 1
  for (int d = lane; d < a.head_dim; d += 32) x[d] = l == 0.0f ? 0.0f : x[d] * factor;
  __syncwarp();
  if (a.out_rotated == 0) rotate_shared(x, a.rotation, true, lane);
  const int64_t at = place.token * a.out_token_stride + place.head * a.out_head_stride;
#pragma unroll 1
  for (int d = lane; d < a.head_dim; d += 32) store_value(a.out, at + d, a.dtype, x[d]);
  if (a.lse != nullptr && lane == 0) {
    a.lse[place.token * static_cast<int64_t>(a.num_kv_heads) * a.group + place.head] = l == 0.0f ? -INFINITY : (m + log2f(l)) * kLn2;
  }
}

// Merges the parts of one row of an item, in the order of the tiles, and writes the row. `x`: [head_dim] floats of the caller's 32 lanes.
__device__ __forceinline__ void merge_row(const AttendArgs& a, const Run& run, int row_in_block, int lane, float* x) {
  const auto slot_of = [&](int part) -> int64_t { return part == 0 ? run.slot_first : run.slot_rest + part * run.slot_step; };
  const auto sums_of = [&](int part) { return __ldcg(a.partial_sums + slot_of(part) * a.block_rows + row_in_block); };
  float most = -INFINITY;
  for (int part = lane; part < run.parts; part += 32) most = fmaxf(most, sums_of(part).x);
  for (int h = 16; h >= 1; h /= 2) most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, h));
#pragma unroll 1
  for (int d = lane; d < a.head_dim; d += 32) x[d] = 0.0f;
  float sum = 0.0f;
#pragma unroll 1
  for (int part = 0; part < run.parts; ++part) {
    const float2 s = sums_of(part);
    const float weight = exp2_difference(s.x, most);
    sum += s.y * weight;
    const float* from = a.partial_out + (slot_of(part) * a.block_rows + row_in_block) * a.head_dim;
#pragma unroll 1
    for (int d = lane; d < a.head_dim; d += 32) x[d] = fmaf(__ldcg(from + d), weight, x[d]);
  }
  __syncwarp();
  write_out(a, run, run.first_row + row_in_block, lane, x, most, sum);
}

// Ends a run: `rows` holds the unnormalised output, [run.rows][row_stride] in shared memory, `sums` maximum and sum of each. All warps of
// the block call it; `flag` is one shared int. The last barrier is the caller's.
__device__ __forceinline__ void end_run(const AttendArgs& a, const Run& run, float* rows, int row_stride, const float2* sums, int* flag,
                                        int warp, int warps, int lane) {
  bool last = run.parts == 1;
  if (!last) {
#pragma unroll 1
    for (int r = warp; r < run.rows; r += warps) {
      const int64_t slot_row = static_cast<int64_t>(run.slot) * a.block_rows + r;
      float* to = a.partial_out + slot_row * a.head_dim;
#pragma unroll 1
      for (int d = lane; d < a.head_dim; d += 32) __stcg(to + d, rows[r * row_stride + d]);
      if (lane == 0) __stcg(a.partial_sums + slot_row, sums[r]);
    }
    __threadfence();
    __syncthreads();  // the block's part is written
    if (threadIdx.x == 0) {
      // Wraps to zero at the last arrival: the counter is ready for the next launch.
      *flag = atomicInc(a.counters + run.counter, static_cast<unsigned>(run.parts - 1)) == static_cast<unsigned>(run.parts - 1) ? 1 : 0;
    }
    __syncthreads();  // the flag is written
    last = *flag != 0;
    __threadfence();
  }
  if (!last) return;
#pragma unroll 1
  for (int r = warp; r < run.rows; r += warps) {
    float* const row = rows + r * row_stride;
    if (run.parts == 1) {
      write_out(a, run, run.first_row + r, lane, row, sums[r].x, sums[r].y);
    } else {
      merge_row(a, run, r, lane, row);
    }
  }
}

}  // namespace kvarn::cuda
