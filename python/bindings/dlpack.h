// The parts of the DLPack 1.x C ABI that borrowing a tensor needs: github.com/dmlc/dlpack, dlpack.h.
#pragma once

#include <cstdint>

namespace kvarn::python::dlpack {

// DLDeviceType
enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kRocm = 10, kRocmHost = 11, kCudaManaged = 13 };

// DLDataTypeCode
enum DtypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct Device {
  int32_t type;
  int32_t index;
};

struct Dtype {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

// DLTensor. Strides are in values; null means contiguous.
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  Dtype dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
static_assert(sizeof(Tensor) == 48 || sizeof(void*) != 8);

struct Version {
  uint32_t major;
  uint32_t minor;
};

// DLPackExchangeAPIHeader
struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;
};

// DLPackExchangeAPI, major version 1. Functions that fail return non-zero with a Python exception set.
struct ExchangeApi {
  ExchangeHeader header;
  int (*allocate)(Tensor*, void**, void*, void (*)(void*, const char*, const char*));
  int (*managed_from_object)(void*, void**);
  int (*managed_to_object)(void*, void**);
  int (*borrow)(void* object, Tensor* tensor);  // valid until control returns to the object's owner; may be null
  int (*current_work_stream)(int32_t device_type, int32_t device_index, void** stream);
};

}  // namespace kvarn::python::dlpack
