// Attention for records of 128 tokens with 16-bit metadata, through the matrix instructions of hip/matrix.h.
//
//   score[t] = k_token_scale[t] * (sum_d (q[d] k_scale[d]) code_k[t][d] + sum_d q[d] k_zero[d])
//   out[d]  += v_channel_scale[d] * (sum_t (p[t] v_scale[t]) code_v[d][t] + sum_t p[t] v_zero[t])
//
// A wave takes whole tiles of a run, every fourth one, for all rows of the run's row block, straight from global memory to registers:
// 13,824 bytes for a k4v2_g128 tile of head_dim 128. Codes are the A operand (16 tokens or 16 channels), rows of q the columns of B. q and
// the probabilities enter as a high and a low fp16 part, so both products are those of fp32 operands to 2^-20, accumulated in fp32. The
// waves' maxima, sums and outputs are joined in shared memory at the end of a run.
#pragma once

#include "attend_ends.h"
#include "attend_fold.h"
#include "attend_walk.h"
#include "record_values.cuh"

namespace kvarn::cuda {

constexpr int kMatrixThreads = kMatrixWaves * kWave;
constexpr int kBlocks = kMatrixTile / 16;

template <int D, int kRows>
struct MatrixShared {
  Run run;
  Share share;
  int flag;
  float2 sums[kRows];  // of the run
  float wave_most[kMatrixWaves][16], wave_sum[kMatrixWaves][16];
  float q_scale[kRows];              // q = its row below * q_scale
  alignas(16) float rows[kRows][D];  // q; after the tiles: the output
  alignas(16) uint8_t columns[kMatrixWaves][FoldedQueries<D, kRows>::kInRegisters ? 16 : Columns<D, kRows>::kBytes];
};

// What a lane knows of its query row: column lane % 16, which is row lane % kRows.
struct LaneRow {
  int position;                     // of the query in its sequence
  int first_visible, last_visible;  // key positions
  float slope;                      // ALiBi
  float scale;                      // of the row of q in shared memory, times the magnitude of softmax_scale
};

template <int D, int kRows>
struct MatrixWave {
  static constexpr int kChannelBlocks = D / 16;
  static constexpr int kKept = kept_scores(kRows);
  using Queries = FoldedQueries<D, kRows>;

  int lane, group;  // group: lane / 16
  LaneRow row;
  float most = -INFINITY;  // running maximum of the row's logits, base 2; the same in all lanes of a row
  float sum = 0.0f;        // of exponentials, this lane's tokens
  float out[kChannelBlocks][kHeld] = {};
  Queries queries;

  // Addresses that depend on the lane are many: without this the compiler keeps all of them in registers for the whole kernel.
  __device__ __forceinline__ void forget_addresses() {
    lane = again(lane);
    group = lane / 16;
  }
  __device__ __forceinline__ bool sees(int position) const { return position >= row.first_visible && position <= row.last_visible; }

  // The first of the kKept tokens of the tile whose scores the lane keeps of block n; value i is token quad_order(i) of them.
  __device__ __forceinline__ int kept_tokens(int n) const { return held_tokens(n, group) + first_kept<kRows>(lane); }
  // Over all lanes that have tokens of the row.
  template <class Op>
  static __device__ __forceinline__ float over_row(float x, Op op) {
    if constexpr (kKept < kHeld) x = op(x, across_eight(x));
    return over_groups(x, op);
  }

  // Products of q and k, times row.scale, to logits in base 2, of kCount blocks from first_block on.
  template <int kCount>
  __device__ __forceinline__ void logits(const AttendArgs& a, float (&s)[kCount][kKept], int first_block, int first_token) const {
    const float cap_inverse = a.soft_cap > 0.0f ? 1.0f / a.soft_cap : 0.0f;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int base = first_token + kept_tokens(first_block + n);
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        const int position = base + quad_order(i);
        float x = s[n][i] * row.scale;
        if (a.soft_cap > 0.0f) x = a.soft_cap * tanhf(x * cap_inverse);
        x = fmaf(row.slope, static_cast<float>(position - row.position), x);
        s[n][i] = sees(position) ? x * kLog2E : -INFINITY;
        in_order();
      }
    }
  }
  // Logits over `scale`, which is not negative, to probabilities against the new maximum; what came before is brought down to it where it
  // has grown.
  template <int kCount>
  __device__ __forceinline__ void softmax(float (&s)[kCount][kKept], float scale) {
    float next = -INFINITY;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) next = fmaxf(next, s[n][i]);
    }
    next = fmaxf(most, over_row(next, [](float x, float y) { return fmaxf(x, y); }) * scale);
    const float base = next == -INFINITY ? 0.0f : next;
    const float factor = exp2_difference(most, next);
    most = next;
    if (any_lane(factor != 1.0f)) {
      sum *= factor;
#pragma unroll
      for (int c = 0; c < kChannelBlocks; ++c) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) out[c][i] *= factor;
      }
    }
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        s[n][i] = exp2_approx(fmaf(s[n][i], scale, -base));
        sum += s[n][i];
      }
    }
  }

  // ---- records: kBlocksAtOnce blocks of 16 tokens at a time ----

  // Whether codes are asked for while those before them are worked on: where instructions stay in order and registers suffice.
  static __device__ __forceinline__ constexpr bool loads_ahead(int bits) { return kWave == 32 && kRows == 8 && bits <= 4; }

  template <int kBits>
  __device__ __forceinline__ void score_codes(GlobalBytes record, int first_block, float (&s)[kBlocksAtOnce][kKept]) {
    forget_addresses();
    CodePart<kBits, D, D / kGroups> parts[2];
    const auto load = [&](int n) {
      parts[n % 2].load(record, kMatrixTile, token_of_row(first_block + n, lane % 16), depth_group(lane) * (D / kGroups));
    };
    load(0);
#pragma unroll
    for (int n = 0; n < kBlocksAtOnce; ++n) {
      // Folded queries in shared memory are read for each block; kept, they would take as many registers as the output.
      if (n > 0 && !Queries::kInRegisters) forget_addresses();
      if (loads_ahead(kBits) ? n + 1 < kBlocksAtOnce : n > 0) load(loads_ahead(kBits) ? n + 1 : n);
      Accumulator c{};
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        queries.multiply(c, parts[n % 2].fragment(step), step, lane);
        if (!Queries::kInRegisters) in_order();
      }
      Queries::sums(c, s[n]);
      in_order();
    }
  }
  // plain: every row sees some of the tile.
  template <int kBits>
  __device__ __forceinline__ void add_codes(GlobalBytes codes, GlobalBytes channel_scales, int first_block,
                                            const Weights<D, kRows, kBlocksAtOnce>& weights, float inverse, float zero, bool plain,
                                            bool seen) {
    forget_addresses();
    CodePart<kBits, kMatrixTile, kBlocksAtOnce * kDepth> parts[2];
    const auto load = [&](int c) {
      parts[c % 2].load(codes, D, 16 * c + channel_of_row(lane % 16), depth_tokens(first_block, depth_group(lane)));
    };
    load(0);
#pragma unroll
    for (int c = 0; c < kChannelBlocks; ++c) {
      if (loads_ahead(kBits) ? c + 1 < kChannelBlocks : c > 0) load(loads_ahead(kBits) ? c + 1 : c);
      Accumulator acc{};
#pragma unroll
      for (int n = 0; n < kBlocksAtOnce; ++n) {
        weights.multiply(acc, parts[c % 2].fragment(n), n, lane);
        in_order();
      }
      float held[kHeld];
      finish(acc, held);
      const auto scales = Halves<kHeld>::load(channel_scales + 2 * (16 * c + kHeld * group));
#pragma unroll
      for (int i = 0; i < kHeld; ++i) held[i] = fmaf(fmaf(held[i], inverse, zero), scales[i], out[c][i]);
      // A row that sees none of the tile must not get its NaN.
      if (!plain) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) held[i] = seen ? held[i] : out[c][i];
      }
#pragma unroll
      for (int i = 0; i < kHeld; ++i) out[c][i] = held[i];
      in_order();
    }
  }
  // first_token: of the tile. plain: every row sees every token, and logits are products alone.
  __device__ __forceinline__ void attend_record(const AttendArgs& a, GlobalBytes record, const float* q, int first_token, bool plain) {
    constexpr int kTokenScales = 4 * D, kChannelScales = kTokenScales + 2 * kMatrixTile;
    constexpr int kVScales = kChannelScales + 2 * D, kVZeros = kVScales + 2 * kMatrixTile;
    forget_addresses();
    const GlobalBytes whole_tile = record + a.metadata_offset;
    queries.template fold<true>(q, whole_tile, whole_tile + 2 * D, lane);
    const HalfScale v_range = HalfScale::of(largest_magnitude<kMatrixTile>(whole_tile + kVScales, lane));
    const bool seen = row.first_visible < first_token + kMatrixTile && row.last_visible >= first_token;
#pragma unroll 1
    for (int first = 0; first < kBlocks; first += kBlocksAtOnce) {
      forget_addresses();
      const GlobalBytes part = again(record), metadata = part + a.metadata_offset;
      float s[kBlocksAtOnce][kKept];
      with_width(a.k_bits, [&]<int kBits>() { score_codes<kBits>(part, first, s); });
      forget_addresses();
#pragma unroll
      for (int n = 0; n < kBlocksAtOnce; ++n) {
        const auto scales = Halves<kKept>::load(metadata + kTokenScales + 2 * kept_tokens(first + n));
#pragma unroll
        for (int i = 0; i < kKept; ++i) s[n][i] = fmaf(s[n][i], queries.inverse, queries.zero) * scales[quad_order(i)];
      }
      float scale = row.scale * kLog2E;
      if (!plain) {
        logits(a, s, first, first_token);
        scale = 1.0f;
      }
      softmax(s, scale);

      float zero = 0.0f;
      Weights<D, kRows, kBlocksAtOnce> weights(queries.columns);
#pragma unroll
      for (int n = 0; n < kBlocksAtOnce; ++n) {
        const int tokens = 2 * kept_tokens(first + n);
        auto scales = Halves<kKept>::load(metadata + kVScales + tokens);
        const auto zeros = Halves<kKept>::load(metadata + kVZeros + tokens);
#pragma unroll
        for (uint32_t& pair : scales.words) pair = v_range.apply(pair);
#pragma unroll
        for (int i = 0; i < kKept; ++i) {
          zero = fmaf(s[n][i], zeros[quad_order(i)], zero);
          s[n][i] *= scales[quad_order(i)];
        }
        weights.set(n, s[n], lane);
        in_order();
      }
      weights.finish_setting();
      zero = over_row(zero, [](float x, float y) { return x + y; });
      // Columns with the low parts get the zeros from their partners.
      if (kRows == 8 && (lane & 8) != 0) zero = 0.0f;
      with_width(a.v_bits, [&]<int kBits>() {
        add_codes<kBits>(part + a.v_offset, metadata + kChannelScales, first, weights, v_range.inverse, zero, plain, seen);
      });
    }
  }

  // ---- staging ----

  __device__ __forceinline__ static uint32_t magnitude_of(float x) { return bits_as<uint32_t>(x) & 0x7fffffffu; }
  __device__ __forceinline__ static uint32_t over_depth_groups(uint32_t x) {
    if constexpr (kGroups > 1) {
      x = max(x, across_sixteen(x));
      if constexpr (kWave == 64) x = max(x, from_lane(x, wave_lane() ^ 32));
    }
    return x;
  }
  struct RowScale {
    float scale, inverse;
    // Brings `magnitude` to 2^13 or so. Infinities and NaNs stay what they are.
    static __device__ __forceinline__ RowScale of(uint32_t magnitude) {
      const uint32_t exponent = max(magnitude >> 23, 14u);
      return {__uint_as_float((267u - exponent) << 23), __uint_as_float((exponent - 13u) << 23)};
    }
  };
  // Values of 16 bits times a power of two are fp16 numbers, but for what is 2^-27 of the largest.
  __device__ __forceinline__ static Fragment scaled(const float (&x)[kDepth], float scale) {
    Fragment f;
#pragma unroll
    for (int w = 0; w < kDepth / 2; ++w) f.words[w] = pack(x[quad_order(2 * w)] * scale, x[quad_order(2 * w + 1)] * scale);
    return f;
  }
  // 16 tokens of a slot: block n. k and v: index of the first value of the KV head's tile. limit: tokens that may be read.
  __device__ __forceinline__ void attend_staging(const AttendArgs& a, int64_t k, int64_t v, int n, int first_token, int limit) {
    forget_addresses();
    const GlobalBytes staging = again(global_bytes(a.staging));
    const bool bfloat16 = a.dtype == KVARN_BF16;
    float s[1][kKept];
    {
      const int token = token_of_row(n, lane % 16);
      // What lies past the limit may be undefined: the last token before it is read instead, and not seen.
      const int64_t at = k + static_cast<int64_t>(min(token, limit - 1)) * D + depth_group(lane) * (D / kGroups);
      const auto load = [&](int step, float(&x)[kDepth]) {
#pragma unroll
        for (int e = 0; e < kDepth; ++e) x[e] = load_half(staging, at + step * kDepth + e, bfloat16);
      };
      uint32_t magnitude = 0;
#pragma unroll 1
      for (int step = 0; step < D / 16; ++step) {
        float x[kDepth];
        load(step, x);
#pragma unroll
        for (int e = 0; e < kDepth; ++e) magnitude = max(magnitude, magnitude_of(x[e]));
      }
      const RowScale scale = RowScale::of(over_depth_groups(magnitude));
      Accumulator c{};
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        float x[kDepth];
        load(step, x);
        queries.multiply(c, scaled(x, scale.scale), step, lane);
        in_order();
      }
      Queries::sums(c, s[0]);
#pragma unroll
      for (int i = 0; i < kKept; ++i) s[0][i] *= queries.inverse * from_lane(scale.inverse, row_held(group, first_kept<kRows>(lane) + i));
    }
    logits(a, s, n, first_token);
    softmax(s, 1.0f);
    forget_addresses();
    // Probabilities are at most 1: 2^12 keeps their low parts in range.
#pragma unroll
    for (int i = 0; i < kKept; ++i) s[0][i] *= 4096.0f;
    Weights<D, kRows, 1> weights(queries.columns);
    weights.set(0, s[0], lane);
    weights.finish_setting();
    // A row that sees none of the tile must not get its NaN.
    const bool seen = row.first_visible < first_token + kMatrixTile && row.last_visible >= first_token;
#pragma unroll
    for (int c = 0; c < kChannelBlocks; ++c) {
      float x[kDepth];
      uint32_t magnitude = 0;
#pragma unroll
      for (int e = 0; e < kDepth; ++e) {
        const int token = depth_tokens(n, depth_group(lane)) + e;
        const float value =
            load_half(staging, v + static_cast<int64_t>(min(token, limit - 1)) * D + 16 * c + channel_of_row(lane % 16), bfloat16);
        x[e] = token < limit ? value : 0.0f;
        magnitude = max(magnitude, magnitude_of(x[e]));
      }
      const RowScale scale = RowScale::of(over_depth_groups(magnitude));
      Accumulator acc{};
      weights.multiply(acc, scaled(x, scale.scale), 0, lane);
      float held[kHeld];
      finish(acc, held);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const float inverse = from_lane(scale.inverse, row_held(group, i)) * (1.0f / 4096.0f);
        const float next = fmaf(held[i], inverse, out[c][i]);
        out[c][i] = seen ? next : out[c][i];
      }
      in_order();
    }
  }

  // ---- the run ----

  __device__ __forceinline__ void describe_row(const AttendArgs& a, const Run& run, const float* q_scale) {
    const int in_block = min(lane % kRows, run.rows - 1);
    const int of_sequence = run.first_row + in_block;
    row.position = row_position(run, of_sequence, a.group);
    row.first_visible = first_visible(a, row.position);
    row.last_visible = last_visible(a, row.position, run.seq_len);
    row.slope = a.alibi_slopes != nullptr ? a.alibi_slopes[run.kv_head * a.group + of_sequence % a.group] : 0.0f;
    row.scale = q_scale[lane % kRows] * fabsf(a.softmax_scale);
  }
  // This wave's tiles of the run.
  __device__ __forceinline__ void attend_tiles(const AttendArgs& a, const Run& run, const float* q, int wave) {
    const int64_t tile_values = static_cast<int64_t>(kMatrixTile) * D;
    const int kv_head = uniform(run.kv_head), end = uniform(run.tile_end);
    // Two loops: each has its own needs of registers.
#pragma unroll 1
    for (int tile = uniform(run.tile_begin + wave); tile < end; tile += kMatrixWaves) {
      const int entry = entry_of(a, run, tile);
      if (entry < 0) continue;
      const int first_token = tile * kMatrixTile;
      if (entry >= a.num_blocks) {
        sum = NAN;
        continue;
      }
      const bool plain = a.soft_cap == 0.0f && a.alibi_slopes == nullptr && uniform(run.full_first) <= first_token &&
                         uniform(run.full_last) >= first_token + kMatrixTile - 1;
      attend_record(a, global_bytes(a.records + (static_cast<int64_t>(entry) * a.num_kv_heads + kv_head) * a.record_bytes), q, first_token,
                    plain);
    }
#pragma unroll 1
    for (int tile = uniform(run.tile_begin + wave); tile < end; tile += kMatrixWaves) {
      const int slot = ~entry_of(a, run, tile);
      if (slot < 0) continue;
      if (slot >= a.num_slots) {
        sum = NAN;
        continue;
      }
      const int first_token = tile * kMatrixTile, limit = min(kMatrixTile, run.last_visible + 1 - first_token);
      const int64_t k = (static_cast<int64_t>(slot) * 2 * a.num_kv_heads + kv_head) * tile_values;
      forget_addresses();
      queries.template fold<false>(q, nullptr, nullptr, lane);
#pragma unroll 1
      for (int n = 0; n < kBlocks && limit > 0; ++n) attend_staging(a, k, k + a.num_kv_heads * tile_values, n, first_token, limit);
    }
  }
  static __device__ __forceinline__ int entry_of(const AttendArgs& a, const Run& run, int tile) {
    return tile < a.max_tiles ? uniform(a.block_table[run.sequence * a.block_table_stride + tile]) : INT32_MAX;
  }
};

// Rows of q to shared memory, each times a power of two that brings it below 1 and times the sign of softmax_scale.
template <int D, int kRows>
__device__ __forceinline__ void load_queries(const AttendArgs& a, MatrixShared<D, kRows>& s, int warp, int lane) {
#pragma unroll 1
  for (int r = warp; r < kRows; r += kMatrixThreads / 32) {
    float* const row = s.rows[r];
    load_q(a, s.run, s.run.first_row + min(r, s.run.rows - 1), lane, row);
    uint32_t magnitude = 0;
    for (int d = lane; d < D; d += 32) magnitude = max(magnitude, bits_as<uint32_t>(row[d]) & 0x7fffffffu);
#pragma unroll 1
    for (int h = 16; h >= 1; h /= 2) magnitude = max(magnitude, __shfl_xor_sync(kFullWarp, magnitude, h));
    // 2^-126 and less count as 2^-126.
    const uint32_t exponent = min(max(magnitude >> 23, 1u), 252u);
    const float scale = __builtin_copysignf(__uint_as_float((253u - exponent) << 23), a.softmax_scale);
    for (int d = lane; d < D; d += 32) row[d] *= scale;
    if (lane == 0) s.q_scale[r] = __uint_as_float((exponent + 1u) << 23);
  }
}

// The waves' shares of the run to one: rows of s.rows and s.sums. All threads call it.
template <int D, int kRows>
__device__ __forceinline__ void join_waves(MatrixShared<D, kRows>& s, MatrixWave<D, kRows>& w, int wave) {
  w.forget_addresses();
  const int lane = w.lane, column = lane % 16;
  w.sum = w.over_row(w.sum, [](float x, float y) { return x + y; });
  if (lane < 16) {
    s.wave_most[wave][column] = w.most;
    s.wave_sum[wave][column] = w.sum;
  }
  __syncthreads();  // the waves' maxima and sums are written, q is used up
  float most = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kMatrixWaves; ++i) most = fmaxf(most, s.wave_most[i][column]);
#pragma unroll
  for (int i = 0; i < kMatrixWaves; ++i) sum += s.wave_sum[i][column] * exp2_difference(s.wave_most[i][column], most);
  if (wave == 0 && lane < kRows) s.sums[lane] = make_float2(most, sum);
  const float factor = exp2_difference(w.most, most);
#pragma unroll 1
  for (int turn = 0; turn < kMatrixWaves; ++turn) {
    if (turn == wave) {
#pragma unroll
      for (int c = 0; c < D / 16; ++c) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
          float x = w.out[c][i];
          if constexpr (kRows == 8) x += across_eight(x);
          float* const to = &s.rows[lane % kRows][16 * c + kHeld * w.group + i];
          if (column < kRows) *to = turn == 0 ? x * factor : fmaf(x, factor, *to);
        }
      }
    }
    __syncthreads();  // one wave after the other
  }
}

template <int D, int kRows>
__device__ __forceinline__ void attend_matrix(MatrixShared<D, kRows>& s) {
  const int wave = uniform(threadIdx.x / kWave);
  if (wave == 0) {
    const Share share = share_of(kernel_args<AttendArgs>(), blockIdx.x, gridDim.x, threadIdx.x % 32);
    if (threadIdx.x == 0) s.share = share;
  }
  __syncthreads();  // the share is written
#pragma unroll 1
  while (s.share.unit < s.share.end) {
    {
      const AttendArgs& a = kernel_args<AttendArgs>();
      const int thread = again(threadIdx.x), warp = thread / 32, lane = thread % 32;
      __syncthreads();  // everyone has seen that there is a run and is done with the one before
      if (warp == 0) {
        Share next = s.share;
        next_run(a, next, blockIdx.x, lane, s.run);
        if (lane == 0) s.share.unit = next.unit;
      }
      __syncthreads();  // the run is described
      load_queries(a, s, warp, lane);
      __syncthreads();  // q is written
    }
    {
      const AttendArgs& a = kernel_args<AttendArgs>();
      MatrixWave<D, kRows> w;
      w.lane = wave_lane();
      w.forget_addresses();
      w.queries.columns.bytes = s.columns[wave];
      w.describe_row(a, s.run, s.q_scale);
      w.attend_tiles(a, s.run, &s.rows[0][0], wave);
      join_waves(s, w, wave);
    }
    {
      const AttendArgs& a = kernel_args<AttendArgs>();
      const int thread = again(threadIdx.x), warp = thread / 32, lane = thread % 32;
      end_run(a, s.run, &s.rows[0][0], D, s.sums, &s.flag, warp, kMatrixThreads / 32, lane);
    }
  }
}

}  // namespace kvarn::cuda
