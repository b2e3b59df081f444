"""Memory as DLPack describes it, for arrays that need no library: on an AMD GPU without torch, bfloat16 without ml_dtypes."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

CPU, ROCM = 1, 10  # kinds of devices
_DTYPE_CODES = {"i": 0, "u": 1, "f": 2}
_BFLOAT16 = 4
#: The stream that work on a device's arrays goes to, by the device's index; the null stream where there is none.
streams: dict[int, int] = {}


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("index", ctypes.c_int32))


class _Dtype(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Dtype),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)


class _ManagedTensor(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", _Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_ManagedOf = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(ctypes.c_void_p))
_StreamOf = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))


class _ExchangeApi(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("managed_from_object", _ManagedOf),
        ("managed_to_object", ctypes.c_void_p),
        ("borrow", ctypes.c_void_p),
        ("current_work_stream", _StreamOf),
    )


def _nothing_to_delete(_managed: Any) -> None:
    # The memory belongs to the array, which the borrower's caller holds.
    pass


def _managed(array: Any, managed: Any) -> int:
    managed[0] = ctypes.addressof(array.managed)
    return 0


def _current_stream(_type: int, index: int, stream: Any) -> int:
    stream[0] = streams.get(index)
    return 0


_deleter = _Deleter(_nothing_to_delete)
_exchange = _ExchangeApi(1, 1, None, None, _ManagedOf(_managed), None, None, _StreamOf(_current_stream))
# A function object of its own: the attributes of ctypes.pythonapi's are everybody's.
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(("PyCapsule_New", ctypes.pythonapi))
# A capsule keeps the address of its name.
_exchange_name = ctypes.create_string_buffer(b"dlpack_exchange_api")
_tensor_name = ctypes.create_string_buffer(b"dltensor_versioned")


class Described:
    """A contiguous array that kvarn.ops can borrow, in memory that the derived class holds.

    Args:
        pointer: its address.
        device: CPU or ROCM, and the index.
        shape, dtype: numpy's; numpy has no bfloat16, its bits as uint16 do.
        bfloat16: the values, which are uint16, are bfloat16 numbers.
    """

    __dlpack_c_exchange_api__ = _new_capsule(ctypes.addressof(_exchange), ctypes.addressof(_exchange_name), None)

    def __init__(self, pointer: int | None, device: tuple[int, int], shape: tuple[int, ...], dtype: Any, bfloat16: bool) -> None:
        self.shape, self.host_dtype = tuple(shape), np.dtype(dtype)
        self.nbytes = int(np.prod(self.shape, dtype=np.int64)) * self.host_dtype.itemsize
        code = _BFLOAT16 if bfloat16 else _DTYPE_CODES[self.host_dtype.kind]
        self._device = device
        self._shape = (ctypes.c_int64 * max(len(self.shape), 1))(*self.shape)
        kind = _Dtype(code, 8 * self.host_dtype.itemsize, 1)
        tensor = _Tensor(pointer, _Device(*device), len(self.shape), kind, self._shape, None, 0)
        self.managed = _ManagedTensor(1, 1, None, _deleter, 0, tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, **_options: Any) -> Any:
        return _new_capsule(ctypes.addressof(self.managed), ctypes.addressof(_tensor_name), None)


class HostArray(Described):
    """Host memory of a numpy array, which it keeps; bfloat16 numbers as their bits."""

    def __init__(self, host: NDArray[Any], *, bfloat16: bool = False) -> None:
        self.host = np.ascontiguousarray(host)
        super().__init__(self.host.ctypes.data, (CPU, 0), self.host.shape, self.host.dtype, bfloat16)
