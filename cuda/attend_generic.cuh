// Attention for every format, tile length and head dimension, in plain fp32 without tensor cores: what attend_kernel.cuh is not made for.
//
// A block of 8 warps holds 8 query rows: for scores its threads share out the tokens of a tile, for the softmax a warp takes a row, for the
// output a thread takes one or two channels.
#pragma once

#include "attend_rows.cuh"
#include "record_values.cuh"

namespace kvarn::cuda {

constexpr int kGenericWarps = kGenericThreads / 32;
constexpr int kRows = kGenericRows;
static_assert(kRows == kGenericWarps, "a row a warp");
constexpr int kMostChannels = (kMaxHeadDim + kGenericThreads - 1) / kGenericThreads;

struct GenericHead {
  Run run;
  float2 sums[kRows];
  float factor[kRows];  // of the output so far
  int flag;
};

struct GenericShared {
  GenericHead* head;
  float* q;  // [head_dim][8 rows]; after the run: output rows [8][head_dim]
  float* p;  // [tile_tokens][8 rows]: logits, then probabilities
  float* metadata;
};

static_assert(sizeof(GenericHead) <= kGenericHeadBytes, "the launch makes room for it");

// `shared`: attend_generic_bytes().
__device__ __forceinline__ GenericShared generic_shared(const AttendArgs& a, uint8_t* shared) {
  GenericShared s;
  s.head = reinterpret_cast<GenericHead*>(shared);
  s.q = reinterpret_cast<float*>(shared + kGenericHeadBytes);
  s.p = s.q + kRows * a.head_dim;
  s.metadata = s.p + kRows * a.tile_tokens;
  return s;
}

// Row-wise dot products with what one thread sees of a token.
struct Dots {
  float of[kRows] = {};
  __device__ __forceinline__ void add(float x, const float* q) {
    const float4 a = *reinterpret_cast<const float4*>(q), b = *reinterpret_cast<const float4*>(q + 4);
    of[0] = fmaf(x, a.x, of[0]), of[1] = fmaf(x, a.y, of[1]), of[2] = fmaf(x, a.z, of[2]), of[3] = fmaf(x, a.w, of[3]);
    of[4] = fmaf(x, b.x, of[4]), of[5] = fmaf(x, b.y, of[5]), of[6] = fmaf(x, b.z, of[6]), of[7] = fmaf(x, b.w, of[7]);
  }
};

__device__ inline void score_tile(const AttendArgs& a, const Run& run, const GenericShared& s, const uint8_t* record, int64_t staging_k,
                                  int first_token, int limit) {
  const int per_token = kGenericThreads / a.tile_tokens;  // threads, neighbours in a warp; tile_tokens is 32 to 256
  const int token = threadIdx.x / per_token, part = threadIdx.x % per_token;
  const MetadataFloats m = metadata_floats(a.head_dim, a.tile_tokens);
  Dots dots;
  if (token < limit) {
    for (int d = part; d < a.head_dim; d += per_token) {
      float k;
      if (record != nullptr) {
        k = fmaf(static_cast<float>(k_code(record, a.layout, token, d)), s.metadata[m.offset[kKScale] + d],
                 s.metadata[m.offset[kKZero] + d]);
      } else {
        k = load_value(a.staging, staging_k + static_cast<int64_t>(token) * a.head_dim + d, a.dtype);
      }
      dots.add(k, s.q + d * kRows);
    }
  }
  const float token_scale = record != nullptr ? s.metadata[m.offset[kKTokenScale] + token] : 1.0f;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float x = dots.of[r];
    for (int h = per_token / 2; h >= 1; h /= 2) x += __shfl_xor_sync(kFullWarp, x, h);
    if (part != 0) continue;
    x *= token_scale * a.softmax_scale;
    const int row = run.first_row + min(r, run.rows - 1);
    const int position = first_token + token, own = row_position(run, row, a.group);
    if (a.soft_cap > 0.0f) x = a.soft_cap * tanhf(x / a.soft_cap);
    if (a.alibi_slopes != nullptr) x += a.alibi_slopes[run.kv_head * a.group + row % a.group] * static_cast<float>(position - own);
    const bool seen = token < limit && position <= last_visible(a, own, run.seq_len) && position >= first_visible(a, own);
    s.p[token * kRows + r] = seen ? x * kLog2E : -INFINITY;
  }
}

// Logits to probabilities against the row's running maximum; one warp a row.
__device__ inline void softmax_row(const AttendArgs& a, const GenericShared& s, int row, int lane) {
  float most = -INFINITY;
  for (int t = lane; t < a.tile_tokens; t += 32) most = fmaxf(most, s.p[t * kRows + row]);
#pragma unroll
  for (int h = 16; h >= 1; h /= 2) most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, h));
  const float2 before = s.head->sums[row];
  const float next = fmaxf(before.x, most);
  const float base = next == -INFINITY ? 0.0f : next;
  float sum = 0.0f;
  for (int t = lane; t < a.tile_tokens; t += 32) {
    const float p = exp2f(s.p[t * kRows + row] - base);
    s.p[t * kRows + row] = p;
    sum += p;
  }
#pragma unroll
  for (int h = 16; h >= 1; h /= 2) sum += __shfl_xor_sync(kFullWarp, sum, h);
  __syncwarp();
  if (lane == 0) {
    const float factor = exp2_difference(before.x, next);
    s.head->factor[row] = factor;
    s.head->sums[row] = make_float2(next, before.y * factor + sum);
  }
}

__device__ inline void add_values(const AttendArgs& a, const GenericShared& s, const uint8_t* record, int64_t staging_v, int limit,
                                  float (&out)[kMostChannels][kRows]) {
  const MetadataFloats m = metadata_floats(a.head_dim, a.tile_tokens);
#pragma unroll
  for (int c = 0; c < kMostChannels; ++c) {
    const int d = threadIdx.x + c * kGenericThreads;
    if (d >= a.head_dim) continue;
    float sums[kRows] = {};
    for (int t = 0; t < limit; ++t) {
      float v;
      if (record != nullptr) {
        v = fmaf(static_cast<float>(v_code(record, a.layout, t, d)), s.metadata[m.offset[kVScale] + t], s.metadata[m.offset[kVZero] + t]) *
            s.metadata[m.offset[kVChannelScale] + d];
      } else {
        v = load_value(a.staging, staging_v + static_cast<int64_t>(t) * a.head_dim + d, a.dtype);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float p = s.p[t * kRows + r];
        // A token that a row does not see must not lend it its NaN.
        if (p != 0.0f) sums[r] = fmaf(p, v, sums[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) out[c][r] = fmaf(out[c][r], s.head->factor[r], sums[r]);
  }
}

struct SharedRows {
  float* rows;  // [8][head_dim]
  const float2* sums;
  int head_dim;
  __device__ __forceinline__ float2 load(int r, int lane, float (&x)[RowLanes<0>::E]) const {
#pragma unroll
    for (int i = 0; i < RowLanes<0>::E; ++i) {
      const int d = RowLanes<0>::index(lane, i);
      x[i] = d < head_dim ? rows[r * head_dim + d] : 0.0f;
    }
    return sums[r];
  }
  __device__ __forceinline__ float* scratch(int r) const { return rows + r * head_dim; }
};

__device__ inline void begin_run(const AttendArgs& a, const GenericShared& s, int warp, int lane) {
  using Lanes = RowLanes<0>;
  const Run& run = s.head->run;
  // One row a warp; rows past the last repeat it.
  float x[Lanes::E];
  load_q_row<0>(a, run, run.first_row + min(warp, run.rows - 1), lane, s.metadata + warp * a.head_dim, x);
#pragma unroll
  for (int i = 0; i < Lanes::E; ++i) {
    if (Lanes::index(lane, i) < a.head_dim) s.q[Lanes::index(lane, i) * kRows + warp] = x[i];
  }
  if (lane == 0) s.head->sums[warp] = make_float2(-INFINITY, 0.0f);
}

// The run's tiles: leaves the rows' unnormalised outputs in s.q, their maxima and sums in s.head->sums.
__device__ __forceinline__ void attend_tiles(const AttendArgs& a, const GenericShared& s, int warp, int lane) {
  const Run& run = s.head->run;
  float out[kMostChannels][kRows] = {};
  const MetadataFloats m = metadata_floats(a.head_dim, a.tile_tokens);
  const int64_t tile_values = static_cast<int64_t>(a.tile_tokens) * a.head_dim;
  for (int tile = run.tile_begin; tile < run.tile_end; ++tile) {
    const int entry = tile < a.max_tiles ? a.block_table[run.sequence * a.block_table_stride + tile] : INT32_MAX;
    const bool valid = entry >= 0 ? entry < a.num_blocks : ~entry < a.num_slots;
    if (!valid) {
      if (threadIdx.x < kRows) s.head->sums[threadIdx.x].y = NAN;
      __syncthreads();
      continue;
    }
    const uint8_t* record = nullptr;
    int64_t staging_k = 0, staging_v = 0;
    const int first_token = tile * a.tile_tokens;
    // Nothing behind what some row sees is read: in a slot it may be undefined.
    const int limit = min(a.tile_tokens, run.last_visible + 1 - first_token);
    if (entry >= 0) {
      record = a.records + (static_cast<int64_t>(entry) * a.num_kv_heads + run.kv_head) * a.record_bytes;
      spread_metadata(record, a.layout, m, s.metadata, threadIdx.x, kGenericThreads);
    } else {
      staging_k = (static_cast<int64_t>(~entry) * 2 * a.num_kv_heads + run.kv_head) * tile_values;
      staging_v = staging_k + a.num_kv_heads * tile_values;
    }
    __syncthreads();  // metadata is spread out; the last tile's probabilities are used up
    score_tile(a, run, s, record, staging_k, first_token, limit);
    __syncthreads();  // logits are written
    softmax_row(a, s, warp, lane);
    __syncthreads();  // probabilities are written
    add_values(a, s, record, staging_v, limit, out);
    __syncthreads();  // metadata and probabilities are read
  }
#pragma unroll
  for (int c = 0; c < kMostChannels; ++c) {
    const int d = threadIdx.x + c * kGenericThreads;
    if (d >= a.head_dim) continue;
#pragma unroll
    for (int r = 0; r < kRows; ++r) s.q[r * a.head_dim + d] = out[c][r];
  }
  __syncthreads();  // output rows are written
}

__device__ __noinline__ void attend_run(const AttendArgs& a, const GenericShared& s, int warp, int lane) {
  const Run& run = s.head->run;
  begin_run(a, s, warp, lane);
  __syncthreads();  // q is written
  attend_tiles(a, s, warp, lane);
  if (warp < run.rows) finish_row<0>(a, run, SharedRows{s.q, s.head->sums, a.head_dim}, warp, lane);
  __syncthreads();  // q's memory and the run's description are free
}

}  // namespace kvarn::cuda
