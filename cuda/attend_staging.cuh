// 16 tokens of a staging slot: full precision K and V, so q and the probabilities enter as a high and a low 16-bit part.
#pragma once

#include "attend_record.cuh"

namespace kvarn::cuda {

// Two neighbouring values of q (natural order of channels) from its run-ordered copy: channels 16*step + 8*half + 2*lane.t + {0, 1} of row
// lane.g.
template <class C>
__device__ __forceinline__ float2 q_pair(const float4* q_rows, int n, int step, int half, const Lane& lane) {
  static_assert(kRunCodes == 16, "a step is a run");
  const int quad = step / 4 * kRunQuads + 2 * half + (lane.t >> 1);
  const float4* at = q_rows + (n * C::kQuads + quad) * 32 + lane.g * 4 + step % 4;
  return reinterpret_cast<const float2*>(at)[lane.t & 1];
}

template <class T>
__device__ __forceinline__ void split(float x, float y, uint32_t& high, uint32_t& low) {
  high = Pair<T>::pack(x, y);
  const float2 h = Pair<T>::unpack(high);
  low = Pair<T>::pack(x - h.x, y - h.y);
}

// A fragment as one or two parts.
template <class T>
struct StagingFragment {
  using Part = T;
  static constexpr int kParts = 1;
  uint32_t part[1][4];
  // Rows = tokens.
  __device__ __forceinline__ void load_k(const uint8_t* rows, uint32_t pitch, int step, const Lane& lane) {
    const int row = (lane.lane & 7) + (lane.lane >> 3 & 1) * 8;
    load_matrices(part[0], shared_address(rows + row * pitch + (16 * step + (lane.lane >> 4) * 8) * 2));
  }
  // Rows = channels.
  __device__ __forceinline__ void load_v(const uint8_t* rows, uint32_t pitch, int tile, const Lane& lane) {
    const int row = (lane.lane & 7) + (lane.lane >> 4) * 8;
    load_matrices_transposed(part[0], shared_address(rows + row * pitch + (16 * tile + (lane.lane >> 3 & 1) * 8) * 2));
  }
};
template <>
struct StagingFragment<float> {  // bf16 has fp32's range
  using Part = __nv_bfloat16;
  static constexpr int kParts = 2;
  uint32_t part[2][4];
  __device__ __forceinline__ void load_k(const uint8_t* rows, uint32_t pitch, int step, const Lane& lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane.g + (i & 1) * 8, column = 16 * step + (i >> 1) * 8 + 2 * lane.t;
      const float2 x = *reinterpret_cast<const float2*>(rows + row * pitch + column * 4);
      split<Part>(x.x, x.y, part[0][i], part[1][i]);
    }
  }
  __device__ __forceinline__ void load_v(const uint8_t* rows, uint32_t pitch, int tile, const Lane& lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = (i >> 1) * 8 + 2 * lane.t, column = 16 * tile + (i & 1) * 8 + lane.g;
      split<Part>(*reinterpret_cast<const float*>(rows + row * pitch + column * 4),
                  *reinterpret_cast<const float*>(rows + (row + 1) * pitch + column * 4), part[0][i], part[1][i]);
    }
  }
};

// sums += a * (high + low), without the product of two low parts.
template <class Fragment>
__device__ __forceinline__ void multiply_split(float (&sums)[4], const Fragment& a, const uint32_t (&high)[2], const uint32_t (&low)[2]) {
  using Part = typename Fragment::Part;
  mma<Part>(sums, a.part[0][0], a.part[0][1], a.part[0][2], a.part[0][3], high[0], high[1]);
  mma<Part>(sums, a.part[0][0], a.part[0][1], a.part[0][2], a.part[0][3], low[0], low[1]);
  if constexpr (Fragment::kParts == 2) {
    mma<Part>(sums, a.part[1][0], a.part[1][1], a.part[1][2], a.part[1][3], high[0], high[1]);
  }
}

template <class C, class T>
__device__ __forceinline__ void attend_staging(const AttendArgs& a, const Run& run, const uint8_t* k_rows, const uint8_t* v_rows,
                                               int first_token, const float4* q_rows, const RowInfo* info, const Lane& lane,
                                               RowState<C>& state) {
  constexpr int D = C::D, NT = C::NT;
  using Fragment = StagingFragment<T>;
  using Part = typename Fragment::Part;
  constexpr uint32_t kPitch = D * sizeof(T) + 16;
  float scores[NT][4] = {};
#pragma unroll 2
  for (int step = 0; step < C::kQuads; ++step) {
    Fragment k;
    k.load_k(k_rows, kPitch, step, lane);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      uint32_t high[2], low[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 x = q_pair<C>(q_rows, n, step, half, lane);
        split<Part>(x.x, x.y, high[half], low[half]);
      }
      multiply_split(scores[n], k, high, low);
    }
  }

  const bool beyond = first_token + kStagingUnit > run.seq_len;
  float old_factor[NT][2], factor[NT][2];
  bool dead[NT][2];
  uint32_t high[NT][2], low[NT][2];
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    float p[4];
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const RowInfo row = info[8 * n + 2 * lane.t + column];
      float logit[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        logit[e] = special_logit(a, run, row, scores[n][2 * e + column] * row.scale, first_token + lane.g + 8 * e);
      }
      const float most = column_max(fmaxf(logit[0], logit[1]));
      const Merge merge = merge_maximum(most, state.most[n][column]);
      const float base = merge.dead ? 0.0f : most;
      old_factor[n][column] = merge.old_factor;
      factor[n][column] = merge.new_factor;
      dead[n][column] = merge.dead;
      p[column] = exp2_approx(logit[0] - base);
      p[2 + column] = exp2_approx(logit[1] - base);
      state.sum[n][column] = fmaf(p[column] + p[2 + column], merge.new_factor, state.sum[n][column] * merge.old_factor);
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      split<Part>(p[2 * e], p[2 * e + 1], high[n][e], low[n][e]);
      high[n][e] = transpose8x8(high[n][e]);
      low[n][e] = transpose8x8(low[n][e]);
    }
  }
  bool same = true;
#pragma unroll
  for (int n = 0; n < NT; ++n) same = same && old_factor[n][0] == 1.0f && old_factor[n][1] == 1.0f;
  if (!__all_sync(kFullWarp, same)) state.rescale(old_factor);

  // What lies behind the last token is undefined memory: probability 0 does not silence its NaN, clearing its bits does.
  uint32_t keep[2] = {~0u, ~0u};
  if (beyond) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first_token + 8 * half + 2 * lane.t;
      keep[half] = (token < run.seq_len ? 0x0000ffffu : 0u) | (token + 1 < run.seq_len ? 0xffff0000u : 0u);
    }
  }
#pragma unroll
  for (int tile = 0; tile < C::kQuads; ++tile) {
    Fragment v;
    v.load_v(v_rows, kPitch, tile, lane);
#pragma unroll
    for (int part = 0; part < Fragment::kParts; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) v.part[part][i] &= keep[i >> 1];
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      float sums[4] = {};
      multiply_split(sums, v, high[n], low[n]);
      const float factors[4] = {factor[n][0], factor[n][1], factor[n][0], factor[n][1]};
      state.add(tile, n, sums, factors, dead[n]);
    }
  }
}

}  // namespace kvarn::cuda
