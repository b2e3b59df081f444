// Generated tiles and the hashes of their records. docs/FORMAT.md quotes them; every backend must reproduce them.
#pragma once

#include <cstdint>
#include <vector>

#include "kvarn/kvarn.h"
#include "ref/ref.h"

namespace kvarn::test {

// One head's staging values (rotated frame, exact in fp16): K [tokens][head_dim], then V. Some tokens and channels stand out.
struct GoldenTile {
  std::vector<float> k, v;
};
inline GoldenTile golden_tile(uint64_t seed, int tokens, int head_dim) {
  ref::Generator generator(seed);
  GoldenTile tile;
  for (std::vector<float>* values : {&tile.k, &tile.v}) {
    for (int t = 0; t < tokens; ++t) {
      for (int d = 0; d < head_dim; ++d) {
        float x = generator.next_value();
        if (t % 37 == 5) x *= 16;
        if (d % 29 == 3) x *= 4;
        values->push_back(values == &tile.v ? x / 8 : x);
      }
    }
  }
  return tile;
}

struct GoldenRecord {
  const char* format;
  int head_dim;
  int normalisation, rounding;
  uint64_t seed;
  uint32_t crc32;
  const char* sha256;
};

inline constexpr GoldenRecord kGoldenRecords[] = {
#include "golden_records.inc"
};

}  // namespace kvarn::test
