// Constants of the encoder; docs/FORMAT.md gives the arithmetic they enter. Shared by every backend, because records are byte-equal.
#pragma once

namespace kvarn {

inline constexpr int kVarNIterations = 8;
inline constexpr float kScaleMin = 0.740818221f;  // exp(-0.3)
inline constexpr float kScaleMax = 22026.4658f;   // exp(10)
inline constexpr float kStdMin = 1e-3f;
inline constexpr float kStdMax = 1e3f;
inline constexpr float kImbalanceFloor = 1e-8f;
inline constexpr float kRangeFloor = 1e-10f;           // of a row's scale, times its VarN scale
inline constexpr float kLargestValue = 1073741824.0f;  // 2^30: beyond it a tile has no finite fp16 scales
inline constexpr float kSmallestSize = 0x1p-60f;       // a tile smaller than this is not normalised by its size

// Unbiased rounding: shares of the row's range that are tried, and least-squares refits of each.
inline constexpr int kUnbiasedClipCount = 6;
inline constexpr float kUnbiasedClips[kUnbiasedClipCount] = {1.0f, 0.85f, 0.7f, 0.6f, 0.5f, 0.4f};
inline constexpr int kUnbiasedRefits = 3;

}  // namespace kvarn
