// One operand (K or V) of one tile to its part of a record: docs/FORMAT.md's fp32 definition, operation by operation, for every tile.
//
// The tile stays in the caches: its values are read again whenever they are needed, and only vectors (scales, weights, spreads) lie in
// shared memory. A line is a channel or a token of the tile. Sums over the tokens of a channel are one thread's, with the sixteen partial
// sums of the definition in registers; sums over the channels of a token are those of 16 neighbouring lanes, one partial sum each, which
// are then added in halves. So neither the size of the tile nor the width of a wave shows in the code.
//
// Per element: 3 fused multiply-adds a direction and iteration of VarN, 54 in all, and as many reads from the cache as there are sums.
#pragma once

#include "encode.h"
#include "encode_args.h"
#include "kvarn/encode_constants.h"
#include "numbers.cuh"
#include "primitives.cuh"

namespace kvarn::cuda {

constexpr unsigned kHalfWarp = 0xffffu;  // the lanes of a token may be alone in a branch

__device__ __forceinline__ float clip_value(float x, float low, float high) { return fminf(fmaxf(x, low), high); }

// The channels of a tile (kChannels), or its tokens.
template <class T, bool kChannels>
struct Lines {
  const T* values;  // [tokens][head_dim]
  int head_dim, tokens;

  __device__ __forceinline__ int count() const { return kChannels ? head_dim : tokens; }
  __device__ __forceinline__ int length() const { return kChannels ? tokens : head_dim; }
  __device__ __forceinline__ float at(int line, int i) const {
    return to_float(kChannels ? values[i * head_dim + line] : values[line * head_dim + i]);
  }
  // The thread that writes what is known about a line; 16 threads know it when lines are tokens.
  static __device__ __forceinline__ bool writes() { return kChannels || threadIdx.x % 16 == 0; }

  template <class F>
  __device__ __forceinline__ void for_each_line(F f) const {
#pragma unroll 1
    for (int line = kChannels ? threadIdx.x : threadIdx.x / 16; line < count(); line += kChannels ? kEncodeThreads : kEncodeThreads / 16)
      f(line);
  }
  // f(value, i) for what this thread sees of a line.
  template <class F>
  __device__ __forceinline__ void for_each(int line, F f) const {
#pragma unroll 1
    for (int i = kChannels ? 0 : threadIdx.x % 16; i < length(); i += kChannels ? 1 : 16) f(at(line, i), i);
  }
  // What all threads of a line have together.
  template <class V, class Op>
  static __device__ __forceinline__ V together(V x, Op op) {
    if constexpr (!kChannels) {
#pragma unroll
      for (int h = 8; h >= 1; h /= 2) x = op(x, __shfl_xor_sync(kHalfWarp << (threadIdx.x & 16), x, h));
    }
    return x;
  }
  // Orders what the threads of a line have read before what one of them writes.
  static __device__ __forceinline__ void settle() {
    if constexpr (!kChannels) __syncwarp();
  }
  // sum16 of step(p, value, i)
  template <class Step>
  __device__ __forceinline__ float sum16(int line, Step step) const {
    if constexpr (kChannels) {
      float p[16] = {};
#pragma unroll 1
      for (int i = 0; i < tokens; i += 16) {
#pragma unroll
        for (int l = 0; l < 16; ++l) p[l] = step(p[l], at(line, i + l), i + l);
      }
#pragma unroll
      for (int h = 8; h >= 1; h /= 2) {
#pragma unroll
        for (int l = 0; l < h; ++l) p[l] = __fadd_rn(p[l], p[l + h]);
      }
      return p[0];
    } else {
      float p = 0.0f;
      for_each(line, [&](float x, int i) { p = step(p, x, i); });
      return together(p, [](float x, float y) { return __fadd_rn(x, y); });
    }
  }
};

// The vectors of one axis, in shared memory.
struct Balance {
  float* scale;   // then 1 / grid step of a row
  float* weight;  // 1 / scale; then the zero of a row's grid
  float* spread;  // then a row's mean
  float* best;    // scale of the best iterate; then a row's scale in the record
  float* zero;    // a row's zero in the record
};
__device__ __forceinline__ Balance balance_at(float* vectors, int n) {
  return {vectors, vectors + n, vectors + 2 * n, vectors + 3 * n, vectors + 4 * n};
}

template <class F>
__device__ __forceinline__ void for_each_of(int n, F f) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += kEncodeThreads) f(i);
}
// sum16 over an array in shared memory; the same in every thread.
__device__ __forceinline__ float sum_array(const float* values, int n) {
  float p = 0.0f;
#pragma unroll 1
  for (int i = threadIdx.x % 16; i < n; i += 16) p = __fadd_rn(p, values[i]);
  return Lines<float, false>::together(p, [](float x, float y) { return __fadd_rn(x, y); });
}

struct Extremes {
  float low, high;
};
// Over all threads; `reduce`: one Extremes a warp in shared memory.
__device__ __forceinline__ Extremes block_extremes(Extremes x, Extremes* reduce) {
#pragma unroll 1
  for (int h = 16; h >= 1; h /= 2) {
    x.low = fminf(x.low, __shfl_xor_sync(kFullWarp, x.low, h));
    x.high = fmaxf(x.high, __shfl_xor_sync(kFullWarp, x.high, h));
  }
  if (threadIdx.x % 32 == 0) reduce[threadIdx.x / 32] = x;
  __syncthreads();  // the warps' extremes are written
#pragma unroll 1
  for (int w = 0; w < kEncodeThreads / 32; ++w) {
    x.low = fminf(x.low, reduce[w].low);
    x.high = fmaxf(x.high, reduce[w].high);
  }
  __syncthreads();  // and read
  return x;
}

// kIsK: rows (the axis that gets scale and zero) are channels, columns tokens; else the reverse.
template <class T, bool kIsK>
struct PlainEncoder {
  Lines<T, kIsK> rows;
  Lines<T, !kIsK> columns;
  Balance row, column;
  Extremes* reduce;

  // ---- step 0 ----
  __device__ __forceinline__ bool finite() const {
    bool fits = true;
    rows.for_each_line([&](int r) { rows.for_each(r, [&](float x, int) { fits = fits && fabsf(x) <= kLargestValue; }); });
    return __syncthreads_or(!fits) == 0;
  }

  // ---- step 1: size ----
  __device__ __forceinline__ float size_of_tile() const {
    rows.for_each_line([&](int r) {
      const float squares = rows.sum16(r, [](float p, float x, int) { return __fmaf_rn(x, x, p); });
      if (rows.writes()) row.spread[r] = squares;
    });
    __syncthreads();  // sums are written
    const float squares = sum_array(row.spread, rows.count());
    const float size = __fmul_rn(__fsqrt_rn(__fdiv_rn(squares, static_cast<float>(rows.count() * columns.count()))), kSizeShare);
    __syncthreads();  // and read
    return size >= kSmallestSize ? size : 1.0f;
  }

  // ---- step 2: VarN ----
  template <class Axis>
  static __device__ __forceinline__ void measure(const Axis& lines, const float* weights, float* spreads) {
    const float n = static_cast<float>(lines.length());
    lines.for_each_line([&](int line) {
      const float mean = __fdiv_rn(lines.sum16(line, [&](float p, float x, int i) { return __fmaf_rn(x, weights[i], p); }), n);
      const float squares = lines.sum16(line, [&](float p, float x, int i) {
        const float d = __fmaf_rn(x, weights[i], -mean);
        return __fmaf_rn(d, d, p);
      });
      if (lines.writes()) spreads[line] = __fsqrt_rn(__fdiv_rn(squares, n - 1.0f));
    });
    __syncthreads();  // spreads are written
  }
  static __device__ __forceinline__ void set_scales(const Balance& b, int n, float scale) {
    for_each_of(n, [&](int i) {
      b.scale[i] = b.best[i] = scale;
      b.weight[i] = __fdiv_rn(1.0f, scale);
    });
  }
  static __device__ __forceinline__ void update(const Balance& b, int n, float low, float high) {
    for_each_of(n, [&](int i) {
      const float change = clip_value(__fmul_rn(b.spread[i], b.weight[i]), kStdMin, kStdMax);
      b.scale[i] = clip_value(__fmul_rn(b.scale[i], change), low, high);
      b.weight[i] = __fdiv_rn(1.0f, b.scale[i]);
    });
    __syncthreads();  // weights are written
  }
  __device__ __forceinline__ float imbalance_of(const Balance& b, int n) const {
    Extremes x{INFINITY, -INFINITY};
    for_each_of(n, [&](int i) {
      const float v = __fmul_rn(b.spread[i], b.weight[i]);
      x.low = fminf(x.low, v);
      x.high = fmaxf(x.high, v);
    });
    x = block_extremes(x, reduce);
    return __fdiv_rn(x.high, fmaxf(x.low, kImbalanceFloor));
  }
  __device__ __forceinline__ void normalise(float size) const {
    const int r = rows.count(), c = columns.count();
    set_scales(row, r, size);
    set_scales(column, c, 1.0f);
    __syncthreads();  // weights are written
    measure(columns, row.weight, column.spread);
    measure(rows, column.weight, row.spread);
    float best = __fadd_rn(imbalance_of(column, c), imbalance_of(row, r));
#pragma unroll 1
    for (int iteration = 0; iteration < kVarNIterations; ++iteration) {
      update(column, c, kScaleMin, kScaleMax);
      measure(rows, column.weight, row.spread);
      update(row, r, __fmul_rn(size, kScaleMin), __fmul_rn(size, kScaleMax));
      measure(columns, row.weight, column.spread);
      const float now = __fadd_rn(imbalance_of(column, c), imbalance_of(row, r));
      if (now <= best) {
        best = now;
        for_each_of(r, [&](int i) { row.best[i] = row.scale[i]; });
        for_each_of(c, [&](int i) { column.best[i] = column.scale[i]; });
      }
    }
    __syncthreads();  // the best scales are written
    for_each_of(c, [&](int i) { column.weight[i] = __fdiv_rn(1.0f, column.best[i]); });
    __syncthreads();  // and their weights
  }

  // ---- step 3: rounding ----
  // clip(rint((x - zero) * inverse), 0, levels)
  static __device__ __forceinline__ float code_of(float x, float zero, float inverse, float levels) {
    return clip_value(rintf(__fmul_rn(__fsub_rn(x, zero), inverse)), 0.0f, levels);
  }
  struct CodeSums {
    float c1, c2, cx;
  };
  __device__ __forceinline__ CodeSums sum_codes(int r, float mean, float scale, float zero, float levels) const {
    const float inverse = __fdiv_rn(1.0f, scale);
    int c1 = 0, c2 = 0;
    const float cx = rows.sum16(r, [&](float p, float m, int c) {
      const float x = __fsub_rn(__fmul_rn(m, column.weight[c]), mean);
      const float code = code_of(x, zero, inverse, levels);
      const int whole = static_cast<int>(code);
      c1 += whole;
      c2 += whole * whole;
      return __fmaf_rn(code, x, p);
    });
    const auto add = [](int x, int y) { return x + y; };
    return {static_cast<float>(rows.together(c1, add)), static_cast<float>(rows.together(c2, add)), cx};
  }
  // fed: for codes that errors are fed back to, whose grid is that of the record.
  __device__ __forceinline__ void fit_rows(bool unbiased, int levels_int, bool fed) const {
    const float levels = static_cast<float>(levels_int), n = static_cast<float>(rows.length());
    rows.for_each_line([&](int r) {
      float low = INFINITY, high = -INFINITY;
      rows.for_each(r, [&](float m, int c) {
        const float u = __fmul_rn(m, column.weight[c]);
        low = fminf(low, u);
        high = fmaxf(high, u);
      });
      low = rows.together(low, [](float x, float y) { return fminf(x, y); });
      high = rows.together(high, [](float x, float y) { return fmaxf(x, y); });
      const float floor = __fmul_rn(kRangeFloor, row.best[r]);
      float scale = fmaxf(__fdiv_rn(__fsub_rn(high, low), levels), floor);
      float zero = low, mean = 0.0f, record_scale = scale, record_zero = low;  // the zero without the mean
      if (unbiased && scale > floor) {
        mean = __fdiv_rn(rows.sum16(r, [&](float p, float m, int c) { return __fadd_rn(p, __fmul_rn(m, column.weight[c])); }), n);
        const float squares = rows.sum16(r, [&](float p, float m, int c) {
          const float x = __fsub_rn(__fmul_rn(m, column.weight[c]), mean);
          return __fmaf_rn(x, x, p);
        });
        scale = __fmul_rn(unbiased_clip(levels_int), scale);
        zero = __fsub_rn(__fsub_rn(__fmul_rn(__fadd_rn(low, high), 0.5f), mean), __fmul_rn(scale, __fmul_rn(levels, 0.5f)));
        CodeSums s{};
#pragma unroll 1
        for (int pass = 0; pass <= kUnbiasedRefits; ++pass) {
          s = sum_codes(r, mean, scale, zero, levels);
          const float variance = __fsub_rn(__fmul_rn(n, s.c2), __fmul_rn(s.c1, s.c1));
          if (pass == kUnbiasedRefits || !(variance > 0.0f) || !(s.cx > 0.0f)) continue;
          scale = __fdiv_rn(__fmul_rn(s.cx, n), variance);
          zero = -__fdiv_rn(__fmul_rn(scale, s.c1), n);
        }
        const bool fits = s.cx > 0.0f;
        record_scale = fits ? __fdiv_rn(squares, s.cx) : scale;
        record_zero = fits ? -__fdiv_rn(__fmul_rn(record_scale, s.c1), n) : zero;
        if (fed) {
          record_zero = __fsub_rn(record_zero, __fmul_rn(record_scale, feedback_low_shift(levels_int)));
          record_scale = __fmul_rn(record_scale, feedback_widening(levels_int));
        }
      }
      if (fed) {
        scale = record_scale;
        zero = record_zero;
      }
      rows.settle();  // the row's scale has been read
      if (!rows.writes()) return;
      row.scale[r] = __fdiv_rn(1.0f, scale);
      row.weight[r] = zero;
      row.spread[r] = mean;
      row.best[r] = record_scale;
      row.zero[r] = __fadd_rn(mean, record_zero);
    });
    __syncthreads();  // grids are written
  }

  // ---- bytes ----
  struct Words {  // of a plane: `words` words of each of `lines` lines
    int first_line, lines, first_word, words;
  };
  // code(row, line). A thread makes whole words, from neighbouring values of a row for K and from neighbouring rows for V, so that a wave
  // reads whole lines.
  template <class Code>
  static __device__ __forceinline__ void pack_words(const Plane& plane, const Words& w, uint8_t* to, int shift, Code code) {
    const int word_codes = 32 / plane.bits;
    const unsigned mask = (1u << plane.bits) - 1u;
#pragma unroll 1
    for (int i = threadIdx.x; i < w.lines * w.words; i += kEncodeThreads) {
      const int line = w.first_line + (kIsK ? i / w.words : i % w.lines), word = w.first_word + (kIsK ? i % w.words : i / w.lines);
      unsigned out = 0;
#pragma unroll 4
      for (int j = 0; j < word_codes; ++j) {
        const int r = word * word_codes + j;  // codes past the row's end are zero
        if (r >= plane.codes) break;
        out |= (code(r, line) >> shift & mask) << (j % 4 * 8 + j / 4 * plane.bits);
      }
      *reinterpret_cast<unsigned*>(to + plane.word_offset(line, word)) = out;
    }
  }
  // Both planes; words(plane) says which words of it.
  template <class Select, class Code>
  static __device__ __forceinline__ void pack(const RecordLayout& r, uint8_t* record, Select words, Code code) {
    const Plane &low = kIsK ? r.k_low : r.v_low, &high = kIsK ? r.k_high : r.v_high;
    pack_words(low, words(low), record + (kIsK ? r.k_low_offset : r.v_low_offset), 0, code);
    if (high.bits != 0) pack_words(high, words(high), record + (kIsK ? r.k_high_offset : r.v_high_offset), low.bits, code);
  }
  // u - mean of an element
  __device__ __forceinline__ float centred(int r, int c) const {
    return __fsub_rn(__fmul_rn(rows.at(r, c), column.weight[c]), row.spread[r]);
  }
  __device__ __forceinline__ void round_and_pack(const RecordLayout& r, uint8_t* record, float levels) const {
    pack(
        r, record, [](const Plane& plane) { return Words{0, plane.rows, 0, plane.row_bytes / 4}; },
        [&](int row_index, int line) {
          return static_cast<unsigned>(code_of(centred(row_index, line), row.weight[row_index], row.scale[row_index], levels));
        });
  }
  static __device__ __forceinline__ __half saturate(float x) {
    return __float2half_rn(__fadd_rn(clip_value(x, -65504.0f, 65504.0f), 0.0f));
  }
  __device__ __forceinline__ void write_vector(const RecordLayout& r, uint8_t* record, int which, const float* values, int exponent) const {
    uint8_t* const at = record + r.metadata_offset[which];
    const int n = r.metadata_count[which];
    const auto value = [&](int i) { return __fadd_rn(ldexpf(values[i], exponent), 0.0f); };
    if (r.format.metadata_bits == 16) {
      for_each_of(n, [&](int i) { reinterpret_cast<__half*>(at)[i] = saturate(value(i)); });
      return;
    }
    Extremes x{INFINITY, -INFINITY};
    for_each_of(n, [&](int i) {
      x.low = fminf(x.low, value(i));
      x.high = fmaxf(x.high, value(i));
    });
    x = block_extremes(x, reduce);
    const __half low16 = saturate(x.low), step16 = saturate(__fdiv_rn(__fsub_rn(x.high, x.low), 255.0f));
    const float base = __half2float(low16), step = __half2float(step16), inverse = __fdiv_rn(1.0f, step);
    if (threadIdx.x == 0) {
      __half* const range = reinterpret_cast<__half*>(record + r.metadata_range_offset) + 2 * which;
      range[0] = low16;
      range[1] = step16;
    }
    for_each_of(n, [&](int i) {
      const float units = rintf(__fmul_rn(__fsub_rn(value(i), base), inverse));
      at[i] = step > 0.0f ? static_cast<uint8_t>(clip_value(units, 0.0f, 255.0f)) : 0;
    });
  }
  static __device__ __forceinline__ void write_padding(const RecordLayout& r, uint8_t* record) {
    const int used = r.metadata_range_offset + (r.format.metadata_bits == 8 ? kMetadataCount * 4 : 0);
    for_each_of(r.record_bytes - used, [&](int i) { record[used + i] = 0; });
  }
  static constexpr int kRowScale = kIsK ? kKScale : kVScale, kRowZero = kIsK ? kKZero : kVZero;
  static constexpr int kColumnScale = kIsK ? kKTokenScale : kVChannelScale;

  static __device__ __forceinline__ void write_nan(const RecordLayout& r, uint8_t* record) {
    const int begin = kIsK ? r.k_low_offset : r.v_low_offset, end = kIsK ? r.v_low_offset : r.metadata_offset[0];
    for_each_of((end - begin) / 4, [&](int i) { *reinterpret_cast<unsigned*>(record + begin + 4 * i) = 0; });
    const __half nan = __ushort_as_half(0x7e00);
    for (int which = kIsK ? kKScale : kVChannelScale; which <= (kIsK ? kKTokenScale : kVZero); ++which) {
      uint8_t* const at = record + r.metadata_offset[which];
      const bool bytes = r.format.metadata_bits == 8;
      for_each_of(r.metadata_count[which], [&](int i) {
        if (bytes) {
          at[i] = 0;
        } else {
          reinterpret_cast<__half*>(at)[i] = nan;
        }
      });
      if (bytes && threadIdx.x < 2) reinterpret_cast<__half*>(record + r.metadata_range_offset)[2 * which + threadIdx.x] = nan;
    }
    if (!kIsK) write_padding(r, record);
  }
};

}  // namespace kvarn::cuda
