// The rotation along the head dimension: x H and x H^T, H = H_m (x) H_2^k / sqrt(head_dim).
#include <bit>
#include <cmath>
#include <vector>

#include "kvarn/hadamard_signs.h"
#include "ref/ref.h"

namespace kvarn::ref {

double hadamard_entry(int head_dim, int row, int column) {
  const int m = hadamard_odd_order(head_dim);
  const int power = head_dim / m;
  const int sylvester = std::popcount(static_cast<unsigned>(row % power & column % power)) % 2 == 0 ? 1 : -1;
  return hadamard_sign(m, row / power, column / power) * sylvester / std::sqrt(static_cast<double>(head_dim));
}

void hadamard_exact(double* row, int head_dim, bool inverse) {
  std::vector<double> out(head_dim, 0.0);
  for (int to = 0; to < head_dim; ++to) {
    for (int from = 0; from < head_dim; ++from) {
      out[to] += row[from] * (inverse ? hadamard_entry(head_dim, to, from) : hadamard_entry(head_dim, from, to));
    }
  }
  for (int i = 0; i < head_dim; ++i) row[i] = out[i];
}

void hadamard(float* row, int head_dim, bool inverse) {
  const int m = hadamard_odd_order(head_dim);
  const int power = head_dim / m;
  // Butterflies inside each block of `power` values, strides 1, 2, 4, ...
  for (int stride = 1; stride < power; stride *= 2) {
    for (int i = 0; i < head_dim; ++i) {
      if ((i % power & stride) != 0) continue;
      const float p = row[i];
      const float q = row[i + stride];
      row[i] = p + q;
      row[i + stride] = p - q;
    }
  }
  if (m > 1) {
    std::vector<float> out(head_dim);
    for (int to = 0; to < m; ++to) {
      for (int b = 0; b < power; ++b) {
        float sum = 0;
        for (int from = 0; from < m; ++from) {
          const int sign = inverse ? hadamard_sign(m, to, from) : hadamard_sign(m, from, to);
          const float term = sign > 0 ? row[from * power + b] : -row[from * power + b];
          sum = from == 0 ? term : sum + term;
        }
        out[to * power + b] = sum;
      }
    }
    for (int i = 0; i < head_dim; ++i) row[i] = out[i];
  }
  for (int i = 0; i < head_dim; ++i) row[i] *= hadamard_scale(head_dim);
}

}  // namespace kvarn::ref
