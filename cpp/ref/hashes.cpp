// The generator of golden inputs, CRC-32 and SHA-256 (FIPS 180-4).
#include <array>
#include <bit>
#include <cstdint>
#include <string>
#include <vector>

#include "ref/ref.h"

namespace kvarn::ref {

uint64_t Generator::next() {
  state_ += 0x9e3779b97f4a7c15u;
  uint64_t z = state_;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

float Generator::next_value() {
  const uint64_t z = next();
  const int sum = static_cast<int>((z & 255) + (z >> 8 & 255) + (z >> 16 & 255) + (z >> 24 & 255));
  return static_cast<float>(sum - 510) / 256.0f;
}

uint32_t crc32(const void* data, size_t bytes) {
  const auto* at = static_cast<const uint8_t*>(data);
  uint32_t crc = 0xffffffffu;
  for (size_t i = 0; i < bytes; ++i) {
    crc ^= at[i];
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0u);
  }
  return ~crc;
}

namespace {

// The first 32 bits of the fractional part of the `root`-th root of a prime, by bisection on integers.
uint32_t root_fraction(uint64_t prime, int root) {
  // The largest r with r^root <= prime * 2^(32 * root); r has at most 37 bits.
  uint64_t low = 0;
  uint64_t high = uint64_t{1} << 40;
  using Wide = unsigned __int128;
  while (high - low > 1) {
    const uint64_t middle = low + (high - low) / 2;
    // Compare middle^root with prime << 32*root without overflow: middle^2 <= (prime << 96) / middle for cubes.
    const bool fits = root == 2 ? Wide{middle} * middle <= Wide{prime} << 64 : Wide{middle} * middle <= (Wide{prime} << 96) / middle;
    (fits ? low : high) = middle;
  }
  return static_cast<uint32_t>(low);
}

std::vector<uint64_t> primes(int count) {
  std::vector<uint64_t> found;
  for (uint64_t n = 2; static_cast<int>(found.size()) < count; ++n) {
    bool prime = true;
    for (const uint64_t p : found) prime = prime && n % p != 0;
    if (prime) found.push_back(n);
  }
  return found;
}

}  // namespace

std::string sha256(const void* data, size_t bytes) {
  const std::vector<uint64_t> first = primes(64);
  std::array<uint32_t, 64> round_constants;
  std::array<uint32_t, 8> state;
  for (int i = 0; i < 64; ++i) round_constants[i] = root_fraction(first[i], 3);
  for (int i = 0; i < 8; ++i) state[i] = root_fraction(first[i], 2);

  const auto* source = static_cast<const uint8_t*>(data);
  std::vector<uint8_t> message(source, source + bytes);
  message.push_back(0x80);
  while (message.size() % 64 != 56) message.push_back(0);
  for (int shift = 56; shift >= 0; shift -= 8) message.push_back(static_cast<uint8_t>(static_cast<uint64_t>(bytes) * 8 >> shift));

  for (size_t block = 0; block < message.size(); block += 64) {
    std::array<uint32_t, 64> w{};
    for (int i = 0; i < 16; ++i) {
      for (int b = 0; b < 4; ++b) w[i] = w[i] << 8 | message[block + 4 * i + b];
    }
    for (int i = 16; i < 64; ++i) {
      const uint32_t s0 = std::rotr(w[i - 15], 7) ^ std::rotr(w[i - 15], 18) ^ w[i - 15] >> 3;
      const uint32_t s1 = std::rotr(w[i - 2], 17) ^ std::rotr(w[i - 2], 19) ^ w[i - 2] >> 10;
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    auto [a, b, c, d, e, f, g, h] = state;
    for (int i = 0; i < 64; ++i) {
      const uint32_t s1 = std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25);
      const uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + round_constants[i] + w[i];
      const uint32_t s0 = std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22);
      const uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
      h = g;
      g = f;
      f = e;
      e = d + t1;
      d = c;
      c = b;
      b = a;
      a = t1 + t2;
    }
    const std::array<uint32_t, 8> added = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; ++i) state[i] += added[i];
  }
  std::string hex;
  for (const uint32_t word : state) {
    for (int shift = 28; shift >= 0; shift -= 4) hex += "0123456789abcdef"[word >> shift & 15];
  }
  return hex;
}

}  // namespace kvarn::ref
