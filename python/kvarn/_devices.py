"""Where ``kvarn doctor`` and ``kvarn bench`` keep arrays: numpy on the host, HIP's own memory on an AMD GPU, torch on a CUDA device."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvarn._backends import backends
from kvarn._dlpack import HostArray
from kvarn._errors import UnavailableError

#: numpy's types of K and V; bfloat16 numbers are their bits.
HOST_DTYPES = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}


def to_bits(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """float32 values rounded to an element type; to bfloat16 towards zero, as its bits."""
    if dtype == "bfloat16":
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(HOST_DTYPES[dtype])


def to_float(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """The inverse of `to_bits`."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float32)


class Device(ABC):
    """One device that a backend runs on.

    Arrays are described by numpy's shape and dtype; `dtype` "bfloat16" makes uint16 values bfloat16 numbers.
    """

    backend: str
    index: int = 0
    asynchronous = True

    @abstractmethod
    def put(self, host: NDArray[Any], dtype: str = "") -> Any:
        """A copy of a host array."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: Any, kind: str = "") -> Any:
        """An array whose values are not defined; `kind` as `dtype` of `put`."""

    @abstractmethod
    def get(self, array: Any) -> NDArray[Any]:
        """A host copy, when all work on the array is done."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits for all work."""

    @abstractmethod
    def copy(self, target: Any, source: Any) -> None:
        """Copies an array on the device to one of the same size there."""

    @abstractmethod
    def part(self, array: Any, first: int, count: int) -> NDArray[Any]:
        """A host copy of rows [first, first + count) of an array."""

    @abstractmethod
    def set_part(self, array: Any, first: int, host: NDArray[Any]) -> None:
        """Overwrites rows from `first` on."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Of memory."""

    @abstractmethod
    def facts(self) -> dict[str, str]:
        """What the device and its runtime are, by name."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None] | None:
        """A function that repeats as a graph what `work` launches; None: the backend has no graphs."""
        return None


class HostDevice(Device):
    """The CPU."""

    backend, asynchronous = "cpu", False

    def put(self, host: NDArray[Any], dtype: str = "") -> Any:
        return HostArray(host.copy(), bfloat16=True) if dtype == "bfloat16" else np.array(host, order="C")

    def empty(self, shape: tuple[int, ...], dtype: Any, kind: str = "") -> Any:
        array = np.empty(shape, dtype)
        return HostArray(array, bfloat16=True) if kind == "bfloat16" else array

    def get(self, array: Any) -> NDArray[Any]:
        return self._values(array).copy()

    def synchronize(self) -> None:
        pass

    def copy(self, target: Any, source: Any) -> None:
        np.copyto(self._values(target), self._values(source))

    def part(self, array: Any, first: int, count: int) -> NDArray[Any]:
        return self._values(array)[first : first + count].copy()

    def set_part(self, array: Any, first: int, host: NDArray[Any]) -> None:
        self._values(array)[first : first + len(host)] = host

    def free_bytes(self) -> int:
        for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
        return 0

    def facts(self) -> dict[str, str]:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return {"device": names[0] if names else "unknown processor"}

    @staticmethod
    def _values(array: Any) -> NDArray[Any]:
        values: NDArray[Any] = array.host if isinstance(array, HostArray) else array
        return values


class HipDevice(Device):
    """An AMD GPU, whose memory is taken from the HIP runtime: torch is not needed."""

    backend = "hip"

    def __init__(self, index: int) -> None:
        from kvarn._hip_memory import HipRuntime

        self.index = index
        self._runtime = HipRuntime(index)

    def put(self, host: NDArray[Any], dtype: str = "") -> Any:
        from kvarn._hip_memory import HipArray

        return HipArray(self._runtime, host, bfloat16=dtype == "bfloat16")

    def empty(self, shape: tuple[int, ...], dtype: Any, kind: str = "") -> Any:
        from kvarn._hip_memory import HipArray

        return HipArray(self._runtime, shape=shape, dtype=dtype, bfloat16=kind == "bfloat16")

    def get(self, array: Any) -> NDArray[Any]:
        # hipMemcpy waits for the null stream, but not for the one of a graph.
        self.synchronize()
        values: NDArray[Any] = array.numpy()
        return values

    def synchronize(self) -> None:
        self._runtime.synchronize()

    def copy(self, target: Any, source: Any) -> None:
        target.copy_from(source)

    def part(self, array: Any, first: int, count: int) -> NDArray[Any]:
        self.synchronize()
        row_bytes = array.nbytes // array.shape[0]
        values: NDArray[Any] = array.numpy(offset_bytes=first * row_bytes, shape=(count, *array.shape[1:]))
        return values

    def set_part(self, array: Any, first: int, host: NDArray[Any]) -> None:
        array.write(host, offset_bytes=first * (array.nbytes // array.shape[0]))

    def free_bytes(self) -> int:
        return self._runtime.free_bytes()

    def facts(self) -> dict[str, str]:
        return {"runtime": f"HIP {self._runtime.version()} ({self._runtime.file})"}

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return self._runtime.capture(work)


class TorchDevice(Device):
    """A CUDA device, whose memory is torch's."""

    backend = "cuda"

    def __init__(self, index: int) -> None:
        self._torch: Any = importlib.import_module("torch")
        self.index = index
        self._device = f"cuda:{index}"
        self._torch.cuda.set_device(index)

    def _typed(self, tensor: Any, dtype: str) -> Any:
        return tensor.view(self._torch.bfloat16) if dtype == "bfloat16" else tensor

    def put(self, host: NDArray[Any], dtype: str = "") -> Any:
        return self._typed(self._torch.from_numpy(np.array(host, order="C")).to(self._device), dtype)

    def empty(self, shape: tuple[int, ...], dtype: Any, kind: str = "") -> Any:
        typed = getattr(self._torch, np.dtype(dtype).name)
        return self._typed(self._torch.empty(shape, dtype=typed, device=self._device), kind)

    def get(self, array: Any) -> NDArray[Any]:
        self.synchronize()
        values: NDArray[Any] = (array.view(self._torch.uint16) if array.dtype == self._torch.bfloat16 else array).cpu().numpy()
        return values

    def synchronize(self) -> None:
        self._torch.cuda.synchronize(self.index)

    def copy(self, target: Any, source: Any) -> None:
        target.copy_(source)

    def part(self, array: Any, first: int, count: int) -> NDArray[Any]:
        return self.get(array[first : first + count])

    def set_part(self, array: Any, first: int, host: NDArray[Any]) -> None:
        array[first : first + len(host)] = self.put(host)

    def free_bytes(self) -> int:
        return int(self._torch.cuda.mem_get_info(self.index)[0])

    def facts(self) -> dict[str, str]:
        major, minor = self._torch.cuda.get_device_capability(self.index)
        name = f"{self._torch.cuda.get_device_name(self.index)} (compute capability {major}.{minor})"
        return {"device": name, "runtime": f"CUDA {self._torch.version.cuda} of torch {self._torch.__version__}"}

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(graph):
            work()
        replay: Callable[[], None] = graph.replay
        return replay


def open_device(operation: str, backend: str, index: int = 0) -> Device:
    """The device of a backend.

    Raises:
        UnavailableError: the backend cannot run here; the message says why, and tells a missing runtime, a missing device and a missing
            torch (for CUDA) apart.
    """
    info = next((info for info in backends() if info.name == backend), None)
    if info is None or not info.available:
        detail = info.detail if info else f"expected one of {', '.join(info.name for info in backends())}"
        raise UnavailableError(f"[kvarn.{operation}] backend: expected one that can run here, got {backend}: {detail}")
    if info.num_devices and index >= info.num_devices:
        raise UnavailableError(f"[kvarn.{operation}] device: expected 0 to {info.num_devices - 1}, got {index}")
    if backend == "cpu":
        return HostDevice()
    if backend == "hip":
        return HipDevice(index)
    try:
        return TorchDevice(index)
    except ModuleNotFoundError:
        raise UnavailableError(f"[kvarn.{operation}] backend: expected torch, which allocates on {backend}, got none") from None
