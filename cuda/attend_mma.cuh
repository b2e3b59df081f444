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

// Codes that a lane takes from a row of K in one piece.
template <class C>
constexpr bool kWideRuns = C::D >= 128;
template <class C, int BITS>
constexpr int kRunCodes = kWideRuns<C> && BITS != 8 ? 32 : 16;

enum UnitKind : int { kRecordUnit, kStagingUnitKind, kInvalidUnit };

struct Unit {
  int number;  // counted over the block's life
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
      head_->units[stage_] = Unit{opened_, kind, first_token};
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
    ++opened_;
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
  int unit_ = 0, opened_ = 0, stage_ = 0, runs_ = 0;  // unit_: announced; opened_: loading
  uint32_t parity_ = 0;
};

// ---- the computing warps -------------------------------------------------------------------------------------------------------------

// Waits for unit `number` in its stage. A barrier knows phases only by their parity, and a warp that is ahead of the others may ask for a
// phase before the one in between is over: the unit's number tells. Once it is there, the phase asked for is the current one or the last.
__device__ __forceinline__ Unit wait_for_unit(SharedHead* head, int stage, uint32_t parity, int number) {
  const uint32_t full = shared_address(&head->full[stage]);
  volatile Unit* unit = &head->units[stage];
  for (;;) {
    barrier_wait(full, parity);
    if (unit->number == number) break;
    __nanosleep(40);
  }
  barrier_wait(full, parity);
  return Unit{number, unit->kind, unit->first_token};
}

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

// q * k_scale of a record as two fp16 parts, in the order the codes come: [quad][even or odd channels].
template <class C>
struct FoldedQuery {
  uint32_t high[C::NT][C::kQuads][2], low[C::NT][C::kQuads][2];
  float zero[C::NT][2];  // what k_zero and the constant under the codes add to every token's score
};

template <class C, int BITS>
__device__ __forceinline__ void fold_query(const __half* k_scale, const __half* k_zero, const float4* q, const Lane& lane,
                                           FoldedQuery<C>& folded) {
  constexpr int NT = C::NT, kRun = kRunCodes<C, BITS>, kRunQuads = kRun / 4;
  using Code = Codes<BITS>;
  float zero[NT] = {};
#pragma unroll
  for (int quad = 0; quad < C::kQuads; quad += 2) {
    const int channel = (quad / kRunQuads * 4 + lane.t) * kRun + quad % kRunQuads * 4;
    const uint4 s4 = *reinterpret_cast<const uint4*>(k_scale + channel);
    const uint4 z4 = *reinterpret_cast<const uint4*>(k_zero + channel);
    const uint32_t s2[4] = {s4.x, s4.y, s4.z, s4.w}, z2[4] = {z4.x, z4.y, z4.z, z4.w};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int x = quad + i;
      const float2 sa = unpack_half2(s2[2 * i]), sb = unpack_half2(s2[2 * i + 1]);
      const float2 za = unpack_half2(z2[2 * i]), zb = unpack_half2(z2[2 * i + 1]);
      const float even_bias = -1024.0f / Code::even_scale(x), odd_bias = -1024.0f / Code::odd_scale(x);
      const float m0 = fmaf(sa.x, even_bias, za.x), m1 = fmaf(sa.y, odd_bias, za.y);
      const float m2 = fmaf(sb.x, even_bias, zb.x), m3 = fmaf(sb.y, odd_bias, zb.y);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const float4 v = q[(n * C::kQuads + x) * 32];
        zero[n] = fmaf(v.x, m0, fmaf(v.y, m1, fmaf(v.z, m2, fmaf(v.w, m3, zero[n]))));
        split_half2(v.x * sa.x, v.z * sb.x, folded.high[n][x][0], folded.low[n][x][0]);
        split_half2(v.y * sa.y, v.w * sb.y, folded.high[n][x][1], folded.low[n][x][1]);
        if constexpr (!Code::kUniform) {
          const uint32_t factor[2] = {Code::even_factor(x), Code::odd_factor(x)};
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
            folded.high[n][x][odd] = multiply_half2(folded.high[n][x][odd], factor[odd]);
            folded.low[n][x][odd] = multiply_half2(folded.low[n][x][odd], factor[odd]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    zero[n] += __shfl_xor_sync(kFullWarp, zero[n], 1);
    zero[n] += __shfl_xor_sync(kFullWarp, zero[n], 2);
    folded.zero[n][0] = Code::kScale * __shfl_sync(kFullWarp, zero[n], 8 * lane.t);
    folded.zero[n][1] = Code::kScale * __shfl_sync(kFullWarp, zero[n], 8 * lane.t + 4);
  }
}

// Scores of a slab: quads 2*slab and 2*slab + 1, times RowView::scale and k_token_scale still to come. Both parts of q have sums of their
// own, so that four chains of products are under way.
template <class C, int BITS>
__device__ __forceinline__ void slab_scores(const uint8_t* codes, const FoldedQuery<C>& folded, const Lane& lane, int slab,
                                            float (&scores)[2][C::NT][4]) {
  constexpr int D = C::D, NT = C::NT, kRun = kRunCodes<C, BITS>, kRunQuads = kRun / 4;
  using Code = Codes<BITS>;
  using Row = RowRun<BITS, D, kRun>;
  const int line = 8 * (lane.g >> 1) + 2 * slab, row = 2 * (lane.g & 1);
  const uint8_t* low_line = codes + line * (kLineRows * Row::kLowRowBytes);
  const uint8_t* high_line = codes + kTile * Row::kLowRowBytes + line * (kLineRows * Row::kHighRowBytes);
  float low_scores[2][NT][4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        scores[i][n][j] = folded.zero[n][j & 1];
        low_scores[i][n][j] = 0.0f;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < C::kQuads / kRunQuads; ++r) {
    Row rows[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        rows[i][h].load(low_line + i * (kLineRows * Row::kLowRowBytes), high_line + i * (kLineRows * Row::kHighRowBytes), row + h,
                        4 * r + lane.t);
      }
    }
#pragma unroll
    for (int x = 0; x < kRunQuads; ++x) {
      const int quad = r * kRunQuads + x;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t a0, a1, a2, a3;
        Code::quad(rows[i][0].low, rows[i][0].high, x, a0, a2);
        Code::quad(rows[i][1].low, rows[i][1].high, x, a1, a3);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          mma<__half>(scores[i][n], a0, a1, a2, a3, folded.high[n][quad][0], folded.high[n][quad][1]);
          mma<__half>(low_scores[i][n], a0, a1, a2, a3, folded.low[n][quad][0], folded.low[n][quad][1]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[i][n][j] += low_scores[i][n][j];
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

// sums[channels] += codes . p over a slab; centre: the same of the constant under the codes and their middle. p: [n][quad of the slab][even
// or odd tokens] as columns of fp16.
template <class C, int BITS>
__device__ __forceinline__ void slab_values(const uint8_t* codes, uint32_t (&p)[C::NT][2][2], const Lane& lane, int slab,
                                            float (&sums)[C::kQuads][C::NT][4], float (&centre)[C::NT][4]) {
  constexpr int NT = C::NT, kLowBits = low_plane_bits(BITS), kRowBytes = kTile * kLowBits / 8;
  using Code = Codes<BITS>;
  const uint8_t* high_plane = codes + C::D * kRowBytes;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      if constexpr (!Code::kUniform) {
        p[n][x][0] = multiply_half2(p[n][x][0], Code::even_factor(x));
        p[n][x][1] = multiply_half2(p[n][x][1], Code::odd_factor(x));
      }
      mma<__half>(centre[n], Code::even_constant(x), Code::even_constant(x), Code::odd_constant(x), Code::odd_constant(x), p[n][x][0],
                  p[n][x][1]);
    }
  }
  // A slab is 8 codes a lane: two words of 8-bit codes, one of 4-bit codes, part of one of fewer bits.
  constexpr int kWords = BITS == 8 ? 2 : 1;
  const int first = BITS == 8 ? 8 * lane.t + 2 * slab : BITS == 4 ? 4 * lane.t + slab : 2 * lane.t + (slab >> 1);
  const int shift = BITS == 2 || BITS == 3 ? 4 * (slab & 1) : 0;
#pragma unroll
  for (int tile = 0; tile < C::kQuads; ++tile) {
    uint32_t words[2][kWords], high[2][1];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int line = 4 * tile + 2 * h + (lane.g >> 2);
      load_words<kRowBytes, kWords>(codes + line * (kLineRows * kRowBytes), lane.g & 3, first, words[h]);
      if constexpr (BITS < 4) words[h][0] >>= shift;
      if constexpr (BITS == 3) {
        load_words<kTile / 8, 1>(high_plane + line * (kLineRows * kTile / 8), lane.g & 3, lane.t, high[h]);
        high[h][0] >>= 2 * slab;
      }
    }
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      uint32_t a0, a1, a2, a3;
      Code::quad(words[0], high[0], x, a0, a2);
      Code::quad(words[1], high[1], x, a1, a3);
#pragma unroll
      for (int n = 0; n < NT; ++n) mma<__half>(sums[tile][n], a0, a1, a2, a3, p[n][x][0], p[n][x][1]);
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

// Makes room above the running maximum when a logit is more than 2^kHeadroom over it: probabilities then stay below 2^kHeadroom, and times
// a v_scale below 2^8 inside fp16.
constexpr float kHeadroom = 7.0f;

// One record against the rows of a warp.
template <class C>
__device__ __forceinline__ void attend_record(const AttendArgs& a, const Run& run, const uint8_t* record, int first_token, const float4* q,
                                              const RowView<C>& view, const Lane& lane, RowState<C>& state) {
  constexpr int D = C::D, NT = C::NT;
  const __half* k_scale = reinterpret_cast<const __half*>(record + a.metadata_offset);
  const __half* k_zero = k_scale + D;
  const __half* k_token_scale = k_zero + D;
  const __half* v_channel_scale = k_token_scale + kTile;
  const __half* v_scale = v_channel_scale + D;
  const __half* v_zero = v_scale + kTile;

  FoldedQuery<C> folded;
  float v_middle, v_undo;
  switch (a.k_bits) {
    case 2:
      fold_query<C, 2>(k_scale, k_zero, q, lane, folded);
      break;
    case 3:
      fold_query<C, 3>(k_scale, k_zero, q, lane, folded);
      break;
    case 4:
      fold_query<C, 4>(k_scale, k_zero, q, lane, folded);
      break;
    default:
      fold_query<C, 8>(k_scale, k_zero, q, lane, folded);
      break;
  }
  v_middle = a.v_bits == 2 ? Codes<2>::kMiddle : a.v_bits == 3 ? Codes<3>::kMiddle : a.v_bits == 4 ? Codes<4>::kMiddle : Codes<8>::kMiddle;
  v_undo = 1.0f / static_cast<float>(a.v_bits == 8 ? Codes<8>::kScale : a.v_bits == 3 ? Codes<3>::kScale : Codes<4>::kScale);

  // v_scale is brought to [128, 256) by a power of two.
  const __half2* four = reinterpret_cast<const __half2*>(v_scale + 4 * lane.lane);
  const __half2 larger = __hmax2(__habs2(four[0]), __habs2(four[1]));
  float most_scale = fmaxf(__low2float(larger), __high2float(larger));
#pragma unroll
  for (int h = 16; h >= 1; h /= 2) most_scale = fmaxf(most_scale, __shfl_xor_sync(kFullWarp, most_scale, h));
  const uint32_t exponent = max((__float_as_uint(most_scale) >> 23) & 255u, 32u);
  const float up = __uint_as_float((261u - exponent) << 23);
  const float down = __uint_as_float((exponent - 7u) << 23) * v_undo;

  const bool masked = first_token < view.full_first || first_token + kTile - 1 > view.full_last;
  const bool special = masked || a.soft_cap > 0.0f || a.alibi_slopes != nullptr;
  float sums[C::kQuads][NT][4], centre[NT][4], zero[NT][2];
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    zero[n][0] = zero[n][1] = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      centre[n][j] = 0.0f;
#pragma unroll
      for (int i = 0; i < C::kQuads; ++i) sums[i][n][j] = 0.0f;
    }
  }

#pragma unroll 1
  for (int slab = 0; slab < 4; ++slab) {
    float scores[2][NT][4];
    switch (a.k_bits) {
      case 2:
        slab_scores<C, 2>(record, folded, lane, slab, scores);
        break;
      case 3:
        slab_scores<C, 3>(record, folded, lane, slab, scores);
        break;
      case 4:
        slab_scores<C, 4>(record, folded, lane, slab, scores);
        break;
      default:
        slab_scores<C, 8>(record, folded, lane, slab, scores);
        break;
    }
    // Logits, base 2. Lane's tokens: lane.token + 8 * slab + 4 * i + e.
    const int token = lane.token + 8 * slab;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 token_scale = __half22float2(*reinterpret_cast<const __half2*>(k_token_scale + token + 4 * i));
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) scores[i][n][j] *= (j < 2 ? token_scale.x : token_scale.y) * view.scale[n][j & 1];
      }
    }
    if (special) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const RowInfo row = view.info[8 * n + 2 * lane.t + column];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& x = scores[i][n][2 * e + column];
              x = special_logit(a, run, row, x, first_token + token + 4 * i + e);
            }
          }
        }
      }
    }
    float most[NT][2];
    bool above = false;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        most[n][column] =
            fmaxf(fmaxf(scores[0][n][column], scores[0][n][2 + column]), fmaxf(scores[1][n][column], scores[1][n][2 + column]));
        above = above || most[n][column] > state.most[n][column] + kHeadroom;
      }
    }
    if (__any_sync(kFullWarp, above)) {
      float old_factor[NT][2];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          old_factor[n][column] = merge_maximum(column_max(most[n][column]), state.most[n][column]).old_factor;
          state.sum[n][column] *= old_factor[n][column];
          zero[n][column] *= old_factor[n][column];
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          centre[n][j] *= old_factor[n][j & 1];
#pragma unroll
          for (int i = 0; i < C::kQuads; ++i) {
            sums[i][n][j] *= old_factor[n][j & 1];
            state.out[i][n][j] *= old_factor[n][j & 1];
          }
        }
      }
    }
    float base[NT][2];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int column = 0; column < 2; ++column) base[n][column] = state.most[n][column] == -INFINITY ? 0.0f : state.most[n][column];
    }
    uint32_t p[NT][2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 vs = __half22float2(*reinterpret_cast<const __half2*>(v_scale + token + 4 * i));
      const float2 vz = __half22float2(*reinterpret_cast<const __half2*>(v_zero + token + 4 * i));
      const float middle[2] = {fmaf(vs.x, v_middle, vz.x), fmaf(vs.y, v_middle, vz.y)};
      const float weight[2] = {vs.x * up, vs.y * up};
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float p0 = exp2_approx(scores[i][n][2 * e] - base[n][0]);
          const float p1 = exp2_approx(scores[i][n][2 * e + 1] - base[n][1]);
          state.sum[n][0] += p0;
          state.sum[n][1] += p1;
          zero[n][0] = fmaf(p0, middle[e], zero[n][0]);
          zero[n][1] = fmaf(p1, middle[e], zero[n][1]);
          p[n][i][e] = transpose8x8(pack_half2(p0 * weight[e], p1 * weight[e]));
        }
      }
    }
    const uint8_t* v_codes = record + a.v_offset;
    switch (a.v_bits) {
      case 2:
        slab_values<C, 2>(v_codes, p, lane, slab, sums, centre);
        break;
      case 3:
        slab_values<C, 3>(v_codes, p, lane, slab, sums, centre);
        break;
      case 4:
        slab_values<C, 4>(v_codes, p, lane, slab, sums, centre);
        break;
      default:
        slab_values<C, 8>(v_codes, p, lane, slab, sums, centre);
        break;
    }
  }

  const float zero_scale = up / v_undo;
  bool dead[NT][2];
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      zero[n][column] = column_sum(zero[n][column]) * zero_scale;
      const int position = view.info[8 * n + 2 * lane.t + column].position;
      dead[n][column] = first_token > last_visible(a, position, run.seq_len) || first_token + kTile <= first_visible(a, position);
    }
  }
#pragma unroll
  for (int i = 0; i < C::kQuads; ++i) {
    const float scale[2] = {__half2float(v_channel_scale[16 * i + lane.g]) * down,
                            __half2float(v_channel_scale[16 * i + lane.g + 8]) * down};
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float sum = sums[i][n][j] + (centre[n][j] + zero[n][j & 1]);
        // A row that sees nothing of this tile must not meet its NaN either.
        if (!masked || !dead[n][j & 1]) state.out[i][n][j] = fmaf(sum, scale[j >> 1], state.out[i][n][j]);
      }
    }
  }
}

}  // namespace kvarn::cuda
