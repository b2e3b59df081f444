"""KvarnCache in a model of transformers, on an AMD device without ROCm's torch: torch's host memory, which the stand-in runtime takes for
device memory, stands in for it. The model computes on the CPU; the cache rotates, encodes and attends on the device."""

from __future__ import annotations

import ctypes
import inspect
from typing import Any

import numpy as np
import pytest

import kvarn
from kvarn import _dlpack, ops
from kvarn import cache as cache_module
from kvarn._memory import Memory

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvarn.integrations.transformers import KvarnCache, enable  # noqa: E402

# As in tests/python/test_transformers.py: logits here have a standard deviation of about 1. Both caches are within the kernels' budget of
# 5e-4 of float64, which may change a code at a rounding boundary: a few hundredths in the logits. fp16 models add as much of their own.
LOGIT_ERROR = 0.1
DTYPE_CODES = {torch.float16: 2, torch.bfloat16: 4, torch.float32: 2, torch.uint8: 1, torch.int32: 0, torch.int64: 0}
_lent: list[Any] = []  # descriptions of tensors that borrowers may still hold


class DeviceTensor(torch.Tensor):
    """A tensor that DLPack says is on an AMD device."""

    __dlpack_c_exchange_api__ = _dlpack.Described.__dlpack_c_exchange_api__
    __dlpack__ = _dlpack.Described.__dlpack__
    register: Any = None  # with the runtime: (address, bytes)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_dlpack.ROCM, 0)

    @property
    def managed(self) -> Any:
        plain = self.as_subclass(torch.Tensor)
        storage = plain.untyped_storage()
        DeviceTensor.register(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()))
        numbers = [(ctypes.c_int64 * max(plain.ndim, 1))(*values) for values in (plain.shape, plain.stride())]
        dtype = _dlpack._Dtype(DTYPE_CODES[plain.dtype], 8 * plain.element_size(), 1)
        tensor = _dlpack._Tensor(plain.data_ptr(), _dlpack._Device(_dlpack.ROCM, 0), plain.ndim, dtype, *numbers, 0)
        managed = _dlpack._ManagedTensor(1, 1, None, _dlpack._deleter, 0, tensor)
        _lent.append((managed, numbers, storage))
        return managed


class StandIn(Memory):
    """Memory of the backend hip in torch's host memory, in places aligned as hipMalloc's."""

    device_caches = False

    def __init__(self, dtype: Any, device: Any) -> None:
        super().__init__(dtype, device)
        if StandIn.device_caches:
            self.backend = "hip"

    def zeros(self, name: str, shape: tuple[int, ...], *, as_bytes: bool = False) -> Any:
        array = super().zeros(name, shape, as_bytes=as_bytes)
        room = torch.zeros(array.nbytes + 256, dtype=torch.uint8)
        begin = -room.data_ptr() % 256
        return room[begin : begin + array.nbytes].view(array.dtype).view(shape)


@pytest.fixture
def calls(runtime, monkeypatch) -> dict[str, int]:
    """Makes operations of plans of the backend hip take torch's tensors; how often each was called."""
    if not hasattr(runtime._library, "amdsim_register"):
        pytest.skip("on a real device ROCm's torch allocates")
    monkeypatch.setattr(DeviceTensor, "register", staticmethod(runtime._library.amdsim_register))
    monkeypatch.setattr(cache_module, "Memory", StandIn)
    counts: dict[str, int] = {}

    def lent(value: Any) -> Any:
        return value.as_subclass(DeviceTensor) if isinstance(value, torch.Tensor) else value

    def wrap(name: str) -> Any:
        true = getattr(ops, name)

        def call(plan: kvarn.Plan, *arguments: Any, **named: Any) -> Any:
            if plan.backend != "hip":
                return true(plan, *arguments, **named)
            counts[name] = counts.get(name, 0) + 1
            bound = inspect.signature(true).bind(plan, *arguments, **named).arguments
            if name == "attend" and bound.get("out") is None:
                bound["out"] = torch.empty_like(bound["q"])
            result = true(**{key: lent(value) for key, value in bound.items()})
            return result.as_subclass(torch.Tensor) if isinstance(result, torch.Tensor) else result

        return call

    for name in ("append", "encode", "decode", "attend", "hadamard"):
        monkeypatch.setattr(ops, name, wrap(name))
    return counts


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_decodes_as_with_a_cache_on_the_cpu(calls, monkeypatch, dtype):
    torch.manual_seed(5)
    config = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        initializer_range=0.15,
    )
    model = enable(transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval())
    tokens = torch.randint(0, 64, (2, 400))
    caches = []
    for on_device in (False, True):
        monkeypatch.setattr(StandIn, "device_caches", on_device)
        cache = KvarnCache(config, "k4v2_g128", sink_tokens=128)
        with torch.inference_mode():
            # A prompt, a chunk that completes a tile, and steps.
            logits = [
                model(tokens[:, a:b], past_key_values=cache).logits
                for a, b in ((0, 380), (380, 390), *((i, i + 1) for i in range(390, 400)))
            ]
        caches.append((cache, torch.cat([x[:, -10:] for x in logits], 1).float()))
    (cpu, expected), (amd, got) = caches
    assert amd.store.memory.backend == "hip"
    assert "gfx" in amd.store._plan.describe
    assert "matrix cores" in amd.store._plan.describe
    assert calls["attend"] == 2 * 11  # both layers: the chunk and the steps
    assert calls["append"] > 2 * 11
    assert calls["encode"] >= 2
    assert float(expected.std()) > 0.3
    assert float((got - expected).abs().max()) <= LOGIT_ERROR
    # What the first layer holds does not depend on attention: the same bytes.
    for mine, other in zip(amd.sequences, cpu.sequences, strict=True):
        np.testing.assert_array_equal(mine.table(), other.table())
        blocks = torch.from_numpy(mine.table()[mine.table() >= 0]).long()
        assert len(blocks) == 2
        assert torch.equal(amd.store.records[0, blocks], cpu.store.records[0, blocks])
