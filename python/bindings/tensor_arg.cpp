#include "tensor_arg.h"

#include <nanobind/stl/string.h>

#include <cstring>
#include <unordered_map>

#include "scalar_arg.h"

namespace kvarn::python {
namespace {

// What is known about a type of arrays. Looked up once per type, because attribute look-ups cost more than borrowing itself.
struct TypeTraits {
  const dlpack::ExchangeApi* exchange = nullptr;
  bool has_requires_grad = false;
  bool has_is_neg = false;
  bool has_mask = false;
};

const dlpack::ExchangeApi* find_exchange(nb::handle type) {
  nb::object capsule = nb::getattr(type, "__dlpack_c_exchange_api__", nb::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto* header = static_cast<dlpack::ExchangeHeader*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (header && header->version.major != 1) header = header->previous;
  return reinterpret_cast<const dlpack::ExchangeApi*>(header);
}

// The GIL guards the table. Types are kept alive so that an address never names a second type.
const TypeTraits& traits_of(nb::handle object) {
  static auto* table = new std::unordered_map<PyTypeObject*, TypeTraits>;
  PyTypeObject* type = Py_TYPE(object.ptr());
  auto found = table->find(type);
  if (found != table->end()) return found->second;
  nb::handle handle(reinterpret_cast<PyObject*>(type));
  TypeTraits traits;
  traits.exchange = find_exchange(handle);
  traits.has_requires_grad = nb::hasattr(handle, "requires_grad");
  traits.has_is_neg = nb::hasattr(handle, "is_neg");
  traits.has_mask = nb::hasattr(handle, "mask") && nb::hasattr(handle, "fill_value");
  handle.inc_ref();
  return table->emplace(type, traits).first->second;
}

// The first line of the pending Python exception, which is cleared.
std::string take_error() {
  PyObject *type = nullptr, *value = nullptr, *trace = nullptr;
  PyErr_Fetch(&type, &value, &trace);
  nb::object owned_type = nb::steal(type), owned_value = nb::steal(value), owned_trace = nb::steal(trace);
  if (!owned_value.is_valid()) return "unknown error";
  PyObject* text = PyObject_Str(owned_value.ptr());
  if (!text) {
    PyErr_Clear();
    return "unknown error";
  }
  const std::string lines = nb::cast<std::string>(nb::steal(text));
  return lines.substr(0, lines.find('\n'));
}

template <class Borrowed>
void fill(const Borrowed& source, TensorArg* tensor) {
  tensor->data = source.data ? static_cast<char*>(source.data) + source.byte_offset : nullptr;
  tensor->ndim = source.ndim;
  int64_t contiguous = 1;
  for (int i = source.ndim - 1; i >= 0; --i) {
    tensor->shape[i] = source.shape[i];
    tensor->strides[i] = source.strides ? source.strides[i] : contiguous;
    contiguous *= source.shape[i];
  }
}

// numpy has no bfloat16 of its own: ml_dtypes registers one that DLPack cannot name. The same bytes as uint16 can be borrowed.
bool borrow_ml_bfloat16(nb::handle object, Access access, TensorArg* tensor) {
  try {
    nb::object dtype = nb::getattr(object, "dtype", nb::none());
    nb::object name = nb::getattr(dtype, "name", nb::none());
    if (!nb::isinstance<nb::str>(name) || nb::cast<std::string>(name) != "bfloat16") return false;
    nb::object bits = object.attr("view")("uint16");
    if (!borrow(bits, access, tensor).empty()) return false;
  } catch (const nb::python_error&) {
    return false;
  }
  tensor->dtype = {dlpack::kBfloat, 16, 1};
  return true;
}

// Through __dlpack__ or the buffer protocol. A read-only source refuses the writable import.
bool borrow_managed(nb::handle object, Access access, TensorArg* tensor) {
  // max_ndim of the import is above kMaxDims
  const auto take = [&](const auto& array) {
    if (array.ndim() > static_cast<size_t>(kMaxDims)) return false;
    tensor->data = const_cast<void*>(static_cast<const void*>(array.data()));
    tensor->device = {array.device_type(), array.device_id()};
    tensor->dtype = {array.dtype().code, array.dtype().bits, array.dtype().lanes};
    tensor->ndim = static_cast<int>(array.ndim());
    for (int i = 0; i < tensor->ndim; ++i) {
      tensor->shape[i] = static_cast<int64_t>(array.shape(static_cast<size_t>(i)));
      tensor->strides[i] = array.stride(static_cast<size_t>(i));
    }
    return true;
  };
  if (access == Access::kWrite && nb::try_cast(object, tensor->writable_owner, false)) return take(tensor->writable_owner);
  if (!nb::try_cast(object, tensor->read_owner, false)) return false;
  tensor->read_only = access == Access::kWrite;
  return take(tensor->read_owner);
}

}  // namespace

int64_t TensorArg::size() const {
  int64_t product = 1;
  for (int i = 0; i < ndim; ++i) product *= shape[i];
  return product;
}

bool TensorArg::is_contiguous(int dims) const {
  if (size() == 0) return true;
  int64_t expected = 1;
  for (int i = ndim - 1; i >= ndim - dims && i >= 0; --i) {
    if (shape[i] != 1 && strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

std::string TensorArg::describe() const { return dtype_name(dtype) + " " + list_of(shape, ndim) + " on " + device_name(device); }

std::string dtype_name(dlpack::Dtype dtype) {
  std::string name;
  switch (dtype.code) {
    case dlpack::kInt:
      name = "int" + std::to_string(dtype.bits);
      break;
    case dlpack::kUInt:
      name = "uint" + std::to_string(dtype.bits);
      break;
    case dlpack::kFloat:
      name = "float" + std::to_string(dtype.bits);
      break;
    case dlpack::kBfloat:
      name = "bfloat" + std::to_string(dtype.bits);
      break;
    case dlpack::kComplex:
      name = "complex" + std::to_string(dtype.bits);
      break;
    case dlpack::kBool:
      name = "bool";
      break;
    default:
      name = "dtype(code " + std::to_string(dtype.code) + ", " + std::to_string(dtype.bits) + " bits)";
  }
  return dtype.lanes == 1 ? name : name + "x" + std::to_string(dtype.lanes);
}

std::string device_name(dlpack::Device device) {
  const std::string index = ":" + std::to_string(device.index);
  switch (device.type) {
    case dlpack::kCpu:
    case dlpack::kCudaHost:
    case dlpack::kRocmHost:
      return "cpu";
    case dlpack::kCuda:
    case dlpack::kCudaManaged:
      return "cuda" + index;
    case dlpack::kRocm:
      return "rocm" + index;
    default:
      return "DLPack device type " + std::to_string(device.type) + index;
  }
}

std::string list_of(const int64_t* values, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

std::string library_of(nb::handle object) {
  const nb::handle type(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())));
  const std::string module = nb::cast<std::string>(nb::str(nb::getattr(type, "__module__", nb::str("builtins"))));
  return module.substr(0, module.find('.'));
}

bool requires_grad(nb::handle object) {
  return traits_of(object).has_requires_grad && nb::cast<bool>(nb::object(nb::getattr(object, "requires_grad")));
}

std::string borrow(nb::handle object, Access access, TensorArg* tensor) {
  alignas(256) static char empty[256];
  const TypeTraits& traits = traits_of(object);
  tensor->exchange = traits.exchange;
  if (traits.has_mask) return type_text(object) + ", whose mask would be lost; pass its filled() or its data";
  // The table cannot say whether an array may be written. Tensors of torch, which have requires_grad, always may.
  const bool direct = traits.exchange && traits.exchange->borrow && (access == Access::kRead || traits.has_requires_grad);
  if (direct) {
    dlpack::Tensor source{};
    if (traits.exchange->borrow(object.ptr(), &source) != 0) return type_text(object) + " (" + take_error() + ")";
    if (source.ndim > kMaxDims) return type_text(object) + " of " + std::to_string(source.ndim) + " dimensions";
    fill(source, tensor);
    tensor->device = source.device;
    tensor->dtype = source.dtype;
  } else if (!borrow_managed(object, access, tensor) && !borrow_ml_bfloat16(object, access, tensor)) {
    std::string name = type_text(object);
    nb::object dtype = nb::getattr(object, "dtype", nb::none());
    nb::object text = dtype.is_none() ? nb::object() : nb::steal(PyObject_Str(dtype.ptr()));
    if (!text.is_valid()) {
      PyErr_Clear();
      return name;
    }
    return name + " of dtype " + nb::cast<std::string>(text) + " that DLPack cannot lend";
  }
  // A view of torch that stands for the values with the other sign, which DLPack does not tell.
  if (traits.has_is_neg && nb::cast<bool>(object.attr("is_neg")()))
    return type_text(object) + " with a pending negation; pass its resolve_neg()";
  // Nothing is reached through the stride of a single index; libraries put anything there.
  for (int i = tensor->ndim - 1; i >= 0; --i) {
    if (tensor->shape[i] <= 1) tensor->strides[i] = i + 1 < tensor->ndim ? tensor->strides[i + 1] * tensor->shape[i + 1] : 1;
  }
  if (tensor->data == nullptr) {
    if (tensor->size() != 0)
      return "a " + type_text(object) + " without memory (a fake, meta or wrapper tensor; models call torch.ops.kvarn)";
    tensor->data = empty;
  }
  return "";
}

}  // namespace kvarn::python
