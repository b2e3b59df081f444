// What every GPU backend refuses before it launches: addresses and sizes that its kernels are not made for.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>

#include "core/backend.h"

namespace kvarn::gpu {

inline const HostServices* g_host = nullptr;

__attribute__((format(printf, 2, 3))) inline kvarn_status fail(kvarn_status status, const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return g_host->fail(status, text);
}

constexpr int64_t kPointerAlignment = 16;  // of records, and of staging where it is read 16 bytes at a time
constexpr int64_t kMostBlocks = INT32_MAX;
constexpr int kMostGridZ = 65535;

inline kvarn_status check_aligned(const char* operation, const char* argument, const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % kPointerAlignment == 0) return KVARN_OK;
  return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] %s: expected an address aligned to %lld bytes, got %p", operation, argument,
              static_cast<long long>(kPointerAlignment), p);
}

#define KVARN_TRY(expression)                                                                    \
  do {                                                                                           \
    if (const kvarn_status try_status = (expression); try_status != KVARN_OK) return try_status; \
  } while (false)

inline kvarn_status check_encode(const kvarn_config& config, const kvarn_encode_params& p) {
  KVARN_TRY(check_aligned("encode", "records", p.records));
  if (p.num_layers > 1 && p.records_layer_stride_bytes % kPointerAlignment != 0) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.encode] records_layer_stride_bytes: expected a multiple of %lld, got %lld",
                static_cast<long long>(kPointerAlignment), static_cast<long long>(p.records_layer_stride_bytes));
  }
  const int64_t tiles = p.num_tiles * config.num_kv_heads;
  if (tiles > kMostBlocks || p.num_layers > kMostGridZ) {
    return fail(KVARN_UNSUPPORTED,
                "[kvarn.encode] num_tiles, num_layers: expected at most %lld tiles of one head and %d layers, got %lld and %d",
                static_cast<long long>(kMostBlocks), kMostGridZ, static_cast<long long>(tiles), p.num_layers);
  }
  return KVARN_OK;
}

inline kvarn_status check_decode(const kvarn_config& config, const kvarn_decode_params& p) {
  KVARN_TRY(check_aligned("decode", "records", p.records));
  const int64_t tiles = p.num_tiles * config.num_kv_heads;
  if (tiles > kMostBlocks) {
    return fail(KVARN_UNSUPPORTED, "[kvarn.decode] num_tiles: expected at most %lld tiles of one head, got %lld",
                static_cast<long long>(kMostBlocks), static_cast<long long>(tiles));
  }
  return KVARN_OK;
}

inline kvarn_status check_attend(const kvarn_attend_params& p) {
  KVARN_TRY(check_aligned("attend", "records", p.records));
  return check_aligned("attend", "staging", p.staging);
}

}  // namespace kvarn::gpu
