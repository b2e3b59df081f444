// Reader of tests/golden/published; the layout is described in tests/golden/convert_published.py.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "kvarn/kvarn.h"
#include "ref/ref.h"

namespace kvarn::test {

inline std::vector<uint8_t> read_file(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("cannot read " + path.string());
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

// Takes little-endian arrays off the front of a file. The tests run on little-endian machines only.
class ByteReader {
 public:
  explicit ByteReader(std::vector<uint8_t> bytes) : bytes_(std::move(bytes)) {}
  template <class T>
  std::vector<T> take(size_t count) {
    std::vector<T> out(count);
    if (at_ + count * sizeof(T) > bytes_.size()) throw std::runtime_error("the file is too short");
    std::memcpy(out.data(), bytes_.data() + at_, count * sizeof(T));
    at_ += count * sizeof(T);
    return out;
  }
  std::vector<float> take_f16(size_t count) {
    const std::vector<uint16_t> halves = take<uint16_t>(count);
    std::vector<float> out(count);
    for (size_t i = 0; i < count; ++i) out[i] = ref::f16_to_f32(halves[i]);
    return out;
  }
  bool at_end() const { return at_ == bytes_.size(); }

 private:
  std::vector<uint8_t> bytes_;
  size_t at_ = 0;
};

struct PublishedVector {
  std::string name;
  int tiles, tokens, head_dim, rows, stride;  // tokens of one tile; rows of q
  Format format;
  std::vector<float> k, v;                  // [tiles][tokens][head_dim], not rotated
  std::vector<uint8_t> published;           // [tiles][published_bytes]
  std::vector<float> k_dequant, v_dequant;  // [tiles][tokens / stride][head_dim], rotated back
  std::vector<float> q, attention, lse;     // [rows][head_dim], [rows][head_dim], [rows]

  kvarn_format c_format() const { return {format.k_bits, format.v_bits, format.tile_tokens, format.metadata_bits}; }
  int64_t published_bytes() const { return kvarn_published_bytes(c_format(), head_dim); }
  // The tile's K or V in the rotated frame, as fp16 staging would hold it before rounding.
  std::vector<float> rotated(const std::vector<float>& values, int tile) const {
    const size_t size = static_cast<size_t>(tokens) * head_dim;
    std::vector<float> out(values.begin() + static_cast<ptrdiff_t>(tile * size),
                           values.begin() + static_cast<ptrdiff_t>((tile + 1) * size));
    for (int t = 0; t < tokens; ++t) ref::hadamard(out.data() + t * head_dim, head_dim, false);
    return out;
  }
};

inline PublishedVector read_published(const std::filesystem::path& path) {
  ByteReader in(read_file(path));
  PublishedVector p;
  p.name = path.stem().string();
  const std::vector<int32_t> header = in.take<int32_t>(8);
  if (std::memcmp(header.data(), "KVGV", 4) != 0) throw std::runtime_error("not a golden vector: " + path.string());
  p.tiles = header[1];
  p.tokens = header[2];
  p.head_dim = header[3];
  p.format = Format{header[4], header[5], p.tokens, 16};
  p.rows = header[6];
  p.stride = header[7];
  const size_t values = static_cast<size_t>(p.tiles) * p.tokens * p.head_dim;
  p.k = in.take_f16(values);
  p.v = in.take_f16(values);
  p.published = in.take<uint8_t>(static_cast<size_t>(p.tiles * p.published_bytes()));
  p.k_dequant = in.take_f16(values / p.stride);
  p.v_dequant = in.take_f16(values / p.stride);
  p.q = in.take_f16(static_cast<size_t>(p.rows) * p.head_dim);
  p.attention = in.take<float>(static_cast<size_t>(p.rows) * p.head_dim);
  p.lse = in.take<float>(p.rows);
  if (!in.at_end()) throw std::runtime_error("bytes are left over in " + path.string());
  return p;
}

// The sixteen golden vectors, by name.
inline constexpr std::array kPublishedVectors = {"k2v2_g128_d128_both",
                                                 "k2v2_g128_d128_token_outliers",
                                                 "k4v2_g128_d128_both",
                                                 "k4v2_g128_d128_channel_outliers",
                                                 "k4v2_g128_d128_constant_channel",
                                                 "k4v2_g128_d128_gaussian",
                                                 "k4v2_g128_d128_small",
                                                 "k4v2_g128_d128_token_outliers",
                                                 "k4v2_g128_d256_both",
                                                 "k4v2_g128_d256_token_outliers",
                                                 "k4v2_g128_d64_both",
                                                 "k4v2_g128_d64_token_outliers",
                                                 "k4v2_g64_d128_both",
                                                 "k4v2_g64_d128_token_outliers",
                                                 "k4v4_g128_d128_both",
                                                 "k4v4_g128_d128_token_outliers"};

}  // namespace kvarn::test
