// Constants of the encoder; docs/FORMAT.md gives the arithmetic they enter. Shared by every backend, because records are byte-equal.
#pragma once

#include "kvarn/format.h"

namespace kvarn {

inline constexpr int kVarNIterations = 8;
inline constexpr float kScaleMin = 0.740818221f;  // exp(-0.3)
inline constexpr float kScaleMax = 22026.4658f;   // exp(10)
inline constexpr float kStdMin = 1e-3f;
inline constexpr float kStdMax = 1e3f;
inline constexpr float kImbalanceFloor = 1e-8f;
inline constexpr float kRangeFloor = 1e-10f;           // of a row's scale, times its VarN scale
inline constexpr float kLargestValue = 1073741824.0f;  // 2^30: beyond it a tile has no finite fp16 scales
// A tile is divided by this share of its root mean square, so that the lower clamp of the scales stays below the quietest tokens when a few
// loud ones make up the tile's energy.
inline constexpr float kSizeShare = 0.0625f;
inline constexpr float kSmallestSize = 0x1p-60f;  // a tile smaller than this is not normalised by its size

// Unbiased rounding: the share of the row's range that the first grid of `levels` = 2^bits - 1 steps spans, about what is best for normally
// distributed values, and the least-squares refits that follow. One start and three refits give the squared error of the best of six
// starts within 2 %.
KVARN_HD constexpr float unbiased_clip(int levels) { return levels <= 3 ? 0.6f : levels <= 7 ? 0.8f : levels <= 15 ? 0.95f : 1.0f; }
inline constexpr int kUnbiasedRefits = 3;

// Feedback moves values away from where the fit saw them. An unbiased grid is widened about its middle by this factor, so that fewer of
// them fall beyond its ends, where their errors would grow and shrink the row.
KVARN_HD constexpr float feedback_widening(int levels) { return levels <= 3 ? 1.125f : levels <= 7 ? 1.0625f : 1.0f; }
// Steps of the old grid by which its low end moves out; exact.
KVARN_HD constexpr float feedback_low_shift(int levels) { return static_cast<float>(levels) * 0.5f * (feedback_widening(levels) - 1.0f); }

}  // namespace kvarn
