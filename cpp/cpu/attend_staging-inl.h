// Tiles in full precision: plain fp32 dot products, for a group of rows that see the same tokens of the tile.
// Tokens outside [begin, end) are not read: the slot may hold anything there.
#pragma once

#include "cpu/attend_simd.h"

namespace kvarn::cpu {
namespace {

// scores[r * stride + t] = q[r] . k[t]; k [tile_tokens][head_dim] of Dtype, q [kRows][head_dim].
template <int Dtype, int kRows>
KVARN_INLINE void staging_scores_as(const void* k, int head_dim, int begin, int end, const float* q, float* scores, int stride) {
  for (int t = begin; t < end; ++t) {
    F32 sum[kRows];
    for (F32& s : sum) s = zero();
    for (int d = 0; d < head_dim; d += kLanes) {
      const F32 key = load_values<Dtype>(k, static_cast<int64_t>(t) * head_dim + d);
      for (int r = 0; r < kRows; ++r) sum[r] = fma(load(q + r * head_dim + d), key, sum[r]);
    }
    for (int r = 0; r < kRows; ++r) scores[r * stride + t] = reduce_add(sum[r]);
  }
}

// acc[r][d] = acc[r][d] * factors[r] + sum_t weights[r * stride + t] * v[t][d].
template <int Dtype, int kRows>
KVARN_INLINE void staging_output_as(const void* v, int head_dim, int begin, int end, const float* weights, int stride, const float* factors,
                                    float* acc) {
  constexpr int kVectors = 2;  // head_dim is a multiple of 16, so also of two vectors of up to 8 lanes
  constexpr int kBlock = kLanes == 16 ? 1 : kVectors;
  for (int d = 0; d < head_dim; d += kBlock * kLanes) {
    F32 sum[kRows][kBlock];
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kBlock; ++i) sum[r][i] = load(acc + r * head_dim + d + i * kLanes) * broadcast(factors[r]);
    }
    for (int t = begin; t < end; ++t) {
      F32 value[kBlock];
      for (int i = 0; i < kBlock; ++i) value[i] = load_values<Dtype>(v, static_cast<int64_t>(t) * head_dim + d + i * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const F32 weight = broadcast(weights[r * stride + t]);
        for (int i = 0; i < kBlock; ++i) sum[r][i] = fma(weight, value[i], sum[r][i]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kBlock; ++i) store(acc + r * head_dim + d + i * kLanes, sum[r][i]);
    }
  }
}

template <int Dtype>
__attribute__((noinline)) void staging_scores(const void* k, int head_dim, int begin, int end, const float* q, int rows, float* scores,
                                              int stride) {
  switch (rows) {
    case 1:
      return staging_scores_as<Dtype, 1>(k, head_dim, begin, end, q, scores, stride);
    case 2:
      return staging_scores_as<Dtype, 2>(k, head_dim, begin, end, q, scores, stride);
    case 3:
      return staging_scores_as<Dtype, 3>(k, head_dim, begin, end, q, scores, stride);
    default:
      return staging_scores_as<Dtype, 4>(k, head_dim, begin, end, q, scores, stride);
  }
}

template <int Dtype>
__attribute__((noinline)) void staging_output(const void* v, int head_dim, int begin, int end, const float* weights, int stride,
                                              const float* factors, int rows, float* acc) {
  switch (rows) {
    case 1:
      return staging_output_as<Dtype, 1>(v, head_dim, begin, end, weights, stride, factors, acc);
    case 2:
      return staging_output_as<Dtype, 2>(v, head_dim, begin, end, weights, stride, factors, acc);
    case 3:
      return staging_output_as<Dtype, 3>(v, head_dim, begin, end, weights, stride, factors, acc);
    default:
      return staging_output_as<Dtype, 4>(v, head_dim, begin, end, weights, stride, factors, acc);
  }
}

}  // namespace
}  // namespace kvarn::cpu
