// One operand (K or V) of a tile in the registers of a block (encode_shape.cuh): loading and variance normalisation, docs/FORMAT.md's fp32
// definition, operation by operation, so that the bytes are those of every other backend.
#pragma once

#include "encode.h"
#include "encode_metadata.cuh"
#include "encode_shape.cuh"
#include "exact.cuh"
#include "kvarn/encode_constants.h"
#include "numbers.cuh"
#include "primitives.cuh"

namespace kvarn::cuda {

template <bool kIsK, bool kFeedback, class Shape>
class RegisterTile {
 public:
  using Shared = typename Shape::template Shared<kFeedback>;
  static constexpr int kThreads = Shape::kThreads, kParts = Shape::kParts;
  static constexpr int kMineX = Shape::kMineX, kMineY = Shape::kMineY, kOwnX = Shape::kOwnX, kOwnY = Shape::kOwnY;
  static constexpr int kHeadDim = Shape::kHeadDim, kTokens = Shape::kTokens, kNY = kTokens / 16;

  __device__ __forceinline__ RegisterTile(const EncodeArgs& a, Shared& s, uint8_t* record)
      : a_(a), s_(s), record_(record), x_(threadIdx.x & 15), y_(threadIdx.x >> 4) {}

 protected:
  template <class T>
  __device__ __forceinline__ void load(const T* tile, float& largest) {
    const T* const from = tile + y_ * kHeadDim + x_;
#pragma unroll
    for (int k = 0; k < kMineY; ++k) {
#pragma unroll
      for (int i = 0; i < kMineX; ++i) {
        m_[k][i] = to_float(from[(k / kNY * kParts + k % kNY * 16) * kHeadDim + 16 * i]);
        largest = max_or_nan(largest, fabsf(m_[k][i]));
      }
    }
  }

  // ---- vectors in shared memory ----

  __device__ __forceinline__ int channel(int o) const {
    const int p = threadIdx.x + o * kThreads;
    return p % 64 / 4 + 16 * (p / 64 * 4 + p % 4);
  }
  __device__ __forceinline__ static int channel_position(int channel) { return channel / 64 * 64 + 4 * (channel % 16) + channel / 16 % 4; }
  __device__ __forceinline__ bool owns_channel(int o) const {
    return kHeadDim % kThreads == 0 || static_cast<int>(threadIdx.x) + o * kThreads < kHeadDim;
  }
  __device__ __forceinline__ int token_position(int o) const { return y_ * kMineY + (kMineY < 16 ? x_ % kMineY : x_) + 16 * o; }
  __device__ __forceinline__ int token(int o) const {
    const int k = (kMineY < 16 ? x_ % kMineY : x_) + 16 * o;
    return y_ + kParts * (k / kNY) + 16 * (k % kNY);
  }
  __device__ __forceinline__ bool owns_token() const { return kMineY >= 16 || x_ < kMineY; }
  // Of the thread's channels 4q ... 4q+3, and of its tokens.
  __device__ __forceinline__ float4 channels_of(const float* values, int q) const {
    return *reinterpret_cast<const float4*>(values + 64 * q + 4 * x_);
  }
  __device__ __forceinline__ float4 tokens_of(const float* values, int q) const {
    return *reinterpret_cast<const float4*>(values + y_ * kMineY + 4 * q);
  }
  __device__ __forceinline__ static void unpack(float* to, float4 from) {
    to[0] = from.x;
    to[1] = from.y;
    to[2] = from.z;
    to[3] = from.w;
  }
  __device__ __forceinline__ void put_channels(float* values, const float (&own)[kOwnX]) {
#pragma unroll
    for (int o = 0; o < kOwnX; ++o) {
      if (owns_channel(o)) values[threadIdx.x + o * kThreads] = own[o];
    }
  }
  __device__ __forceinline__ void put_tokens(float* values, const float (&own)[kOwnY]) {
#pragma unroll
    for (int o = 0; o < kOwnY; ++o) {
      if (owns_token()) values[token_position(o)] = own[o];
    }
  }

  // ---- sums: partial ones are put, the owner gets the total once the others' are there ----

  // Halves joined to halves.
  template <int N, class T, class Join>
  __device__ __forceinline__ static T fold(T (&v)[N], Join join) {
    if constexpr (N > 1) {
      T halves[N / 2];
#pragma unroll
      for (int l = 0; l < N / 2; ++l) halves[l] = join(v[l], v[l + N / 2]);
      return fold(halves, join);
    } else {
      return v[0];
    }
  }
  template <int N, class T>
  __device__ __forceinline__ static T fold(T (&v)[N]) {
    return fold(v, [](T x, T y) { return x + y; });
  }
  // Of four channels i = 4q ...: sums over the thread's tokens.
  template <class T>
  __device__ __forceinline__ void put_part(T* part, int q, const T (&sums)[4]) {
    *reinterpret_cast<Four<T>*>(part + y_ * kHeadDim + 64 * q + 4 * x_) = {sums[0], sums[1], sums[2], sums[3]};
  }
  template <class T>
  __device__ __forceinline__ void gather_part(const T* part, int o, T (&v)[kParts]) const {
#pragma unroll
    for (int l = 0; l < kParts; ++l) v[l] = part[l * kHeadDim + (threadIdx.x + o * kThreads) % kHeadDim];
  }
  __device__ __forceinline__ float channel_total(int o) const {
    float v[kParts];
    gather_part(s_.part, o, v);
    return fold(v);
  }
  // Of four tokens k = 4q ...: sums over the thread's channels.
  template <class T>
  __device__ __forceinline__ void put_stage(T* stage, int q, const T (&sums)[4]) {
    *reinterpret_cast<Four<T>*>(stage + y_ * Shape::kStage + Shape::stage_at(4 * q, x_)) = {sums[0], sums[1], sums[2], sums[3]};
  }
  template <class T, class Join>
  __device__ __forceinline__ T stage_total(const T* stage, int o, Join join) const {
    if constexpr (Shape::kPaired) {
      const T* const from = stage + y_ * Shape::kStage + Shape::stage_at(x_ % 8, x_ / 8);
      T v[8];
#pragma unroll
      for (int l = 0; l < 8; ++l) v[l] = from[4 * l];
      const T half = fold(v, join);
      return join(half, __shfl_xor_sync(kFullWarp, half, 8));
    } else {
      const T* const from = stage + y_ * Shape::kStage + Shape::stage_at(x_ + 16 * o, 0);
      T v[16];
#pragma unroll
      for (int l = 0; l < 16; ++l) v[l] = from[4 * l];
      return fold(v, join);
    }
  }
  __device__ __forceinline__ float token_total(int o) const {
    return stage_total(s_.stage, o, [](float x, float y) { return x + y; });
  }
  // step(p, k, i) added up over the thread's tokens of each of its channels, into a part.
  template <class Step>
  __device__ __forceinline__ void sum_over_tokens(Step step) {
#pragma unroll
    for (int q = 0; q < kMineX / 4; ++q) {
      float p[4][kMineY / kNY] = {};
#pragma unroll
      for (int j = 0; j < kNY; ++j) {
#pragma unroll
        for (int u = 0; u < kMineY / kNY; ++u) {
#pragma unroll
          for (int r = 0; r < 4; ++r) p[r][u] = step(p[r][u], u * kNY + j, 4 * q + r);
        }
      }
      const float sums[4] = {fold(p[0]), fold(p[1]), fold(p[2]), fold(p[3])};
      put_part(s_.part, q, sums);
    }
  }
  // The same over its channels of each of its tokens, into the stage.
  template <class Step>
  __device__ __forceinline__ void sum_over_channels(Step step) {
#pragma unroll
    for (int b = 0; b < kMineY / 8; ++b) {
      float p[2][4] = {};
#pragma unroll
      for (int i = 0; i < kMineX; ++i) {
#pragma unroll
        for (int k = 0; k < 8; ++k) p[k / 4][k % 4] = step(p[k / 4][k % 4], 8 * b + k, i);
      }
      put_stage(s_.stage, 2 * b, p[0]);
      put_stage(s_.stage, 2 * b + 1, p[1]);
    }
    __syncwarp();
  }
  // The sum over all lanes' values, halves to halves.
  __device__ __forceinline__ static float half_warp_total(float p) {
#pragma unroll
    for (int h = 8; h >= 1; h /= 2) p = __fadd_rn(p, __shfl_xor_sync(kFullWarp, p, h));
    return p;
  }

  // ---- step 1: size ----

  __device__ __forceinline__ float tile_size() {
    const auto square = [&](float p, int k, int i) { return __fmaf_rn(m_[k][i], m_[k][i], p); };
    float p = 0.0f;  // of the sum over rows: partial sum of the rows that are x modulo 16
    if constexpr (kIsK) {
      sum_over_tokens(square);
      __syncthreads();  // parts are written
      float own[kOwnX];
#pragma unroll
      for (int o = 0; o < kOwnX; ++o) own[o] = channel_total(o);
      put_channels(s_.x_mean, own);
      __syncthreads();  // sums are written, parts are read
#pragma unroll
      for (int q = 0; q < kMineX / 4; ++q) {
        const float4 v = channels_of(s_.x_mean, q);
        p = __fadd_rn(__fadd_rn(__fadd_rn(__fadd_rn(p, v.x), v.y), v.z), v.w);
      }
    } else {
      sum_over_channels(square);
      float own[kOwnY];
#pragma unroll
      for (int o = 0; o < kOwnY; ++o) own[o] = token_total(o);
      put_tokens(s_.y_mean, own);
      __syncthreads();  // sums are written
#pragma unroll
      for (int j = 0; j < kNY; ++j) p = __fadd_rn(p, s_.y_mean[x_ % kParts * kMineY + x_ / kParts * kNY + j]);
      __syncthreads();  // and read
    }
    const float size = __fmul_rn(square_root(__fmul_rn(half_warp_total(p), 1.0f / static_cast<float>(kHeadDim * kTokens))), kSizeShare);
    return size >= kSmallestSize ? size : 1.0f;
  }

  // ---- step 2: VarN ----

  // The quotients of a sum by powers of two are products.
  static constexpr float kPerChannel = 1.0f / static_cast<float>(kHeadDim), kPerToken = 1.0f / static_cast<float>(kTokens);

  // Spread over the channels of every token, weighted by x_weight.
  __device__ __forceinline__ void measure_tokens() {
    float w[kMineX];
#pragma unroll
    for (int q = 0; q < kMineX / 4; ++q) unpack(w + 4 * q, channels_of(s_.x_weight, q));
    sum_over_channels([&](float p, int k, int i) { return __fmaf_rn(m_[k][i], w[i], p); });
    float own[kOwnY];
#pragma unroll
    for (int o = 0; o < kOwnY; ++o) own[o] = __fmul_rn(token_total(o), -kPerChannel);
    put_tokens(s_.y_mean, own);
    __syncwarp();
    float minus[8];
    sum_over_channels([&](float p, int k, int i) {
      if (i == 0 && k % 8 == 0) {
        unpack(minus, tokens_of(s_.y_mean, k / 4));
        unpack(minus + 4, tokens_of(s_.y_mean, k / 4 + 1));
      }
      const float t = __fmaf_rn(m_[k][i], w[i], minus[k % 8]);
      return __fmaf_rn(t, t, p);
    });
#pragma unroll
    for (int o = 0; o < kOwnY; ++o) spread_y_[o] = square_root(quotient<kHeadDim - 1>(token_total(o)));
    __syncwarp();
  }
  // Spread over the tokens of every channel, weighted by y_weight. between() is called once after a barrier.
  template <class Between>
  __device__ __forceinline__ void measure_channels(Between between) {
    float w[kMineY];
#pragma unroll
    for (int q = 0; q < kMineY / 4; ++q) unpack(w + 4 * q, tokens_of(s_.y_weight, q));
    sum_over_tokens([&](float p, int k, int i) { return __fmaf_rn(m_[k][i], w[k], p); });
    __syncthreads();  // parts are written
    between();
    float own[kOwnX];
#pragma unroll
    for (int o = 0; o < kOwnX; ++o) {
      if (owns_channel(o)) own[o] = __fmul_rn(channel_total(o), -kPerToken);
    }
    put_channels(s_.x_mean, own);
    __syncthreads();  // means are written, parts are read
    float minus[4];
    sum_over_tokens([&](float p, int k, int i) {
      if (k == 0 && i % 4 == 0) unpack(minus, channels_of(s_.x_mean, i / 4));
      const float t = __fmaf_rn(m_[k][i], w[k], minus[i % 4]);
      return __fmaf_rn(t, t, p);
    });
    __syncthreads();  // parts are written
#pragma unroll
    for (int o = 0; o < kOwnX; ++o) {
      if (owns_channel(o)) spread_x_[o] = square_root(quotient<kTokens - 1>(channel_total(o)));
    }
  }
  // What an owner keeps of its channels and tokens lies in shared memory, where nobody else looks: registers are for the tile.
  __device__ __forceinline__ float& own_x(float* values, int o) { return values[(threadIdx.x + o * kThreads) % kHeadDim]; }
  __device__ __forceinline__ float& own_y(float* values, int o) { return values[token_position(o)]; }
  __device__ __forceinline__ void update_tokens(float low, float high) {
#pragma unroll
    for (int o = 0; o < kOwnY; ++o) {
      if (owns_token()) update(own_y(s_.y_scale, o), own_y(s_.y_weight, o), spread_y_[o], low, high);
    }
    __syncwarp();
  }
  __device__ __forceinline__ void update_channels(float low, float high) {
#pragma unroll
    for (int o = 0; o < kOwnX; ++o) {
      if (owns_channel(o)) update(own_x(s_.x_scale, o), own_x(s_.x_weight, o), spread_x_[o], low, high);
    }
    __syncthreads();  // weights are written, parts are read
  }
  __device__ __forceinline__ static void update(float& scale, float& weight, float spread, float low, float high) {
    const float next = clip_value(__fmul_rn(scale, clip_value(__fmul_rn(spread, weight), kStdMin, kStdMax)), low, high);
    scale = next;
    weight = reciprocal(next);
  }
  // The warp's least and most weighted spreads. They are not negative, so their bits compare as they do; the least are kept as complements.
  __device__ __forceinline__ void put_extremes(int axis, uint32_t least, uint32_t most) {
    least = __reduce_max_sync(kFullWarp, least);
    most = __reduce_max_sync(kFullWarp, most);
    if (threadIdx.x % 32 == 0) *reinterpret_cast<uint2*>(s_.extremes + threadIdx.x / 32 * 4 + 2 * axis) = make_uint2(least, most);
  }
  __device__ __forceinline__ void put_extremes_x() {
    uint32_t least = 0, most = 0;
#pragma unroll
    for (int o = 0; o < kOwnX; ++o) {
      if (!owns_channel(o)) continue;
      const uint32_t bits = __float_as_uint(__fmul_rn(spread_x_[o], own_x(s_.x_weight, o)));
      least = max(least, ~bits);
      most = max(most, bits);
    }
    put_extremes(0, least, most);
  }
  __device__ __forceinline__ void put_extremes_y() {
    uint32_t least = 0, most = 0;
#pragma unroll
    for (int o = 0; o < kOwnY; ++o) {
      const uint32_t bits = __float_as_uint(__fmul_rn(spread_y_[o], own_y(s_.y_weight, o)));
      least = max(least, ~bits);
      most = max(most, bits);
    }
    put_extremes(1, least, most);
  }
  // After a barrier.
  __device__ __forceinline__ float imbalance() const {
    constexpr int kWords = 4 * Shape::kWarps;
    const int lane = threadIdx.x % 32;
    uint32_t own = s_.extremes[lane % kWords];
#pragma unroll
    for (int h = kWords / 2; h >= 4; h /= 2) own = max(own, __shfl_xor_sync(kFullWarp, own, h));
    const uint32_t other = __shfl_xor_sync(kFullWarp, own, 1);
    const bool has_most = lane % 2 != 0;
    const float most = __uint_as_float(has_most ? own : other), least = __uint_as_float(~(has_most ? other : own));
    const float ratio = quotient(most, fmaxf(least, kImbalanceFloor));
    return __fadd_rn(ratio, __shfl_xor_sync(kFullWarp, ratio, 2));
  }

  // Leaves the kept scales in x_scale and y_scale.
  __device__ __forceinline__ void normalise(float size) {
    const float row_weight = reciprocal(size);
#pragma unroll
    for (int o = 0; o < kOwnX; ++o) {
      if (!owns_channel(o)) continue;
      own_x(s_.x_scale, o) = kIsK ? size : 1.0f;
      own_x(s_.x_weight, o) = kIsK ? row_weight : 1.0f;
    }
#pragma unroll
    for (int o = 0; o < kOwnY; ++o) {
      if (!owns_token()) continue;
      own_y(s_.y_scale, o) = kIsK ? 1.0f : size;
      own_y(s_.y_weight, o) = kIsK ? 1.0f : row_weight;
    }
    __syncthreads();  // weights are written
    // An iteration is judged when the next one has passed a barrier and only the columns' scales have gone on.
    float best = INFINITY;
    float before[kIsK ? kOwnY : kOwnX] = {};
    const auto note_columns = [&] {
#pragma unroll
      for (int o = 0; o < (kIsK ? kOwnY : kOwnX); ++o) {
        if (kIsK ? owns_token() : owns_channel(o)) before[o] = kIsK ? own_y(s_.y_scale, o) : own_x(s_.x_scale, o);
      }
    };
    const auto judge = [&] {
      const float now = imbalance();
      const bool better = now <= best;
      best = better ? now : best;
#pragma unroll
      for (int o = 0; o < kOwnX; ++o) {
        if (better && owns_channel(o)) own_x(s_.x_kept, o) = kIsK ? own_x(s_.x_scale, o) : before[o % (kIsK ? kOwnY : kOwnX)];
      }
#pragma unroll
      for (int o = 0; o < kOwnY; ++o) {
        if (better && owns_token()) own_y(s_.y_kept, o) = kIsK ? before[o % (kIsK ? kOwnY : kOwnX)] : own_y(s_.y_scale, o);
      }
    };
    if constexpr (kIsK) {
      measure_channels([] {});
      put_extremes_x();
      __syncthreads();  // parts are read
      measure_tokens();
      put_extremes_y();
#pragma unroll 1
      for (int iteration = 0; iteration < kVarNIterations; ++iteration) {
        note_columns();
        update_tokens(kScaleMin, kScaleMax);
        measure_channels(judge);
        update_channels(__fmul_rn(s_.size, kScaleMin), __fmul_rn(s_.size, kScaleMax));
        put_extremes_x();
        measure_tokens();
        put_extremes_y();
      }
    } else {
      measure_tokens();
      put_extremes_y();
      measure_channels([] {});
      put_extremes_x();
#pragma unroll 1
      for (int iteration = 0; iteration < kVarNIterations; ++iteration) {
        note_columns();
        update_channels(kScaleMin, kScaleMax);
        judge();
        measure_tokens();
        update_tokens(__fmul_rn(s_.size, kScaleMin), __fmul_rn(s_.size, kScaleMax));
        measure_channels([&] { put_extremes_y(); });
        put_extremes_x();
      }
    }
    note_columns();
    __syncthreads();  // extremes are written, parts are read
    judge();
  }

  const EncodeArgs& a_;
  Shared& s_;
  uint8_t* record_;
  int x_, y_;
  float m_[kMineY][kMineX];
  float spread_x_[kOwnX], spread_y_[kOwnY];
};

}  // namespace kvarn::cuda
