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
  const std::vector<int32_t> indices = {0, 1, 2, 3};
  std::vector<int64_t> mapping(kTiles * kTokens);
  for (size_t i = 0; i < mapping.size(); ++i) mapping[i] = static_cast<int64_t>(i);

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

  for (const std::string& isa : test::machine_isas()) {
    const auto plan = test::make_plan(format, kHeadDim, kHeads, KVARN_F16, isa, 3);
    // The first call is no exception.
    const int64_t before = g_allocations.load();
    kvarn_status statuses[8];
    for (int repeat = 0; repeat < 2; ++repeat) {
      statuses[4 * repeat] = kvarn_append(plan.get(), &append, nullptr);
      statuses[4 * repeat + 1] = kvarn_encode(plan.get(), &encode, nullptr);
      statuses[4 * repeat + 2] = kvarn_decode(plan.get(), &decode, nullptr);
      statuses[4 * repeat + 3] = kvarn_hadamard(plan.get(), &hadamard, nullptr);
    }
    EXPECT_EQ(g_allocations.load(), before) << isa;
    for (const kvarn_status status : statuses) EXPECT_EQ(status, KVARN_OK);
  }
}

}  // namespace
}  // namespace kvarn
