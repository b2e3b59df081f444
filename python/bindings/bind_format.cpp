// Format names, record layouts, the authors' layout.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "errors.h"
#include "kvarn/kvarn.h"
#include "module.h"
#include "scalar_arg.h"
#include "tensor_arg.h"

namespace nb = nanobind;

namespace kvarn::python {
namespace {

using FormatTuple = std::tuple<int32_t, int32_t, int32_t, int32_t>;
using Bytes = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;

kvarn_format from_tuple(const FormatTuple& f) { return {std::get<0>(f), std::get<1>(f), std::get<2>(f), std::get<3>(f)}; }

FormatTuple parse(nb::handle name) {
  const std::string text = text_arg({"format_parse", "name"}, name, "the name of a format, such as k4v2_g128");
  kvarn_format f{};
  check_status(kvarn_format_parse(text.c_str(), &f));
  return {f.k_bits, f.v_bits, f.tile_tokens, f.metadata_bits};
}

std::string name_of(const FormatTuple& format) {
  char name[32];
  check_status(kvarn_format_name(from_tuple(format), name, sizeof(name)));
  return name;
}

kvarn_record_layout record_layout(const char* operation, const FormatTuple& format, nb::handle head_dim) {
  kvarn_record_layout layout{};
  check_status(kvarn_record_layout_of(from_tuple(format), integer_arg<int32_t>({operation, "head_dim"}, head_dim), &layout));
  return layout;
}

nb::dict layout_of(const FormatTuple& format, nb::handle head_dim) {
  const kvarn_record_layout r = record_layout("record_layout", format, head_dim);
  nb::dict d;
  d["record_bytes"] = r.record_bytes;
  d["k_low_offset"] = r.k_low_offset;
  d["k_low_bytes"] = r.k_low_bytes;
  d["k_high_offset"] = r.k_high_offset;
  d["k_high_bytes"] = r.k_high_bytes;
  d["v_low_offset"] = r.v_low_offset;
  d["v_low_bytes"] = r.v_low_bytes;
  d["v_high_offset"] = r.v_high_offset;
  d["v_high_bytes"] = r.v_high_bytes;
  d["metadata_offset"] = nb::tuple(nb::cast(std::vector<int64_t>(r.metadata_offset, r.metadata_offset + 6)));
  d["metadata_count"] = nb::tuple(nb::cast(std::vector<int64_t>(r.metadata_count, r.metadata_count + 6)));
  d["metadata_range_offset"] = r.metadata_range_offset;
  return d;
}

TensorArg read_bytes(const char* operation, const char* argument, nb::handle object) {
  TensorArg bytes;
  const std::string prefix = std::string("[kvarn.") + operation + "] " + argument + ": expected contiguous uint8 [N] on cpu, got ";
  if (std::string problem = borrow(object, Access::kRead, &bytes); !problem.empty()) raise("ArgumentTypeError", prefix + problem);
  if (bytes.dtype.code != dlpack::kUInt || bytes.dtype.bits != 8) raise("ArgumentTypeError", prefix + bytes.describe());
  if (bytes.ndim != 1 || bytes.device.type != dlpack::kCpu || !bytes.is_contiguous(1))
    raise("InvalidArgumentError", prefix + bytes.describe());
  return bytes;
}

Bytes make_bytes(int64_t count) {
  auto* data = new uint8_t[static_cast<size_t>(count)]();
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
  return Bytes(data, {static_cast<size_t>(count)}, owner);
}

int64_t published_bytes(const FormatTuple& format, nb::handle head_dim_object) {
  const auto head_dim = integer_arg<int32_t>({"published", "head_dim"}, head_dim_object);
  const int64_t bytes = kvarn_published_bytes(from_tuple(format), head_dim);
  if (bytes < 0) {
    raise("UnsupportedError", "[kvarn.published] format: expected widths 2, 4 or 8, 16-bit metadata and a supported head_dim, got " +
                                  name_of(format) + " with head_dim " + std::to_string(head_dim));
  }
  return bytes;
}

Bytes import_published(const FormatTuple& format, nb::handle head_dim, nb::handle published) {
  const TensorArg source = read_bytes("import_published", "published", published);
  const kvarn_record_layout layout = record_layout("import_published", format, head_dim);
  Bytes record = make_bytes(layout.record_bytes);
  check_status(kvarn_import_published(from_tuple(format), nb::cast<int32_t>(head_dim), static_cast<const uint8_t*>(source.data),
                                      source.size(), record.data(), layout.record_bytes));
  return record;
}

Bytes export_published(const FormatTuple& format, nb::handle head_dim, nb::handle record) {
  const TensorArg source = read_bytes("export_published", "record", record);
  const int64_t bytes = published_bytes(format, head_dim);
  Bytes published = make_bytes(bytes);
  check_status(kvarn_export_published(from_tuple(format), nb::cast<int32_t>(head_dim), static_cast<const uint8_t*>(source.data),
                                      source.size(), published.data(), bytes));
  return published;
}

}  // namespace

void bind_format(nb::module_& m) {
  m.def("format_parse", &parse, nb::arg("name").none(), "(k_bits, v_bits, tile_tokens, metadata_bits) of a format name.");
  m.def("format_name", &name_of, nb::arg("format"), "Name of (k_bits, v_bits, tile_tokens, metadata_bits).");
  m.def("record_layout", &layout_of, nb::arg("format"), nb::arg("head_dim").none(),
        nb::sig("def record_layout(format: tuple[int, int, int, int], head_dim: int) -> dict[str, typing.Any]"),
        "Offsets of one record in bytes, by field name.");
  m.def("published_bytes", &published_bytes, nb::arg("format"), nb::arg("head_dim").none(), "Bytes of one record in the authors' layout.");
  m.def("import_published", &import_published, nb::arg("format"), nb::arg("head_dim").none(), nb::arg("published").none(),
        "uint8 [record_bytes] of uint8 [published_bytes].");
  m.def("export_published", &export_published, nb::arg("format"), nb::arg("head_dim").none(), nb::arg("record").none(),
        "uint8 [published_bytes] of uint8 [record_bytes].");
}

}  // namespace kvarn::python
