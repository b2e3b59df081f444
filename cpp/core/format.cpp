#include "core/format.h"

#include <cstdio>
#include <cstring>

#include "core/status.h"

namespace kvarn {
namespace {

// Reads a number without sign, leading zeros or white space; at most three digits, which is more than any field has.
bool read_number(const char*& at, int32_t& value) {
  if (*at < '1' || *at > '9') return false;
  value = 0;
  for (int digits = 0; *at >= '0' && *at <= '9'; ++at) {
    if (++digits > 3) return false;
    value = value * 10 + (*at - '0');
  }
  return true;
}

bool read_word(const char*& at, const char* word) {
  const size_t length = std::strlen(word);
  if (std::strncmp(at, word, length) != 0) return false;
  at += length;
  return true;
}

bool read_format(const char* at, kvarn_format& f) {
  if (!read_word(at, "k") || !read_number(at, f.k_bits)) return false;
  if (!read_word(at, "v") || !read_number(at, f.v_bits)) return false;
  if (!read_word(at, "_g") || !read_number(at, f.tile_tokens)) return false;
  f.metadata_bits = read_word(at, "_m8") ? 8 : 16;
  return *at == '\0';
}

}  // namespace

kvarn_status check_format(const char* operation, const kvarn_format& f) {
  const struct {
    const char* field;
    int32_t bits;
  } widths[] = {{"k_bits", f.k_bits}, {"v_bits", f.v_bits}};
  for (const auto& width : widths) {
    if (!is_supported_width(width.bits)) {
      return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] format.%s: expected 2, 3, 4, 5, 6 or 8, got %d", operation, width.field, width.bits);
    }
  }
  if (!is_supported_tile_tokens(f.tile_tokens)) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] format.tile_tokens: expected 32, 64, 128 or 256, got %d", operation, f.tile_tokens);
  }
  if (f.metadata_bits != 16 && f.metadata_bits != 8) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] format.metadata_bits: expected 16 or 8, got %d", operation, f.metadata_bits);
  }
  return KVARN_OK;
}

kvarn_status check_head_dim(const char* operation, int64_t head_dim) {
  if (head_dim < 0 || head_dim > kMaxHeadDim || !is_supported_head_dim(static_cast<int>(head_dim))) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] head_dim: expected 64, 80, 96, 112, 128, 160, 192, 256 or 512, got %lld", operation,
                static_cast<long long>(head_dim));
  }
  return KVARN_OK;
}

std::string format_name(const kvarn_format& f) {
  char name[64];
  std::snprintf(name, sizeof name, "k%dv%d_g%d%s", f.k_bits, f.v_bits, f.tile_tokens, f.metadata_bits == 8 ? "_m8" : "");
  return name;
}

}  // namespace kvarn

extern "C" {

kvarn_status kvarn_format_parse(const char* name, kvarn_format* format) {
  using kvarn::fail;
  if (name == nullptr) return fail(KVARN_INVALID_ARGUMENT, "[kvarn.format_parse] name: expected a string, got NULL");
  if (format == nullptr) return fail(KVARN_INVALID_ARGUMENT, "[kvarn.format_parse] format: expected a pointer, got NULL");
  kvarn_format parsed{};
  if (!kvarn::read_format(name, parsed)) {
    return fail(KVARN_INVALID_ARGUMENT,
                "[kvarn.format_parse] name: expected \"k<bits>v<bits>_g<tile tokens>\" with an optional \"_m8\", such as \"k4v2_g128\", "
                "got \"%.64s\"",
                name);
  }
  if (const kvarn_status status = kvarn::check_format("format_parse", parsed); status != KVARN_OK) return status;
  *format = parsed;
  return KVARN_OK;
}

kvarn_status kvarn_format_name(kvarn_format format, char* name, size_t capacity) {
  using kvarn::fail;
  if (name == nullptr) return fail(KVARN_INVALID_ARGUMENT, "[kvarn.format_name] name: expected a pointer, got NULL");
  if (const kvarn_status status = kvarn::check_format("format_name", format); status != KVARN_OK) return status;
  const std::string text = kvarn::format_name(format);
  if (capacity <= text.size()) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.format_name] capacity: expected at least %zu bytes, got %zu", text.size() + 1, capacity);
  }
  std::memcpy(name, text.c_str(), text.size() + 1);
  return KVARN_OK;
}

kvarn_status kvarn_record_layout_of(kvarn_format format, int32_t head_dim, kvarn_record_layout* layout) {
  using kvarn::fail;
  if (layout == nullptr) return fail(KVARN_INVALID_ARGUMENT, "[kvarn.record_layout_of] layout: expected a pointer, got NULL");
  if (const kvarn_status status = kvarn::check_format("record_layout_of", format); status != KVARN_OK) return status;
  if (const kvarn_status status = kvarn::check_head_dim("record_layout_of", head_dim); status != KVARN_OK) return status;
  const kvarn::RecordLayout r = kvarn::make_layout(kvarn::to_format(format), head_dim);
  *layout = kvarn_record_layout{};
  layout->record_bytes = r.record_bytes;
  layout->k_low_offset = r.k_low_offset;
  layout->k_low_bytes = r.k_low.bytes;
  layout->k_high_offset = r.k_high_offset;
  layout->k_high_bytes = r.k_high.bytes;
  layout->v_low_offset = r.v_low_offset;
  layout->v_low_bytes = r.v_low.bytes;
  layout->v_high_offset = r.v_high_offset;
  layout->v_high_bytes = r.v_high.bytes;
  for (int i = 0; i < kvarn::kMetadataCount; ++i) {
    layout->metadata_offset[i] = r.metadata_offset[i];
    layout->metadata_count[i] = r.metadata_count[i];
  }
  layout->metadata_range_offset = r.metadata_range_offset;
  return KVARN_OK;
}

}  // extern "C"
