// A record against the query rows of one warp, on the tensor cores.
//
//   score[t] = k_token_scale[t] * ( sum_d (q[d]*k_scale[d]) * code[t,d] + sum_d q[d]*k_zero[d] )
//   out[d]  += v_channel_scale[d] * ( sum_t (p[t]*v_scale[t]) * code[t,d] + sum_t p[t]*v_zero[t] )
//
// Codes are the 16-row operand (tokens for scores, channels for the output), query rows the 8-column one, both m16n8k16 with fp32 sums.
// The scales fold into q and into the probabilities in fp32. Folded q enters as a high and a low fp16 part, 22 bits together: logits may be
// large, and their errors count absolutely. A folded probability enters as one fp16 number; what its rounding does to the codes' mean is
// taken back exactly (see add_values), so that 2^-12 of a value's distance from the middle of its codes remains. Powers of two, one of a
// row of q, one of the record's k_scale and one of its v_scale, keep everything inside fp16's normal range.
//
// For k4v2, D = 128, 8 rows: a record is 13,824 bytes = 1,034 cycles of an SM's share of 3.0 TB/s at 1.76 GHz, 4,136 issue slots. It takes
// 200 products, 608 instructions to unpack codes, 24 shared loads of codes, and some 700 to fold, for the softmax and to update the output.
#pragma once

#include "attend_loader.cuh"
#include "attend_rows.cuh"
#include "attend_unpack.cuh"

namespace kvarn::cuda {

// NT: columns of 8 query rows that a warp holds. K_BITS, V_BITS: a width, or kAnyWidth, which takes more registers and longer code.
constexpr int kAnyWidth = 0;
template <int D_, int NT_, int WARPS_, int K_BITS, int V_BITS>
struct AttendMma {
  static constexpr int D = D_;
  static constexpr int NT = NT_;
  static constexpr int kKBits = K_BITS, kVBits = V_BITS;
  static constexpr int kWarps = WARPS_;               // that compute; one more loads
  static constexpr int kThreads = (WARPS_ + 1) * 32;  // 3 warps of 168 registers or 2 of 255 share a quarter of the SM
  static constexpr int kRows = 8 * NT;
  static constexpr int kQuads = D / 16;       // quads of channels a lane holds
  static constexpr int kMergeStride = D + 4;  // floats: the four rows that lanes write together fall into different banks
  static_assert(D % 64 == 0, "four lanes take a run of a row each");
};

// A lane takes kRunCodes consecutive channels of a row of K at a time; four lanes take a step of 64.
constexpr int kRunCodes = 16;
constexpr int kRunQuads = kRunCodes / 4;

// The metadata vectors of K, behind its codes.
template <class C>
struct KMetadata {
  const __half* at;
  __device__ __forceinline__ const __half* scale() const { return at; }                   // [D]
  __device__ __forceinline__ const __half* zero() const { return at + C::D; }             // [D]
  __device__ __forceinline__ const __half* token_scale() const { return at + 2 * C::D; }  // [kTile]
};
// Of V.
template <class C>
struct VMetadata {
  const __half* at;
  __device__ __forceinline__ const __half* channel_scale() const { return at; }        // [D]
  __device__ __forceinline__ const __half* scale() const { return at + C::D; }         // [kTile]
  __device__ __forceinline__ const __half* zero() const { return at + C::D + kTile; }  // [kTile]
};

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
  float out[C::kQuads][C::NT][4];  // channels 16i + {g, g+8}, rows 8n + {2t, 2t+1}: as the products leave them
  float most[C::NT][2];            // what probabilities are relative to, base 2: the maximum logit, or up to kHeadroom less
  float sum[C::NT][2];             // this lane's share

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < C::NT; ++n) {
      most[n][0] = most[n][1] = -INFINITY;
      sum[n][0] = sum[n][1] = 0.0f;
#pragma unroll
      for (int i = 0; i < C::kQuads; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) out[i][n][j] = 0.0f;
      }
    }
  }
  __device__ __forceinline__ void spoil() {
#pragma unroll
    for (int n = 0; n < C::NT; ++n) sum[n][0] = sum[n][1] = NAN;
  }
  __device__ __forceinline__ void rescale(const float (&factor)[C::NT][2]) {
#pragma unroll
    for (int i = 0; i < C::kQuads; ++i) {
#pragma unroll
      for (int n = 0; n < C::NT; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) out[i][n][j] *= factor[n][j & 1];
      }
    }
  }
  // out += factor * sums of channels 16i.., where the row is not dead.
  __device__ __forceinline__ void add(int i, int n, const float (&sums)[4], const float (&factor)[4], const bool (&dead)[2]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (!dead[j & 1]) out[i][n][j] = fmaf(sums[j], factor[j], out[i][n][j]);
    }
  }
};

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

// Powers of two that bring the largest of COUNT scales of a record to [2^EXPONENT, 2^(EXPONENT+1)), and back.
struct Range {
  float up, down;
};
template <int COUNT, int EXPONENT>
__device__ __forceinline__ Range range_of(const __half* scales, int lane) {
  const __half2* mine = reinterpret_cast<const __half2*>(scales) + lane * (COUNT / 64);
  __half2 most = __habs2(mine[0]);
#pragma unroll
  for (int i = 1; i < COUNT / 64; ++i) most = __hmax2(most, __habs2(mine[i]));
  float largest = fmaxf(__low2float(most), __high2float(most));
#pragma unroll
  for (int h = 16; h >= 1; h /= 2) largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, h));
  // Exponents of fp16 numbers, subnormal ones included.
  const uint32_t exponent = min(max(__float_as_uint(largest) >> 23, 103u), 142u);
  return {__uint_as_float((254u + EXPONENT - exponent) << 23), __uint_as_float((exponent - EXPONENT) << 23)};
}

constexpr int kBlocks = kTile / 16;  // row blocks of the score products, and quads of tokens that a lane holds for the output
constexpr int kHalf = kBlocks / 2;

// scores[b]: rows 16b.. of the products (see Lane), times k_token_scale and the row's scale still to come; k_scale enters times `up`.
//
// The loops stay rolled, here and below: the code of a whole record has to fit the instruction cache.
template <class C, int BITS>
__device__ __forceinline__ void record_scores(const uint8_t* codes, const KMetadata<C>& metadata, const float4* q, float up,
                                              const Lane& lane, float (&scores)[kBlocks][C::NT][4]) {
  constexpr int NT = C::NT;
  using Code = Codes<BITS>;
  using Row = RowRun<BITS, C::D, kRunCodes>;
  constexpr int kLowLine = kLineRows * Row::kLowRowBytes, kHighLine = kLineRows * Row::kHighRowBytes;
  const uint8_t* low = codes + 8 * (lane.g >> 1) * kLowLine;
  const uint8_t* high = codes + kTile * Row::kLowRowBytes + 8 * (lane.g >> 1) * kHighLine;
  const int row = 2 * (lane.g & 1);
  float zero[NT] = {};  // what k_zero adds to every token's score
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[b][n][j] = 0.0f;
    }
  }
#pragma unroll 1
  for (int step = 0; step < C::D / 64; ++step) {
    const int run = 4 * step + lane.t;
    // q * k_scale as two fp16 parts, in the order the codes come: [quad][even or odd channels].
    uint32_t q_high[NT][kRunQuads][2], q_low[NT][kRunQuads][2];
#pragma unroll
    for (int x = 0; x < kRunQuads; ++x) {
      const uint2 s2 = *reinterpret_cast<const uint2*>(metadata.scale() + run * kRunCodes + 4 * x);
      const uint2 z2 = *reinterpret_cast<const uint2*>(metadata.zero() + run * kRunCodes + 4 * x);
      const float share = up * (1.0f / static_cast<float>(Code::scale(x)));
      float2 sa = unpack_half2(s2.x), sb = unpack_half2(s2.y);
      sa.x *= share, sa.y *= share, sb.x *= share, sb.y *= share;
      const float2 za = unpack_half2(z2.x), zb = unpack_half2(z2.y);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const float4 v = q[(n * C::kQuads + step * kRunQuads + x) * 32];
        split_half2(v.x * sa.x, v.z * sb.x, q_high[n][x][0], q_low[n][x][0]);
        split_half2(v.y * sa.y, v.w * sb.y, q_high[n][x][1], q_low[n][x][1]);
        zero[n] = fmaf(v.x, za.x, fmaf(v.y, za.y, fmaf(v.z, zb.x, fmaf(v.w, zb.y, zero[n]))));
      }
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      Row rows[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) rows[h].load(low + b * kLowLine, high + b * kHighLine, row + h, run);
#pragma unroll
      for (int x = 0; x < kRunQuads; ++x) {
        uint32_t a0, a1, a2, a3;
        Code::quad(rows[0].low, rows[0].high, x, a0, a2);
        Code::quad(rows[1].low, rows[1].high, x, a1, a3);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          mma<__half>(scores[b][n], a0, a1, a2, a3, q_high[n][x][0], q_high[n][x][1]);
          mma<__half>(scores[b][n], a0, a1, a2, a3, q_low[n][x][0], q_low[n][x][1]);
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    zero[n] *= kCodeUnit * up;
    zero[n] += __shfl_xor_sync(kFullWarp, zero[n], 1);
    zero[n] += __shfl_xor_sync(kFullWarp, zero[n], 2);
    // Of the rows that a lane holds after the products.
    float zeros[2] = {__shfl_sync(kFullWarp, zero[n], 8 * lane.t), __shfl_sync(kFullWarp, zero[n], 8 * lane.t + 4)};
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[b][n][j] += zeros[j & 1];
    }
  }
}

// How far logits may exceed what probabilities are relative to: these stay below 2^kHeadroom, and times a v_scale below 2^8 inside fp16.
constexpr float kHeadroom = 7.0f;

// Brings the rows' maxima up where a score, times `scale` a row, exceeds them by more than kHeadroom.
template <class C>
__device__ __forceinline__ void raise_maximum(const float (&scores)[kBlocks][C::NT][4], const float (&scale)[C::NT][2],
                                              RowState<C>& state) {
  constexpr int NT = C::NT;
  float most[NT][2];
  bool above = false;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      float m = scores[0][n][column];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) m = fmaxf(m, fmaxf(scores[b][n][column], scores[b][n][2 + column]));
      most[n][column] = m * scale[n][column];
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
      }
    }
    state.rescale(old_factor);
  }
}

// What half a tile's probabilities, or all of them, come to.
template <class C>
struct ValueSums {
  float zero[C::NT][2];    // sum of p * (v_zero + middle code * v_scale), this lane's share
  float middle[C::NT][4];  // -middle code * sum of rounded weights
};
// Probabilities times v_scale in fp16: [quad of tokens of half a tile][even or odd tokens].
template <class C>
struct HalfWeights {
  uint32_t pair[C::NT][kHalf][2];
};

// Half a tile's scores, from block FROM on, times `scale` a row, become weights. v_scale, v_zero: of this lane's first token of the half.
template <class C, int BITS, int FROM>
__device__ __forceinline__ void fold_weights(const __half* v_scale, const __half* v_zero, const float (&scores)[kBlocks][C::NT][4],
                                             const float (&scale)[C::NT][2], float up, RowState<C>& state, ValueSums<C>& sums,
                                             HalfWeights<C>& weights) {
  constexpr int NT = C::NT;
  using Code = Codes<BITS>;
  constexpr uint32_t kMinus = 0x80008000u;  // both halves' signs
  float base[NT][2];
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    base[n][0] = state.most[n][0] == -INFINITY ? 0.0f : -state.most[n][0];
    base[n][1] = state.most[n][1] == -INFINITY ? 0.0f : -state.most[n][1];
  }
#pragma unroll
  for (int x = 0; x < kHalf; ++x) {
    const float2 vs = __half22float2(*reinterpret_cast<const __half2*>(v_scale + 4 * x));
    const float2 vz = __half22float2(*reinterpret_cast<const __half2*>(v_zero + 4 * x));
    const float raise = up * (1.0f / static_cast<float>(Code::scale(x)));
    const uint32_t minus_middle = kMinus | both_halves(static_cast<uint32_t>(Code::kMiddle * Code::scale(x)));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float of_token = h == 0 ? vs.x : vs.y, weight = of_token * raise;
      const float zero = fmaf(static_cast<float>(Code::kMiddle), of_token, h == 0 ? vz.x : vz.y);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const float p0 = exp2_approx(fmaf(scores[FROM + x][n][2 * h], scale[n][0], base[n][0]));
        const float p1 = exp2_approx(fmaf(scores[FROM + x][n][2 * h + 1], scale[n][1], base[n][1]));
        state.sum[n][0] += p0;
        state.sum[n][1] += p1;
        sums.zero[n][0] = fmaf(p0, zero, sums.zero[n][0]);
        sums.zero[n][1] = fmaf(p1, zero, sums.zero[n][1]);
        weights.pair[n][x][h] = transpose8x8(pack_half2(p0 * weight, p1 * weight));
      }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      mma<__half>(sums.middle[n], minus_middle, minus_middle, minus_middle, minus_middle, weights.pair[n][x][0], weights.pair[n][x][1]);
    }
  }
}

// sums += codes . weights for half a tile's tokens and COUNT blocks of 16 channels. low, high: the first line of this lane's row in either
// plane.
template <class C, int BITS, int COUNT>
__device__ __forceinline__ void add_codes(const uint8_t* low, const uint8_t* high, int half, const HalfWeights<C>& weights,
                                          const Lane& lane, float (&sums)[COUNT][C::NT][4]) {
  using Code = Codes<BITS>;
  using Row = RowRun<BITS, kTile, 4 * kHalf>;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    Row rows[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int line = (4 * i + 2 * h) * kLineRows;
      rows[h].load(low + line * Row::kLowRowBytes, high + line * Row::kHighRowBytes, lane.g & 3, 2 * lane.t + half);
    }
#pragma unroll
    for (int x = 0; x < kHalf; ++x) {
      uint32_t a0, a1, a2, a3;
      Code::quad(rows[0].low, rows[0].high, x, a0, a2);
      Code::quad(rows[1].low, rows[1].high, x, a1, a3);
#pragma unroll
      for (int n = 0; n < C::NT; ++n) mma<__half>(sums[i][n], a0, a1, a2, a3, weights.pair[n][x][0], weights.pair[n][x][1]);
    }
  }
}

// out += v_channel_scale * (codes . weights + zero), for rows that are not `dead`. `range` is v_scale's. The scores are used up.
//
// A rounded weight w + e adds e * code to every channel, of which e * middle code is the larger part and the same for all: it is taken back
// by ValueSums.
template <class C, int BITS>
__device__ __forceinline__ void add_values(const uint8_t* codes, const VMetadata<C>& metadata, float (&scores)[kBlocks][C::NT][4],
                                           const float (&scale)[C::NT][2], const Range& range, const bool (&dead)[C::NT][2],
                                           const Lane& lane, RowState<C>& state) {
  constexpr int NT = C::NT;
  using Row = RowRun<BITS, kTile, 4 * kHalf>;
  constexpr int kLowBlock = 4 * kLineRows * Row::kLowRowBytes, kHighBlock = 4 * kLineRows * Row::kHighRowBytes;  // 16 channels
  const uint8_t* const low = codes + (lane.g >> 2) * (kLineRows * Row::kLowRowBytes);
  const uint8_t* const high = codes + C::D * Row::kLowRowBytes + (lane.g >> 2) * (kLineRows * Row::kHighRowBytes);
  const __half* const v_scale = metadata.scale() + lane.token;
  const __half* const v_zero = metadata.zero() + lane.token;
  const float down = range.down * (1.0f / kCodeUnit);
  ValueSums<C> total{};
  // sums of channel blocks first.., which are complete.
  const auto finish = [&](int first, auto& sums) {
    float more[NT][2];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      more[n][0] = fmaf(column_sum(total.zero[n][0]), range.up * kCodeUnit, total.middle[n][0]);
      more[n][1] = fmaf(column_sum(total.zero[n][1]), range.up * kCodeUnit, total.middle[n][1]);
    }
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(sums) / sizeof(sums[0])); ++i) {
      const __half* const v_channel_scale = metadata.channel_scale() + lane.g + 16 * (first + i);
      const float upper = __half2float(v_channel_scale[0]) * down, lower = __half2float(v_channel_scale[8]) * down;
      const float factor[4] = {upper, upper, lower, lower};
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][n][j] += more[n][j & 1];
        state.add(first + i, n, sums[i][n], factor, dead[n]);
      }
    }
  };
  if constexpr (NT == 1) {
    float sums[C::kQuads][NT][4] = {};
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      HalfWeights<C> weights;
      fold_weights<C, BITS, 0>(v_scale + 4 * kHalf * half, v_zero + 4 * kHalf * half, scores, scale, range.up, state, total, weights);
      add_codes<C, BITS, C::kQuads>(low, high, half, weights, lane, sums);
#pragma unroll
      for (int b = 0; b < kHalf; ++b) {
#pragma unroll
        for (int j = 0; j < 4; ++j) scores[b][0][j] = scores[b + kHalf][0][j];
      }
    }
    finish(0, sums);
  } else {  // sums of all channels beside the scores would take too many registers
    HalfWeights<C> weights[2];
    fold_weights<C, BITS, 0>(v_scale, v_zero, scores, scale, range.up, state, total, weights[0]);
    fold_weights<C, BITS, kHalf>(v_scale + 4 * kHalf, v_zero + 4 * kHalf, scores, scale, range.up, state, total, weights[1]);
    constexpr int kTogether = 2;
#pragma unroll
    for (int first = 0; first < C::kQuads; first += kTogether) {
      float sums[kTogether][NT][4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        add_codes<C, BITS, kTogether>(low + first * kLowBlock, high + first * kHighBlock, half, weights[half], lane, sums);
      }
      finish(first, sums);
    }
  }
}

// Calls body<BITS>() of a width; every warp of a launch takes the same way.
template <int WIDTHS, class Body>
__device__ __forceinline__ void with_width(int bits, Body body) {
  if constexpr (WIDTHS != kAnyWidth) {
    body.template operator()<WIDTHS>();
  } else if (bits == 2) {
    body.template operator()<2>();
  } else if (bits == 3) {
    body.template operator()<3>();
  } else if (bits == 4) {
    body.template operator()<4>();
  } else {
    body.template operator()<8>();
  }
}

// Scores of a tile's tokens against the rows of a warp.
template <class C>
struct TileScores {
  float value[kBlocks][C::NT][4];  // this lane's tokens: lane.token + 4 * b + h
  float scale[C::NT][2];           // to base-2 logits
  bool dead[C::NT][2];             // the row sees nothing of this tile
};

// `k`: codes and metadata. q: this lane's, as prepare_rows leaves it; rows: their description.
template <class C>
__device__ __forceinline__ void score_record(const AttendArgs& a, const Run& run, const uint8_t* k, int first_token, const float4* q,
                                             const RowInfo* rows, const Lane& lane, TileScores<C>& scores) {
  constexpr int NT = C::NT;
  const KMetadata<C> metadata{reinterpret_cast<const __half*>(k + a.v_offset)};
  const Range range = range_of<C::D, 0>(metadata.scale(), lane.lane);
  with_width<C::kKBits>(a.k_bits, [&]<int BITS>() { record_scores<C, BITS>(k, metadata, q, range.up, lane, scores.value); });
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    const float2 token_scale = __half22float2(*reinterpret_cast<const __half2*>(metadata.token_scale() + lane.token + 4 * b));
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) scores.value[b][n][j] *= j < 2 ? token_scale.x : token_scale.y;
    }
  }
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      scores.scale[n][column] = rows[8 * n + 2 * lane.t + column].scale * (range.down / kCodeUnit);
      scores.dead[n][column] = false;
    }
  }
  const bool masked = first_token < run.full_first || first_token + kTile - 1 > run.full_last;
  if (!masked && a.soft_cap <= 0.0f && a.alibi_slopes == nullptr) return;
  // Rare, so short code: the blocks pass through the first place in turn.
#pragma unroll 1
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const RowInfo row = rows[8 * n + 2 * lane.t + column];
        float logits[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          logits[h] = special_logit(a, run, row, scores.value[0][n][2 * h + column] * scores.scale[n][column],
                                    first_token + lane.token + 4 * b + h);
        }
#pragma unroll
        for (int to = 0; to < kBlocks; ++to) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            scores.value[to][n][2 * h + column] = to + 1 < kBlocks ? scores.value[to + 1][n][2 * h + column] : logits[h];
          }
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const int position = rows[8 * n + 2 * lane.t + column].position;
      // A row that sees nothing of this tile must not meet its NaN either.
      scores.dead[n][column] = first_token > last_visible(a, position, run.seq_len) || first_token + kTile <= first_visible(a, position);
      scores.scale[n][column] = 1.0f;
    }
  }
}

// `v`: codes and metadata.
template <class C>
__device__ __forceinline__ void add_record(const AttendArgs& a, const uint8_t* v, TileScores<C>& scores, const Lane& lane,
                                           RowState<C>& state) {
  const VMetadata<C> metadata{reinterpret_cast<const __half*>(v + a.metadata_offset - a.v_offset)};
  raise_maximum<C>(scores.value, scores.scale, state);
  const Range range = range_of<kTile, 7>(metadata.scale(), lane.lane);
  with_width<C::kVBits>(a.v_bits,
                        [&]<int BITS>() { add_values<C, BITS>(v, metadata, scores.value, scores.scale, range, scores.dead, lane, state); });
}

}  // namespace kvarn::cuda
