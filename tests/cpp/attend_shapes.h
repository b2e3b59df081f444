// Cases of attention that every backend is tested on. `check(case, params, what)` compares one call with the oracle.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "attend_case.h"
#include "cpu_machine.h"

namespace kvarn::test {

inline std::string name_of(const AttendShape& s) {
  return "k" + std::to_string(s.format.k_bits) + "v" + std::to_string(s.format.v_bits) + "_g" + std::to_string(s.format.tile_tokens) +
         (s.format.metadata_bits == 8 ? "_m8" : "") + " head_dim " + std::to_string(s.head_dim) + " group " + std::to_string(s.group) +
         " dtype " + std::to_string(s.dtype);
}

template <class Check>
void check_shape(const AttendShape& shape, const Check& check) {
  AttendCase c(shape);
  check(c, c.params(), name_of(shape));
}

constexpr int kAttendGroups[] = {1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 33, 64, 71};

// The widths, the dtypes, 8-bit metadata and the groups take turns.
template <class Check>
void check_every_head_dim_and_tile_length(const Check& check) {
  int i = 0;
  for (const int head_dim : kHeadDims) {
    for (const int tokens : kTileTokens) {
      AttendShape shape;
      shape.format = {kWidths[i % 6], kWidths[(i / 6 + i) % 6], tokens, i % 5 == 0 ? 8 : 16};
      shape.head_dim = head_dim;
      shape.kv_heads = 1 + i % 2;
      shape.group = 1 + i % 4;
      shape.dtype = i % 3;
      shape.seq_lens = {3 * tokens + 7, tokens};
      shape.q_lens = {2, 1};
      shape.seed = static_cast<uint32_t>(++i);
      check_shape(shape, check);
    }
  }
}

template <class Check>
void check_odd_lengths_in_one_batch(AttendShape shape, const Check& check) {
  shape.seq_lens = {0, 1, 127, 128, 129, 255, 256, 257, 5, 700, 64};
  shape.q_lens = {1, 1, 1, 1, 1, 2, 0, 4, 5, 1, 64};
  check_shape(shape, check);
}

template <class Check>
void check_queries_longer_than_the_sequence(AttendShape shape, const Check& check) {
  shape.seq_lens = {0, 3, 130};
  shape.q_lens = {2, 5, 140};
  AttendCase c(shape);
  kvarn_attend_params p = c.params();
  check(c, p, "causal");
  p.causal = 0;
  check(c, p, "not causal");
}

template <class Check>
void check_long_queries(const Check& check) {
  AttendShape shape;
  shape.kv_heads = 1;
  shape.group = 3;
  shape.seq_lens = {333, 190, 40};
  shape.q_lens = {200, 190, 33};
  AttendCase c(shape);
  kvarn_attend_params p = c.params();
  check(c, p, "causal");
  p.window = 50;
  check(c, p, "window");
  p.causal = 0;
  check(c, p, "window, not causal");
  p.window = 0;
  check(c, p, "not causal");
}

// Every combination of window, soft cap, ALiBi, sinks and causality.
template <class Check>
void check_every_option(int tile_tokens, const Check& check) {
  AttendShape shape;
  shape.format = {4, 2, tile_tokens, 16};
  shape.group = 4;
  shape.seq_lens = {700, 65, 300, 0};
  shape.q_lens = {3, 1, 20, 1};
  shape.q_size = 2;
  std::vector<float> slopes, sinks;
  for (int h = 0; h < shape.q_heads(); ++h) {
    slopes.push_back(std::exp2(-1.0f - static_cast<float>(h)));
    sinks.push_back(static_cast<float>(h % 5) * 2 - 3);
  }
  AttendCase c(shape);
  for (int options = 0; options < 16; ++options) {
    for (const int causal : {0, 1}) {
      kvarn_attend_params p = c.params();
      p.causal = causal;
      std::string what = causal ? "causal" : "full";
      if (options & 1) p.window = 100, what += " window";
      if (options & 2) p.logits_soft_cap = 3, what += " cap";
      if (options & 4) p.alibi_slopes = slopes.data(), what += " alibi";
      if (options & 8) p.sinks = sinks.data(), what += " sinks";
      check(c, p, what);
    }
  }
}

template <class Check>
void check_strides_and_rotated_frames(const Check& check) {
  for (const int head_dim : {96, 128}) {
    for (const int dtype : {KVARN_F32, KVARN_F16, KVARN_BF16}) {
      AttendShape shape;
      shape.head_dim = head_dim;
      shape.dtype = dtype;
      shape.stride_padding = 24;
      shape.q_lens = {5};
      AttendCase c(shape);
      for (int frames = 0; frames < 4; ++frames) {
        kvarn_attend_params p = c.params();
        p.q_rotated = frames & 1;
        p.out_rotated = frames >> 1;
        check(c, p, "frames " + std::to_string(frames) + " " + name_of(shape));
      }
    }
  }
}

// Scores of every size, up to a softmax that is all but one-hot.
template <class Check>
void check_large_scores(const Check& check) {
  for (const double q_size : {0.0, 0.1, 3.0, 10.0, 30.0, 100.0}) {
    for (const int k_bits : {2, 4, 8}) {
      AttendShape shape;
      shape.format.k_bits = k_bits;
      shape.seq_lens = {600};
      shape.q_lens = {8};
      shape.q_size = q_size;
      shape.sink_tiles = 0;
      AttendCase c(shape);
      check(c, c.params(), "q of size " + std::to_string(q_size) + ", K bits " + std::to_string(k_bits));
    }
  }
}

}  // namespace kvarn::test
