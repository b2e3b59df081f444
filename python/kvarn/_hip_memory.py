"""Arrays on an AMD GPU without torch, through the HIP runtime itself: for checks and timings where no ROCm build of torch is installed."""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvarn._dlpack import ROCM, Described, streams
from kvarn._errors import UnavailableError

_FILES = ("libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5", "libamdhip64.so")
_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3
_CAPTURE_OF_THIS_THREAD = 1


class HipRuntime:
    """The HIP runtime that the backend uses, for one device.

    Raises:
        UnavailableError: there is no runtime.
    """

    def __init__(self, device: int = 0) -> None:
        self.device = device
        # One that the process has loaded comes first, as in the backend: two runtimes know nothing of each other's streams.
        for mode, file in itertools.product((os.RTLD_NOLOAD, 0), _FILES):
            try:
                self._library = ctypes.CDLL(file, ctypes.DEFAULT_MODE | mode)
                self.file = file
                break
            except OSError:
                continue
        else:
            raise UnavailableError("[kvarn.hip] runtime: expected one of " + ", ".join(_FILES) + ", got none")
        self._library.hipGetErrorString.restype = ctypes.c_char_p
        self.synchronize()  # fails where there is no such device

    def call(self, function: str, *arguments: Any) -> None:
        """Calls a function that returns a hipError_t, with the device current. Raises RuntimeError unless it succeeds."""
        for name, given in (("hipSetDevice", (self.device,)), (function, arguments)):
            if error := getattr(self._library, name)(*given):
                raise RuntimeError(f"{name}: {self._library.hipGetErrorString(error).decode()}")

    def synchronize(self) -> None:
        """Waits for everything on the device."""
        self.call("hipDeviceSynchronize")

    def version(self) -> str:
        """Of the runtime, as "7.0.0"."""
        number = ctypes.c_int()
        self.call("hipRuntimeGetVersion", ctypes.byref(number))
        # Ten million of the major version, a hundred thousand of the minor one.
        return f"{number.value // 10_000_000}.{number.value // 100_000 % 100}.{number.value % 100_000}"

    def free_bytes(self) -> int:
        """Of the device's memory."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("hipMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """A function that repeats, as one graph, what `work` launches, which is not carried out now. Graphs live as long as the process."""
        stream, graph, executable = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        self.call("hipStreamCreate", ctypes.byref(stream))
        self.call("hipStreamBeginCapture", stream, _CAPTURE_OF_THIS_THREAD)
        streams[self.device] = int(stream.value or 0)
        try:
            work()
        except BaseException:
            del streams[self.device]
            self._library.hipStreamEndCapture(stream, ctypes.byref(graph))  # what it says matters less than what happened
            raise
        del streams[self.device]
        self.call("hipStreamEndCapture", stream, ctypes.byref(graph))
        self.call("hipGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        return lambda: self.call("hipGraphLaunch", executable, stream)


class HipArray(Described):
    """A contiguous array in device memory that kvarn.ops can borrow. Work on it goes to the null stream, or to one that captures.

    Args:
        runtime: of the device.
        host: what the array holds at first.
        bfloat16: the values, which are uint16, are bfloat16 numbers.
        shape, dtype: instead of `host`, of an array whose values are not defined yet.
    """

    def __init__(
        self,
        runtime: HipRuntime,
        host: NDArray[Any] | None = None,
        *,
        bfloat16: bool = False,
        shape: tuple[int, ...] = (),
        dtype: Any = np.uint8,
    ) -> None:
        self._runtime, self._pointer = runtime, ctypes.c_void_p()
        if host is not None:
            shape, dtype = host.shape, host.dtype
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        runtime.call("hipMalloc", ctypes.byref(self._pointer), ctypes.c_size_t(max(size, 16)))
        super().__init__(self._pointer.value, (ROCM, runtime.device), shape, dtype, bfloat16)
        if host is not None:
            self.write(host)

    def __del__(self) -> None:
        if getattr(self, "_pointer", None):
            self._runtime.call("hipFree", self._pointer)

    def _copy(self, to: Any, source: Any, size: int, kind: int) -> None:
        if size:
            self._runtime.call("hipMemcpy", to, source, ctypes.c_size_t(size), kind)

    def write(self, host: NDArray[Any], *, offset_bytes: int = 0) -> None:
        """Copies a host array to the device, to begin so many bytes behind this array's beginning."""
        host = np.ascontiguousarray(host)
        to = ctypes.c_void_p((self._pointer.value or 0) + offset_bytes)
        self._copy(to, host.ctypes.data_as(ctypes.c_void_p), host.nbytes, _HOST_TO_DEVICE)

    def copy_from(self, other: HipArray) -> None:
        """Copies an array of the same size on the device, on the null stream."""
        self._runtime.call("hipMemcpyAsync", self._pointer, other._pointer, ctypes.c_size_t(self.nbytes), _DEVICE_TO_DEVICE, None)

    def numpy(self, *, offset_bytes: int = 0, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
        """A host copy, of all or of `shape` values that begin so many bytes behind the beginning."""
        host = np.empty(self.shape if shape is None else shape, self.host_dtype)
        source = ctypes.c_void_p((self._pointer.value or 0) + offset_bytes)
        self._copy(host.ctypes.data_as(ctypes.c_void_p), source, host.nbytes, _DEVICE_TO_HOST)
        return host
