// One operand (K or V) of one tile to its part of a record, with the tile in registers: rounding, error feedback, metadata.
#pragma once

#include "encode_order.cuh"
#include "encode_pack.cuh"
#include "encode_place.cuh"
#include "encode_registers.cuh"

namespace kvarn::cuda {

template <bool kIsK, bool kFeedback, class Shape>
class RegisterEncoder : RegisterTile<kIsK, kFeedback, Shape> {
  using Base = RegisterTile<kIsK, kFeedback, Shape>;

 public:
  using Base::Base;

  // tile: [tokens][channels]; null: the operand cannot be encoded.
  __device__ __forceinline__ void encode(const uint8_t* tile, bool unbiased) {
    float largest = tile == nullptr ? INFINITY : 0.0f;
    if (tile != nullptr) {
      if (a_.dtype == KVARN_F16) {
        load(reinterpret_cast<const __half*>(tile), largest);
      } else if (a_.dtype == KVARN_BF16) {
        load(reinterpret_cast<const __nv_bfloat16*>(tile), largest);
      } else {
        load(reinterpret_cast<const float*>(tile), largest);
      }
    }
    const float* const factor = kFeedback ? encode_factor(a_, kIsK) : nullptr;
    if (__syncthreads_or(!(largest <= kLargestValue)) ||
        (factor != nullptr && !orders_channels<kThreads>(factor, kHeadDim, reinterpret_cast<unsigned*>(s_.stage)))) {
      write_nan<kIsK, kThreads>(a_.layout, record_);
      return;
    }
    const float size = a_.published != 0 ? 1.0f : tile_size();
    if (threadIdx.x == 0) s_.size = size;
    normalise(size);
    round(unbiased);
    write();
  }

 private:
  using Base::a_, Base::s_, Base::record_, Base::x_, Base::y_, Base::m_;
  using Base::channel, Base::channel_position, Base::owns_channel, Base::channels_of, Base::own_x, Base::put_channels, Base::put_part,
      Base::gather_part;
  using Base::kThreads, Base::kParts, Base::kMineX, Base::kMineY, Base::kOwnX, Base::kOwnY, Base::kHeadDim, Base::kTokens, Base::kNY;
  using Base::load, Base::tile_size, Base::normalise, Base::fold, Base::unpack;
  using Base::token, Base::owns_token, Base::token_position, Base::tokens_of, Base::own_y, Base::put_tokens, Base::put_stage,
      Base::stage_total;

  // ---- step 3: rounding ----

  // Rows are the channels of K and the tokens of V; element (r, c) of the thread is row r, column c.
  static constexpr int kMineRows = kIsK ? kMineX : kMineY, kMineColumns = kIsK ? kMineY : kMineX, kOwnRows = kIsK ? kOwnX : kOwnY;
  static constexpr int kChains = kIsK ? kMineY / kNY : 1, kChain = kMineColumns / kChains;  // partial sums of a row, and their terms
  static constexpr int kColumns = kIsK ? kTokens : kHeadDim;

  __device__ __forceinline__ float& at(int r, int c) { return kIsK ? m_[c][r] : m_[r][c]; }
  __device__ __forceinline__ float* row_first() const { return kIsK ? s_.x_mean : s_.y_mean; }
  __device__ __forceinline__ float* row_second() const { return kIsK ? s_.x_weight : s_.y_weight; }
  __device__ __forceinline__ float* row_third() const { return kIsK ? s_.x_scale : s_.y_scale; }
  __device__ __forceinline__ float& own_row(float* values, int o) { return kIsK ? own_x(values, o) : own_y(values, o); }
  __device__ __forceinline__ bool owns_row(int o) const { return kIsK ? owns_channel(o) : owns_token(); }
  __device__ __forceinline__ void rows_of(float (&to)[4], const float* values, int q) const {
    unpack(to, kIsK ? channels_of(values, q) : tokens_of(values, q));
  }
  __device__ __forceinline__ void put_rows(float* values, const float (&own)[kOwnRows]) {
    if constexpr (kIsK) {
      put_channels(values, own);
    } else {
      put_tokens(values, own);
    }
  }
  __device__ __forceinline__ float row_scale(int o) { return kIsK ? own_x(s_.x_kept, o) : own_y(s_.y_kept, o); }
  // Orders shared memory among those who share a row.
  __device__ __forceinline__ static void row_barrier() {
    if constexpr (kIsK) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }
  // Of four rows, for totals() after a barrier; kSecond: beside another one.
  template <bool kSecond, class T>
  __device__ __forceinline__ void put_row_sums(int q, const T (&sums)[4]) {
    if constexpr (kIsK) {
      put_part(kSecond ? reinterpret_cast<T*>(s_.more) : reinterpret_cast<T*>(s_.part), q, sums);
    } else {
      put_stage(kSecond ? reinterpret_cast<T*>(s_.more_stage) : reinterpret_cast<T*>(s_.stage), q, sums);
    }
  }
  template <bool kSecond, class T, class Join>
  __device__ __forceinline__ T row_total(int o, Join join) const {
    if constexpr (kIsK) {
      T v[kParts];
      gather_part(kSecond ? reinterpret_cast<const T*>(s_.more) : reinterpret_cast<const T*>(s_.part), o, v);
      return fold(v, join);
    } else {
      return stage_total(kSecond ? reinterpret_cast<const T*>(s_.more_stage) : reinterpret_cast<const T*>(s_.stage), o, join);
    }
  }
  // Over the columns of every row: first(r, c) begins a partial sum, step(p, r, c) goes on; own: the owners' totals.
  template <class First, class Step, class Join>
  __device__ __forceinline__ void over_columns(float (&own)[kOwnRows], First first, Step step, Join join) {
#pragma unroll
    for (int q = 0; q < kMineRows / 4; ++q) {
      float p[4][kChains];
#pragma unroll
      for (int c = 0; c < kMineColumns; ++c) {
        const int chain = c / kChain;
#pragma unroll
        for (int r = 0; r < 4; ++r) p[r][chain] = c % kChain == 0 ? first(4 * q + r, c) : step(p[r][chain], 4 * q + r, c);
      }
      const float sums[4] = {fold(p[0], join), fold(p[1], join), fold(p[2], join), fold(p[3], join)};
      put_row_sums<false>(q, sums);
    }
    row_barrier();  // sums are written
#pragma unroll
    for (int o = 0; o < kOwnRows; ++o) own[o] = row_total<false, float>(o, join);
    row_barrier();  // and read
  }

  // Values become balanced values; the extremes of every row go to its owner.
  __device__ __forceinline__ void balance(float (&low)[kOwnRows], float (&high)[kOwnRows]) {
    const auto lower = [](float x, float y) { return fminf(x, y); };
    const auto higher = [](float x, float y) { return fmaxf(x, y); };
#pragma unroll
    for (int q = 0; q < kMineRows / 4; ++q) {
      float least[4], most[4], weight[4];
#pragma unroll
      for (int c = 0; c < kMineColumns; ++c) {
        if (c % 4 == 0) unpack(weight, kIsK ? tokens_of(s_.y_weight, c / 4) : channels_of(s_.x_weight, c / 4));
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float& u = at(4 * q + r, c);
          u = __fmul_rn(u, weight[c % 4]);
          least[r] = c == 0 ? u : fminf(least[r], u);
          most[r] = c == 0 ? u : fmaxf(most[r], u);
        }
      }
      put_row_sums<false>(q, least);
      put_row_sums<true>(q, most);
    }
    row_barrier();  // extremes are written
#pragma unroll
    for (int o = 0; o < kOwnRows; ++o) low[o] = row_total<false, float>(o, lower);
    __syncwarp();  // not all loads at once: registers are scarce
#pragma unroll
    for (int o = 0; o < kOwnRows; ++o) high[o] = row_total<true, float>(o, higher);
    row_barrier();  // and read
  }

  // The code of x is the low byte of the bits of biased = kBias + code: rounding happens where the bias is added. inverse: of the step,
  // times 2^-8, so that the product saturates at 256 steps and at 0.
  static constexpr float kBias = 8912896.0f;  // 2^23 + 2^19
  __device__ __forceinline__ static float biased(float x, float zero, float inverse, float levels) {
    return __fmaf_rn(fminf(multiply_saturated(__fsub_rn(x, zero), inverse), levels), 256.0f, kBias);
  }
  // The square of those bits modulo 2^32 is 2401 code 2^20 + code^2, so one sum of them holds the sum of codes (below 2^12) and of their
  // squares (below 2^20) for 16 codes of 8 bits, or for a row of 4-bit codes.
  static constexpr int kFields = kMineColumns > 16 ? 2 : 1;
  __device__ __forceinline__ static uint32_t sum_of(uint32_t packed) { return (packed >> 20) * 0xaa1u & 0xfffu; }
  __device__ __forceinline__ static uint32_t squares_of(uint32_t packed) { return packed & 0xfffffu; }
  // Four codes of neighbouring rows in a word.
  __device__ __forceinline__ static uint32_t word_of(const float (&b)[4]) {
    return __byte_perm(__byte_perm(__float_as_uint(b[0]), __float_as_uint(b[1]), 0x0040),
                       __byte_perm(__float_as_uint(b[2]), __float_as_uint(b[3]), 0x0040), 0x5410);
  }

  using Words = uint32_t[kMineRows / 4][kMineColumns];
  struct CodeSums {
    float c1, c2, cx;
  };
  // Rounds to the grids in row_first() (zeros) and row_second() (inverses). Where one sum cannot hold both counts of a row, everything is
  // done twice, once for either. kKeep: the codes are kept, and squares are not needed.
  template <bool kKeep>
  __device__ __forceinline__ void sum_codes(int bits, CodeSums (&own)[kOwnRows]) {
    Words words;
    const float levels = static_cast<float>((1 << bits) - 1) * 0x1p-8f;
    const auto add = [](auto x, auto y) { return x + y; };
    const bool together = bits <= 4;
#pragma unroll 1
    for (int squares = 0; squares < (kKeep ? 1 : 2); ++squares) {
#pragma unroll
      for (int q = 0; q < kMineRows / 4; ++q) {
        float zero[4], inverse[4], p[4][kChains] = {};
        uint32_t packed[4][kFields] = {};
        rows_of(zero, row_first(), q);
        rows_of(inverse, row_second(), q);
#pragma unroll
        for (int c = 0; c < kMineColumns; ++c) {
          float b[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const float x = at(4 * q + r, c);
            b[r] = biased(x, zero[r], inverse[r], levels);
            p[r][c / kChain] = __fmaf_rn(__fsub_rn(b[r], kBias), x, p[r][c / kChain]);
            packed[r][c / 16] += __float_as_uint(b[r]) * __float_as_uint(b[r]);
          }
          if constexpr (kKeep) words[q][c] = word_of(b);
        }
        const float sums[4] = {fold(p[0]), fold(p[1]), fold(p[2]), fold(p[3])};
        put_row_sums<false>(q, sums);
        uint32_t counts[4] = {};
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
          for (int h = 0; h < kFields; ++h) {
            counts[r] += together ? packed[r][h] : squares != 0 ? squares_of(packed[r][h]) : sum_of(packed[r][h]);
          }
        }
        put_row_sums<true>(q, counts);
      }
      row_barrier();  // sums are written
#pragma unroll
      for (int o = 0; o < kOwnRows; ++o) {
        const uint32_t count = row_total<true, uint32_t>(o, add);
        if (together || squares == 0) own[o].c1 = static_cast<float>(together ? sum_of(count) : count);
        if (together || squares != 0) own[o].c2 = static_cast<float>(together ? squares_of(count) : count);
      }
      __syncwarp();  // not all loads at once
#pragma unroll
      for (int o = 0; o < kOwnRows; ++o) own[o].cx = row_total<false, float>(o, add);
      row_barrier();  // sums are read
      if (together) break;
    }
    if constexpr (kKeep) put_codes(words);
  }
  // Rounds values between the ends of the grids.
  __device__ __forceinline__ void round_between() {
    Words words;
#pragma unroll
    for (int q = 0; q < kMineRows / 4; ++q) {
      float zero[4], inverse[4];
      rows_of(zero, row_first(), q);
      rows_of(inverse, row_second(), q);
#pragma unroll
      for (int c = 0; c < kMineColumns; ++c) {
        float b[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) b[r] = __fadd_rn(__fmul_rn(__fsub_rn(at(4 * q + r, c), zero[r]), inverse[r]), kBias);
        words[q][c] = word_of(b);
      }
    }
    put_codes(words);
  }

  struct RowFit {             // of one row, kept by its owner
    float scale, zero, mean;  // the row's zero is zero + mean
    bool unbiased;
  };
  __device__ __forceinline__ void put_grids(const RowFit (&fit)[kOwnRows], float share) {
    float zeros[kOwnRows], inverses[kOwnRows];
#pragma unroll
    for (int o = 0; o < kOwnRows; ++o) {
      zeros[o] = fit[o].zero;
      inverses[o] = __fmul_rn(reciprocal(fit[o].scale), share);
    }
    put_rows(row_first(), zeros);
    put_rows(row_second(), inverses);
    row_barrier();  // grids are written
  }

  __device__ __forceinline__ void round(bool unbiased) {
    const int bits = kIsK ? a_.layout.format.k_bits : a_.layout.format.v_bits;
    const int levels_int = (1 << bits) - 1;
    const float levels = static_cast<float>(levels_int);
    constexpr float n = static_cast<float>(kColumns), share = 1.0f / n;
    const bool fed = kFeedback && encode_factor(a_, kIsK) != nullptr;

    // From here on values are balanced, with the columns' weights of the kept scales.
    if constexpr (kIsK) {
#pragma unroll
      for (int o = 0; o < kOwnY; ++o) {
        if (owns_token()) own_y(s_.y_weight, o) = reciprocal(own_y(s_.y_kept, o));
      }
      __syncwarp();
    } else {
#pragma unroll
      for (int o = 0; o < kOwnX; ++o) {
        if (owns_channel(o)) own_x(s_.x_weight, o) = reciprocal(own_x(s_.x_kept, o));
      }
      __syncthreads();  // weights are written
    }
    const auto add = [](float x, float y) { return __fadd_rn(x, y); };
    float low[kOwnRows], high[kOwnRows];
    balance(low, high);
    RowFit fit[kOwnRows];
#pragma unroll
    for (int o = 0; o < kOwnRows; ++o) {
      const float floor = __fmul_rn(kRangeFloor, row_scale(o));
      fit[o].scale = fmaxf(quotient(__fsub_rn(high[o], low[o]), levels), floor);
      fit[o].zero = low[o];
      fit[o].mean = 0.0f;
      fit[o].unbiased = unbiased && fit[o].scale > floor;
    }
    if (unbiased) {
      float totals[kOwnRows], squares[kOwnRows];
      over_columns(
          totals, [&](int r, int c) { return __fadd_rn(0.0f, at(r, c)); }, [&](float p, int r, int c) { return __fadd_rn(p, at(r, c)); },
          add);
#pragma unroll
      for (int o = 0; o < kOwnRows; ++o) {
        totals[o] = fit[o].unbiased ? __fmul_rn(totals[o], share) : 0.0f;
        fit[o].mean = totals[o];
      }
      put_rows(row_first(), totals);
      row_barrier();  // means are written
#pragma unroll
      for (int q = 0; q < kMineRows / 4; ++q) {
        float mean[4];
        rows_of(mean, row_first(), q);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
          for (int c = 0; c < kMineColumns; ++c) at(4 * q + r, c) = __fsub_rn(at(4 * q + r, c), mean[r]);
        }
      }
      over_columns(
          squares, [&](int r, int c) { return __fmul_rn(at(r, c), at(r, c)); },
          [&](float p, int r, int c) { return __fmaf_rn(at(r, c), at(r, c), p); }, add);
#pragma unroll
      for (int o = 0; o < kOwnRows; ++o) {
        if (!fit[o].unbiased) continue;
        const float middle = __fsub_rn(__fmul_rn(__fadd_rn(low[o], high[o]), 0.5f), fit[o].mean);
        fit[o].scale = __fmul_rn(unbiased_clip(levels_int), fit[o].scale);
        fit[o].zero = __fsub_rn(middle, __fmul_rn(fit[o].scale, __fmul_rn(levels, 0.5f)));
      }
      CodeSums sums[kOwnRows];
#pragma unroll 1
      for (int pass = 0; pass < kUnbiasedRefits; ++pass) {
        put_grids(fit, 0x1p-8f);
        sum_codes<false>(bits, sums);
#pragma unroll
        for (int o = 0; o < kOwnRows; ++o) {
          const float variance = __fsub_rn(__fmul_rn(n, sums[o].c2), __fmul_rn(sums[o].c1, sums[o].c1));
          if (!fit[o].unbiased || !(variance > 0.0f) || !(sums[o].cx > 0.0f)) continue;
          fit[o].scale = quotient(__fmul_rn(sums[o].cx, n), variance);
          fit[o].zero = -__fmul_rn(__fmul_rn(fit[o].scale, sums[o].c1), share);
        }
      }
      put_grids(fit, 0x1p-8f);
      if (fed) {
        sum_codes<false>(bits, sums);
      } else {
        sum_codes<true>(bits, sums);
      }
#pragma unroll
      for (int o = 0; o < kOwnRows; ++o) {
        if (!fit[o].unbiased) continue;
        if (sums[o].cx > 0.0f) {
          fit[o].scale = quotient(squares[o], sums[o].cx);
          fit[o].zero = -__fmul_rn(__fmul_rn(fit[o].scale, sums[o].c1), share);
        }
        if (fed) {
          fit[o].zero = __fsub_rn(fit[o].zero, __fmul_rn(fit[o].scale, feedback_low_shift(levels_int)));
          fit[o].scale = __fmul_rn(fit[o].scale, feedback_widening(levels_int));
        }
      }
    } else if (!fed) {
      put_grids(fit, 1.0f);
      round_between();
    }
    // Row zeros and scales lie with their owners again.
#pragma unroll
    for (int o = 0; o < kOwnRows; ++o) {
      if (!owns_row(o)) continue;
      own_row(row_first(), o) = fit[o].zero;
      own_row(row_second(), o) = fit[o].scale;
      own_row(row_third(), o) = fit[o].mean;
    }
    if (fed) feed_back(levels * 0x1p-8f);
    __syncthreads();  // codes are written
  }

  __device__ __forceinline__ void write() {
    CodePacker<kIsK, Shape>::pack(s_.codes, a_.layout, record_);

    // ---- step 4: exponents and metadata ----
    const int e = a_.published != 0 ? 0 : ilogbf(s_.size) >> 1;
    float scales[kOwnRows], zeros[kOwnRows], columns_x[kOwnX], columns_y[kOwnY];
    int x_index[kOwnX], y_index[kOwnY];
#pragma unroll
    for (int o = 0; o < kOwnRows; ++o) {
      scales[o] = ldexpf(own_row(row_second(), o), -e);
      zeros[o] = ldexpf(__fadd_rn(own_row(row_third(), o), own_row(row_first(), o)), -e);
    }
#pragma unroll
    for (int o = 0; o < kOwnX; ++o) {
      columns_x[o] = ldexpf(own_x(s_.x_kept, o), e);
      x_index[o] = owns_channel(o) ? channel(o) : -1;
    }
#pragma unroll
    for (int o = 0; o < kOwnY; ++o) {
      columns_y[o] = ldexpf(own_y(s_.y_kept, o), e);
      y_index[o] = owns_token() ? token(o) : -1;
    }
    float2* const reduce = reinterpret_cast<float2*>(s_.extremes);
    if constexpr (kIsK) {
      write_metadata<kThreads>(a_.layout, record_, kKScale, scales, x_index, reduce);
      write_metadata<kThreads>(a_.layout, record_, kKZero, zeros, x_index, reduce);
      write_metadata<kThreads>(a_.layout, record_, kKTokenScale, columns_y, y_index, reduce);
    } else {
      write_metadata<kThreads>(a_.layout, record_, kVChannelScale, columns_x, x_index, reduce);
      write_metadata<kThreads>(a_.layout, record_, kVScale, scales, y_index, reduce);
      write_metadata<kThreads>(a_.layout, record_, kVZero, zeros, y_index, reduce);
      write_padding<kThreads>(a_.layout, record_);
    }
  }

  // ---- step 3b: feedback ----

  // Rounds values again, 16 steps at a time. Within these a lane takes a token of its half-warp, step after step; then it has the channels
  // of its own steps again and adds the errors of the 16 to those still to come.
  __device__ __forceinline__ void feed_back(float levels) {
    const float* const from = encode_factor(a_, kIsK);
    __syncthreads();  // sums are read
    for (int k = threadIdx.x; k < kHeadDim; k += kThreads) {
      const int c = step_channel(from, kHeadDim, k), p = channel_position(c);
      if constexpr (kIsK) {
        const float scale = row_second()[p];
        s_.steps[k] = make_float4(row_first()[p], scale, __fmul_rn(reciprocal(scale), 0x1p-8f), __int_as_float(c));
      } else {
        s_.steps[k] = make_float4(s_.x_kept[p], s_.x_weight[p], 0.0f, __int_as_float(c));
      }
    }
    __syncthreads();  // steps are written
    const int lane = threadIdx.x % 32;
    float* const stage = s_.stage + y_ * Shape::kStage;
    float* const triangle = s_.triangles + threadIdx.x / 32 * 256;
    uint8_t* const fed = s_.fed + y_ * kHeadDim * kMineY;
    to_steps(reinterpret_cast<Moved*>(fed));
#pragma unroll
    for (int i = 0; i < kMineX; ++i) {
      // Values to tokens, the factor among the 16 steps to shared memory.
#pragma unroll
      for (int q = 0; q < kMineY / 4; ++q) {
        const float v[4] = {m_[4 * q][i], m_[4 * q + 1][i], m_[4 * q + 2][i], m_[4 * q + 3][i]};
        put_stage(s_.stage, q, v);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float4 f = *reinterpret_cast<const float4*>(from + (16 * i + lane / 4 + 8 * h) * kHeadDim + 16 * i + lane % 4 * 4);
        if constexpr (!kIsK) {
          const float4* const b = s_.steps + 16 * i + lane % 4 * 4;
          f = make_float4(__fmul_rn(f.x, b[0].y), __fmul_rn(f.y, b[1].y), __fmul_rn(f.z, b[2].y), __fmul_rn(f.w, b[3].y));
        }
        *reinterpret_cast<float4*>(triangle + (lane / 4 + 8 * h) * 16 + lane % 4 * 4) = f;
      }
      __syncwarp();
      float x[kOwnY][16];
#pragma unroll
      for (int o = 0; o < kOwnY; ++o) {
#pragma unroll
        for (int l = 0; l < 16; ++l) x[o][l] = stage[Shape::stage_at(x_ % kMineY + 16 * o, l)];
      }
      float4 grid[kOwnY];  // of V's tokens
#pragma unroll
      for (int o = 0; o < kOwnY && !kIsK; ++o) {
        const float scale = own_y(row_second(), o);
        grid[o] = make_float4(own_y(row_first(), o), scale, __fmul_rn(reciprocal(scale), 0x1p-8f), 0.0f);
      }
#pragma unroll
      for (int d = 0; d < 16; ++d) {
        float f[16];
#pragma unroll
        for (int j = 0; j < 16; j += 4) {
          if (j + 3 > d) unpack(f + j, *reinterpret_cast<const float4*>(triangle + d * 16 + j));
        }
        const float4 step = s_.steps[16 * i + d];
        uint8_t* const codes = fed + __float_as_int(step.w) * kMineY + x_ % kMineY;
#pragma unroll
        for (int o = 0; o < kOwnY; ++o) {
          const float4 g = kIsK ? step : grid[o];
          const float b = biased(x[o][d], g.x, g.z, levels);
          float error = __fsub_rn(__fmaf_rn(__fsub_rn(b, kBias), g.y, g.x), x[o][d]);
          if constexpr (!kIsK) error = __fmul_rn(error, step.x);
          if (owns_token()) codes[16 * o] = static_cast<uint8_t>(__float_as_uint(b));
#pragma unroll
          for (int j = 0; j < 16; ++j) x[o][j] = j > d ? __fmaf_rn(f[j], error, x[o][j]) : x[o][j];
          x[o][d] = error;
        }
      }
      __syncwarp();  // values are read: errors take their place, [step][token]
#pragma unroll
      for (int d = 0; d < 16; ++d) {
#pragma unroll
        for (int o = 0; o < kOwnY; ++o) {
          if (owns_token()) stage[d * kMineY + x_ % kMineY + 16 * o] = x[o][d];
        }
      }
      __syncwarp();
      // The steps still to come.
      if (i + 1 < kMineX) {
        float b[kMineX];
#pragma unroll
        for (int later = i + 1; later < kMineX && !kIsK; ++later) b[later] = s_.steps[x_ + 16 * later].y;
#pragma unroll 2
        for (int d = 0; d < 16; ++d) {
          const float* const shares = from + (16 * i + d) * kHeadDim + x_;
          float error[kMineY];
#pragma unroll
          for (int q = 0; q < kMineY / 4; ++q) unpack(error + 4 * q, *reinterpret_cast<const float4*>(stage + d * kMineY + 4 * q));
#pragma unroll
          for (int later = 0; later < kMineX; ++later) {
            if (later <= i) continue;
            float f = shares[16 * later];
            if constexpr (!kIsK) f = __fmul_rn(f, b[later]);
#pragma unroll
            for (int k = 0; k < kMineY; ++k) m_[k][later] = __fmaf_rn(f, error[k], m_[k][later]);
          }
        }
        __syncwarp();  // errors are read
      }
    }
    Words words;
#pragma unroll
    for (int i = 0; i < kMineX; ++i) {
#pragma unroll
      for (int q = 0; q < kMineY / 4; ++q) {
        const uint32_t four = *reinterpret_cast<const uint32_t*>(fed + (16 * i + x_) * kMineY + 4 * q);
        if constexpr (!kIsK) {
          words[q][i] = four;
        } else {
#pragma unroll
          for (int k = 0; k < 4; ++k) {  // byte k of the four tokens becomes byte i % 4 of the four channels
            uint32_t& word = words[i / 4][4 * q + k];
            word = i % 4 == 0 ? __byte_perm(four, 0u, 0x4440u + k)
                              : __byte_perm(word, four, (0x3210u & ~(15u << 4 * (i % 4))) | (4u + k) << 4 * (i % 4));
          }
        }
      }
    }
    put_codes(words);
  }
  // Some tokens of a channel.
  static constexpr int kMovedTokens = kMineY / 4;
  struct alignas(4 * kMovedTokens) Moved {
    float v[kMovedTokens];
  };
  // Values become those of the channels that the thread's steps x + 16i take. moved [kHeadDim]: of the half-warp.
  __device__ __forceinline__ void to_steps(Moved* moved) {
#pragma unroll
    for (int k = 0; k < kMineY; k += kMovedTokens) {
#pragma unroll
      for (int i = 0; i < kMineX; ++i) {
        Moved own;
#pragma unroll
        for (int t = 0; t < kMovedTokens; ++t) own.v[t] = m_[k + t][i];
        moved[x_ + 16 * i] = own;
      }
      __syncwarp();  // values are written
#pragma unroll
      for (int i = 0; i < kMineX; ++i) {
        const Moved other = moved[__float_as_int(s_.steps[x_ + 16 * i].w)];
#pragma unroll
        for (int t = 0; t < kMovedTokens; ++t) m_[k + t][i] = other.v[t];
      }
      __syncwarp();  // and read
    }
  }
  // Rows of codes for CodePacker.
  __device__ __forceinline__ void put_codes(const Words& words) {
    __syncthreads();  // sums are read: the codes take their place
#pragma unroll
    for (int q = 0; q < kMineRows / 4; ++q) {
#pragma unroll
      for (int c = 0; c < kMineColumns; ++c) {
        if constexpr (kIsK) {
          s_.codes[(y_ + c / kNY * kParts + c % kNY * 16) * Shape::code_stride(kHeadDim) + 16 * q + x_] = words[q][c];
        } else if constexpr (kNY >= 4) {
          s_.codes[(x_ + 16 * c) * Shape::code_stride(kTokens) + 4 * q % kNY * 4 + y_ + 4 * q / kNY * kParts] = words[q][c];
        } else {
          uint32_t* const to = s_.codes + (x_ + 16 * c) * Shape::code_stride(kTokens) + y_ + 2 * q * kParts;
          to[0] = words[q][c];
          to[kParts] = words[q][c] >> 16;
        }
      }
    }
  }
};

}  // namespace kvarn::cuda
