// Error feedback of the encoder: docs/FORMAT.md's fp32 definition, operation by operation, on the grids that PlainEncoder has fitted.
//
// Eight lanes round a token, eight steps at a time: each lane gathers what the errors of all steps before these give its channel,
// from shared memory, then the eight channels are rounded one after the other. So loops are all there is to a head dimension. Codes are
// packed every 32 tokens, which is what a word of one-bit codes of V holds.
//
// Per element: head_dim / 2 fused multiply-adds, with a load of the factor and a quarter of a load of errors each, and about 10 other
// operations in each of eight lanes.
#pragma once

#include "encode_order.cuh"
#include "encode_plain.h"

namespace kvarn::cuda {

static_assert(kFeedbackLanes == 8, "errors are read as two float4");

template <class T, bool kIsK>
struct Feedback {
  PlainEncoder<T, kIsK> encoder;
  const float* factor;  // [head_dim][head_dim], read on and above the diagonal
  float levels;
  float* errors;   // [feedback_tokens(head_dim)][feedback_stride(head_dim)]
  uint8_t* codes;  // [kFeedbackGroup][feedback_stride(head_dim)]

  // Codes of kFeedbackGroup tokens from `first_token` on.
  __device__ __forceinline__ void round_tokens(int first_token) const {
    const int head_dim = encoder.rows.head_dim, stride = feedback_stride(head_dim), most = feedback_tokens(head_dim);
    const int slot = threadIdx.x / kFeedbackLanes, lane = threadIdx.x % kFeedbackLanes, first_lane = threadIdx.x % 32 - lane;
    float* const own_errors = errors + slot * stride;
#pragma unroll 1
    for (int at = slot < most ? slot : kFeedbackGroup; at < kFeedbackGroup; at += most) {
      const int token = first_token + at;
#pragma unroll 1
      for (int base = 0; base < head_dim; base += kFeedbackLanes) {
        const int step = base + lane, channel = step_channel(factor, head_dim, step);
        const int r = kIsK ? channel : token, c = kIsK ? token : channel;
        const float* const shares = factor + step;
        const auto fed = [&](float x, int from, float error) {
          const float share = shares[from * head_dim];
          return __fmaf_rn(kIsK ? share : __fmul_rn(share, encoder.column.weight[channel]), error, x);
        };
        float x = encoder.centred(r, c);
#pragma unroll 1
        for (int from = 0; from < base; from += 8) {
          const float4 a = *reinterpret_cast<const float4*>(own_errors + from), b = *reinterpret_cast<const float4*>(own_errors + from + 4);
          x = fed(fed(fed(fed(x, from, a.x), from + 1, a.y), from + 2, a.z), from + 3, a.w);
          x = fed(fed(fed(fed(x, from + 4, b.x), from + 5, b.y), from + 6, b.z), from + 7, b.w);
        }
        const float zero = encoder.row.weight[r], scale = encoder.row.best[r], inverse = encoder.row.scale[r];
        const auto error_of = [&](float code) {
          const float error = __fsub_rn(__fmaf_rn(code, scale, zero), x);
          return kIsK ? error : __fmul_rn(error, encoder.column.best[channel]);
        };
#pragma unroll
        for (int owner = 0; owner < kFeedbackLanes - 1; ++owner) {
          const float error = __shfl_sync(kFullWarp, error_of(encoder.code_of(x, zero, inverse, levels)), first_lane + owner);
          const float next = fed(x, base + owner, error);
          x = lane > owner ? next : x;
        }
        const float code = encoder.code_of(x, zero, inverse, levels);
        own_errors[step] = error_of(code);
        codes[at * stride + channel] = static_cast<uint8_t>(code);
        __syncwarp();  // errors are written
      }
    }
  }

  __device__ __forceinline__ void round_and_pack(const RecordLayout& r, uint8_t* record) const {
    const int tokens = encoder.rows.tokens, stride = feedback_stride(encoder.rows.head_dim);
#pragma unroll 1
    for (int first = 0; first < tokens; first += kFeedbackGroup) {
      round_tokens(first);
      __syncthreads();  // codes are written
      encoder.pack(
          r, record,
          [&](const Plane& plane) {
            using Words = typename PlainEncoder<T, kIsK>::Words;
            return kIsK ? Words{first, kFeedbackGroup, 0, plane.row_bytes / 4}
                        : Words{0, plane.rows, first / 32 * plane.bits, kFeedbackGroup / 32 * plane.bits};
          },
          [&](int row, int line) { return static_cast<unsigned>(codes[((kIsK ? line : row) - first) * stride + (kIsK ? row : line)]); });
      __syncthreads();  // and read
    }
  }
};

}  // namespace kvarn::cuda
