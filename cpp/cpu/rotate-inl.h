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

// Copies of this translation unit: the shared ones would be emitted here as symbols of external linkage.
constexpr HadamardSigns kSigns12 = make_hadamard_signs(12);
constexpr HadamardSigns kSigns20 = make_hadamard_signs(20);
constexpr HadamardSigns kSigns28 = make_hadamard_signs(28);

template <int M>
constexpr const HadamardSigns& signs_of() {
  if constexpr (M == 12) return kSigns12;
  if constexpr (M == 20) return kSigns20;
  if constexpr (M == 28) return kSigns28;
}

// Butterflies with strides 1 .. Count * kLanes / 2 of Count vectors.
template <int Count>
KVARN_INLINE void butterflies(F32 (&x)[Count]) {
  for (int i = 0; i < Count; ++i) {
    x[i] = butterfly<1>(x[i]);
    x[i] = butterfly<2>(x[i]);
    if constexpr (kLanes > 4) x[i] = butterfly<4>(x[i]);
    if constexpr (kLanes > 8) x[i] = butterfly<8>(x[i]);
  }
#pragma GCC unroll 8
  for (int stride = 1; stride < Count; stride *= 2) {
#pragma GCC unroll 32
    for (int i = 0; i < Count; ++i) {
      if ((i & stride) != 0) continue;
      const F32 p = x[i];
      const F32 q = x[i + stride];
      x[i] = p + q;
      x[i + stride] = p - q;
    }
  }
}

// D a power of two. `row` is fp32 scratch of one row.
template <int D, int InDtype, int OutDtype>
inline void rotate_power_of_two(const void* in, int64_t in_at, void* out, int64_t out_at, float* row) {
  constexpr int kVectors = D / kLanes;
  constexpr int kGroup = kVectors < 8 ? kVectors : 8;  // vectors that stay in registers
  const F32 scale = broadcast(hadamard_scale(D));
  for (int g = 0; g < kVectors; g += kGroup) {
    F32 x[kGroup];
    for (int i = 0; i < kGroup; ++i) x[i] = load_values<InDtype>(in, in_at + (g + i) * kLanes);
    butterflies(x);
    if constexpr (kGroup == kVectors) {
      for (int i = 0; i < kGroup; ++i) store_values<OutDtype>(out, out_at + (g + i) * kLanes, x[i] * scale);
    } else {
      for (int i = 0; i < kGroup; ++i) store(row + (g + i) * kLanes, x[i]);
    }
  }
  if constexpr (kGroup < kVectors) {
    // What is left crosses the groups: vectors kGroup apart.
    constexpr int kGroups = kVectors / kGroup;
    for (int i = 0; i < kGroup; ++i) {
      F32 x[kGroups];
      for (int g = 0; g < kGroups; ++g) x[g] = load(row + (g * kGroup + i) * kLanes);
#pragma GCC unroll 8
      for (int stride = 1; stride < kGroups; stride *= 2) {
#pragma GCC unroll 32
        for (int g = 0; g < kGroups; ++g) {
          if ((g & stride) != 0) continue;
          const F32 p = x[g];
          const F32 q = x[g + stride];
          x[g] = p + q;
          x[g + stride] = p - q;
        }
      }
      for (int g = 0; g < kGroups; ++g) store_values<OutDtype>(out, out_at + (g * kGroup + i) * kLanes, x[g] * scale);
    }
  }
}

// y[to] for to = To .. To + 3: the signed sum over from, in rising order. x and y step by `stride` floats between values.
template <int M, bool Inverse, int To, int From = 0>
KVARN_INLINE void add_terms(const float* x, int stride, F32 (&y)[4]) {
  if constexpr (From < M) {
    constexpr const HadamardSigns& kSigns = signs_of<M>();
    const F32 term = load(x + From * stride);
    const auto add = [&]<int I>() {
      constexpr bool kMinus = ((Inverse ? kSigns.rows[To + I] : kSigns.columns[To + I]) >> From & 1u) != 0;
      if constexpr (From == 0) {
        y[I] = kMinus ? as_f32(as_i32(term) ^ broadcast(int32_t(-0x7fffffff - 1))) : term;
      } else {
        y[I] = kMinus ? y[I] - term : y[I] + term;
      }
    };
    add.template operator()<0>();
    add.template operator()<1>();
    add.template operator()<2>();
    add.template operator()<3>();
    add_terms<M, Inverse, To, From + 1>(x, stride, y);
  }
}

template <int M, bool Inverse, int To = 0>
KVARN_INLINE void multiply_signs(const float* x, int stride, F32 scale, float* out) {
  if constexpr (To < M) {
    F32 y[4];
    add_terms<M, Inverse, To>(x, stride, y);
    for (int i = 0; i < 4; ++i) store(out + (To + i) * stride, y[i] * scale);
    multiply_signs<M, Inverse, To + 4>(x, stride, scale, out);
  }
}

// kLanes rows in the lanes of x[D]; the result is out[D].
template <int D, int M, bool Inverse>
__attribute__((noinline)) void rotate_lanes(float* x, float* out) {
  constexpr int kPower = D / M;
  for (int a = 0; a < M; ++a) {
    F32 t[kPower];
    for (int b = 0; b < kPower; ++b) t[b] = load(x + (a * kPower + b) * kLanes);
#pragma GCC unroll 4
    for (int stride = 1; stride < kPower; stride *= 2) {
#pragma GCC unroll 16
      for (int b = 0; b < kPower; ++b) {
        if ((b & stride) != 0) continue;
        const F32 p = t[b];
        const F32 q = t[b + stride];
        t[b] = p + q;
        t[b + stride] = p - q;
      }
    }
    for (int b = 0; b < kPower; ++b) store(x + (a * kPower + b) * kLanes, t[b]);
  }
  const F32 scale = broadcast(hadamard_scale(D));
  for (int b = 0; b < kPower; ++b) multiply_signs<M, Inverse>(x + b * kLanes, kPower * kLanes, scale, out + b * kLanes);
}

template <int D, int M, int InDtype, int OutDtype>
inline void rotate_transposed(const RotateRows& r) {
  float* lanes = r.scratch;
  float* rotated = lanes + D * kLanes;
  for (int64_t first = 0; first < r.rows; first += kLanes) {
    const int rows = r.rows - first < kLanes ? static_cast<int>(r.rows - first) : kLanes;
    for (int d = 0; d < D; d += kLanes) {
      F32 block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = i < rows ? load_values<InDtype>(r.in, (first + i) * r.in_stride + d) : zero();
      transpose(block);
      for (int i = 0; i < kLanes; ++i) store(lanes + (d + i) * kLanes, block[i]);
    }
    if (r.inverse) {
      rotate_lanes<D, M, true>(lanes, rotated);
    } else {
      rotate_lanes<D, M, false>(lanes, rotated);
    }
    for (int d = 0; d < D; d += kLanes) {
      F32 block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load(rotated + (d + i) * kLanes);
      transpose(block);
      for (int i = 0; i < rows; ++i) store_values<OutDtype>(r.out, (first + i) * r.out_stride + d, block[i]);
    }
  }
}

template <int D, int InDtype, int OutDtype>
inline void rotate_rows_as(const RotateRows& r) {
  constexpr int kOdd = hadamard_odd_order(D);
  if constexpr (kOdd == 1) {
    for (int64_t i = 0; i < r.rows; ++i) {
      rotate_power_of_two<D, InDtype, OutDtype>(r.in, i * r.in_stride, r.out, i * r.out_stride, r.scratch);
    }
  } else {
    rotate_transposed<D, kOdd, InDtype, OutDtype>(r);
  }
}

template <int D>
inline void rotate_rows_of(const RotateRows& r) {
  with_dtype(r.in_dtype, [&]<int In>() {
    if (r.out_dtype == r.in_dtype) return rotate_rows_as<D, In, In>(r);
    if constexpr (In == KVARN_F32) {
      if (r.out_dtype == KVARN_F16) return rotate_rows_as<D, KVARN_F32, KVARN_F16>(r);
      return rotate_rows_as<D, KVARN_F32, KVARN_BF16>(r);
    } else {
      rotate_rows_as<D, In, KVARN_F32>(r);
    }
  });
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
