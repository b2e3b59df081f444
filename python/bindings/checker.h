// Checks of array arguments. Every refusal reads "[kvarn.<operation>] <argument>: expected <what>, got <what>".
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "plan.h"
#include "scalar_arg.h"
#include "tensor_arg.h"

namespace kvarn::python {

// Sets of element types.
enum Dtypes : unsigned { kF32 = 1, kF16 = 2, kBF16 = 4, kI32 = 8, kI64 = 16, kU8 = 32, kValues = kF32 | kF16 | kBF16 };

Dtypes dtypes_of(kvarn_dtype dtype);
// "float32|float16"
std::string names_of(unsigned dtypes);
// The C value of one of kValues.
kvarn_dtype value_dtype(const TensorArg& tensor);

// A dimension: a fixed size, or any size under a name that the message shows.
struct Dim {
  constexpr Dim(int64_t fixed) : size(fixed), name(nullptr) {}
  constexpr Dim(const char* any) : size(-1), name(any) {}
  int64_t size;
  const char* name;
};

struct Expected {
  unsigned dtypes;
  std::initializer_list<Dim> dims;
  int contiguous_dims = kMaxDims;  // how many trailing dimensions must be contiguous
  bool any_leading = false;        // any dimensions before `dims`
};

// The plan of an operation's first argument.
Plan& plan_arg(const char* operation, nb::handle object);

class Checker {
 public:
  Checker(const char* operation, const Plan& plan) : operation_(operation), plan_(plan) {}

  TensorArg read(const char* argument, nb::handle object, const Expected& expected) {
    return take(argument, object, Access::kRead, expected);
  }
  TensorArg write(const char* argument, nb::handle object, const Expected& expected) {
    return take(argument, object, Access::kWrite, expected);
  }

  // An array to write that the caller did not give: `empty` makes it in the library and on the device of `like`. With None for `empty` it
  // is refused. `dtype` is a name, or "" for that of `like`.
  nb::object allocate(const char* argument, nb::handle empty, nb::handle like, const std::vector<int64_t>& shape,
                      const std::string& dtype) const;

  bool flag(const char* argument, nb::handle object) const { return flag_arg({operation_, argument}, object); }
  float number(const char* argument, nb::handle object) const { return number_arg({operation_, argument}, object); }

  // Raise for something other than a single array.
  [[noreturn]] void fail_value(const char* argument, const std::string& expected, const std::string& got) const;
  [[noreturn]] void fail_type(const char* argument, const std::string& expected, const std::string& got) const;

  // The stream on which the arrays' library works now; null on the host.
  void* stream() const { return stream_; }

 private:
  TensorArg take(const char* argument, nb::handle object, Access access, const Expected& expected);
  void take_stream(const char* argument, nb::handle object, const TensorArg& tensor);
  std::string text(const Expected& expected) const;

  const char* operation_;
  const Plan& plan_;
  void* stream_ = nullptr;
  bool has_stream_ = false;
};

}  // namespace kvarn::python
