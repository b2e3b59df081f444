// Attention over records and staging on the tensor cores.
//
//   score[t] = k_token_scale[t] * ( sum_d (q[d]*k_scale[d]) * code[t,d] + sum_d q[d]*k_zero[d] )
//   out[d]  += v_channel_scale[d] * ( sum_t (p[t]*v_scale[t]) * code[t,d] + sum_t p[t]*v_zero[t] )
//
// One block an SM, one warp that loads and kWarps that compute. Loads are units in a ring of stages in shared memory: a whole record (read
// once, as one bulk copy on sm_90 and later), or 16 tokens of a staging slot. Unit x is computed by the warps whose number among the tile
// owners is x modulo their count; `row_groups` warps share a unit, each with 8*NT query rows of its own, so many rows cost one reading.
// A computing warp keeps output, maximum and sum of its rows in registers over all its tiles; the block's warps merge at the end of a run.
//
// Products: codes are the 16-row operand (tokens for scores, channels for the output), query rows the 8-column one, both
// m16n8k16 with fp32 sums. Scales fold into q and into the probabilities, in fp32, before these are rounded to fp16: q is brought to
// [1/2, 1) by a power of two, probabilities are relative to the tile's own maximum and v_scale to its largest, so neither end of fp16's
// range is met. q enters as a high and a low fp16 part, so that scores of any size are exact to fp32's precision; a probability is rounded
// once, at most 2^-11 of its own size. Staging tiles use two parts for both.
//
// For k4v2, D = 128, 8 rows: a record is 13,824 bytes = 1,034 cycles of an SM's share of 3.0 TB/s at 1.76 GHz, 4,136 issue slots. Unpacking
// costs 0.875 instructions a pair of 4-bit codes and 0.625 of 2-bit ones, 384 in all; 200 products, 32 + 24 shared loads; folding, softmax
// and the update of the output 750.
#pragma once

#include "attend_rows.cuh"
#include "attend_unpack.cuh"

namespace kvarn::cuda {

constexpr int kTile = 128;        // tokens of a tile this kernel is made for
constexpr int kStagingUnit = 16;  // tokens of one staging load
constexpr int kMaxStages = 32;
constexpr int kMaxBlockRows = 128;

template <int D_, int NT_, int WARPS_>
struct AttendMma {
  static constexpr int D = D_;
  static constexpr int NT = NT_;  // columns of 8 query rows
  static constexpr int kWarps = WARPS_;
  static constexpr int kThreads = (WARPS_ + 1) * 32;  // 3 warps of 168 registers or 2 of 255 share a quarter of the SM
  static constexpr int kRows = 8 * NT;
  static constexpr int kQuads = D / 16;     // quads of channels a lane holds
  static constexpr int kRowStride = D + 4;  // floats: rows two apart fall into different banks
  static_assert(D == 64 || D == 128 || D == 256 || D == 512, "a power of two, so that rows are whole runs of codes");
};

// Codes that a lane takes from a row in one piece. 32 make longer loads, 16 let 16 query rows fold 64 channels at a time.
template <class C>
constexpr bool kWideRuns = C::D >= 128 && C::NT == 1;
template <class C, int BITS>
constexpr int kRunCodes = kWideRuns<C> && BITS != 8 ? 32 : 16;

enum UnitKind : int { kRecordUnit, kStagingUnitKind, kInvalidUnit };

struct Unit {
  int kind;
  int first_token;  // position of the first token
};

struct RowInfo {
  float scale;  // of scores as the record products give them, to base-2 logits
  float slope;  // ALiBi, base 2
  int position;
  int unused;
};

// Shared memory: this, q (later output rows), the merge buffer, the stages.
struct SharedHead {
  uint64_t full[kMaxStages], empty[kMaxStages];
  uint64_t run_full[2], run_empty[2];
  Unit units[kMaxStages];
  Run runs[2];
  RowInfo rows[kMaxBlockRows];
  float2 sums[kMaxBlockRows];
  int flag;
};

template <class C>
struct SharedPlan {
  static __host__ __device__ constexpr int align(int bytes) { return (bytes + 127) / 128 * 128; }
  static __host__ __device__ constexpr int q_offset() { return align(static_cast<int>(sizeof(SharedHead))); }
  static __host__ __device__ constexpr int q_bytes(int row_groups) { return align(row_groups * C::kRows * C::kRowStride * 4); }
  static __host__ __device__ constexpr int merge_offset(int row_groups) { return q_offset() + q_bytes(row_groups); }
  // Half of the warps hand their sums to the other half.
  static __host__ __device__ constexpr int merge_bytes(int row_groups) {
    return C::kWarps / row_groups < 2 ? 0 : align(C::kWarps / 2 * C::kRows * (C::D + 2) * 4);
  }
  static __host__ __device__ constexpr int stage_offset(int row_groups) { return merge_offset(row_groups) + merge_bytes(row_groups); }
};

// ---- the loading warp ----------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int staging_pitch(const AttendArgs& a) { return a.head_dim * dtype_bytes(a.dtype) + 16; }

class Loader {
 public:
  __device__ __forceinline__ Loader(const AttendArgs& a, SharedHead* head, uint32_t stages, int lane)
      : a_(a), head_(head), stages_(stages), lane_(lane) {}

  // The description of the next run, once the computing warps have done with the one before the last.
  __device__ __forceinline__ Run* open() {
    barrier_wait(shared_address(&head_->run_empty[runs_ & 1]), ((runs_ >> 1) & 1) ^ 1);
    return &head_->runs[runs_ & 1];
  }
  __device__ __forceinline__ void visit() {
    Run& run = head_->runs[runs_ & 1];
    // Count the loads first: the computing warps must know where the run ends.
    const int tile_begin = run.tile_begin, tile_end = run.tile_end;
    int units = 0;
    for (int tile = tile_begin + lane_; tile < tile_end; tile += 32) units += units_of(run, tile, entry(run, tile));
#pragma unroll
    for (int h = 16; h >= 1; h /= 2) units += __shfl_xor_sync(kFullWarp, units, h);
    if (lane_ == 0) {
      run.unit_end = unit_ + units;
      barrier_arrive(shared_address(&head_->run_full[runs_ & 1]));
    }
    unit_ += units;
    ++runs_;
    for (int base = tile_begin; base < tile_end; base += 32) {
      const int mine = base + lane_ < tile_end ? entry(run, base + lane_) : kNoEntry;
      const int count = min(32, tile_end - base);
      for (int i = 0; i < count; ++i) load_tile(run, base + i, __shfl_sync(kFullWarp, mine, i));
    }
  }

 private:
  static constexpr int kNoEntry = INT32_MAX;  // blocks and slots are counted in int32, so no entry has this value

  // Block, ~slot, or kNoEntry.
  __device__ __forceinline__ int entry(const Run& run, int tile) const {
    if (tile >= a_.max_tiles) return kNoEntry;
    const int e = a_.block_table[run.sequence * a_.block_table_stride + tile];
    return (e >= 0 ? e < a_.num_blocks : ~e < a_.num_slots) ? e : kNoEntry;
  }
  __device__ __forceinline__ void staging_span(const Run& run, int tile, int& first, int& last) const {
    first = max(run.first_visible - tile * kTile, 0) / kStagingUnit;
    last = min(run.last_visible - tile * kTile, kTile - 1) / kStagingUnit;
  }
  __device__ __forceinline__ int units_of(const Run& run, int tile, int e) const {
    if (e >= 0) return 1;
    int first, last;
    staging_span(run, tile, first, last);
    return last - first + 1;
  }
  // Waits for the stage to be free and describes its unit; returns the barrier that the copies arrive on.
  __device__ __forceinline__ uint32_t open_stage(UnitKind kind, int first_token, uint32_t bytes) {
    barrier_wait(shared_address(&head_->empty[stage_]), parity_ ^ 1);
    const uint32_t full = shared_address(&head_->full[stage_]);
    if (lane_ == 0) {
      head_->units[stage_] = Unit{kind, first_token};
#if __CUDA_ARCH__ >= 900
      barrier_arrive_expect(full, bytes);
#else
      barrier_arrive(full);
#endif
    }
    __syncwarp();
    return full;
  }
  __device__ __forceinline__ void close_stage(uint32_t full) {
#if __CUDA_ARCH__ < 900
    barrier_arrive_copies(full);
#endif
    if (++stage_ == a_.num_stages) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }
  __device__ __forceinline__ uint32_t stage_address() const { return stages_ + stage_ * a_.stage_bytes; }

  __device__ __forceinline__ void load_tile(const Run& run, int tile, int e) {
    if (e == kNoEntry) {
      close_stage(open_stage(kInvalidUnit, tile * kTile, 0));
      return;
    }
    if (e >= 0) {
      const uint8_t* from = a_.records + (int64_t{e} * a_.num_kv_heads + run.kv_head) * a_.record_bytes;
      const uint32_t bytes = static_cast<uint32_t>(a_.record_bytes);
      const uint32_t full = open_stage(kRecordUnit, tile * kTile, bytes);
#if __CUDA_ARCH__ >= 900
      if (lane_ == 0) copy_bulk(stage_address(), from, bytes, full);
#else
      for (uint32_t at = lane_ * 16; at < bytes; at += 512) copy16(stage_address() + at, from + at);
#endif
      close_stage(full);
      return;
    }
    const uint32_t row_bytes = static_cast<uint32_t>(a_.head_dim * dtype_bytes(a_.dtype));
    const uint32_t pitch = row_bytes + 16;
    const int64_t head_bytes = int64_t{kTile} * row_bytes;
    const uint8_t* k = a_.staging + (int64_t{~e} * 2 * a_.num_kv_heads + run.kv_head) * head_bytes;
    const uint8_t* v = k + a_.num_kv_heads * head_bytes;
    int first, last;
    staging_span(run, tile, first, last);
    for (int group = first; group <= last; ++group) {
      const uint32_t full = open_stage(kStagingUnitKind, tile * kTile + group * kStagingUnit, 2 * kStagingUnit * row_bytes);
#if __CUDA_ARCH__ >= 900
      // One row a lane: 16 of K, then 16 of V.
      const uint8_t* from =
          (lane_ < kStagingUnit ? k : v) + (group * kStagingUnit + lane_ % kStagingUnit) * static_cast<int64_t>(row_bytes);
      copy_bulk(stage_address() + lane_ * pitch, from, row_bytes, full);
#else
      const uint32_t row_copies = row_bytes / 16;
      for (uint32_t i = lane_; i < 2 * kStagingUnit * row_copies; i += 32) {
        const uint32_t row = i / row_copies, column = i % row_copies * 16;
        const uint8_t* from =
            (row < kStagingUnit ? k : v) + (group * kStagingUnit + row % kStagingUnit) * static_cast<int64_t>(row_bytes) + column;
        copy16(stage_address() + row * pitch + column, from);
      }
#endif
      close_stage(full);
    }
  }

  const AttendArgs& a_;
  SharedHead* head_;
  uint32_t stages_;
  int lane_;
  int unit_ = 0, stage_ = 0, runs_ = 0;
  uint32_t parity_ = 0;
};

// ---- the computing warps -------------------------------------------------------------------------------------------------------------

// Where a token of a record tile sits among the rows of the score products. V's lane t holds tokens [32t, 32t+32), so row r of 8-row block
// 2*quad + e is token 32*(r/2) + 4*quad + e + 2*(r%2): after transposition lane t holds the probabilities of its own tokens.
struct Lane {
  int lane, g, t;
  int token;  // of row g, quad 0, even
  __device__ __forceinline__ explicit Lane(int l) : lane(l), g(l >> 2), t(l & 3), token(32 * (l >> 3) + 2 * ((l >> 2) & 1)) {}
};

// What a computing warp carries from tile to tile of a run.
template <class C>
struct RowState {
  float out[C::kQuads][C::NT][4];  // channels 16i + {g, g+8}, rows 8n + {2t, 2t+1}
  float most[C::NT][2];            // maximum logit, base 2
  float sum[C::NT][2];             // this lane's share
};

// Row constants of a run.
template <class C>
struct RowView {
  float scale[C::NT][2];
  const RowInfo* info;        // of this warp's rows
  int full_first, full_last;  // positions between which every row of the block sees everything
};

// scores[quad][n][..] of a record tile, times RowView::scale and k_token_scale still to come. q * k_scale enters as a high and a low part.
template <class C, int BITS>
__device__ __forceinline__ void record_scores(const uint8_t* codes, const __half* k_scale, const __half* k_zero, const float4* q,
                                              const Lane& lane, float (&scores)[8][C::NT][4]) {
  constexpr int D = C::D, NT = C::NT, kRun = kRunCodes<C, BITS>;
  constexpr int kRunQuads = kRun / 4;
  constexpr int kBlockQuads = NT == 1 && C::kQuads >= 8 ? 8 : 4;  // channels are folded 128 or 64 at a time
  constexpr int kBlockRuns = kBlockQuads / kRunQuads;
  using Code = Codes<BITS>;
  using Row = RowRun<BITS, D, kRun>;
  const uint8_t* high_plane = codes + kTile * Row::kLowRowBytes;
  const int line = 8 * (lane.g >> 1), row = 2 * (lane.g & 1);

#pragma unroll
  for (int block = 0; block < C::kQuads / kBlockQuads; ++block) {
    uint32_t high[NT][kBlockQuads][2], low[NT][kBlockQuads][2];  // of the even and the odd channels of a quad
    float zero[NT] = {};
#pragma unroll
    for (int x = 0; x < kBlockQuads; x += 2) {
      const int quad = block * kBlockQuads + x;
      const int channel = (quad / kRunQuads * 4 + lane.t) * kRun + quad % kRunQuads * 4;
      const uint4 s4 = *reinterpret_cast<const uint4*>(k_scale + channel);
      const uint4 z4 = *reinterpret_cast<const uint4*>(k_zero + channel);
      const uint32_t s2[4] = {s4.x, s4.y, s4.z, s4.w}, z2[4] = {z4.x, z4.y, z4.z, z4.w};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 sa = unpack_half2(s2[2 * i]), sb = unpack_half2(s2[2 * i + 1]);
        const float2 za = unpack_half2(z2[2 * i]), zb = unpack_half2(z2[2 * i + 1]);
        // The constant under every code comes off with the zero term.
        constexpr float kBias = 1024.0f;
        const float even_bias = -kBias / Code::even_scale(x + i), odd_bias = -kBias / Code::odd_scale(x + i);
        const float m0 = fmaf(sa.x, even_bias, za.x), m1 = fmaf(sa.y, odd_bias, za.y);
        const float m2 = fmaf(sb.x, even_bias, zb.x), m3 = fmaf(sb.y, odd_bias, zb.y);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const float4 v = q[(n * C::kQuads + quad + i) * 32];
          zero[n] = fmaf(v.x, m0, fmaf(v.y, m1, fmaf(v.z, m2, fmaf(v.w, m3, zero[n]))));
          split_half2(v.x * sa.x, v.z * sb.x, high[n][x + i][0], low[n][x + i][0]);
          split_half2(v.y * sa.y, v.w * sb.y, high[n][x + i][1], low[n][x + i][1]);
          if constexpr (!Code::kUniform) {
            const uint32_t factor[2] = {Code::even_factor(x + i), Code::odd_factor(x + i)};
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
              high[n][x + i][odd] = multiply_half2(high[n][x + i][odd], factor[odd]);
              low[n][x + i][odd] = multiply_half2(low[n][x + i][odd], factor[odd]);
            }
          }
        }
      }
    }
    float start[NT][2];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      zero[n] += __shfl_xor_sync(kFullWarp, zero[n], 1);
      zero[n] += __shfl_xor_sync(kFullWarp, zero[n], 2);
      start[n][0] = Code::kScale * __shfl_sync(kFullWarp, zero[n], 8 * lane.t);
      start[n][1] = Code::kScale * __shfl_sync(kFullWarp, zero[n], 8 * lane.t + 4);
    }
#pragma unroll
    for (int quad = 0; quad < 8; quad += 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
          for (int j = 0; j < 4; ++j) scores[quad + i][n][j] = block == 0 ? start[n][j & 1] : scores[quad + i][n][j] + start[n][j & 1];
        }
      }
#pragma unroll
      for (int r = 0; r < kBlockRuns; ++r) {
        Row rows[2][2];
        const int run = (block * kBlockRuns + r) * 4 + lane.t;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint8_t* low_line = codes + (line + quad + i) * (kLineRows * Row::kLowRowBytes);
          const uint8_t* high_line = high_plane + (line + quad + i) * (kLineRows * Row::kHighRowBytes);
          rows[i][0].load(low_line, high_line, row, run);
          rows[i][1].load(low_line, high_line, row + 1, run);
        }
#pragma unroll
        for (int x = 0; x < kRunQuads; ++x) {
          const int at = r * kRunQuads + x;
          uint32_t a[2][4];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            Code::quad(rows[i][0].low, rows[i][0].high, x, a[i][0], a[i][2]);
            Code::quad(rows[i][1].low, rows[i][1].high, x, a[i][1], a[i][3]);
#pragma unroll
            for (int n = 0; n < NT; ++n) {
              mma<__half>(scores[quad + i][n], a[i][0], a[i][1], a[i][2], a[i][3], high[n][at][0], high[n][at][1]);
            }
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int n = 0; n < NT; ++n) {
              mma<__half>(scores[quad + i][n], a[i][0], a[i][1], a[i][2], a[i][3], low[n][at][0], low[n][at][1]);
            }
          }
        }
      }
    }
  }
}

// Maximum over the 8 lanes that hold the same columns.
__device__ __forceinline__ float column_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 4));
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 8));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 16));
}
__device__ __forceinline__ float column_sum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 4);
  x += __shfl_xor_sync(kFullWarp, x, 8);
  return x + __shfl_xor_sync(kFullWarp, x, 16);
}

// One score (product, with its scale) to a base-2 logit, or minus infinity.
__device__ __forceinline__ float special_logit(const AttendArgs& a, const Run& run, const RowInfo& row, float x, int position) {
  if (a.soft_cap > 0.0f) {
    const float cap = a.soft_cap * kLog2E;
    // tanh(y) = 1 - 2 / (exp(2y) + 1) with y = x / cap
    const float e = exp2_approx(x * (2.0f * kLog2E / cap));
    x = fmaf(-2.0f * cap, reciprocal_approx(e + 1.0f), cap);
  }
  x += row.slope * static_cast<float>(position - row.position);
  const bool seen = position <= last_visible(a, row.position, run.seq_len) && position >= first_visible(a, row.position);
  return seen ? x : -INFINITY;
}

// The tile's weights against the running sums, for one column.
struct Merge {
  float old_factor, new_factor;
  bool dead;  // the row sees nothing here
};
__device__ __forceinline__ Merge merge_maximum(float tile_most, float& most) {
  const float next = fmaxf(most, tile_most);
  Merge m{exp2_difference(most, next), exp2_difference(tile_most, next), tile_most == -INFINITY};
  most = next;
  return m;
}

// Output of a record tile: out = out * old + v_channel_scale * (codes . p + zero) * factor. p: [n][8-row block] as columns of fp16.
template <class C, int BITS>
__device__ __forceinline__ void record_values(const uint8_t* codes, const __half* v_channel_scale, uint32_t (&p)[C::NT][16],
                                              const float (&zero)[C::NT][2], const float (&factor)[C::NT][2], const bool (&dead)[C::NT][2],
                                              bool some_dead, const Lane& lane, RowState<C>& state) {
  constexpr int NT = C::NT;
  using Code = Codes<BITS>;
  using Row = RowRun<BITS, kTile, 32>;
  const uint8_t* high = codes + C::D * Row::kLowRowBytes;
  float start[NT][4];
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    if constexpr (!Code::kUniform) {
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        p[n][2 * x] = multiply_half2(p[n][2 * x], Code::even_factor(x));
        p[n][2 * x + 1] = multiply_half2(p[n][2 * x + 1], Code::odd_factor(x));
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) start[n][j] = 0.0f;
#pragma unroll
    for (int x = 0; x < 8; ++x) {
      mma<__half>(start[n], Code::even_constant(x), Code::even_constant(x), Code::odd_constant(x), Code::odd_constant(x), p[n][2 * x],
                  p[n][2 * x + 1]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) start[n][j] += Code::kScale * zero[n][j & 1];
  }
#pragma unroll
  for (int tile = 0; tile < C::kQuads; tile += 2) {
    float sums[2][NT][4];
    Row rows[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][n][j] = start[n][j];
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int line = 4 * (tile + i) + 2 * h + (lane.g >> 2);
        rows[i][h].load(codes + line * (kLineRows * Row::kLowRowBytes), high + line * (kLineRows * Row::kHighRowBytes), lane.g & 3, lane.t);
      }
    }
#pragma unroll
    for (int x = 0; x < 8; ++x) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t a0, a1, a2, a3;
        Code::quad(rows[i][0].low, rows[i][0].high, x, a0, a2);
        Code::quad(rows[i][1].low, rows[i][1].high, x, a1, a3);
#pragma unroll
        for (int n = 0; n < NT; ++n) mma<__half>(sums[i][n], a0, a1, a2, a3, p[n][2 * x], p[n][2 * x + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float scale[2] = {__half2float(v_channel_scale[16 * (tile + i) + lane.g]),
                              __half2float(v_channel_scale[16 * (tile + i) + lane.g + 8])};
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float f = scale[j >> 1] * (factor[n][j & 1] * (1.0f / Code::kScale));
          // A row that sees nothing of this tile must not meet its NaN either.
          if (some_dead) {
            if (!dead[n][j & 1]) state.out[tile + i][n][j] = fmaf(sums[i][n][j], f, state.out[tile + i][n][j]);
          } else {
            state.out[tile + i][n][j] = fmaf(sums[i][n][j], f, state.out[tile + i][n][j]);
          }
        }
      }
    }
  }
}

template <class C>
__device__ __forceinline__ void rescale(const float (&old_factor)[C::NT][2], RowState<C>& state) {
  bool same = true;
#pragma unroll
  for (int n = 0; n < C::NT; ++n) same = same && old_factor[n][0] == 1.0f && old_factor[n][1] == 1.0f;
  if (__all_sync(kFullWarp, same)) return;
#pragma unroll
  for (int i = 0; i < C::kQuads; ++i) {
#pragma unroll
    for (int n = 0; n < C::NT; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) state.out[i][n][j] *= old_factor[n][j & 1];
    }
  }
}

template <class C>
__device__ __forceinline__ void attend_record(const AttendArgs& a, const Run& run, const uint8_t* record, int first_token, const float4* q,
                                              const RowView<C>& view, const Lane& lane, RowState<C>& state) {
  constexpr int D = C::D, NT = C::NT;
  const __half* metadata = reinterpret_cast<const __half*>(record + a.metadata_offset);
  const __half* k_scale = metadata;
  const __half* k_zero = k_scale + D;
  const __half* k_token_scale = k_zero + D;
  const __half* v_channel_scale = k_token_scale + kTile;
  const __half* v_scale = v_channel_scale + D;
  const __half* v_zero = v_scale + kTile;

  float scores[8][NT][4];
  switch (a.k_bits) {
    case 2:
      record_scores<C, 2>(record, k_scale, k_zero, q, lane, scores);
      break;
    case 3:
      record_scores<C, 3>(record, k_scale, k_zero, q, lane, scores);
      break;
    case 4:
      record_scores<C, 4>(record, k_scale, k_zero, q, lane, scores);
      break;
    default:
      record_scores<C, 8>(record, k_scale, k_zero, q, lane, scores);
      break;
  }

  // Logits. In the plain case the row's scale is applied inside the exponent.
  const bool masked = first_token < view.full_first || first_token + kTile - 1 > view.full_last;
  const bool special = masked || a.soft_cap > 0.0f || a.alibi_slopes != nullptr;
#pragma unroll
  for (int quad = 0; quad < 8; ++quad) {
    const float2 token_scale = __half22float2(*reinterpret_cast<const __half2*>(k_token_scale + lane.token + 4 * quad));
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      scores[quad][n][0] *= token_scale.x;
      scores[quad][n][1] *= token_scale.x;
      scores[quad][n][2] *= token_scale.y;
      scores[quad][n][3] *= token_scale.y;
    }
  }
  float scale[NT][2];
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    scale[n][0] = special ? 1.0f : view.scale[n][0];
    scale[n][1] = special ? 1.0f : view.scale[n][1];
  }
  if (special) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const RowInfo row = view.info[8 * n + 2 * lane.t + column];
#pragma unroll
        for (int quad = 0; quad < 8; ++quad) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = scores[quad][n][2 * e + column];
            x = special_logit(a, run, row, x * view.scale[n][column], first_token + lane.token + 4 * quad + e);
          }
        }
      }
    }
  }

  // v_scale brought to [128, 256) by a power of two.
  __half2 largest = __half2half2(__ushort_as_half(0));
#pragma unroll
  for (int quad = 0; quad < 8; ++quad) {
    largest = __hmax2(largest, __habs2(*reinterpret_cast<const __half2*>(v_scale + lane.token + 4 * quad)));
  }
  const float most_scale = column_max(fmaxf(__low2float(largest), __high2float(largest)));
  const uint32_t exponent = max((__float_as_uint(most_scale) >> 23) & 255u, 32u);
  const float up = __uint_as_float((261u - exponent) << 23);
  const float down = __uint_as_float((exponent - 7u) << 23);

  float middle;  // of V's codes
  switch (a.v_bits) {
    case 2:
      middle = Codes<2>::kMiddle;
      break;
    case 3:
      middle = Codes<3>::kMiddle;
      break;
    case 4:
      middle = Codes<4>::kMiddle;
      break;
    default:
      middle = Codes<8>::kMiddle;
      break;
  }

  float zero[NT][2], factor[NT][2], old_factor[NT][2], base[NT][2];
  bool dead[NT][2];
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      float most = -INFINITY;
#pragma unroll
      for (int quad = 0; quad < 8; ++quad) most = fmaxf(most, fmaxf(scores[quad][n][column], scores[quad][n][2 + column]));
      most = column_max(most) * scale[n][column];
      const Merge merge = merge_maximum(most, state.most[n][column]);
      base[n][column] = merge.dead ? 0.0f : -most;
      old_factor[n][column] = merge.old_factor;
      factor[n][column] = merge.new_factor;
      dead[n][column] = merge.dead;
      zero[n][column] = 0.0f;
      state.sum[n][column] *= merge.old_factor;
    }
  }
  uint32_t p[NT][16];
  float sums[NT][2] = {};
#pragma unroll
  for (int quad = 0; quad < 8; ++quad) {
    const float2 vs = __half22float2(*reinterpret_cast<const __half2*>(v_scale + lane.token + 4 * quad));
    const float2 vz = __half22float2(*reinterpret_cast<const __half2*>(v_zero + lane.token + 4 * quad));
    const float centre[2] = {fmaf(vs.x, middle, vz.x), fmaf(vs.y, middle, vz.y)};
    const float weight[2] = {vs.x * up, vs.y * up};
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float p0 = exp2_approx(fmaf(scores[quad][n][2 * e], scale[n][0], base[n][0]));
        const float p1 = exp2_approx(fmaf(scores[quad][n][2 * e + 1], scale[n][1], base[n][1]));
        sums[n][0] += p0;
        sums[n][1] += p1;
        zero[n][0] = fmaf(p0, centre[e], zero[n][0]);
        zero[n][1] = fmaf(p1, centre[e], zero[n][1]);
        p[n][2 * quad + e] = transpose8x8(pack_half2(p0 * weight[e], p1 * weight[e]));
      }
    }
  }
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      zero[n][column] = column_sum(zero[n][column]) * up;
      state.sum[n][column] = fmaf(sums[n][column], factor[n][column], state.sum[n][column]);
      factor[n][column] *= down;
    }
  }
  rescale<C>(old_factor, state);
  const uint8_t* v_codes = record + a.v_offset;
  switch (a.v_bits) {
    case 2:
      record_values<C, 2>(v_codes, v_channel_scale, p, zero, factor, dead, masked, lane, state);
      break;
    case 3:
      record_values<C, 3>(v_codes, v_channel_scale, p, zero, factor, dead, masked, lane, state);
      break;
    case 4:
      record_values<C, 4>(v_codes, v_channel_scale, p, zero, factor, dead, masked, lane, state);
      break;
    default:
      record_values<C, 8>(v_codes, v_channel_scale, p, zero, factor, dead, masked, lane, state);
      break;
  }
}

}  // namespace kvarn::cuda
