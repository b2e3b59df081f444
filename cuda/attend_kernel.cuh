// Attention over records and staging on the tensor cores: the roles of the warps.
//
// One block an SM, one warp that loads and kWarps that compute. Unit x of the ring is computed by the warps whose number among the tile
// owners is x modulo their count; `row_groups` warps share a unit, each with 8*NT query rows of its own, so many rows cost one reading.
// A computing warp keeps output, maximum and sum of its rows over all its tiles of a run and leaves them in the merge buffer; then a warp
// takes a row and adds up what the tile owners have of it.
//
// A warp takes 11 tiles' time for a tile, so the warps must not wait for each other at the end of a run: a warp that has done its part
// goes on with the next run. After its first unit there it finishes its rows of the run before and prepares those of the run after (a
// step), when the others have long done theirs. With more than two row groups there is no memory for the rows of two runs, and no such
// overlap.
#pragma once

#include "attend_staging.cuh"

namespace kvarn::cuda {

// Buffers for prepared rows.
constexpr __host__ __device__ int q_buffers(int row_groups) { return row_groups <= 2 ? 2 : 1; }

template <class C>
struct SharedPlan {
  static __host__ __device__ constexpr int align(int bytes) { return (bytes + 127) / 128 * 128; }
  static __host__ __device__ constexpr int q_offset() { return align(static_cast<int>(sizeof(SharedHead))); }
  // One buffer: [row_groups][kQuads][NT][32 lanes] float4.
  static __host__ __device__ constexpr int q_bytes(int row_groups) { return row_groups * C::kRows * C::D * 4; }
  static __host__ __device__ constexpr int merge_offset(int row_groups) {
    return q_offset() + align(q_buffers(row_groups) * q_bytes(row_groups));
  }
  // [kWarps][group_rows][kMergeStride] floats, of a warp's output; then [kWarps][group_rows] float2, maxima and sums.
  static __host__ __device__ constexpr int sums_offset(int row_groups, int group_rows) {
    return merge_offset(row_groups) + align(C::kWarps * group_rows * C::kMergeStride * 4);
  }
  static __host__ __device__ constexpr int stage_offset(int row_groups, int group_rows) {
    return sums_offset(row_groups, group_rows) + align(C::kWarps * group_rows * 8);
  }
};

// Rows of q are brought to [2^13, 2^14) by a power of two, and k_scale to [1, 2): their products stay inside fp16.
constexpr int kQExponent = 13;

// Reads, rotates and scales rows first_row, first_row + step, .. below num_rows of the run's q into shared memory, in the order the record
// products take them.
template <class C>
__device__ __forceinline__ void prepare_rows(const AttendArgs& a, const Run& run, int first_row, int step, int num_rows, RowInfo* rows,
                                             float4* q, int lane) {
  constexpr int D = C::D, E = RowLanes<D>::E;
  for (int r = first_row; r < num_rows; r += step) {
    // Rows past the last are zero, and see what it sees.
    const int row = run.first_row + min(r, run.rows - 1);
    float x[E] = {};
    if (r < run.rows) load_q_row<D>(a, run, row, lane, nullptr, x);
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
      rows[r] = info;
    }
  }
}

// What a warp has of its rows, to the merge buffer.
template <class C>
__device__ __forceinline__ void store_state(float* rows, float2* sums, int group_rows, const Lane& lane, const RowState<C>& state) {
  float2 total[C::NT];
#pragma unroll
  for (int n = 0; n < C::NT; ++n) total[n] = make_float2(column_sum(state.sum[n][0]), column_sum(state.sum[n][1]));
#pragma unroll
  for (int n = 0; n < C::NT; ++n) {
    if (8 * n + 2 * lane.t >= group_rows) continue;
    float* to = rows + (8 * n + 2 * lane.t) * C::kMergeStride + lane.g;
#pragma unroll
    for (int i = 0; i < C::kQuads; ++i) {
      to[16 * i] = state.out[i][n][0];
      to[16 * i + C::kMergeStride] = state.out[i][n][1];
      to[16 * i + 8] = state.out[i][n][2];
      to[16 * i + 8 + C::kMergeStride] = state.out[i][n][3];
    }
    if (lane.g == 0) {
      const float2 sum = total[n];
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
  int block_rows, owners;
  // x: this lane's values of row r; returns its maximum and sum.
  __device__ __forceinline__ float2 load(int r, int lane, float (&x)[RowLanes<C::D>::E]) const {
    constexpr int E = RowLanes<C::D>::E;
    const float2 mine = lane < owners ? sums[r + lane * block_rows] : make_float2(-INFINITY, 0.0f);
    float most = mine.x;
#pragma unroll
    for (int h = 16; h >= 1; h /= 2) most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, h));
    const float weight = lane < owners ? exp2_difference(mine.x, most) : 0.0f;
    float sum = mine.y * weight;
#pragma unroll
    for (int h = 16; h >= 1; h /= 2) sum += __shfl_xor_sync(kFullWarp, sum, h);
#pragma unroll
    for (int i = 0; i < E; ++i) x[i] = 0.0f;
#pragma unroll 4
    for (int owner = 0; owner < owners; ++owner) {
      const float w = __shfl_sync(kFullWarp, weight, owner);
      const float* from = rows + (r + owner * block_rows) * C::kMergeStride + lane * E;
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

// The unit at the cursor, and moves the cursor on.
template <class C>
__device__ __forceinline__ void attend_unit(const AttendArgs& a, SharedHead* head, uint8_t* shared, const Cursor& now, RowState<C>& state) {
  const auto own = [&]() -> Cursor& { return head->cursors[this_warp()]; };
  const Run& run = head->runs[now.run % kMaxRuns];
  const Unit& unit = head->units[now.k.stage];
  wait_for_unit(head->k_full[now.k.stage], now.k.parity, unit.number, now.unit);
  const uint8_t* const k = shared + (a.k_stages + now.k.stage * a.k_stage_bytes);
  const auto v = [&] { return shared + (a.v_stages + own().v.stage * a.v_stage_bytes); };
  const float4* const q = reinterpret_cast<const float4*>(shared + now.q);
  const RowInfo* const info = reinterpret_cast<const RowInfo*>(shared + now.info);
  const auto wait_for_v = [&] { wait_for_unit(head->v_full[now.v.stage], now.v.parity, head->v_numbers[now.v.stage], now.unit); };
  const Lane lane(this_thread() % 32);
  const int kind = unit.kind, first_token = unit.first_token;
  if (now.has_rows != 0 && kind == kRecordUnit) {
    TileScores<C> scores;
    score_record<C>(a, run, k, first_token, q + lane.lane, info, lane, scores);
    release(head->k_empty[own().k.stage]);
    wait_for_v();
    add_record<C>(a, v(), scores, Lane(this_thread() % 32), state);
  } else {
    wait_for_v();
    if (now.has_rows == 0) {  // only to give the stages back
    } else if (kind == kInvalidUnit) {
      state.spoil();
    } else if (a.dtype == KVARN_F16) {
      attend_staging<C, __half>(a, run, k, v(), first_token, q, info, lane, state);
    } else if (a.dtype == KVARN_BF16) {
      attend_staging<C, __nv_bfloat16>(a, run, k, v(), first_token, q, info, lane, state);
    } else {
      attend_staging<C, float>(a, run, k, v(), first_token, q, info, lane, state);
    }
    release(head->k_empty[own().k.stage]);
  }
  release(head->v_empty[own().v.stage]);
  __syncwarp();  // the cursor is read
  if (this_thread() % 32 == 0) {
    Cursor& cursor = own();
    cursor.unit += a.tile_owners;
    cursor.k.advance(a.tile_owners, a.num_k_stages);
    cursor.v.advance(a.tile_owners, a.num_v_stages);
  }
}

// The step between runs: prepares this warp's rows of the next run without prepared rows, which is as many after `finished` as there are
// buffers, then finishes its rows of `finished`. Before the first run `finished` is negative; after the last there is nothing to prepare.
template <class C>
__device__ __forceinline__ void step_between_runs(const AttendArgs& a, SharedHead* head, uint8_t* shared, int finished, bool prepare) {
  const int warp = this_warp(), lane = this_thread() % 32;
  using Layout = SharedPlan<C>;
  // Every warp is done with the run: its rows of q may be overwritten, its results merged.
  if (finished >= 0) barrier_wait(shared_address(&head->merge_full), finished & 1);
  __syncwarp();
  const int buffers = q_buffers(a.row_groups);
  if (prepare) {
    const int next = finished + buffers, buffer = next & (buffers - 1);
    barrier_wait(shared_address(&head->run_full[next % kMaxRuns]), parity_of_run(next));
    __syncwarp();
    const Run& run = head->runs[next % kMaxRuns];
    if (run.end == 0) {
      // The last warps first: of a short run they have no tiles.
      prepare_rows<C>(a, run, C::kWarps - 1 - warp, C::kWarps, a.row_groups * C::kRows, head->rows + buffer * a.row_groups * C::kRows,
                      reinterpret_cast<float4*>(shared + Layout::q_offset() + buffer * Layout::q_bytes(a.row_groups)), lane);
      barrier_arrive(shared_address(&head->q_full[buffer]));
    }
  }
  if (finished >= 0) {
    const Run& run = head->runs[finished % kMaxRuns];
    const MergedRows<C> rows{reinterpret_cast<const float*>(shared + Layout::merge_offset(a.row_groups)),
                             reinterpret_cast<const float2*>(shared + Layout::sums_offset(a.row_groups, a.group_rows)), a.block_rows,
                             a.tile_owners};
    for (int r = warp; r < run.rows; r += C::kWarps) finish_row<C::D>(a, run, rows, r, lane);
    barrier_arrive(shared_address(&head->merge_empty));
    barrier_arrive(shared_address(&head->run_empty[finished % kMaxRuns]));
  }
  __syncwarp();
}

// Brings the cursor of this warp to run `number`, whose rows are prepared.
template <class C>
__device__ __forceinline__ void begin_run(const AttendArgs& a, SharedHead* head, Cursor& cursor, int number) {
  using Layout = SharedPlan<C>;
  const int buffers = q_buffers(a.row_groups), buffer = number & (buffers - 1);
  const Run& run = head->runs[max(number, 0) % kMaxRuns];  // described: the step that prepared its rows has waited for it
  const bool real = number >= 0 && run.end == 0;
  if (real) barrier_wait(shared_address(&head->q_full[buffer]), number / buffers & 1);
  __syncwarp();
  if (this_thread() % 32 == 0) {
    cursor.run = number;
    cursor.real = real ? 1 : 0;
    cursor.step_due = 1;
    cursor.has_rows = real && cursor.first_row < run.rows ? 1 : 0;
    if (real) cursor.unit_end = run.unit_end;
    const int row = cursor.has_rows != 0 ? cursor.first_row : 0;
    cursor.q = Layout::q_offset() + buffer * Layout::q_bytes(a.row_groups) + row * C::D * 4;
    cursor.info = static_cast<int>(offsetof(SharedHead, rows) + (buffer * a.row_groups * C::kRows + row) * sizeof(RowInfo));
  }
  __syncwarp();
}

// Leaves what this warp has of the run in the merge buffer, once the run before is out of it.
template <class C>
__device__ __forceinline__ void end_run(const AttendArgs& a, SharedHead* head, uint8_t* shared, const Cursor& cursor,
                                        const RowState<C>& state) {
  using Layout = SharedPlan<C>;
  if (cursor.run > 0) barrier_wait(shared_address(&head->merge_empty), (cursor.run - 1) & 1);
  __syncwarp();
  if (cursor.has_rows != 0) {
    const int row = this_warp() * a.group_rows;
    store_state<C>(reinterpret_cast<float*>(shared + Layout::merge_offset(a.row_groups)) + row * C::kMergeStride,
                   reinterpret_cast<float2*>(shared + Layout::sums_offset(a.row_groups, a.group_rows)) + row, a.group_rows,
                   Lane(this_thread() % 32), state);
  }
  barrier_arrive(shared_address(&head->merge_full));
}

template <class C>
__device__ __forceinline__ void compute_runs(const AttendArgs& a, SharedHead* head, uint8_t* shared) {
  const auto own = [&]() -> Cursor& { return head->cursors[this_warp()]; };
  const auto overlap = [&] { return q_buffers(a.row_groups) == 2; };
  if (this_thread() % 32 == 0) {
    const int owner = this_warp() / a.row_groups;
    // Warps beyond the last whole set of row groups only help with the rows of q and out.
    const bool owns = owner < a.tile_owners;
    Cursor c{};
    c.unit = owns ? owner : INT32_MAX;
    c.k.advance(owns ? owner : 0, a.num_k_stages);
    c.v.advance(owns ? owner : 0, a.num_v_stages);
    c.first_row = owns ? this_warp() % a.row_groups * a.group_rows : INT32_MAX;
    own() = c;
  }
  __syncwarp();
  begin_run<C>(a, head, own(), -1);  // without units: the rows of the first run are prepared
  for (;;) {
    RowState<C> state;
    state.clear();
    for (;;) {
      const Cursor& now = own();
      const bool has_unit = now.unit < now.unit_end;
      if (has_unit) {
        attend_unit<C>(a, head, shared, now, state);
      } else if (!overlap() && own().real != 0) {
        end_run<C>(a, head, shared, own(), state);
      }
      if (own().step_due != 0 && (overlap() || !has_unit)) {
        const int number = own().run;
        step_between_runs<C>(a, head, shared, overlap() ? number - 1 : number, number < 0 || own().real != 0);
        if (this_thread() % 32 == 0) own().step_due = 0;
      }
      __syncwarp();
      if (!has_unit) break;
    }
    const int number = own().run;
    if (number >= 0 && own().real == 0) return;
    if (overlap() && own().real != 0) end_run<C>(a, head, shared, own(), state);
    if (!overlap() && head->runs[(number + 1) % kMaxRuns].end != 0) return;
    begin_run<C>(a, head, own(), number + 1);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) attend_mma_kernel(const __grid_constant__ AttendArgs a) {
  extern __shared__ __align__(128) uint8_t shared[];
  SharedHead* const head = reinterpret_cast<SharedHead*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Walk walk;
  if (warp == C::kWarps) {
    walk = begin_walk(a, blockIdx.x, gridDim.x, lane);
  } else if (lane == 0) {  // an initialisation takes some 50 cycles, one lane after the other: every warp does a few
    static_assert(C::kWarps >= kMaxRuns + 2);
    // A stage is empty when the warps that share a unit are done with it.
    for (int i = warp; i < a.num_k_stages; i += C::kWarps) {
      head->units[i].number = -1;
      barrier_init(shared_address(&head->k_full[i]), kFullArrivals);
      barrier_init(shared_address(&head->k_empty[i]), 32 * a.row_groups);
    }
    for (int i = warp; i < a.num_v_stages; i += C::kWarps) {
      head->v_numbers[i] = -1;
      barrier_init(shared_address(&head->v_full[i]), kFullArrivals);
      barrier_init(shared_address(&head->v_empty[i]), 32 * a.row_groups);
    }
    if (warp < kMaxRuns) {
      barrier_init(shared_address(&head->run_full[warp]), 32);
      barrier_init(shared_address(&head->run_empty[warp]), C::kWarps * 32);
    } else if (warp == kMaxRuns) {
      for (int i = 0; i < 2; ++i) barrier_init(shared_address(&head->q_full[i]), C::kWarps * 32);
    } else if (warp == kMaxRuns + 1) {
      barrier_init(shared_address(&head->merge_full), C::kWarps * 32);
      barrier_init(shared_address(&head->merge_empty), C::kWarps * 32);
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
    loader.load_all(walk, blockIdx.x);
  }
}

template <class C>
AttendKernel attend_mma_of() {
  return {reinterpret_cast<const void*>(&attend_mma_kernel<C>), C::kThreads, C::kWarps, C::kRows, &SharedPlan<C>::stage_offset};
}

}  // namespace kvarn::cuda
