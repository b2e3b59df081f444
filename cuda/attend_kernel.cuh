// Attention over records and staging on the tensor cores: the roles of the warps.
//
// One block an SM, one warp that loads and kWarps that compute. Unit x of the ring is computed by the warps whose number among the tile
// owners is x modulo their count; `row_groups` warps share a unit, each with 8*NT query rows of its own, so many rows cost one reading.
// A computing warp keeps output, maximum and sum of its rows over all its tiles of a run; at the end of the run a warp takes a row and adds
// up what the tile owners have of it.
#pragma once

#include "attend_staging.cuh"

namespace kvarn::cuda {

template <class C>
struct SharedPlan {
  static __host__ __device__ constexpr int align(int bytes) { return (bytes + 127) / 128 * 128; }
  static __host__ __device__ constexpr int q_offset() { return align(static_cast<int>(sizeof(SharedHead))); }
  static __host__ __device__ constexpr int merge_offset(int row_groups) { return q_offset() + align(row_groups * C::kRows * C::D * 4); }
  // [kWarps][kRows][kMergeStride] floats, of a warp's output; then [kWarps][kRows] float2, maxima and sums.
  static __host__ __device__ constexpr int sums_offset(int row_groups) {
    return merge_offset(row_groups) + align(C::kWarps * C::kRows * C::kMergeStride * 4);
  }
  static __host__ __device__ constexpr int stage_offset(int row_groups) {
    return sums_offset(row_groups) + align(C::kWarps * C::kRows * 8);
  }
};

// Rows of q are brought to [2^13, 2^14) by a power of two, and k_scale to [1, 2): their products stay inside fp16.
constexpr int kQExponent = 13;

// Reads, rotates and scales the run's rows of q into shared memory, in the order the record products take them.
template <class C>
__device__ __forceinline__ void prepare_rows(const AttendArgs& a, const Run& run, SharedHead* head, float4* q, int warp, int lane) {
  constexpr int D = C::D, E = RowLanes<D>::E;
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
    // Of the power of two at or below `most`; infinities and NaN go through as they are.
    const int exponent = static_cast<int>(__float_as_uint(most) >> 23);
    const int shift = exponent == 255 ? 0 : min(max(exponent - 127, -100), 100) - kQExponent;
    const float down =
        a.softmax_scale == 0.0f ? 0.0f : copysignf(__uint_as_float(static_cast<uint32_t>(127 - shift) << 23), a.softmax_scale);
    const float up = __uint_as_float(static_cast<uint32_t>(127 + shift) << 23);
#pragma unroll
    for (int i = 0; i < E; i += 2) {
      const int d = lane * E + i;
      const int code_run = d / kRunCodes;
      const int quad = code_run / 4 * kRunQuads + d % kRunCodes / 4;
      float2* to = reinterpret_cast<float2*>(q + (r / 8 * C::kQuads + quad) * 32 + (r % 8) * 4 + code_run % 4);
      to[d % 4 / 2] = make_float2(x[i] * down, x[i + 1] * down);
    }
    if (lane == 0) {
      const int query_head = run.kv_head * a.group + row % a.group;
      RowInfo info{};
      info.scale = a.softmax_scale == 0.0f ? 1.0f : fabsf(a.softmax_scale) * kLog2E * up;
      info.slope = a.alibi_slopes != nullptr ? a.alibi_slopes[query_head] * kLog2E : 0.0f;
      info.position = row_position(run, row, a.group);
      head->rows[r] = info;
    }
  }
}

// What a warp has of its rows, to the merge buffer.
template <class C>
__device__ __forceinline__ void store_state(float* rows, float2* sums, const Lane& lane, RowState<C>& state) {
  constexpr int NT = C::NT;
  float4 out[C::kQuads][NT];
#pragma unroll
  for (int i = 0; i < C::kQuads; ++i) {
#pragma unroll
    for (int n = 0; n < NT; ++n) out[i][n] = state.at(i, n);
  }
  __syncwarp();  // the output lies in the same memory
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    float* to = rows + (8 * n + 2 * lane.t) * C::kMergeStride + lane.g;
#pragma unroll
    for (int i = 0; i < C::kQuads; ++i) {
      to[16 * i] = out[i][n].x;
      to[16 * i + C::kMergeStride] = out[i][n].y;
      to[16 * i + 8] = out[i][n].z;
      to[16 * i + 8 + C::kMergeStride] = out[i][n].w;
    }
    const float2 sum = make_float2(column_sum(state.sum[n][0]), column_sum(state.sum[n][1]));
    if (lane.g == 0) {
      sums[8 * n + 2 * lane.t] = make_float2(state.most[n][0], sum.x);
      sums[8 * n + 2 * lane.t + 1] = make_float2(state.most[n][1], sum.y);
    }
  }
}

// A row of the run out of what the tile owners have of it.
template <class C>
struct MergedRows {
  const float* rows;
  const float2* sums;
  int row_groups, owners;
  // x: this lane's values of row r; returns its maximum and sum.
  __device__ __forceinline__ float2 load(int r, int lane, float (&x)[RowLanes<C::D>::E]) const {
    constexpr int E = RowLanes<C::D>::E;
    const int step = row_groups * C::kRows;  // rows of an owner
    const float2 mine = lane < owners ? sums[r + lane * step] : make_float2(-INFINITY, 0.0f);
    float most = mine.x;
#pragma unroll
    for (int h = 16; h >= 1; h /= 2) most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, h));
    const float weight = lane < owners ? exp2_difference(mine.x, most) : 0.0f;
    float sum = mine.y * weight;
#pragma unroll
    for (int h = 16; h >= 1; h /= 2) sum += __shfl_xor_sync(kFullWarp, sum, h);
#pragma unroll
    for (int i = 0; i < E; ++i) x[i] = 0.0f;
    for (int owner = 0; owner < owners; ++owner) {
      const float w = __shfl_sync(kFullWarp, weight, owner);
      const float* from = rows + (r + owner * step) * C::kMergeStride + lane * E;
#pragma unroll
      for (int i = 0; i < E; i += 2) {
        const float2 v = *reinterpret_cast<const float2*>(from + i);
        x[i] = fmaf(v.x, w, x[i]);
        x[i + 1] = fmaf(v.y, w, x[i + 1]);
      }
    }
    return make_float2(most, sum);
  }
  __device__ __forceinline__ float* scratch(int) const { return nullptr; }  // these rows rotate in registers
};

// Read anew at every use, so that neither it nor what follows from it takes registers over the products.
__device__ __forceinline__ int this_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
__device__ __forceinline__ int this_warp() { return this_thread() / 32; }

template <class C>
__device__ __forceinline__ void compute_runs(const AttendArgs& a, SharedHead* head, uint8_t* shared) {
  const int warp = this_warp();
  const Lane lane(threadIdx.x % 32);
  const int owners = a.tile_owners;
  const auto own = [&]() -> Cursor& { return head->cursors[this_warp()]; };
  if (lane.lane == 0) {
    const int group = warp % a.row_groups, owner = warp / a.row_groups;
    // Warps beyond the last whole set of row groups only help with the rows of q and out.
    const bool owns = owner < owners;
    Cursor c{};
    c.unit = owns ? owner : INT32_MAX;
    c.k.advance(owns ? owner : 0, a.num_k_stages);
    c.v.advance(owns ? owner : 0, a.num_v_stages);
    c.first_row = owns ? group * C::kRows : INT32_MAX;
    c.q = SharedPlan<C>::q_offset() + group * C::kRows * C::D * 4;
    c.info = static_cast<int>(offsetof(SharedHead, rows) + group * C::kRows * sizeof(RowInfo));
    c.output = SharedPlan<C>::merge_offset(a.row_groups) + warp * C::kRows * C::kMergeStride * 4;
    own() = c;
  }
  for (;;) {
    __syncwarp();
    const RingPlace run_place = own().run;
    barrier_wait(shared_address(&head->run_full[run_place.stage]), run_place.parity);
    __syncwarp();
    const Run& run = head->runs[run_place.stage];
    if (run.end != 0) return;

    prepare_rows<C>(a, run, head, reinterpret_cast<float4*>(shared + SharedPlan<C>::q_offset()), this_warp(), this_thread() % 32);
    named_barrier(1, C::kWarps * 32);  // q and the row table are written; the merge buffer is read

    RowState<C> state;
    if (lane.lane == 0) {
      Cursor& cursor = own();
      cursor.unit_end = run.unit_end;
      cursor.has_rows = cursor.first_row < run.rows ? 1 : 0;
    }
    const auto own_output = [&] { return reinterpret_cast<float4*>(shared + own().output) + this_thread() % 32; };
    state.clear(own_output());
    for (;;) {
      __syncwarp();
      const Lane lane(this_thread() % 32);
      const Cursor now = own();
      if (now.unit >= now.unit_end) break;
      const Unit& unit = head->units[now.k.stage];
      wait_for_unit(head->k_full[now.k.stage], now.k.parity, unit.number, now.unit);
      const uint8_t* const k = shared + (a.k_stages + now.k.stage * a.k_stage_bytes);
      const auto v = [&] { return shared + (a.v_stages + own().v.stage * a.v_stage_bytes); };
      const float4* const q = reinterpret_cast<const float4*>(shared + now.q);
      const RowInfo* const info = reinterpret_cast<const RowInfo*>(shared + now.info);
      const auto wait_for_v = [&] { wait_for_unit(head->v_full[now.v.stage], now.v.parity, head->v_numbers[now.v.stage], now.unit); };
      const int kind = unit.kind, first_token = unit.first_token;
      if (now.has_rows != 0 && kind == kRecordUnit) {
        TileScores<C> scores;
        score_record<C>(a, run, k, first_token, q + lane.lane, info, lane, scores);
        __syncwarp();
        if (lane.lane == 0) barrier_arrive(shared_address(&head->k_empty[own().k.stage]));
        wait_for_v();
        const Lane again(this_thread() % 32);
        state.out = own_output();
        add_record<C>(a, v(), scores, again, state);
        __syncwarp();
      } else {
        wait_for_v();
        if (now.has_rows == 0) {
        } else if (kind == kInvalidUnit) {
          state.spoil();
        } else if (a.dtype == KVARN_F16) {
          attend_staging<C, __half>(a, run, k, v(), first_token, q, info, lane, state);
        } else if (a.dtype == KVARN_BF16) {
          attend_staging<C, __nv_bfloat16>(a, run, k, v(), first_token, q, info, lane, state);
        } else {
          attend_staging<C, float>(a, run, k, v(), first_token, q, info, lane, state);
        }
        __syncwarp();
        if (lane.lane == 0) barrier_arrive(shared_address(&head->k_empty[own().k.stage]));
      }
      if (lane.lane == 0) {
        Cursor& cursor = own();
        barrier_arrive(shared_address(&head->v_empty[cursor.v.stage]));
        cursor.unit += owners;
        cursor.k.advance(owners, a.num_k_stages);
        cursor.v.advance(owners, a.num_v_stages);
      }
    }
    const int finishing_warp = this_warp();
    float* const merge = reinterpret_cast<float*>(shared + SharedPlan<C>::merge_offset(a.row_groups));
    float2* const sums = reinterpret_cast<float2*>(shared + SharedPlan<C>::sums_offset(a.row_groups));
    if (own().has_rows != 0) {
      store_state<C>(reinterpret_cast<float*>(shared + own().output), sums + finishing_warp * C::kRows, Lane(this_thread() % 32), state);
    }
    named_barrier(1, C::kWarps * 32);  // the merge buffer is written, q is read
    finish_run<C::D>(a, run, MergedRows<C>{merge, sums, a.row_groups, a.tile_owners}, &head->flag, finishing_warp, C::kWarps,
                     this_thread() % 32);
    __syncwarp();
    if (lane.lane == 0) {
      Cursor& cursor = own();
      barrier_arrive(shared_address(&head->run_empty[cursor.run.stage]));
      cursor.run.advance(1, 2);
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) attend_mma_kernel(const __grid_constant__ AttendArgs a) {
  extern __shared__ __align__(128) uint8_t shared[];
  SharedHead* const head = reinterpret_cast<SharedHead*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    // A stage is empty when the warps that share a unit are done with it.
    for (int i = 0; i < a.num_k_stages; ++i) {
      head->units[i].number = -1;
      barrier_init(shared_address(&head->k_full[i]), kFullArrivals);
      barrier_init(shared_address(&head->k_empty[i]), a.row_groups);
    }
    for (int i = 0; i < a.num_v_stages; ++i) {
      head->v_numbers[i] = -1;
      barrier_init(shared_address(&head->v_full[i]), kFullArrivals);
      barrier_init(shared_address(&head->v_empty[i]), a.row_groups);
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
    compute_runs<C>(a, head, shared);
  } else {
    Loader<C::D> loader(a, head, shared_address(shared), lane);
    for_each_run(a, blockIdx.x, gridDim.x, lane, loader);
  }
}

template <class C>
AttendKernel attend_mma_of() {
  return {reinterpret_cast<const void*>(&attend_mma_kernel<C>), C::kThreads, C::kWarps, C::kRows, &SharedPlan<C>::stage_offset};
}

}  // namespace kvarn::cuda
