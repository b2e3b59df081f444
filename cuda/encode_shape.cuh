// Tiles that an encoder holds in registers: who has which elements, and what lies in shared memory.
//
// sum16 keeps one partial sum for every index modulo 16. A half-warp holds UY residues of tokens, its lane x residue x of channels, and a
// thread all channels x + 16i of its tokens, so each thread's own sums are partial sums of the definition, in its order; what remains is
// adding halves to halves: within the thread and among half-warps for sums over tokens, among the 16 lanes of a half-warp for sums over
// channels.
//
// Vectors in shared memory lie in the order of their owners. Position p of channels belongs to thread p % kThreads, and the four channels
// x + 16i, i = 4q ... 4q+3, of lane x are neighbours: p = 64q + 4x + i % 4. Position k of a half-warp's tokens belongs to lane k % 16;
// k = u*NY + j is token y + kParts*u + 16j.
#pragma once

#include <cstdint>

#include "kvarn/format.h"

namespace kvarn::cuda {

template <class T>
struct alignas(16) Four {
  T v[4];
};

template <int NX, int NY, int UY>
struct TileShape {
  static constexpr int kHeadDim = 16 * NX, kTokens = 16 * NY;
  static constexpr int kThreads = 256 / UY, kWarps = kThreads / 32;
  static constexpr int kParts = 16 / UY;               // half-warps
  static constexpr int kMineX = NX, kMineY = UY * NY;  // channels and tokens of a thread
  static constexpr int kOwnX = (kHeadDim + kThreads - 1) / kThreads, kOwnY = (kMineY + 15) / 16;
  // Words of a half-warp's partial sums over channels, and where token k of lane l is, so that neither writing four tokens at once nor
  // reading one of every lane has two lanes in a bank. Where there are but 8 tokens, two lanes add one up, even and odd l.
  static constexpr bool kPaired = kMineY == 8;
  static constexpr int kStage = kPaired ? 200 : kMineY / 4 * 68 + (kMineY == 32 ? 16 : 0);
  static KVARN_HD constexpr int stage_at(int k, int l) {
    return kPaired ? k / 4 * 100 + l % 2 * 48 + l / 2 * 4 + k % 4 : k / 4 * 68 + 4 * l + k % 4;
  }
  // Codes: a row of words [group of 4 residue classes][16 residues], and 4 words between rows.
  static KVARN_HD constexpr int groups(int n) { return n < 64 ? 1 : n / 64; }
  static KVARN_HD constexpr int code_stride(int n) { return 16 * groups(n) + 4; }
  static constexpr int kCodeWords = kTokens * code_stride(kHeadDim) > kHeadDim* code_stride(kTokens) ? kTokens* code_stride(kHeadDim)
                                                                                                     : kHeadDim* code_stride(kTokens);
  template <bool kFeedback>
  struct Shared {
    union {
      struct {
        float stage[kParts * kStage];  // partial sums over channels
        union {
          struct {
            float part[kParts * kHeadDim], more[kParts * kHeadDim];  // and over tokens
          };
          float more_stage[kParts * kStage];
          struct {                                            // of feedback
            float4 steps[kHeadDim];                           // of their channels K: zero, scale, inverse, V: scale, weight; the channel
            float triangles[kWarps * 16 * 16];                // of the factor, a warp's own
            uint8_t fed[kFeedback ? kHeadDim * kTokens : 4];  // codes [half-warp][channel][token]; before, values on the move
          };
        };
      };
      uint32_t codes[kCodeWords];
    };
    // Of channels and tokens, in the order of their owners.
    float x_weight[kHeadDim], x_mean[kHeadDim], x_scale[kHeadDim], x_kept[kHeadDim];
    float y_weight[kTokens], y_mean[kTokens], y_scale[kTokens], y_kept[kTokens];
    alignas(16) uint32_t extremes[kWarps * 4];
    float size;
  };
};

}  // namespace kvarn::cuda
