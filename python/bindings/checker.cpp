#include "checker.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

namespace kvarn::python {
namespace {

struct NamedDtype {
  Dtypes set;
  const char* name;
  uint8_t code, bits;
};

constexpr std::array<NamedDtype, 6> kDtypes = {{{kF32, "float32", dlpack::kFloat, 32},
                                                {kF16, "float16", dlpack::kFloat, 16},
                                                {kBF16, "bfloat16", dlpack::kBfloat, 16},
                                                {kI32, "int32", dlpack::kInt, 32},
                                                {kI64, "int64", dlpack::kInt, 64},
                                                {kU8, "uint8", dlpack::kUInt, 8}}};

unsigned set_of(dlpack::Dtype dtype) {
  for (const NamedDtype& known : kDtypes) {
    if (dtype.code == known.code && dtype.bits == known.bits && dtype.lanes == 1) return known.set;
  }
  return 0;
}

std::string memory_name(Memory memory, int32_t device) {
  if (memory == Memory::kHost) return "cpu";
  return (memory == Memory::kCuda ? "cuda:" : "rocm:") + std::to_string(device);
}

bool lives_in(const TensorArg& tensor, Memory memory, int32_t device) {
  const int32_t type = tensor.device.type;
  if (memory == Memory::kHost) return type == dlpack::kCpu || type == dlpack::kCudaHost || type == dlpack::kRocmHost;
  if (tensor.device.index != device) return false;
  return memory == Memory::kCuda ? type == dlpack::kCuda || type == dlpack::kCudaManaged : type == dlpack::kRocm;
}

bool has_shape(const TensorArg& tensor, const Expected& expected) {
  const int dims = static_cast<int>(expected.dims.size());
  if (expected.any_leading ? tensor.ndim < dims : tensor.ndim != dims) return false;
  const int64_t* shape = tensor.shape + (tensor.ndim - dims);
  return std::all_of(expected.dims.begin(), expected.dims.end(), [&](const Dim& dim) {
    const int64_t size = *shape++;
    return dim.size < 0 || dim.size == size;
  });
}

// True when two indices of the array can name the same byte.
bool overlaps_itself(const TensorArg& tensor) {
  if (tensor.is_contiguous(tensor.ndim)) return false;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int i = 0; i < tensor.ndim; ++i) {
    if (tensor.shape[i] != 1) dims.emplace_back(tensor.strides[i], tensor.shape[i]);
  }
  // From the smallest stride up, each dimension must step over everything inside it.
  std::sort(dims.begin(), dims.end());
  int64_t extent = 1;
  for (const auto& [stride, size] : dims) {
    if (stride < extent) return true;
    extent += stride * (size - 1);
  }
  return false;
}

}  // namespace

std::string names_of(unsigned dtypes) {
  std::string names;
  for (const NamedDtype& known : kDtypes) {
    if (dtypes & known.set) names += (names.empty() ? "" : "|") + std::string(known.name);
  }
  return names;
}

Dtypes dtypes_of(kvarn_dtype dtype) { return dtype == KVARN_F32 ? kF32 : dtype == KVARN_F16 ? kF16 : kBF16; }

kvarn_dtype value_dtype(const TensorArg& tensor) {
  const unsigned set = set_of(tensor.dtype);
  return set == kF32 ? KVARN_F32 : set == kF16 ? KVARN_F16 : KVARN_BF16;
}

std::string Checker::text(const Expected& expected) const {
  std::string dims = expected.any_leading ? "..." : "";
  for (const Dim& dim : expected.dims)
    dims += (dims.empty() ? "" : ", ") + (dim.size < 0 ? std::string(dim.name) : std::to_string(dim.size));
  return names_of(expected.dtypes) + " [" + dims + "] on " + memory_name(plan_.memory, plan_.device);
}

Plan& plan_arg(const char* operation, nb::handle object) {
  Plan* plan = nullptr;
  if (nb::isinstance<Plan>(object) && nb::try_cast(object, plan, false) && plan != nullptr) return *plan;
  raise("ArgumentTypeError", std::string("[kvarn.") + operation + "] plan: expected a kvarn.Plan, got " + type_text(object));
}

nb::object Checker::allocate(const char* argument, nb::handle empty, nb::handle like, const std::vector<int64_t>& shape,
                             const std::string& dtype) const {
  if (empty.is_none()) fail_type(argument, "an array to write", "None");
  nb::list sizes;
  for (const int64_t size : shape) sizes.append(size);
  const nb::object type = dtype.empty() ? nb::none() : nb::object(nb::str(dtype.c_str()));
  return empty(operation_, argument, like, nb::tuple(sizes), type);
}

void Checker::fail_value(const char* argument, const std::string& expected, const std::string& got) const {
  raise("InvalidArgumentError", std::string("[kvarn.") + operation_ + "] " + argument + ": expected " + expected + ", got " + got);
}

void Checker::fail_type(const char* argument, const std::string& expected, const std::string& got) const {
  raise("ArgumentTypeError", std::string("[kvarn.") + operation_ + "] " + argument + ": expected " + expected + ", got " + got);
}

void Checker::take_stream(const char* argument, nb::handle object, const TensorArg& tensor) {
  if (plan_.memory == Memory::kHost || has_stream_) return;
  if (tensor.exchange && tensor.exchange->current_work_stream) {
    if (tensor.exchange->current_work_stream(tensor.device.type, tensor.device.index, &stream_) != 0) throw nb::python_error();
  } else {
    const nb::object stream = nb::module_::import_("kvarn._streams").attr("current_stream")(library_of(object), tensor.device.index);
    if (stream.is_none()) {
      fail_type(argument, "an array of torch or cupy, or of a type with __dlpack_c_exchange_api__, which names the stream to work on",
                tensor.describe() + " of " + library_of(object));
    }
    stream_ = reinterpret_cast<void*>(nb::cast<uintptr_t>(stream));
  }
  has_stream_ = true;
}

TensorArg Checker::take(const char* argument, nb::handle object, Access access, const Expected& expected) {
  TensorArg tensor;
  if (std::string problem = borrow(object, access, &tensor); !problem.empty()) fail_type(argument, text(expected), problem);
  if (requires_grad(object)) fail_type(argument, text(expected), tensor.describe() + " that requires grad; pass " + argument + ".detach()");
  if (!(set_of(tensor.dtype) & expected.dtypes)) fail_type(argument, text(expected), tensor.describe());
  if (!has_shape(tensor, expected) || !lives_in(tensor, plan_.memory, plan_.device))
    fail_value(argument, text(expected), tensor.describe());
  // Text is made on failure only: it costs more than the checks.
  const auto strides = [&] { return tensor.describe() + " with strides " + list_of(tensor.strides, tensor.ndim); };
  if (!tensor.is_contiguous(std::min(expected.contiguous_dims, tensor.ndim))) {
    const int dims = expected.contiguous_dims;
    const std::string which = dims >= tensor.ndim ? "contiguous"
                              : dims == 1         ? "with a contiguous last dimension"
                                                  : "with " + std::to_string(dims) + " contiguous last dimensions";
    fail_value(argument, text(expected) + ", " + which, strides());
  }
  if (access == Access::kWrite) {
    if (tensor.read_only) fail_value(argument, text(expected) + ", writable", tensor.describe() + ", read-only");
    if (overlaps_itself(tensor)) fail_value(argument, text(expected) + ", every value at an address of its own", strides());
  }
  if (reinterpret_cast<uintptr_t>(tensor.data) % static_cast<uintptr_t>(tensor.item_bytes()) != 0) {
    fail_value(argument, text(expected) + ", aligned to its values", tensor.describe() + " at an odd address");
  }
  take_stream(argument, object, tensor);
  return tensor;
}

}  // namespace kvarn::python
