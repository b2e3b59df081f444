// Conversion between a record and the tile layout of the method's authors. Codes and scales are copied, never rounded.
#include <cstring>

#include "core/format.h"
#include "core/status.h"
#include "kvarn/format.h"
#include "kvarn/kvarn.h"

namespace kvarn {
namespace {

// Their code arrays: [rows][codes * bits / 8], value i of a row at bit i * bits, least significant bit first.
int packed_code(const uint8_t* row, int i, int bits) { return row[i * bits / 8] >> (i * bits % 8) & ((1 << bits) - 1); }
void set_packed_code(uint8_t* row, int i, int bits, int code) {
  row[i * bits / 8] = static_cast<uint8_t>(row[i * bits / 8] | code << (i * bits % 8));
}

// One plane suffices: the published layout exists for widths of 2, 4 and 8 bits.
int plane_code(const uint8_t* bytes, const Plane& plane, int row, int i) {
  const int shift = code_shift(i, plane.bits);
  return bytes[plane.word_offset(row, code_word(i, plane.bits)) + shift / 8] >> shift % 8 & ((1 << plane.bits) - 1);
}
void set_plane_code(uint8_t* bytes, const Plane& plane, int row, int i, int code) {
  const int shift = code_shift(i, plane.bits);
  uint8_t& byte = bytes[plane.word_offset(row, code_word(i, plane.bits)) + shift / 8];
  byte = static_cast<uint8_t>(byte | code << shift % 8);
}

bool has_published_layout(const Format& f) {
  const auto packs = [](int bits) { return bits == 2 || bits == 4 || bits == 8; };
  return is_supported_format(f) && packs(f.k_bits) && packs(f.v_bits) && f.metadata_bits == 16;
}

// Their arrays are transposed against ours: K [channels][tokens], V [tokens][channels].
struct PublishedLayout {
  int64_t k_row_bytes, v_row_bytes, v_offset, metadata_offset, metadata_bytes, bytes;
};
PublishedLayout published_layout(const Format& f, int head_dim) {
  PublishedLayout p{};
  p.k_row_bytes = f.tile_tokens * f.k_bits / 8;
  p.v_row_bytes = head_dim * f.v_bits / 8;
  p.v_offset = head_dim * p.k_row_bytes;
  p.metadata_offset = p.v_offset + f.tile_tokens * p.v_row_bytes;
  p.metadata_bytes = 2 * 3 * (head_dim + f.tile_tokens);
  p.bytes = p.metadata_offset + p.metadata_bytes;
  return p;
}

kvarn_status check(const char* operation, const kvarn_format& format, int32_t head_dim, const void* published, int64_t published_bytes,
                   const void* record, int64_t record_bytes) {
  if (const kvarn_status status = check_format(operation, format); status != KVARN_OK) return status;
  if (const kvarn_status status = check_head_dim(operation, head_dim); status != KVARN_OK) return status;
  const Format f = to_format(format);
  if (!has_published_layout(f)) {
    return fail(KVARN_UNSUPPORTED, "[kvarn.%s] format: expected widths of 2, 4 or 8 bits and 16-bit metadata, got %s", operation,
                format_name(format).c_str());
  }
  if (published == nullptr || record == nullptr) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] %s: expected a pointer, got NULL", operation,
                published == nullptr ? "published" : "record");
  }
  const int64_t expected_published = published_layout(f, head_dim).bytes;
  if (published_bytes != expected_published) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] published_bytes: expected %lld, got %lld", operation,
                static_cast<long long>(expected_published), static_cast<long long>(published_bytes));
  }
  const int64_t expected_record = make_layout(f, head_dim).record_bytes;
  if (record_bytes != expected_record) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] record_bytes: expected %lld, got %lld", operation,
                static_cast<long long>(expected_record), static_cast<long long>(record_bytes));
  }
  return KVARN_OK;
}

}  // namespace
}  // namespace kvarn

using kvarn::Format;
using kvarn::PublishedLayout;
using kvarn::RecordLayout;

int64_t kvarn_published_bytes(kvarn_format format, int32_t head_dim) {
  const Format f = kvarn::to_format(format);
  if (!kvarn::has_published_layout(f) || !kvarn::is_supported_head_dim(head_dim)) return -1;
  return kvarn::published_layout(f, head_dim).bytes;
}

kvarn_status kvarn_import_published(kvarn_format format, int32_t head_dim, const uint8_t* published, int64_t published_bytes,
                                    uint8_t* record, int64_t record_bytes) {
  const Format f = kvarn::to_format(format);
  const kvarn_status status = kvarn::check("import_published", format, head_dim, published, published_bytes, record, record_bytes);
  if (status != KVARN_OK) return status;
  const PublishedLayout p = kvarn::published_layout(f, head_dim);
  const RecordLayout r = kvarn::make_layout(f, head_dim);
  std::memset(record, 0, static_cast<size_t>(record_bytes));
  for (int d = 0; d < head_dim; ++d) {
    for (int t = 0; t < f.tile_tokens; ++t) {
      const int k = kvarn::packed_code(published + d * p.k_row_bytes, t, f.k_bits);
      const int v = kvarn::packed_code(published + p.v_offset + t * p.v_row_bytes, d, f.v_bits);
      kvarn::set_plane_code(record + r.k_low_offset, r.k_low, t, d, k);
      kvarn::set_plane_code(record + r.v_low_offset, r.v_low, d, t, v);
    }
  }
  // The same six vectors in the same order.
  std::memcpy(record + r.metadata_offset[kvarn::kKScale], published + p.metadata_offset, static_cast<size_t>(p.metadata_bytes));
  return KVARN_OK;
}

kvarn_status kvarn_export_published(kvarn_format format, int32_t head_dim, const uint8_t* record, int64_t record_bytes, uint8_t* published,
                                    int64_t published_bytes) {
  const Format f = kvarn::to_format(format);
  const kvarn_status status = kvarn::check("export_published", format, head_dim, published, published_bytes, record, record_bytes);
  if (status != KVARN_OK) return status;
  const PublishedLayout p = kvarn::published_layout(f, head_dim);
  const RecordLayout r = kvarn::make_layout(f, head_dim);
  std::memset(published, 0, static_cast<size_t>(published_bytes));
  for (int d = 0; d < head_dim; ++d) {
    for (int t = 0; t < f.tile_tokens; ++t) {
      kvarn::set_packed_code(published + d * p.k_row_bytes, t, f.k_bits, kvarn::plane_code(record + r.k_low_offset, r.k_low, t, d));
      kvarn::set_packed_code(published + p.v_offset + t * p.v_row_bytes, d, f.v_bits,
                             kvarn::plane_code(record + r.v_low_offset, r.v_low, d, t));
    }
  }
  std::memcpy(published + p.metadata_offset, record + r.metadata_offset[kvarn::kKScale], static_cast<size_t>(p.metadata_bytes));
  return KVARN_OK;
}
