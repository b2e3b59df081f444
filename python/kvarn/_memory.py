"""Where a cache keeps its arrays: numpy on the host, or torch on any device. Everything else in the package is written against this."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvarn._backends import backends
from kvarn._errors import InvalidArgumentError, OutOfMemoryError, UnavailableError

#: A numpy array or a torch tensor.
Array = Any

_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def _require_backend(name: str) -> None:
    info = next(info for info in backends() if info.name == name)
    if not info.available:
        raise UnavailableError(f"[kvarn.Cache] device: expected one of backend {name}, got none: {info.detail}")


class Memory:
    """Allocates arrays of one dtype on one device.

    Args:
        dtype: element type of K, V and staging: ``"float16"``, ``"bfloat16"``, ``"float32"``, a numpy dtype or a torch dtype.
        device: ``"cpu"``, ``"cuda"`` (torch's current one), ``"cuda:1"``, ``"hip"`` or a torch device.

    The arrays are torch tensors when `dtype` is a torch dtype or the device is not the CPU, else numpy arrays.

    Raises:
        ValueError: an unknown dtype or device, or bfloat16 without torch (numpy has no such type).
        UnavailableError: a GPU without a torch that can use it, which is what allocates there.
    """

    def __init__(self, dtype: Any, device: Any) -> None:
        is_torch_dtype = type(dtype).__module__ == "torch"
        name = str(dtype).removeprefix("torch.") if is_torch_dtype or isinstance(dtype, str) else np.dtype(dtype).name
        if name not in _ITEM_BYTES:
            raise InvalidArgumentError(f"[kvarn.Cache] dtype: expected float16, bfloat16 or float32, got {dtype}")
        kind, _, index = str(device).partition(":")
        if kind not in ("cpu", "cuda", "hip") or (index and not index.isdigit()):
            raise InvalidArgumentError(f'[kvarn.Cache] device: expected "cpu", "cuda", "cuda:N" or "hip", got {device!r}')
        self.dtype_name = name
        self.item_bytes = _ITEM_BYTES[name]
        self.device_index = int(index) if index else 0
        self.torch: Any = None
        if is_torch_dtype or kind != "cpu":
            if kind == "hip":
                _require_backend(kind)  # says what AMD's side lacks before torch is blamed
            try:
                import torch
            except ModuleNotFoundError:
                raise UnavailableError(f"[kvarn.Cache] device: expected torch, which allocates on {device}, got none") from None
            self.torch = torch
            if kind == "hip" and not torch.version.hip:
                built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs alone"
                raise UnavailableError(
                    f"[kvarn.Cache] device: expected a torch built for ROCm, which allocates on {device}, "
                    f"got {torch.__version__} built for {built}"
                )
            if kind == "cuda" and torch.version.hip:
                kind = "hip"
            if kind != "cpu" and not torch.cuda.is_available():
                raise UnavailableError(
                    f"[kvarn.Cache] device: expected a torch that can use {device}, got {torch.__version__} without a GPU"
                )
            if kind != "cpu" and not index:
                self.device_index = torch.cuda.current_device()
        elif name == "bfloat16":
            raise InvalidArgumentError(
                '[kvarn.Cache] dtype: expected float16 or float32 for a numpy cache, got "bfloat16" (pass torch.bfloat16)'
            )
        self.backend = kind
        #: torch calls AMD devices "cuda" too.
        self.torch_device = "cpu" if kind == "cpu" else f"cuda:{self.device_index}"

    def zeros(self, name: str, shape: tuple[int, ...], *, as_bytes: bool = False) -> Array:
        """An array of zeros: uint8 when `as_bytes`, else the values' dtype. `name` is for the message of OutOfMemoryError."""
        try:
            if self.torch is None:
                return np.zeros(shape, np.uint8 if as_bytes else self.dtype_name)
            dtype = self.torch.uint8 if as_bytes else getattr(self.torch, self.dtype_name)
            return self.torch.zeros(shape, dtype=dtype, device=self.torch_device)
        except (MemoryError, RuntimeError) as error:
            # torch has an exception of its own for a GPU's memory, and none for the host's.
            if not isinstance(error, MemoryError) and "memory" not in str(error):
                raise
            size = math.prod(shape) * (1 if as_bytes else self.item_bytes)
            where = f"{size:,} bytes on {self.torch_device}"
            raise OutOfMemoryError(f"[kvarn.Cache] {name}: expected {where}, got out of memory") from error

    def grown(self, name: str, array: Array, size: int) -> Array:
        """A copy of `array` whose axis 1 is `size` long; what is new is zero."""
        shape = (array.shape[0], size, *array.shape[2:])
        new = self.zeros(name, shape, as_bytes=array.dtype.itemsize == 1)
        new[:, : array.shape[1]] = array
        return new

    def put(self, host: NDArray[Any]) -> Array:
        """A host array of integers (or float32) as an array of this memory; shares the host's memory on the CPU."""
        if self.torch is None:
            return host
        tensor = self.torch.from_numpy(np.ascontiguousarray(host))
        return tensor if self.torch_device == "cpu" else tensor.to(self.torch_device, non_blocking=True)

    def index(self, indices: list[int]) -> Array:
        """Indices for fancy indexing."""
        return self.put(np.asarray(indices, np.int64))

    def pairs(self, pairs: list[tuple[int, int]]) -> tuple[Array, Array]:
        """The two sides of index pairs, as int32 arrays."""
        sources, destinations = np.array(pairs, np.int32).reshape(-1, 2).T
        return self.put(np.ascontiguousarray(sources)), self.put(np.ascontiguousarray(destinations))

    def num_threads(self) -> int:
        """Threads that the CPU backend should take by default: no more than torch uses itself, where the arrays are torch's; 0: its own
        choice."""
        if self.torch is None or self.backend != "cpu" or os.environ.get("KVARN_NUM_THREADS"):
            return 0
        (available,) = (info.num_threads for info in backends() if info.name == "cpu")
        return min(available, int(self.torch.get_num_threads()))

    def contiguous(self, array: Array) -> Array:
        """`array` itself when it is contiguous, else a copy."""
        return np.ascontiguousarray(array) if self.torch is None else array.contiguous()

    def to_host(self, array: Array) -> NDArray[Any]:
        """A host copy or view; bfloat16 comes as its uint16 bits, because numpy has no such type."""
        if self.torch is None:
            return np.asarray(array)
        tensor = array.detach().to("cpu")
        if tensor.dtype == self.torch.bfloat16:
            tensor = tensor.view(self.torch.uint16)
        host: NDArray[Any] = tensor.numpy()
        return host

    def from_host(self, host: NDArray[Any]) -> Array:
        """The inverse of `to_host` for values of this memory's dtype."""
        if self.torch is None:
            return host
        tensor = self.torch.from_numpy(np.ascontiguousarray(host))
        if self.dtype_name == "bfloat16" and tensor.dtype == self.torch.uint16:
            tensor = tensor.view(self.torch.bfloat16)
        return tensor.to(self.torch_device)
