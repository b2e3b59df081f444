"""A cache on an AMD device without torch: numpy arrays that the stand-in runtime takes for device memory stand in for torch's tensors."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

import kvarn
from kvarn import _dlpack
from kvarn import cache as cache_module
from kvarn._memory import Memory
from support import relative_error

LAYERS, HEADS, Q_HEADS, DIM, TILE = 2, 2, 4, 64, 32


_lent: list[Any] = []  # descriptions of arrays that borrowers may still hold


class DeviceArray(np.ndarray):
    """An array that DLPack says is on an AMD device; so are its views."""

    __dlpack_c_exchange_api__ = _dlpack.Described.__dlpack_c_exchange_api__

    def __dlpack_device__(self) -> tuple[int, int]:
        return (10, 0)

    __dlpack__ = _dlpack.Described.__dlpack__

    @property
    def managed(self) -> Any:
        shape = (ctypes.c_int64 * max(self.ndim, 1))(*self.shape)
        strides = (ctypes.c_int64 * max(self.ndim, 1))(*(stride // self.itemsize for stride in self.strides))
        dtype = _dlpack._Dtype({"i": 0, "u": 1, "f": 2}[self.dtype.kind], 8 * self.itemsize, 1)
        tensor = _dlpack._Tensor(self.ctypes.data, _dlpack._Device(10, 0), self.ndim, dtype, shape, strides, 0)
        managed = _dlpack._ManagedTensor(1, 1, None, _dlpack._deleter, 0, tensor)
        _lent.append((managed, shape, strides))
        return managed


@pytest.fixture
def device_memory(runtime, monkeypatch):
    """Makes caches of `device="hip"` take DeviceArrays; returns a function from a host array to one."""
    library, arrays = runtime._library, []
    if not hasattr(library, "amdsim_register"):
        pytest.skip("a real device needs torch to allocate")

    def put(host: np.ndarray) -> DeviceArray:
        runtime.synchronize()  # before arrays are copied into one that grew
        room = np.zeros(host.nbytes + 256, np.uint8)
        begin = -room.ctypes.data % 256  # as hipMalloc aligns
        array = room[begin : begin + host.nbytes].view(host.dtype).reshape(host.shape).view(DeviceArray)
        array[...] = host
        library.amdsim_register(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(max(array.nbytes, 1)))
        arrays.append(array)
        return array

    class StandIn(Memory):
        def __init__(self, dtype: Any, device: Any) -> None:
            super().__init__(dtype, "cpu")
            if device == "hip":
                self.backend, self.put = "hip", put

        def zeros(self, name: str, shape: tuple[int, ...], *, as_bytes: bool = False) -> np.ndarray:
            return self.put(super().zeros(name, shape, as_bytes=as_bytes))

        def contiguous(self, array: np.ndarray) -> np.ndarray:
            return array if array.flags.c_contiguous else self.put(array)

    monkeypatch.setattr(cache_module, "Memory", StandIn)
    yield put
    for array in arrays:
        library.amdsim_unregister(ctypes.c_void_p(array.ctypes.data))


def correlated(rng: np.random.Generator) -> kvarn.Moments:
    parts = rng.standard_normal((2, LAYERS, HEADS, DIM // 8, DIM))
    k, v = (parts.swapaxes(3, 4) @ parts + 0.1 * np.eye(DIM)).astype(np.float32)
    return kvarn.Moments(k[None], v, source="a test")


@pytest.mark.parametrize("with_moments", [False, True])
def test_a_cache_holds_and_attends_to_what_the_cpus_does(runtime, device_memory, rng, with_moments):
    shape = {"num_layers": LAYERS, "num_kv_heads": HEADS, "num_q_heads": Q_HEADS, "head_dim": DIM, "sink_tokens": TILE}
    moments = correlated(rng) if with_moments else None
    cpu, amd = (kvarn.Cache("k2v2_g32", **shape, device=device, moments=moments) for device in ("cpu", "hip"))
    sequences = [cpu.sequence(), amd.sequence()]
    # A prompt whose first tiles are encoded layer by layer as they are written, then steps whose tiles the commit encodes in all layers.
    for tokens in (4 * TILE + 5, TILE - 6, 1, 1):
        k, v = rng.standard_normal((2, LAYERS, tokens, HEADS, DIM)).astype(np.float16)
        cpu.append(sequences[0], k, v)
        amd.append(sequences[1], device_memory(k), device_memory(v))
    runtime.synchronize()
    np.testing.assert_array_equal(sequences[0].table(), sequences[1].table())
    assert (sequences[0].table() >= 0).sum() == 4  # behind the sinks, all complete tiles
    for entry in sequences[0].table():
        for layer in range(LAYERS):
            if entry >= 0:
                np.testing.assert_array_equal(amd.records[layer, entry], cpu.records[layer, entry])
    q = rng.standard_normal((1, Q_HEADS, DIM)).astype(np.float16)
    expected = cpu.attend(sequences[0], 1, q).astype(np.float64)
    got = amd.attend(sequences[1], 1, device_memory(q), out=device_memory(np.zeros_like(q)))
    runtime.synchronize()
    # Both are within 5e-4 of float64 arithmetic, and rounded to fp16.
    assert relative_error(got.astype(np.float64), expected) <= 2 * (5e-4 + 2**-11)
