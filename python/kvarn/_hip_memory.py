"""Arrays on an AMD GPU without torch, through the HIP runtime itself: for checks where no ROCm build of torch is installed."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvarn._errors import UnavailableError

_FILES = ("libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5", "libamdhip64.so")
_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2
_DLPACK_ROCM = 10
_DTYPE_CODES = {"i": 0, "u": 1, "f": 2}


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


def _null_stream(_type: int, _index: int, stream: Any) -> int:
    stream[0] = None
    return 0


_deleter = _Deleter(_nothing_to_delete)
_exchange = _ExchangeApi(1, 1, None, None, _ManagedOf(_managed), None, None, _StreamOf(_null_stream))
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
# A capsule keeps the address of its name.
_exchange_name = ctypes.create_string_buffer(b"dlpack_exchange_api")
_tensor_name = ctypes.create_string_buffer(b"dltensor_versioned")


class HipRuntime:
    """The HIP runtime that the backend uses, for one device.

    Raises:
        UnavailableError: there is no runtime.
    """

    def __init__(self, device: int = 0) -> None:
        self.device = device
        for file in _FILES:
            try:
                self._library = ctypes.CDLL(file)
                break
            except OSError:
                continue
        else:
            raise UnavailableError("[kvarn.hip] runtime: expected one of " + ", ".join(_FILES) + ", got none")
        self._library.hipGetErrorString.restype = ctypes.c_char_p
        self.call("hipSetDevice", device)

    def call(self, function: str, *arguments: Any) -> None:
        """Calls a function that returns a hipError_t. Raises RuntimeError unless it succeeds."""
        error = getattr(self._library, function)(*arguments)
        if error:
            raise RuntimeError(f"{function}: {self._library.hipGetErrorString(error).decode()}")

    def synchronize(self) -> None:
        """Waits for everything on the device."""
        self.call("hipDeviceSynchronize")


class HipArray:
    """A contiguous array in device memory that kvarn.ops can borrow. Work on it goes to the null stream.

    Args:
        runtime: of the device.
        host: what the array holds at first; numpy has no bfloat16, its bits as uint16 do.
        bfloat16: the values, which are uint16, are bfloat16 numbers.
    """

    __dlpack_c_exchange_api__ = _new_capsule(ctypes.addressof(_exchange), ctypes.addressof(_exchange_name), None)

    def __init__(self, runtime: HipRuntime, host: NDArray[Any], *, bfloat16: bool = False) -> None:
        host = np.ascontiguousarray(host)
        self._runtime = runtime
        self.shape, self.host_dtype, self.nbytes = host.shape, host.dtype, host.nbytes
        self._pointer = ctypes.c_void_p()
        runtime.call("hipMalloc", ctypes.byref(self._pointer), ctypes.c_size_t(max(host.nbytes, 16)))
        self.write(host)
        code, bits = (4, 16) if bfloat16 else (_DTYPE_CODES[host.dtype.kind], 8 * host.dtype.itemsize)
        self._shape = (ctypes.c_int64 * max(host.ndim, 1))(*host.shape)
        tensor = _Tensor(self._pointer, _Device(_DLPACK_ROCM, runtime.device), host.ndim, _Dtype(code, bits, 1), self._shape, None, 0)
        self.managed = _ManagedTensor(1, 1, None, _deleter, 0, tensor)

    def __del__(self) -> None:
        if getattr(self, "_pointer", None):
            self._runtime.call("hipFree", self._pointer)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_DLPACK_ROCM, self._runtime.device)

    def __dlpack__(self, **_options: Any) -> Any:
        return _new_capsule(ctypes.addressof(self.managed), ctypes.addressof(_tensor_name), None)

    def write(self, host: NDArray[Any]) -> None:
        """Copies a host array of the same size to the device."""
        host = np.ascontiguousarray(host)
        if host.nbytes:
            self._runtime.call(
                "hipMemcpy", self._pointer, host.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(host.nbytes), _HOST_TO_DEVICE
            )

    def numpy(self) -> NDArray[Any]:
        """A host copy."""
        host = np.empty(self.shape, self.host_dtype)
        if host.nbytes:
            self._runtime.call(
                "hipMemcpy", host.ctypes.data_as(ctypes.c_void_p), self._pointer, ctypes.c_size_t(host.nbytes), _DEVICE_TO_HOST
            )
        return host
