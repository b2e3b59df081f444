// One operand (K or V) of one tile of any shape to its part of a record: docs/FORMAT.md's fp32 definition, operation by operation, so that
// the bytes are those of every other backend. Values are read again from global memory whenever they are needed; encode_round.cuh is for
// the shapes that fit registers.
//
// A block of 16 x 16 threads covers the tile [tokens][channels]: thread (y, x) has tokens y + 16j and channels x + 16i. sum16
// keeps one partial sum for every index modulo 16, so each thread's own sum is one of the sixteen, in the order of the definition, and what
// remains is adding halves to halves: over the 16 lanes of a half-warp for sums over channels, through shared memory for sums over tokens.
// Scales belong to one owner each: token y + 16j to a lane of half-warp y, channel c to thread c; the weights 1/scale are broadcast through
// shared memory.
#pragma once

#include "encode.h"
#include "encode_feedback.cuh"
#include "encode_metadata.cuh"
#include "encode_place.cuh"
#include "kvarn/encode_constants.h"
#include "numbers.cuh"
#include "primitives.cuh"

namespace kvarn::cuda {

struct EncodeShared {
  static __host__ __device__ constexpr int part_stride(int head_dim) { return head_dim + 16; }
  float* part;   // [16][head_dim + 16] partial sums over tokens
  int* part_c1;  // the same for sums of codes, and of their squares; later the codes themselves
  int* part_c2;
  float* x_weight;  // [head_dim]
  float* x_mean;
  float* y_weight;  // [tile_tokens]
  float* y_mean;
  float* reduce;  // [8 warps][4]
};

// kIsK: rows (the axis that gets scale and zero) are channels, columns tokens; else the reverse. kFeedback: whether there may be a factor
// to feed errors back with.
template <bool kIsK, bool kFeedback>
class TileEncoder {
 public:
  static constexpr int kMostY = kMaxTileTokens / 16;
  static constexpr int kOwnedX = kMaxHeadDim / kEncodeThreads;  // channels of one owner

  __device__ __forceinline__ TileEncoder(const EncodeArgs& a, const EncodeShared& s, const uint8_t* tile, uint8_t* record)
      : a_(a), s_(s), tile_(tile), record_(record), x_(threadIdx.x & 15), y_(threadIdx.x >> 4) {
    own_y_ = x_ / (16 / kMostY);
  }

  __device__ void encode(bool slot_exists, bool unbiased) {
    bool finite = slot_exists;
    if (slot_exists) {
      for (int i = 0; i < nx(); ++i) {
#pragma unroll
        for (int j = 0; j < kMostY; ++j) {
          if (j >= ny()) continue;
          const float v = load_value(tile_, static_cast<int64_t>(y_ + 16 * j) * head_dim() + x_ + 16 * i, a_.dtype);
          finite = finite && fabsf(v) <= kLargestValue;
        }
      }
    }
    const float* const factor = kFeedback ? encode_factor(a_, kIsK) : nullptr;
    if (__syncthreads_or(!finite) ||
        (factor != nullptr && !orders_channels<kEncodeThreads>(factor, head_dim(), reinterpret_cast<unsigned*>(s_.part)))) {
      write_nan<kIsK, kEncodeThreads>(a_.layout, record_);
      return;
    }
    const float size = a_.published != 0 ? 1.0f : tile_size();
    normalise(size);
    round(unbiased, size);
  }

 private:
  __device__ __forceinline__ int nx() const { return a_.head_dim / 16; }
  __device__ __forceinline__ int ny() const { return a_.tile_tokens / 16; }
  __device__ __forceinline__ int head_dim() const { return a_.head_dim; }
  __device__ __forceinline__ int tokens() const { return a_.tile_tokens; }
  __device__ __forceinline__ int stride() const { return EncodeShared::part_stride(head_dim()); }
  __device__ __forceinline__ float at(int j, int i) const {
    return load_value(tile_, static_cast<int64_t>(y_ + 16 * j) * head_dim() + x_ + 16 * i, a_.dtype);
  }
  __device__ __forceinline__ int own_token() const { return y_ + 16 * own_y_; }
  __device__ __forceinline__ bool owns_token() const { return own_y_ < ny(); }
  // f(owned, channel)
  template <class F>
  __device__ __forceinline__ void for_own_channels(F f) {
#pragma unroll
    for (int o = 0; o < kOwnedX; ++o) {
      const int c = threadIdx.x + o * kEncodeThreads;
      if (c < head_dim()) f(o, c);
    }
  }

  // ---- sums ----

  // The own token's sum over channels of step(p, j, i).
  template <class Step>
  __device__ __forceinline__ float sum_channels(Step step) {
    float p[kMostY] = {};
    for (int i = 0; i < nx(); ++i) {
#pragma unroll
      for (int j = 0; j < kMostY; ++j) {
        if (j < ny()) p[j] = step(p[j], j, i);
      }
    }
    return total_of_own(p, x_);
  }
  // Partial sums over tokens of step(p, j, i) into s_.part; channel_total() gives the sum once the block has synchronised.
  template <class Step>
  __device__ __forceinline__ void part_tokens(Step step) {
    for (int i = 0; i < nx(); ++i) {
      float p = 0.0f;
#pragma unroll
      for (int j = 0; j < kMostY; ++j) {
        if (j < ny()) p = step(p, j, i);
      }
      s_.part[y_ * stride() + x_ + 16 * i] = p;
    }
  }
  template <class T>
  __device__ __forceinline__ T channel_total(const T* part, int channel) const {
    T p[16];
#pragma unroll
    for (int l = 0; l < 16; ++l) p[l] = part[l * stride() + channel];
#pragma unroll
    for (int h = 8; h >= 1; h /= 2) {
#pragma unroll
      for (int l = 0; l < h; ++l) p[l] = p[l] + p[l + h];
    }
    return p[0];
  }
  // sum16 over all `n` values of an array in shared memory; the same in every thread.
  __device__ __forceinline__ float sum_array(const float* values, int n) const {
    float p = 0.0f;
    for (int i = x_; i < n; i += 16) p = __fadd_rn(p, values[i]);
#pragma unroll
    for (int h = 8; h >= 1; h /= 2) p = __fadd_rn(p, __shfl_xor_sync(kFullWarp, p, h));
    return p;
  }

  // ---- step 1: size ----

  __device__ __forceinline__ float tile_size() {
    const auto square = [&](float p, int j, int i) {
      const float v = at(j, i);
      return __fmaf_rn(v, v, p);
    };
    float squares;
    if constexpr (kIsK) {
      part_tokens(square);
      __syncthreads();  // parts are written
      for_own_channels([&](int, int c) { s_.x_mean[c] = channel_total(s_.part, c); });
      __syncthreads();  // sums are written
      squares = sum_array(s_.x_mean, head_dim());
    } else {
      const float own = sum_channels(square);
      if (owns_token()) s_.y_mean[own_token()] = own;
      __syncthreads();  // sums are written
      squares = sum_array(s_.y_mean, tokens());
    }
    __syncthreads();  // sums are read
    const float size = __fmul_rn(__fsqrt_rn(__fdiv_rn(squares, static_cast<float>(head_dim() * tokens()))), kSizeShare);
    return size >= kSmallestSize ? size : 1.0f;
  }

  // ---- step 2: VarN ----

  // Spread over the channels of every token, weighted by x_weight.
  __device__ __forceinline__ void measure_tokens() {
    const float n = static_cast<float>(head_dim());
    float p[kMostY] = {};
    for (int i = 0; i < nx(); ++i) {
      const float w = s_.x_weight[x_ + 16 * i];
#pragma unroll
      for (int j = 0; j < kMostY; ++j) {
        if (j < ny()) p[j] = __fmaf_rn(at(j, i), w, p[j]);
      }
    }
    const float mean = __fdiv_rn(total_of_own(p, x_), n);
    if (owns_token()) s_.y_mean[own_token()] = mean;
    __syncwarp();
    float minus[kMostY];
#pragma unroll
    for (int j = 0; j < kMostY; ++j) {
      minus[j] = j < ny() ? -s_.y_mean[y_ + 16 * j] : 0.0f;
      p[j] = 0.0f;
    }
    for (int i = 0; i < nx(); ++i) {
      const float w = s_.x_weight[x_ + 16 * i];
#pragma unroll
      for (int j = 0; j < kMostY; ++j) {
        if (j >= ny()) continue;
        const float t = __fmaf_rn(at(j, i), w, minus[j]);
        p[j] = __fmaf_rn(t, t, p[j]);
      }
    }
    spread_y_ = __fsqrt_rn(__fdiv_rn(total_of_own(p, x_), n - 1.0f));
    __syncwarp();
  }
  // Spread over the tokens of every channel, weighted by y_weight.
  __device__ __forceinline__ void measure_channels() {
    const float n = static_cast<float>(tokens());
    float w[kMostY];
#pragma unroll
    for (int j = 0; j < kMostY; ++j) w[j] = j < ny() ? s_.y_weight[y_ + 16 * j] : 0.0f;
    part_tokens([&](float p, int j, int i) { return __fmaf_rn(at(j, i), w[j], p); });
    __syncthreads();  // parts are written
    for_own_channels([&](int, int c) { s_.x_mean[c] = __fdiv_rn(channel_total(s_.part, c), n); });
    __syncthreads();  // means are written, parts are read
    for (int i = 0; i < nx(); ++i) {
      const float minus = -s_.x_mean[x_ + 16 * i];
      float p = 0.0f;
#pragma unroll
      for (int j = 0; j < kMostY; ++j) {
        if (j >= ny()) continue;
        const float t = __fmaf_rn(at(j, i), w[j], minus);
        p = __fmaf_rn(t, t, p);
      }
      s_.part[y_ * stride() + x_ + 16 * i] = p;
    }
    __syncthreads();  // parts are written
    for_own_channels([&](int o, int c) { spread_x_[o] = __fsqrt_rn(__fdiv_rn(channel_total(s_.part, c), n - 1.0f)); });
    __syncthreads();  // parts are read
  }
  __device__ __forceinline__ void measure_columns() {
    if constexpr (kIsK) {
      measure_tokens();
    } else {
      measure_channels();
    }
  }
  __device__ __forceinline__ void measure_rows() {
    if constexpr (kIsK) {
      measure_channels();
    } else {
      measure_tokens();
    }
  }
  __device__ __forceinline__ static void update(float spread, float low, float high, float& scale, float& weight) {
    scale = clip_value(__fmul_rn(scale, clip_value(__fmul_rn(spread, weight), kStdMin, kStdMax)), low, high);
    weight = __fdiv_rn(1.0f, scale);
  }
  __device__ __forceinline__ void update_tokens(float low, float high) {
    update(spread_y_, low, high, scale_y_, weight_y_);
    if (owns_token()) s_.y_weight[own_token()] = weight_y_;
    __syncwarp();
  }
  __device__ __forceinline__ void update_channels(float low, float high) {
    for_own_channels([&](int o, int c) {
      update(spread_x_[o], low, high, scale_x_[o], weight_x_[o]);
      s_.x_weight[c] = weight_x_[o];
    });
    __syncthreads();  // weights are written
  }
  __device__ __forceinline__ float imbalance() {
    float least_y = INFINITY, most_y = -INFINITY, least_x = INFINITY, most_x = -INFINITY;
    if (owns_token()) least_y = most_y = __fmul_rn(spread_y_, weight_y_);
    for_own_channels([&](int o, int) {
      const float v = __fmul_rn(spread_x_[o], weight_x_[o]);
      least_x = fminf(least_x, v);
      most_x = fmaxf(most_x, v);
    });
#pragma unroll
    for (int h = 16; h >= 1; h /= 2) {
      least_y = fminf(least_y, __shfl_xor_sync(kFullWarp, least_y, h));
      most_y = fmaxf(most_y, __shfl_xor_sync(kFullWarp, most_y, h));
      least_x = fminf(least_x, __shfl_xor_sync(kFullWarp, least_x, h));
      most_x = fmaxf(most_x, __shfl_xor_sync(kFullWarp, most_x, h));
    }
    float4* const reduce = reinterpret_cast<float4*>(s_.reduce);
    if (threadIdx.x % 32 == 0) reduce[threadIdx.x / 32] = make_float4(least_y, most_y, least_x, most_x);
    __syncthreads();  // the warps' extremes are written
#pragma unroll
    for (int w = 0; w < kEncodeThreads / 32; ++w) {
      const float4 v = reduce[w];
      least_y = fminf(least_y, v.x);
      most_y = fmaxf(most_y, v.y);
      least_x = fminf(least_x, v.z);
      most_x = fmaxf(most_x, v.w);
    }
    __syncthreads();  // and read
    return __fadd_rn(__fdiv_rn(most_x, fmaxf(least_x, kImbalanceFloor)), __fdiv_rn(most_y, fmaxf(least_y, kImbalanceFloor)));
  }
  __device__ __forceinline__ void normalise(float size) {
    scale_y_ = kIsK ? 1.0f : size;
    weight_y_ = __fdiv_rn(1.0f, scale_y_);
    if (owns_token()) s_.y_weight[own_token()] = weight_y_;
    for_own_channels([&](int o, int c) {
      scale_x_[o] = kIsK ? size : 1.0f;
      weight_x_[o] = __fdiv_rn(1.0f, scale_x_[o]);
      s_.x_weight[c] = weight_x_[o];
    });
    __syncthreads();  // weights are written
    measure_columns();
    measure_rows();
    float best = imbalance();
    float best_y = scale_y_, best_x[kOwnedX];
#pragma unroll
    for (int o = 0; o < kOwnedX; ++o) best_x[o] = scale_x_[o];
    const float row_low = __fmul_rn(size, kScaleMin), row_high = __fmul_rn(size, kScaleMax);
#pragma unroll 1
    for (int iteration = 0; iteration < kVarNIterations; ++iteration) {
      if constexpr (kIsK) {
        update_tokens(kScaleMin, kScaleMax);
        measure_rows();
        update_channels(row_low, row_high);
      } else {
        update_channels(kScaleMin, kScaleMax);
        measure_rows();
        update_tokens(row_low, row_high);
      }
      measure_columns();
      const float now = imbalance();
      if (now <= best) {
        best = now;
        best_y = scale_y_;
#pragma unroll
        for (int o = 0; o < kOwnedX; ++o) best_x[o] = scale_x_[o];
      }
    }
    scale_y_ = best_y;
#pragma unroll
    for (int o = 0; o < kOwnedX; ++o) scale_x_[o] = best_x[o];
  }

  // ---- step 3: rounding ----

  struct RowFit {  // of one row, kept by its owner
    float scale, zero, mean, squares;
    float centred_zero;  // zero = mean + centred_zero
    bool unbiased;
  };
  struct CodeSums {
    float c1, c2, cx;
  };
  static constexpr int kOwnedRows = kIsK ? kOwnedX : 1;
  __device__ __forceinline__ static int row_of(int j, int i) { return kIsK ? i : j; }
  __device__ __forceinline__ float row_scale_of(int o) const { return kIsK ? scale_x_[o] : scale_y_; }
  // f(owned, row)
  template <class F>
  __device__ __forceinline__ void for_own_rows(F f) {
    if constexpr (kIsK) {
      for_own_channels(f);
    } else if (owns_token()) {
      f(0, own_token());
    }
  }
  // What the rows' owners publish and every thread reads: x_mean / y_mean take one value a row, row_second another.
  __device__ __forceinline__ float* row_first() const { return kIsK ? s_.x_mean : s_.y_mean; }
  __device__ __forceinline__ float* row_second() const { return kIsK ? s_.x_weight : s_.y_weight; }
  __device__ __forceinline__ float* column_weight() const { return kIsK ? s_.y_weight : s_.x_weight; }
  __device__ __forceinline__ int row_index(int j, int i) const { return kIsK ? x_ + 16 * i : y_ + 16 * j; }
  __device__ __forceinline__ int column_index(int j, int i) const { return kIsK ? y_ + 16 * j : x_ + 16 * i; }
  __device__ __forceinline__ float balanced(int j, int i) const { return __fmul_rn(at(j, i), column_weight()[column_index(j, i)]); }

  // Sums over the columns of every row of step(p, j, i); total(owned) gives the owner's.
  template <class Step>
  __device__ __forceinline__ void sum_rows(float (&totals)[kOwnedRows], Step step) {
    if constexpr (kIsK) {
      part_tokens(step);
      __syncthreads();  // parts are written
      for_own_channels([&](int o, int c) { totals[o] = channel_total(s_.part, c); });
      __syncthreads();  // parts are read
    } else {
      totals[0] = sum_channels(step);
    }
  }

  __device__ __forceinline__ void row_extremes(float (&low)[kOwnedRows], float (&high)[kOwnedRows]) {
    if constexpr (kIsK) {
      float* const part_high = reinterpret_cast<float*>(s_.part_c1);
      for (int i = 0; i < nx(); ++i) {
        float l = INFINITY, h = -INFINITY;
#pragma unroll
        for (int j = 0; j < kMostY; ++j) {
          if (j >= ny()) continue;
          const float u = balanced(j, i);
          l = fminf(l, u);
          h = fmaxf(h, u);
        }
        s_.part[y_ * stride() + x_ + 16 * i] = l;
        part_high[y_ * stride() + x_ + 16 * i] = h;
      }
      __syncthreads();  // parts are written
      for_own_channels([&](int o, int c) {
        low[o] = INFINITY;
        high[o] = -INFINITY;
#pragma unroll
        for (int l = 0; l < 16; ++l) {
          low[o] = fminf(low[o], s_.part[l * stride() + c]);
          high[o] = fmaxf(high[o], part_high[l * stride() + c]);
        }
      });
      __syncthreads();  // parts are read
    } else {
      float l[kMostY], h[kMostY];
#pragma unroll
      for (int j = 0; j < kMostY; ++j) {
        l[j] = INFINITY;
        h[j] = -INFINITY;
      }
      for (int i = 0; i < nx(); ++i) {
#pragma unroll
        for (int j = 0; j < kMostY; ++j) {
          if (j >= ny()) continue;
          const float u = balanced(j, i);
          l[j] = fminf(l[j], u);
          h[j] = fmaxf(h[j], u);
        }
      }
#pragma unroll
      for (int j = 0; j < kMostY; ++j) {
#pragma unroll
        for (int lanes = 8; lanes >= 1; lanes /= 2) {
          l[j] = fminf(l[j], __shfl_xor_sync(kFullWarp, l[j], lanes));
          h[j] = fmaxf(h[j], __shfl_xor_sync(kFullWarp, h[j], lanes));
        }
        if (j == own_y_) {
          low[0] = l[j];
          high[0] = h[j];
        }
      }
    }
  }

  // x of the fits: the balanced value less its row's mean.
  __device__ __forceinline__ float centred(int j, int i, const float* means) const {
    return __fsub_rn(balanced(j, i), means[row_index(j, i)]);
  }
  // The same of the channel of step x + 16i of feedback.
  __device__ __forceinline__ float centred_of_step(int j, int i, const float* factor, const float* means) const {
    const int token = y_ + 16 * j, channel = step_channel(factor, head_dim(), x_ + 16 * i);
    const float value = load_value(tile_, static_cast<int64_t>(token) * head_dim() + channel, a_.dtype);
    return __fsub_rn(__fmul_rn(value, column_weight()[kIsK ? token : channel]), means[kIsK ? channel : token]);
  }
  __device__ __forceinline__ void publish(const RowFit (&fit)[kOwnedRows]) {
    for_own_rows([&](int o, int r) {
      row_first()[r] = fit[o].zero;
      row_inverse()[r] = __fdiv_rn(1.0f, fit[o].scale);
    });
    __syncthreads();  // grids are written
  }
  // The rows' grid steps lie in their weights' place (row weights have served), the zeros in the means' place.
  __device__ __forceinline__ float* row_inverse() const { return row_second(); }

  __device__ __forceinline__ void sum_codes(const float* means, float levels, CodeSums (&sums)[kOwnedRows]) {
    if constexpr (kIsK) {
      for (int i = 0; i < nx(); ++i) {
        const float zero = row_first()[x_ + 16 * i], inverse = row_inverse()[x_ + 16 * i];
        float cx = 0.0f;
        int c1 = 0, c2 = 0;
#pragma unroll
        for (int j = 0; j < kMostY; ++j) {
          if (j >= ny()) continue;
          const float x = centred(j, i, means);
          const float biased = biased_code(x, zero, inverse, levels);
          const int code = __float_as_int(biased) & 255;
          cx = __fmaf_rn(__fsub_rn(biased, 12582912.0f), x, cx);
          c1 += code;
          c2 += code * code;
        }
        s_.part[y_ * stride() + x_ + 16 * i] = cx;
        s_.part_c1[y_ * stride() + x_ + 16 * i] = c1;
        s_.part_c2[y_ * stride() + x_ + 16 * i] = c2;
      }
      __syncthreads();  // parts are written
      for_own_channels([&](int o, int c) {
        sums[o] = {static_cast<float>(channel_total(s_.part_c1, c)), static_cast<float>(channel_total(s_.part_c2, c)),
                   channel_total(s_.part, c)};
      });
      __syncthreads();  // parts are read
    } else {
      float cx[kMostY] = {};
      int c1[kMostY] = {}, c2[kMostY] = {};
#pragma unroll
      for (int j = 0; j < kMostY; ++j) {
        if (j >= ny()) continue;
        const float zero = row_first()[y_ + 16 * j], inverse = row_inverse()[y_ + 16 * j];
        for (int i = 0; i < nx(); ++i) {
          const float x = centred(j, i, means);
          const float biased = biased_code(x, zero, inverse, levels);
          const int code = __float_as_int(biased) & 255;
          cx[j] = __fmaf_rn(__fsub_rn(biased, 12582912.0f), x, cx[j]);
          c1[j] += code;
          c2[j] += code * code;
        }
      }
      sums[0].c1 = static_cast<float>(total_of_own(c1, x_));
      sums[0].c2 = static_cast<float>(total_of_own(c2, x_));
      sums[0].cx = total_of_own(cx, x_);
      __syncthreads();  // grids are read
    }
  }

  // Codes of every element as bytes in shared memory: K [tokens][channels], V [channels][tokens], rows 4 bytes apart.
  __device__ __forceinline__ void write_codes(const float* means, float levels) {
    uint8_t* const codes = reinterpret_cast<uint8_t*>(s_.part_c1);
    for (int i = 0; i < nx(); ++i) {
#pragma unroll
      for (int j = 0; j < kMostY; ++j) {
        if (j >= ny()) continue;
        const int row = row_index(j, i);
        const float biased = biased_code(centred(j, i, means), row_first()[row], row_inverse()[row], levels);
        const int token = y_ + 16 * j, channel = x_ + 16 * i;
        codes[kIsK ? token * (head_dim() + 4) + channel : channel * (tokens() + 4) + token] =
            static_cast<uint8_t>(__float_as_int(biased) & 255);
      }
    }
    __syncthreads();  // codes are written
  }

  // Codes again, with the errors of each token's channels fed back to the channels of later steps.
  __device__ __forceinline__ void write_fed_codes(const RowFit (&fit)[kOwnedRows], const float* means, float levels) {
    const float* const factor = encode_factor(a_, kIsK);
    float* const row_inverse = s_.part;
    float *const step_scale = s_.part + tokens(), *const step_weight = step_scale + head_dim();  // V; its rows are tokens
    for_own_rows([&](int o, int r) {
      row_first()[r] = fit[o].centred_zero;
      row_second()[r] = fit[o].scale;
      row_inverse[r] = __fdiv_rn(1.0f, fit[o].scale);
    });
    if constexpr (!kIsK) for_own_channels([&](int o, int c) { s_.x_mean[c] = scale_x_[o]; });
    __syncthreads();  // grids and scales are written
    if constexpr (!kIsK) {
      for_own_channels([&](int, int k) {
        const int channel = step_channel(factor, head_dim(), k);
        step_scale[k] = s_.x_mean[channel];
        step_weight[k] = s_.x_weight[channel];
      });
      __syncthreads();  // scales are in the order of steps
    }
    const FeedbackArrays f{
        factor,     row_first(), row_second(), row_inverse, step_scale, step_weight, reinterpret_cast<uint8_t*>(s_.part_c1),
        head_dim(), tokens(),    levels};
    for (int j = 0; j < ny(); ++j) {
      float x[kMaxHeadDim / 16];
#pragma unroll
      for (int i = 0; i < kMaxHeadDim / 16; ++i) x[i] = i < nx() ? centred_of_step(j, i, factor, means) : 0.0f;
      feed_back<kIsK>(f, x, y_ + 16 * j, x_);
    }
    __syncthreads();  // codes are written
  }

  __device__ __forceinline__ void round(bool unbiased, float size) {
    const int bits = kIsK ? a_.layout.format.k_bits : a_.layout.format.v_bits;
    const int levels_int = (1 << bits) - 1;
    const float levels = static_cast<float>(levels_int);
    const bool fed = kFeedback && encode_factor(a_, kIsK) != nullptr;
    const float n = static_cast<float>(kIsK ? tokens() : head_dim());  // columns

    // Columns' weights are those of the best scales.
    if constexpr (kIsK) {
      if (owns_token()) s_.y_weight[own_token()] = __fdiv_rn(1.0f, scale_y_);
    } else {
      for_own_channels([&](int o, int c) { s_.x_weight[c] = __fdiv_rn(1.0f, scale_x_[o]); });
    }
    __syncthreads();  // weights are written

    float low[kOwnedRows], high[kOwnedRows];
    row_extremes(low, high);
    RowFit fit[kOwnedRows];
    for_own_rows([&](int o, int) {
      const float floor = __fmul_rn(kRangeFloor, row_scale_of(o));
      fit[o].scale = fmaxf(__fdiv_rn(__fsub_rn(high[o], low[o]), levels), floor);
      fit[o].zero = low[o];
      fit[o].mean = 0.0f;
      fit[o].unbiased = unbiased && fit[o].scale > floor;
    });

    float* const means = s_.reduce + 32;
    if (unbiased) {
      float totals[kOwnedRows];
      sum_rows(totals, [&](float p, int j, int i) { return __fadd_rn(p, balanced(j, i)); });
      for_own_rows([&](int o, int r) {
        if (fit[o].unbiased) fit[o].mean = __fdiv_rn(totals[o], n);
        means[r] = fit[o].mean;
      });
    } else {
      for_own_rows([&](int, int r) { means[r] = 0.0f; });
    }
    __syncthreads();  // means are written
    if (unbiased) {
      float squares[kOwnedRows];
      sum_rows(squares, [&](float p, int j, int i) {
        const float x = centred(j, i, means);
        return __fmaf_rn(x, x, p);
      });
      for_own_rows([&](int o, int) {
        fit[o].squares = squares[o];
        if (!fit[o].unbiased) return;
        const float middle = __fsub_rn(__fmul_rn(__fadd_rn(low[o], high[o]), 0.5f), fit[o].mean);
        fit[o].scale = __fmul_rn(unbiased_clip(levels_int), fit[o].scale);
        fit[o].zero = __fsub_rn(middle, __fmul_rn(fit[o].scale, __fmul_rn(levels, 0.5f)));
      });
      CodeSums sums[kOwnedRows];
#pragma unroll 1
      for (int pass = 0; pass <= kUnbiasedRefits; ++pass) {
        publish(fit);
        sum_codes(means, levels, sums);
        if (pass == kUnbiasedRefits) break;
        for_own_rows([&](int o, int) {
          const float variance = __fsub_rn(__fmul_rn(n, sums[o].c2), __fmul_rn(sums[o].c1, sums[o].c1));
          if (!fit[o].unbiased || !(variance > 0.0f) || !(sums[o].cx > 0.0f)) return;
          fit[o].scale = __fdiv_rn(__fmul_rn(sums[o].cx, n), variance);
          fit[o].zero = -__fdiv_rn(__fmul_rn(fit[o].scale, sums[o].c1), n);
        });
      }
      if (!fed) write_codes(means, levels);
      for_own_rows([&](int o, int) {
        fit[o].centred_zero = fit[o].zero;
        if (!fit[o].unbiased) return;
        if (sums[o].cx > 0.0f) {
          fit[o].scale = __fdiv_rn(fit[o].squares, sums[o].cx);
          fit[o].centred_zero = -__fdiv_rn(__fmul_rn(fit[o].scale, sums[o].c1), n);
        }
        if (fed) {
          fit[o].centred_zero = __fsub_rn(fit[o].centred_zero, __fmul_rn(fit[o].scale, feedback_low_shift(levels_int)));
          fit[o].scale = __fmul_rn(fit[o].scale, feedback_widening(levels_int));
        }
        fit[o].zero = __fadd_rn(fit[o].mean, fit[o].centred_zero);
      });
    } else {
      for_own_rows([&](int o, int) { fit[o].centred_zero = fit[o].zero; });
      if (!fed) {
        publish(fit);
        write_codes(means, levels);
      }
    }
    if constexpr (kFeedback) {
      if (fed) write_fed_codes(fit, means, levels);
    }
    pack();

    // ---- step 4: exponents and metadata ----
    const int e = a_.published != 0 ? 0 : ilogbf(size) >> 1;
    float scales[kOwnedRows], zeros[kOwnedRows];
    for_own_rows([&](int o, int) {
      scales[o] = ldexpf(fit[o].scale, -e);
      zeros[o] = ldexpf(fit[o].zero, -e);
    });
    int channels[kOwnedX], token[1] = {owns_token() ? own_token() : -1};
#pragma unroll
    for (int o = 0; o < kOwnedX; ++o) channels[o] = -1;
    for_own_channels([&](int o, int c) { channels[o] = c; });
    const auto write = [&](Metadata which, const auto& values, const auto& index) {
      write_metadata<kEncodeThreads>(a_.layout, record_, which, values, index, reinterpret_cast<float2*>(s_.reduce));
    };
    if constexpr (kIsK) {
      const float columns[1] = {ldexpf(scale_y_, e)};
      write(kKScale, scales, channels);
      write(kKZero, zeros, channels);
      write(kKTokenScale, columns, token);
    } else {
      float columns[kOwnedX];
#pragma unroll
      for (int o = 0; o < kOwnedX; ++o) columns[o] = ldexpf(scale_x_[o], e);
      write(kVChannelScale, columns, channels);
      write(kVScale, scales, token);
      write(kVZero, zeros, token);
      write_padding<kEncodeThreads>(a_.layout, record_);
    }
  }

  // ---- bytes ----

  __device__ __forceinline__ void pack_plane(const Plane& plane, int offset, int shift) {
    const uint8_t* const codes = reinterpret_cast<const uint8_t*>(s_.part_c1);
    const int row_words = plane.row_bytes / 4, word_codes = 32 / plane.bits;
    const uint32_t mask = ((1u << plane.bits) - 1u) * 0x01010101u;
    for (int w = threadIdx.x; w < plane.rows * row_words; w += kEncodeThreads) {
      const int row = w / row_words, word = w % row_words;
      uint32_t out = 0;
      for (int p = 0; p < 8 / plane.bits; ++p) {
        const int first = word * word_codes + 4 * p;  // codes past the row's end are zero
        if (first >= plane.codes) break;
        const uint32_t quad = *reinterpret_cast<const uint32_t*>(codes + row * (plane.codes + 4) + first);
        out |= (quad >> shift & mask) << p * plane.bits;
      }
      *reinterpret_cast<uint32_t*>(record_ + offset + plane.word_offset(row, word)) = out;
    }
  }
  __device__ __forceinline__ void pack() {
    const RecordLayout& r = a_.layout;
    const Plane& low = kIsK ? r.k_low : r.v_low;
    const Plane& high = kIsK ? r.k_high : r.v_high;
    pack_plane(low, kIsK ? r.k_low_offset : r.v_low_offset, 0);
    if (high.bits != 0) pack_plane(high, kIsK ? r.k_high_offset : r.v_high_offset, low.bits);
  }

  const EncodeArgs& a_;
  const EncodeShared& s_;
  const uint8_t* tile_;
  uint8_t* record_;
  int x_, y_, own_y_;
  float scale_y_, weight_y_, spread_y_;
  float scale_x_[kOwnedX], weight_x_[kOwnedX], spread_x_[kOwnedX];
};

}  // namespace kvarn::cuda
