// Operations on a plan do not allocate.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "cpu_machine.h"

namespace {
std::atomic<int64_t> g_allocations{0};
}

void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  g_allocations.fetch_add(1);
  return std::malloc(bytes > 0 ? bytes : 1);
}
void* operator new(size_t bytes) {
  if (void* p = operator new(bytes, std::nothrow)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }

namespace kvarn {
namespace {

TEST(CpuAllocation, OperationsDoNotAllocate) {
  constexpr int kHeadDim = 112, kHeads = 2, kTokens = 32, kTiles = 4;
  const Format format{3, 2, kTokens, 16};
  const int64_t record_bytes = make_layout(format, kHeadDim).record_bytes;
  std::vector<uint16_t> staging(static_cast<size_t>(kTiles * slot_values(kHeads, kTokens, kHeadDim)), 0x3c00);
  std::vector<uint16_t> out(staging.size());
  std::vector<uint8_t> records(static_cast<size_t>(kTiles * kHeads * record_bytes));
  const std::vector<int32_t> indices = {2, 0, 3, 1};  // not rising, so that the check for repeated places has to look
  std::vector<int64_t> mapping(kTiles * kTokens);
  for (size_t i = 0; i < mapping.size(); ++i) mapping[i] = static_cast<int64_t>(mapping.size() - 1 - i);

  kvarn_append_params append{};
  KVARN_INIT(append);
  append.k = append.v = out.data();
  append.k_token_stride = append.v_token_stride = kHeads * kHeadDim;
  append.k_head_stride = append.v_head_stride = kHeadDim;
  append.slot_mapping = mapping.data();
  append.num_tokens = kTiles * kTokens;
  append.staging = staging.data();
  append.num_slots = kTiles;

  kvarn_encode_params encode{};
  KVARN_INIT(encode);
  encode.staging = staging.data();
  encode.num_slots = kTiles;
  encode.records = records.data();
  encode.num_blocks = kTiles;
  encode.num_layers = 1;
  encode.slots = encode.blocks = indices.data();
  encode.num_tiles = kTiles;

  kvarn_decode_params decode{};
  KVARN_INIT(decode);
  decode.records = records.data();
  decode.num_blocks = kTiles;
  decode.blocks = indices.data();
  decode.num_tiles = decode.num_destinations = kTiles;
  decode.k = out.data();
  decode.v = out.data() + out.size() / 2;
  decode.dtype = KVARN_F16;

  kvarn_hadamard_params hadamard{};
  KVARN_INIT(hadamard);
  hadamard.x = staging.data();
  hadamard.out = out.data();
  hadamard.rows = static_cast<int64_t>(out.size()) / kHeadDim;
  hadamard.dtype = KVARN_F16;

  // Two sequences: three encoded tiles and a staged one, and a staged one alone.
  constexpr int kQHeads = 3 * kHeads, kQTokens = 3;
  const std::vector<uint16_t> q(kQTokens * kQHeads * kHeadDim, 0x3c00);
  std::vector<uint16_t> attended(q.size());
  const int32_t cu_q_lens[] = {0, 2, 3}, seq_lens[] = {3 * kTokens + 5, 7};
  const int32_t table[] = {0, 1, 2, ~0, ~1, 0, 0, 0};
  kvarn_attend_params attend{};
  KVARN_INIT(attend);
  attend.q = q.data();
  attend.out = attended.data();
  attend.q_token_stride = attend.out_token_stride = kQHeads * kHeadDim;
  attend.q_head_stride = attend.out_head_stride = kHeadDim;
  attend.cu_q_lens = cu_q_lens;
  attend.seq_lens = seq_lens;
  attend.block_table = table;
  attend.block_table_stride = 4;
  attend.num_seqs = 2;
  attend.num_q_tokens = kQTokens;
  attend.records = records.data();
  attend.num_blocks = kTiles;
  attend.staging = staging.data();
  attend.num_slots = kTiles;
  attend.softmax_scale = 0.1f;
  attend.causal = 1;

  for (const std::string& isa : test::machine_isas()) {
    kvarn_plan_params params = test::plan_params(format, kHeadDim, kHeads, KVARN_F16, isa.c_str(), 3);
    params.num_q_heads = kQHeads;
    params.max_num_seqs = 2;
    params.max_q_tokens = kQTokens;
    params.max_tiles = 4;
    const auto plan = test::make_plan(params);
    attend.workspace_bytes = kvarn_plan_workspace_bytes(plan.get());
    std::vector<uint8_t> memory(static_cast<size_t>(attend.workspace_bytes) + 256);
    attend.workspace = memory.data() + (256 - reinterpret_cast<uintptr_t>(memory.data()) % 256) % 256;
    // The first call is no exception.
    const int64_t before = g_allocations.load();
    kvarn_status statuses[10];
    for (int repeat = 0; repeat < 2; ++repeat) {
      statuses[5 * repeat] = kvarn_append(plan.get(), &append, nullptr);
      statuses[5 * repeat + 1] = kvarn_encode(plan.get(), &encode, nullptr);
      statuses[5 * repeat + 2] = kvarn_decode(plan.get(), &decode, nullptr);
      statuses[5 * repeat + 3] = kvarn_hadamard(plan.get(), &hadamard, nullptr);
      statuses[5 * repeat + 4] = kvarn_attend(plan.get(), &attend, nullptr);
    }
    EXPECT_EQ(g_allocations.load(), before) << isa;
    for (const kvarn_status status : statuses) EXPECT_EQ(status, KVARN_OK);
  }
}

}  // namespace
}  // namespace kvarn
