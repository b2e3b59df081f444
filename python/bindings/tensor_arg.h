// Borrowed tensors: what any array library hands over through DLPack, never copied.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>

#include "dlpack.h"

namespace kvarn::python {

namespace nb = nanobind;

enum class Access { kRead, kWrite };

inline constexpr int kMaxDims = 8;

// The layout and address of one array argument; valid while the caller of the bound function holds the argument.
struct TensorArg {
  void* data = nullptr;  // never null once borrowed: an empty array points at a static byte
  dlpack::Device device{};
  dlpack::Dtype dtype{};
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in values; of a dimension of size 1, as if it were contiguous
  bool read_only = false;
  const dlpack::ExchangeApi* exchange = nullptr;  // of the array's type; null for most libraries
  nb::ndarray<> writable_owner;                   // keeps the exported view of libraries without an exchange table
  nb::ndarray<nb::ro> read_owner;

  int64_t size() const;
  int item_bytes() const { return dtype.bits * dtype.lanes / 8; }
  // True when the last `dims` dimensions are contiguous (row major); dimensions of size 1 and empty arrays do not matter.
  bool is_contiguous(int dims) const;
  // "bfloat16 [3, 32, 128] on cuda:0"
  std::string describe() const;
};

std::string dtype_name(dlpack::Dtype dtype);
std::string device_name(dlpack::Device device);
std::string list_of(const int64_t* values, int count);

// Fills `tensor` from `object`. Returns "" or the reason why the object cannot be borrowed, for "got ..." in a message.
std::string borrow(nb::handle object, Access access, TensorArg* tensor);

// Top-level module of the array's type: "torch", "cupy".
std::string library_of(nb::handle object);

// True when the array asks for gradients, which no operation here computes.
bool requires_grad(nb::handle object);

}  // namespace kvarn::python
