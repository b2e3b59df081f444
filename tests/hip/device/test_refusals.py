"""What the backend alone refuses is refused before a launch, with what was expected and what came. Arrays are described falsely here, so
nothing of them may be read."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

import kvarn

FAR = 1 << 46  # bytes beyond every array, so that an array said to be huge overlaps none
CONFIG = {"head_dim": 64, "num_kv_heads": 2, "dtype": "float16"}


@pytest.fixture
def plan(runtime) -> kvarn.Plan:
    return kvarn.Plan("k4v2_g32", backend="hip", num_q_heads=2, max_num_seqs=1, max_q_tokens=1, max_tiles=4, **CONFIG)


@pytest.fixture
def arrays(to_device, plan) -> dict[str, Any]:
    return {
        "staging": to_device(np.zeros((2, 2, 2, 32, 64), np.float16)),
        "records": to_device(np.zeros((2, 2, plan.record_bytes), np.uint8)),
        "slots": to_device(np.zeros(1, np.int32)),
        "blocks": to_device(np.zeros(1, np.int32)),
    }


def described(array: Any, first: int | None = None, *, moved: int = 0) -> Any:
    """The array, said to be `first` long in its first dimension and to begin `moved` bytes later."""
    if first is not None:
        array._shape[0] = first
    array.managed.tensor.data += moved
    return array


def encode(plan, arrays, **options):
    kvarn.ops.encode(plan, arrays["staging"], arrays["records"], arrays["slots"], arrays["blocks"], **options)


def decode(plan, arrays, to_device, tiles: int = 1):
    shape = (1, 2, 32, 64)
    out = [described(to_device(np.zeros(shape, np.float16)), tiles, moved=4 * FAR * (tiles > 1) * (i + 1)) for i in range(2)]
    kvarn.ops.decode(plan, arrays["records"], arrays["blocks"], k=out[0], v=out[1])


def attend(plan, arrays, to_device):
    q = np.zeros((1, 2, 64), np.float16)
    integers = {"block_table": np.zeros((1, 4), np.int32), "seq_lens": np.ones(1, np.int32), "cu_q_lens": np.array([0, 1], np.int32)}
    memory = {name: to_device(value) for name, value in integers.items()}
    memory["workspace"] = to_device(np.zeros(plan.workspace_bytes, np.uint8))
    kvarn.ops.attend(plan, to_device(q), records=arrays["records"], staging=arrays["staging"], out=to_device(q), **memory)


def test_a_device_that_does_not_exist(runtime):
    with pytest.raises(kvarn.InvalidArgumentError, match=r"\[kvarn.plan_create\] device: expected 0 to \d+, got 99"):
        kvarn.Plan("k4v2_g32", backend="hip", device=99, **CONFIG)


def test_records_off_their_alignment(plan, arrays, to_device):
    described(arrays["records"], moved=8)
    for name, call in (
        ("encode", lambda: encode(plan, arrays)),
        ("decode", lambda: decode(plan, arrays, to_device)),
        ("attend", lambda: attend(plan, arrays, to_device)),
    ):
        with pytest.raises(kvarn.InvalidArgumentError, match=rf"\[kvarn.{name}\] records: expected an address aligned to 16 bytes, got 0x"):
            call()


def test_staging_off_the_alignment_of_attend(plan, arrays, to_device):
    described(arrays["staging"], moved=8)
    with pytest.raises(kvarn.InvalidArgumentError, match=r"\[kvarn.attend\] staging: expected an address aligned to 16 bytes, got 0x"):
        attend(plan, arrays, to_device)


def test_more_tiles_than_a_grid_has_blocks(plan, arrays, to_device):
    tiles = 2**30  # of two heads
    for name, way in (("records", FAR), ("slots", 0), ("blocks", 0)):
        described(arrays[name], tiles, moved=way)
    message = rf"num_tiles.*: expected at most {2**31 - 1} tiles of one head.*, got {2**31}"
    with pytest.raises(kvarn.UnsupportedError, match=r"\[kvarn.encode\] " + message):
        encode(plan, arrays)
    with pytest.raises(kvarn.UnsupportedError, match=r"\[kvarn.decode\] " + message):
        decode(plan, arrays, to_device, tiles)


def test_more_layers_than_a_grid_has(plan, arrays, to_device):
    layers = 65536
    arrays["staging"] = described(to_device(np.zeros((1, 2, 2, 2, 32, 64), np.float16)), layers)
    arrays["records"] = described(to_device(np.zeros((1, 2, 2, plan.record_bytes), np.uint8)), layers, moved=FAR)
    with pytest.raises(kvarn.UnsupportedError, match=r"\[kvarn.encode\] .*: expected at most .* and 65535 layers, got 2 and 65536"):
        encode(plan, arrays)


def test_layers_of_records_off_their_alignment(plan, arrays, to_device):
    records = to_device(np.zeros((2, 2, 2, plan.record_bytes), np.uint8))
    strides = (ctypes.c_int64 * 4)(4 * plan.record_bytes + 8, 2 * plan.record_bytes, plan.record_bytes, 1)
    records.managed.tensor.strides = strides
    arrays["records"] = records
    arrays["staging"] = to_device(np.zeros((2, 2, 2, 2, 32, 64), np.float16))
    expected = rf"\[kvarn.encode\] records_layer_stride_bytes: expected a multiple of 16, got {4 * plan.record_bytes + 8}"
    with pytest.raises(kvarn.InvalidArgumentError, match=expected):
        encode(plan, arrays)


def test_a_factor_of_another_shape_or_on_the_host(plan, arrays, to_device):
    factor = np.zeros((2, 64, 64), np.float32)
    with pytest.raises(kvarn.InvalidArgumentError, match=r"k_feedback: expected float32 \[2, 64, 64\] on rocm:0, got .* \[2, 64, 32\]"):
        encode(plan, arrays, k_feedback=to_device(factor[..., :32]))
    with pytest.raises(kvarn.InvalidArgumentError, match=r"v_feedback: expected float32 \[2, 64, 64\] on rocm:0, got .* on cpu"):
        encode(plan, arrays, v_feedback=factor)
