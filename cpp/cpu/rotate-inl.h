// Rotation of rows of head_dim values, x H or x H^T, H = H_m (x) H_2^k / sqrt(head_dim): docs/FORMAT.md gives the order of every addition.
//
// m = 1: a row is transformed where it lies, butterflies inside and between vectors.
// m > 1: kLanes rows are transposed first, so that one lane holds one row and every step is a plain vector operation.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "kvarn/hadamard_signs.h"

namespace kvarn::cpu {
namespace {

// Signs of H_m, or of its transpose, as factors: value[from][to].
template <int M>
struct SignTable {
  float value[M][M];
};
template <int M>
constexpr SignTable<M> make_sign_table(bool inverse) {
  SignTable<M> table{};
  for (int from = 0; from < M; ++from) {
    for (int to = 0; to < M; ++to)
      table.value[from][to] = static_cast<float>(inverse ? hadamard_sign(M, to, from) : hadamard_sign(M, from, to));
  }
  return table;
}
template <int M, bool Inverse>
constexpr SignTable<M> kSignTable = make_sign_table<M>(Inverse);

// Butterflies of whole vectors, strides 1 .. Count / 2 vectors.
template <int Count>
KVARN_INLINE void butterflies_between(F32 (&x)[Count]) {
  KVARN_UNROLL for (int stride = 1; stride < Count; stride *= 2) {
    KVARN_UNROLL for (int i = 0; i < Count; ++i) {
      if ((i & stride) != 0) continue;
      const F32 p = x[i];
      const F32 q = x[i + stride];
      x[i] = p + q;
      x[i + stride] = p - q;
    }
  }
}

// The same within the vectors first: strides 1 .. Count * kLanes / 2 values.
template <int Count>
KVARN_INLINE void butterflies(F32 (&x)[Count]) {
  KVARN_UNROLL for (int i = 0; i < Count; ++i) {
    x[i] = butterfly<1>(x[i]);
    x[i] = butterfly<2>(x[i]);
    if constexpr (kLanes > 4) x[i] = butterfly<4>(x[i]);
    if constexpr (kLanes > 8) x[i] = butterfly<8>(x[i]);
  }
  butterflies_between(x);
}

// Vectors `step` values apart, from and to a dtype known at run time.
template <int Count>
KVARN_INLINE void load_group(const void* in, int dtype, int64_t at, int step, F32 (&x)[Count]) {
  with_dtype(dtype, [&]<int Dtype>() { KVARN_UNROLL for (int i = 0; i < Count; ++i) x[i] = load_values<Dtype>(in, at + i * step); });
}
template <int Count>
KVARN_INLINE void store_group(void* out, int dtype, int64_t at, int step, const F32 (&x)[Count]) {
  with_dtype(dtype, [&]<int Dtype>() { KVARN_UNROLL for (int i = 0; i < Count; ++i) store_values<Dtype>(out, at + i * step, x[i]); });
}

// D a power of two.
template <int D>
KVARN_INLINE void rotate_power_of_two(const RotateRows& r, int64_t in_at, int64_t out_at) {
  constexpr int kVectors = D / kLanes;
  constexpr int kGroup = kVectors < 8 ? kVectors : 8;  // vectors that stay in registers
  const F32 scale = broadcast(hadamard_scale(D));
  if constexpr (kGroup == kVectors) {
    F32 x[kGroup];
    load_group(r.in, r.in_dtype, in_at, kLanes, x);
    butterflies(x);
    KVARN_UNROLL for (int i = 0; i < kGroup; ++i) x[i] = x[i] * scale;
    store_group(r.out, r.out_dtype, out_at, kLanes, x);
  } else {
    constexpr int kGroups = kVectors / kGroup;
    constexpr int kStep = kGroup * kLanes;
#pragma GCC unroll 1
    for (int g = 0; g < kGroups; ++g) {
      F32 x[kGroup];
      load_group(r.in, r.in_dtype, in_at + g * kStep, kLanes, x);
      butterflies(x);
      KVARN_UNROLL for (int i = 0; i < kGroup; ++i) store(r.scratch + g * kStep + i * kLanes, x[i]);
    }
    // What is left crosses the groups.
#pragma GCC unroll 1
    for (int i = 0; i < kGroup; ++i) {
      F32 x[kGroups];
      KVARN_UNROLL for (int g = 0; g < kGroups; ++g) x[g] = load(r.scratch + g * kStep + i * kLanes);
      butterflies_between(x);
      KVARN_UNROLL for (int g = 0; g < kGroups; ++g) x[g] = x[g] * scale;
      store_group(r.out, r.out_dtype, out_at + i * kLanes, kStep, x);
    }
  }
}

// x + term * sign. The product is exact, so fused or not the sum rounds once.
KVARN_INLINE F32 add_signed(F32 x, F32 term, F32 sign) {
  if constexpr (kLanes > 4) return fma(term, sign, x);
  return x + term * sign;
}

// out[to] = the signed sum of x[from], in rising order, times scale; both [M][Power][kLanes], kLanes rows in the lanes.
template <int M, int Power, bool Inverse>
KVARN_INLINE void multiply_signs(const float* x, F32 scale, float* out) {
  constexpr int kStep = Power * kLanes;
  static_assert(M % 4 == 0 && Power % 2 == 0);
#pragma GCC unroll 1
  for (int b = 0; b < Power; b += 2) {
#pragma GCC unroll 1
    for (int to = 0; to < M; to += 4) {
      const float(*signs)[M] = kSignTable<M, Inverse>.value;
      const float* at = x + b * kLanes;
      F32 y[4], z[4];
      KVARN_UNROLL for (int i = 0; i < 4; ++i) {
        const F32 sign = broadcast(signs[0][to + i]);
        y[i] = load(at) * sign;
        z[i] = load(at + kLanes) * sign;
      }
#pragma GCC unroll 1
      for (int from = 1; from < M; ++from) {
        at += kStep;
        const F32 first = load(at);
        const F32 second = load(at + kLanes);
        KVARN_UNROLL for (int i = 0; i < 4; ++i) {
          const F32 sign = broadcast(signs[from][to + i]);
          y[i] = add_signed(y[i], first, sign);
          z[i] = add_signed(z[i], second, sign);
        }
      }
      KVARN_UNROLL for (int i = 0; i < 4; ++i) {
        store(out + (to + i) * kStep + b * kLanes, y[i] * scale);
        store(out + (to + i) * kStep + (b + 1) * kLanes, z[i] * scale);
      }
    }
  }
}

// kLanes rows in the lanes of x[D]; the result is out[D].
template <int D, int M, bool Inverse>
__attribute__((noinline)) void rotate_lanes(float* x, float* out) {
  constexpr int kPower = D / M;
#pragma GCC unroll 1
  for (int a = 0; a < M; ++a) {
    F32 t[kPower];
    KVARN_UNROLL for (int b = 0; b < kPower; ++b) t[b] = load(x + (a * kPower + b) * kLanes);
    butterflies_between(t);
    KVARN_UNROLL for (int b = 0; b < kPower; ++b) store(x + (a * kPower + b) * kLanes, t[b]);
  }
  multiply_signs<M, kPower, Inverse>(x, broadcast(hadamard_scale(D)), out);
}

template <int D, int M>
KVARN_INLINE void rotate_transposed(const RotateRows& r) {
  float* lanes = r.scratch;
  float* rotated = lanes + D * kLanes;
  for (int64_t first = 0; first < r.rows; first += kLanes) {
    const int rows = r.rows - first < kLanes ? static_cast<int>(r.rows - first) : kLanes;
#pragma GCC unroll 1
    for (int d = 0; d < D; d += kLanes) {
      F32 block[kLanes];
      with_dtype(r.in_dtype, [&]<int Dtype>() {
        for (int i = 0; i < kLanes; ++i) block[i] = i < rows ? load_values<Dtype>(r.in, (first + i) * r.in_stride + d) : zero();
      });
      transpose(block);
      KVARN_UNROLL for (int i = 0; i < kLanes; ++i) store(lanes + (d + i) * kLanes, block[i]);
    }
    if (r.inverse) {
      rotate_lanes<D, M, true>(lanes, rotated);
    } else {
      rotate_lanes<D, M, false>(lanes, rotated);
    }
#pragma GCC unroll 1
    for (int d = 0; d < D; d += kLanes) {
      F32 block[kLanes];
      KVARN_UNROLL for (int i = 0; i < kLanes; ++i) block[i] = load(rotated + (d + i) * kLanes);
      transpose(block);
      with_dtype(r.out_dtype, [&]<int Dtype>() {
        for (int i = 0; i < rows; ++i) store_values<Dtype>(r.out, (first + i) * r.out_stride + d, block[i]);
      });
    }
  }
}

template <int D>
__attribute__((noinline)) void rotate_rows_of(const RotateRows& r) {
  constexpr int kOdd = hadamard_odd_order(D);
  if constexpr (kOdd == 1) {
    for (int64_t i = 0; i < r.rows; ++i) rotate_power_of_two<D>(r, i * r.in_stride, i * r.out_stride);
  } else {
    rotate_transposed<D, kOdd>(r);
  }
}

inline void rotate_rows(const RotateRows& r) {
  switch (r.head_dim) {
    case 64:
      return rotate_rows_of<64>(r);
    case 80:
      return rotate_rows_of<80>(r);
    case 96:
      return rotate_rows_of<96>(r);
    case 112:
      return rotate_rows_of<112>(r);
    case 128:
      return rotate_rows_of<128>(r);
    case 160:
      return rotate_rows_of<160>(r);
    case 192:
      return rotate_rows_of<192>(r);
    case 256:
      return rotate_rows_of<256>(r);
    case 512:
      return rotate_rows_of<512>(r);
    default:
      return;
  }
}

}  // namespace
}  // namespace kvarn::cpu
