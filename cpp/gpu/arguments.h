// From the calls of the C interface to the arguments of the kernels; the same for every GPU backend.
#pragma once

#include <algorithm>

#include "attend.h"
#include "encode.h"
#include "gpu/plan.h"
#include "kvarn/kvarn.h"
#include "rows.h"

namespace kvarn::gpu {

using namespace kvarn::cuda;  // the kernels' arguments are declared beside the kernels

inline HadamardArgs hadamard_args(const PlanBase& plan, const kvarn_hadamard_params& p) {
  return {p.x, p.out, p.rows, p.dtype, p.inverse, plan.rotation};
}

inline AppendArgs append_args(const PlanBase& plan, const kvarn_append_params& p) {
  AppendArgs a{};
  a.k = p.k;
  a.v = p.v;
  a.k_token_stride = p.k_token_stride;
  a.k_head_stride = p.k_head_stride;
  a.v_token_stride = p.v_token_stride;
  a.v_head_stride = p.v_head_stride;
  a.slot_mapping = p.slot_mapping;
  a.num_tokens = p.num_tokens;
  a.staging = p.staging;
  a.num_slots = p.num_slots;
  a.num_kv_heads = plan.config.num_kv_heads;
  a.tile_tokens = plan.config.format.tile_tokens;
  a.dtype = plan.config.dtype;
  a.rotated = p.rotated;
  a.rotation = plan.rotation;
  return a;
}

inline EncodeArgs encode_args(const PlanBase& plan, const kvarn_encode_params& p) {
  const auto unbiased = [&](int bits) { return p.rounding == KVARN_UNBIASED || (p.rounding == KVARN_ROUNDING_AUTO && bits <= 3) ? 1 : 0; };
  EncodeArgs a{};
  a.staging = static_cast<const uint8_t*>(p.staging);
  a.records = p.records;
  a.slots = p.slots;
  a.blocks = p.blocks;
  a.staging_layer_stride = p.num_layers > 1 ? p.staging_layer_stride_bytes : 0;
  a.records_layer_stride = p.num_layers > 1 ? p.records_layer_stride_bytes : 0;
  a.num_slots = p.num_slots;
  a.num_blocks = p.num_blocks;
  a.num_kv_heads = plan.config.num_kv_heads;
  a.head_dim = plan.config.head_dim;
  a.tile_tokens = plan.config.format.tile_tokens;
  a.dtype = plan.config.dtype;
  a.published = p.normalisation == KVARN_PUBLISHED ? 1 : 0;
  a.unbiased_k = unbiased(plan.config.format.k_bits);
  a.unbiased_v = unbiased(plan.config.format.v_bits);
  a.k_feedback = p.k_feedback;
  a.v_feedback = p.v_feedback;
  a.layout = plan.layout;
  return a;
}

inline DecodeArgs decode_args(const PlanBase& plan, const kvarn_decode_params& p) {
  DecodeArgs a{};
  a.records = p.records;
  a.num_blocks = p.num_blocks;
  a.blocks = p.blocks;
  a.destinations = p.destinations;
  a.num_destinations = p.num_destinations;
  a.k = p.k;
  a.v = p.v;
  a.tile_stride = p.tile_stride;
  a.head_stride = p.head_stride;
  a.num_kv_heads = plan.config.num_kv_heads;
  a.dtype = p.dtype;
  a.rotated = p.rotated;
  a.layout = plan.layout;
  a.rotation = plan.rotation;
  return a;
}

// How the work is shared out among blocks (`block_rows` apart) is the backend's to fill in.
inline AttendArgs attend_args(PlanBase& plan, const kvarn_attend_params& p, int block_rows) {
  AttendArgs a{};
  a.q = p.q;
  a.out = p.out;
  a.q_token_stride = p.q_token_stride;
  a.q_head_stride = p.q_head_stride;
  a.out_token_stride = p.out_token_stride;
  a.out_head_stride = p.out_head_stride;
  a.lse = p.lse;
  a.cu_q_lens = p.cu_q_lens;
  a.seq_lens = p.seq_lens;
  a.block_table = p.block_table;
  a.block_table_stride = p.block_table_stride;
  a.max_tiles = static_cast<int>(std::min<int64_t>(p.block_table_stride, plan.max_tiles));
  a.records = p.records;
  a.staging = static_cast<const uint8_t*>(p.staging);
  a.alibi_slopes = p.alibi_slopes;
  a.sinks = p.sinks;
  a.partial_out = static_cast<float*>(p.workspace);
  a.partial_sums = reinterpret_cast<float2*>(a.partial_out + plan.slots * plan.max_block_rows * plan.config.head_dim);
  a.counters = plan.sets.of(p.workspace);
  a.block_rows = block_rows;
  a.run_tiles = plan.run_tiles;
  a.record_bytes = plan.layout.record_bytes;
  a.num_blocks = p.num_blocks;
  a.num_slots = p.num_slots;
  a.num_q_tokens = p.num_q_tokens;
  a.num_seqs = p.num_seqs;
  a.num_kv_heads = plan.config.num_kv_heads;
  a.group = plan.group;
  a.dtype = plan.config.dtype;
  a.head_dim = plan.config.head_dim;
  a.tile_tokens = plan.config.format.tile_tokens;
  a.softmax_scale = p.softmax_scale;
  a.soft_cap = p.logits_soft_cap;
  a.causal = p.causal;
  a.window = p.window;
  a.q_rotated = p.q_rotated;
  a.out_rotated = p.out_rotated;
  a.rotation = plan.rotation;
  a.k_bits = plan.config.format.k_bits;
  a.v_bits = plan.config.format.v_bits;
  a.v_offset = plan.layout.v_low_offset;
  a.metadata_offset = plan.layout.metadata_offset[kKScale];
  a.layout = plan.layout;
  return a;
}

}  // namespace kvarn::gpu
