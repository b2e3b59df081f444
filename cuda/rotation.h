// What a kernel needs to know to rotate rows. Plain data, copied to the device by value.
#pragma once

#include "kvarn/hadamard_signs.h"

namespace kvarn::cuda {

constexpr int kMostOddHeadDim = 192;  // that is no power of two

struct Rotation {
  int head_dim;
  int odd;  // m of head_dim = m * 2^k
  float scale;
  uint32_t signs[2][kMaxHadamardOddOrder];  // [inverse][output]: bit i set where term i is subtracted
};

inline Rotation make_rotation(int head_dim) {
  Rotation r{};
  r.head_dim = head_dim;
  r.odd = hadamard_odd_order(head_dim);
  r.scale = hadamard_scale(head_dim);
  const HadamardSigns& s = r.odd == 12 ? kHadamard12 : r.odd == 20 ? kHadamard20 : kHadamard28;
  for (int i = 0; i < kMaxHadamardOddOrder && r.odd > 1; ++i) {
    r.signs[0][i] = s.columns[i];  // x H: output `to` takes H[from][to]
    r.signs[1][i] = s.rows[i];
  }
  return r;
}

}  // namespace kvarn::cuda
