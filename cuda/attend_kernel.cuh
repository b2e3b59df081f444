// The kernel around attend_mma.cuh: roles of the warps, q in shared memory, merging the warps of a block.
#pragma once

#include "attend_staging.cuh"

namespace kvarn::cuda {

// Reads, rotates and scales the run's rows of q into shared memory, in the order the record products take them.
template <class C>
__device__ __forceinline__ void prepare_rows(const AttendArgs& a, const Run& run, SharedHead* head, float4* q, int warp, int lane) {
  constexpr int D = C::D, E = RowLanes<D>::E;
  const bool wide_runs = kWideRuns<C> && a.k_bits != 8;
  const int run_codes = wide_runs ? 32 : 16;
  const float undo = 1.0f / static_cast<float>(a.k_bits == 8 ? Codes<8>::kScale : a.k_bits == 3 ? Codes<3>::kScale : Codes<4>::kScale);
  for (int r = warp; r < a.row_groups * C::kRows; r += C::kWarps) {
    // Rows past the last repeat it: they cost nothing and see nothing that the others do not.
    const int row = run.first_row + min(r, run.rows - 1);
    float x[E];
    load_q_row<D>(a, run, row, lane, nullptr, x);
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < E; ++i) most = fmaxf(most, fabsf(x[i]));
#pragma unroll
    for (int h = 16; h >= 1; h /= 2) most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, h));
    // A power of two brings the row to [1/2, 1); infinities and NaN go through as they are.
    const int exponent = static_cast<int>(__float_as_uint(most) >> 23);
    const int shift = exponent == 255 || exponent < 2 ? 0 : min(exponent - 126, 126);
    const float down =
        a.softmax_scale == 0.0f ? 0.0f : copysignf(__uint_as_float(static_cast<uint32_t>(127 - shift) << 23), a.softmax_scale);
    const float up = __uint_as_float(static_cast<uint32_t>(127 + shift) << 23);
    const int n = r / 8;
#pragma unroll
    for (int i = 0; i < E; i += 2) {
      const int d = lane * E + i;
      const int code_run = d / run_codes;
      const int quad = code_run / 4 * (run_codes / 4) + d % run_codes / 4;
      float2* to = reinterpret_cast<float2*>(q + (n * C::kQuads + quad) * 32 + (r % 8) * 4 + code_run % 4);
      to[d % 4 / 2] = make_float2(x[i] * down, x[i + 1] * down);
    }
    if (lane == 0) {
      const int query_head = run.kv_head * a.group + row % a.group;
      RowInfo info{};
      info.scale = a.softmax_scale == 0.0f ? 1.0f : fabsf(a.softmax_scale) * kLog2E * undo * up;
      info.slope = a.alibi_slopes != nullptr ? a.alibi_slopes[query_head] * kLog2E : 0.0f;
      info.position = row_position(run, row, a.group);
      head->rows[r] = info;
    }
  }
}

// Adds the sums of the warps that own the other tiles of the same rows, halving the warps each time; the first `row_groups` warps end with
// the run's sums and write them out as rows.
template <class C>
__device__ __forceinline__ void merge_warps(const AttendArgs& a, SharedHead* head, float4* merge, float* rows, int owner, int owners,
                                            int group, const Lane& lane, RowState<C>& state) {
  constexpr int NT = C::NT;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    state.sum[n][0] = column_sum(state.sum[n][0]);
    state.sum[n][1] = column_sum(state.sum[n][1]);
  }
  constexpr int kVectors = C::kQuads * NT * 32;  // of one warp's output
  float4* const sums = merge + C::kWarps / 2 * kVectors;
  for (int left = owners; left > 1;) {
    const int half = (left + 1) / 2;
    if (owner >= half && owner < left) {
      const int to = (owner - half) * a.row_groups + group;
#pragma unroll
      for (int i = 0; i < C::kQuads; ++i) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const float(&o)[4] = state.out[i][n];
          merge[to * kVectors + (i * NT + n) * 32 + lane.lane] = make_float4(o[0], o[1], o[2], o[3]);
        }
      }
      if (lane.g == 0) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          sums[(to * NT + n) * 4 + lane.t] = make_float4(state.most[n][0], state.most[n][1], state.sum[n][0], state.sum[n][1]);
        }
      }
    }
    named_barrier(1, C::kWarps * 32);  // sums are written
    if (owner < left - half) {
      const int from = owner * a.row_groups + group;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const float4 other = sums[(from * NT + n) * 4 + lane.t];
        float mine[2], theirs[2];
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const float other_most = column == 0 ? other.x : other.y;
          const float next = fmaxf(state.most[n][column], other_most);
          mine[column] = exp2_difference(state.most[n][column], next);
          theirs[column] = exp2_difference(other_most, next);
          state.most[n][column] = next;
          state.sum[n][column] = state.sum[n][column] * mine[column] + (column == 0 ? other.z : other.w) * theirs[column];
        }
#pragma unroll
        for (int i = 0; i < C::kQuads; ++i) {
          const float4 o = merge[from * kVectors + (i * NT + n) * 32 + lane.lane];
          float(&out)[4] = state.out[i][n];
          out[0] = out[0] * mine[0] + o.x * theirs[0];
          out[1] = out[1] * mine[1] + o.y * theirs[1];
          out[2] = out[2] * mine[0] + o.z * theirs[0];
          out[3] = out[3] * mine[1] + o.w * theirs[1];
        }
      }
    }
    named_barrier(1, C::kWarps * 32);  // the buffer is free
    left = half;
  }
  if (owners == 1) named_barrier(1, C::kWarps * 32);  // q, whose memory the rows take, is no longer read
  if (owner == 0) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int row = group * C::kRows + 8 * n + 2 * lane.t + column;
        float* to = rows + row * C::kRowStride + lane.g;
#pragma unroll
        for (int i = 0; i < C::kQuads; ++i) {
          to[16 * i] = state.out[i][n][column];
          to[16 * i + 8] = state.out[i][n][2 + column];
        }
        if (lane.g == 0) head->sums[row] = make_float2(state.most[n][column], state.sum[n][column]);
      }
    }
  }
  named_barrier(1, C::kWarps * 32);  // rows are written
}

template <class C>
__device__ __forceinline__ void compute_runs(const AttendArgs& a, SharedHead* head, uint8_t* shared, int warp, int lane_index) {
  const Lane lane(lane_index);
  const int group = warp % a.row_groups, owner = warp / a.row_groups, owners = C::kWarps / a.row_groups;
  float4* const q = reinterpret_cast<float4*>(shared + SharedPlan<C>::q_offset());
  float4* const merge = reinterpret_cast<float4*>(shared + SharedPlan<C>::merge_offset(a.row_groups));
  const uint8_t* const stages = shared + SharedPlan<C>::stage_offset(a.row_groups);
  const bool wide_runs = kWideRuns<C> && a.k_bits != 8;
  const float4* const q_rows = q + group * C::NT * C::kQuads * 32;

  // Warps beyond the last whole set of row groups only help with the rows of q and out.
  int unit = owner < owners ? owner : INT32_MAX, stage = owner < owners ? owner : 0;
  uint32_t parity = 0;
  while (stage >= a.num_stages) {
    stage -= a.num_stages;
    parity ^= 1;
  }
  for (int index = 0;; ++index) {
    const int at = index & 1;
    barrier_wait(shared_address(&head->run_full[at]), index >> 1 & 1);
    const Run& run = head->runs[at];
    if (run.end != 0) return;

    prepare_rows<C>(a, run, head, q, warp, lane.lane);
    named_barrier(1, C::kWarps * 32);  // q and the row table are written

    RowView<C> view;
    view.info = head->rows + group * C::kRows;
    RowState<C> state;
#pragma unroll
    for (int n = 0; n < C::NT; ++n) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        view.scale[n][column] = view.info[8 * n + 2 * lane.t + column].scale;
        state.most[n][column] = -INFINITY;
        state.sum[n][column] = 0.0f;
      }
#pragma unroll
      for (int i = 0; i < C::kQuads; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) state.out[i][n][j] = 0.0f;
      }
    }
    // The first row sees the least of the end, the last row the least of the beginning.
    view.full_last = last_visible(a, row_position(run, run.first_row, a.group), run.seq_len);
    view.full_first = first_visible(a, row_position(run, run.first_row + run.rows - 1, a.group));
    const bool has_rows = group * C::kRows < run.rows;

    const int unit_end = run.unit_end;
    for (; unit < unit_end; unit += owners) {
      const Unit loaded = wait_for_unit(head, stage, parity, unit);
      if (has_rows) {
        const uint8_t* data = stages + stage * a.stage_bytes;
        if (loaded.kind == kRecordUnit) {
          attend_record<C>(a, run, data, loaded.first_token, q_rows + lane.lane, view, lane, state);
        } else if (loaded.kind == kInvalidUnit) {
#pragma unroll
          for (int n = 0; n < C::NT; ++n) state.sum[n][0] = state.sum[n][1] = NAN;
        } else if (a.dtype == KVARN_F16) {
          attend_staging<C, __half>(a, run, data, loaded.first_token, q_rows, wide_runs, view, lane, state);
        } else if (a.dtype == KVARN_BF16) {
          attend_staging<C, __nv_bfloat16>(a, run, data, loaded.first_token, q_rows, wide_runs, view, lane, state);
        } else {
          attend_staging<C, float>(a, run, data, loaded.first_token, q_rows, wide_runs, view, lane, state);
        }
        __syncwarp();
      }
      if (lane.lane == 0) barrier_arrive(shared_address(&head->empty[stage]));
      stage += owners;
      while (stage >= a.num_stages) {
        stage -= a.num_stages;
        parity ^= 1;
      }
    }
    merge_warps<C>(a, head, merge, reinterpret_cast<float*>(q), owner, owners, group, lane, state);
    finish_run<C::D>(a, run, reinterpret_cast<float*>(q), C::kRowStride, head->sums, &head->flag, warp, C::kWarps, lane.lane);
    named_barrier(1, C::kWarps * 32);  // the rows' memory takes the next q
    if (lane.lane == 0) barrier_arrive(shared_address(&head->run_empty[at]));
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) attend_mma_kernel(const __grid_constant__ AttendArgs a) {
  extern __shared__ __align__(128) uint8_t shared[];
  SharedHead* const head = reinterpret_cast<SharedHead*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.num_stages; ++i) {
#if __CUDA_ARCH__ >= 900
      barrier_init(shared_address(&head->full[i]), 1);
#else
      barrier_init(shared_address(&head->full[i]), 1 + 32);
#endif
      barrier_init(shared_address(&head->empty[i]), a.row_groups);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared_address(&head->run_full[i]), 1);
      barrier_init(shared_address(&head->run_empty[i]), C::kWarps);
    }
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the copy engine sees the barriers
#endif
  }
  __syncthreads();
  if (warp < C::kWarps) {
    compute_runs<C>(a, head, shared, warp, lane);
  } else {
    Loader loader(a, head, shared_address(shared + SharedPlan<C>::stage_offset(a.row_groups)), lane);
    for_each_run(a, blockIdx.x, gridDim.x, lane, loader);
  }
}

template <class C>
AttendKernel attend_mma_of() {
  return {reinterpret_cast<const void*>(&attend_mma_kernel<C>), C::kThreads, C::kWarps, C::kRows, &SharedPlan<C>::stage_offset};
}

}  // namespace kvarn::cuda
