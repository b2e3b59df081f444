"""Array arguments: borrowed and never copied, or refused with a message, before anything is written."""

from __future__ import annotations

import ctypes
import re
import threading
import time
from typing import Any

import numpy as np
import pytest

import kvarn
from kvarn import ops

TOKENS, HEADS, Q_HEADS, DIM, TILE = 5, 2, 8, 64, 32


def arguments(operation: str, plan: kvarn.Plan) -> dict[str, np.ndarray]:
    """Valid numpy arguments of an operation; every output holds a canary."""
    half, record = np.float16, plan.record_bytes
    table = np.full((2, 8), ~0, np.int32)
    every: dict[str, dict[str, np.ndarray]] = {
        "hadamard": {"x": np.ones((3, DIM), half), "out": np.full((3, DIM), 7, half)},
        "append": {
            "k": np.ones((TOKENS, HEADS, DIM), half),
            "v": np.ones((TOKENS, HEADS, DIM), half),
            "slot_mapping": np.arange(TOKENS, dtype=np.int64),
            "staging": np.full((4, 2, HEADS, TILE, DIM), 7, half),
        },
        "encode": {
            "staging": np.ones((4, 2, HEADS, TILE, DIM), half),
            "records": np.full((3, HEADS, record), 7, np.uint8),
            "slots": np.array([0, 1], np.int32),
            "blocks": np.array([2, 0], np.int32),
        },
        "decode": {
            "records": np.zeros((3, HEADS, record), np.uint8),
            "blocks": np.array([2, 0], np.int32),
            "k": np.full((2, HEADS, TILE, DIM), 7, half),
            "v": np.full((2, HEADS, TILE, DIM), 7, half),
            "destinations": np.array([1, 0], np.int32),
        },
        "attend": {
            "q": np.ones((TOKENS, Q_HEADS, DIM), half),
            "records": np.zeros((3, HEADS, record), np.uint8),
            "staging": np.ones((4, 2, HEADS, TILE, DIM), half),
            "block_table": table,
            "seq_lens": np.array([TOKENS, 0], np.int32),
            "cu_q_lens": np.array([0, TOKENS, TOKENS], np.int32),
            "out": np.full((TOKENS, Q_HEADS, DIM), 7, half),
            "lse": np.full((TOKENS, Q_HEADS), 7, np.float32),
            "alibi_slopes": np.zeros(Q_HEADS, np.float32),
            "sinks": np.zeros(Q_HEADS, np.float32),
            "workspace": aligned(max(plan.workspace_bytes, 1)),
        },
    }
    return every[operation]


OUTPUTS = {"hadamard": ["out"], "append": ["staging"], "encode": ["records"], "decode": ["k", "v"], "attend": ["out", "lse", "workspace"]}
NAMES = {
    "hadamard": "x out",
    "append": "k v slot_mapping staging",
    "encode": "staging records slots blocks",
    "decode": "records blocks k v destinations",
    "attend": "q records staging block_table seq_lens cu_q_lens out lse alibi_slopes sinks workspace",
}
EVERY_ARGUMENT = [(operation, name) for operation, names in NAMES.items() for name in names.split()]
EVERY_OUTPUT = [(operation, name) for operation, names in OUTPUTS.items() for name in names]


def aligned(size: int) -> np.ndarray:
    memory = np.full(size + 256, 7, np.uint8)
    start = -memory.ctypes.data % 256
    return memory[start : start + size]


def call(operation: str, plan: kvarn.Plan, values: dict[str, Any]) -> Any:
    return getattr(ops, operation)(plan, **values)


def refused(operation: str, plan: kvarn.Plan, name: str, bad: Any, kind: type[Exception], text: str) -> str:
    """Calls with one bad argument; checks the exception, the message and that no output changed."""
    values: dict[str, Any] = arguments(operation, plan)
    before = {output: values[output].copy() for output in OUTPUTS[operation] if output != name}
    values[name] = bad
    with pytest.raises(kind, match=re.escape(f"[kvarn.{operation}] {name}: expected ")) as caught:
        call(operation, plan, values)
    message = str(caught.value)
    assert isinstance(caught.value, kvarn.KvarnError)
    assert ", got " in message
    assert text in message, message
    for output, expected in before.items():
        np.testing.assert_array_equal(values[output], expected)
    return message


@pytest.mark.parametrize("operation", list(OUTPUTS))
def test_valid_arguments_pass(operation: str, plan: kvarn.Plan, to_library: Any) -> None:
    values = {name: to_library(value) for name, value in arguments(operation, plan).items()}
    call(operation, plan, values)


def test_message_names_what_was_expected_and_what_came() -> None:
    plan = kvarn.Plan(
        "k4v2_g128", head_dim=128, num_kv_heads=8, num_q_heads=32, dtype="bfloat16", max_num_seqs=1, max_q_tokens=3, max_tiles=1
    )
    with pytest.raises(TypeError) as caught:
        ops.attend(plan, np.zeros((3, 32, 128), np.float32), records=None, staging=None, block_table=None, seq_lens=None, cu_q_lens=None)
    expected = "[kvarn.attend] q: expected bfloat16 [num_q_tokens, 32, 128] on cpu, got float32 [3, 32, 128] on cpu"
    assert str(caught.value) == expected


@pytest.mark.parametrize(("operation", "name"), EVERY_ARGUMENT)
def test_wrong_dtype(operation: str, name: str, plan: kvarn.Plan, to_library: Any) -> None:
    good = arguments(operation, plan)[name]
    bad = np.zeros(good.shape, np.int16)
    refused(operation, plan, name, to_library(bad), TypeError, "got int16 [")


@pytest.mark.parametrize(("operation", "name"), EVERY_ARGUMENT)
def test_wrong_rank(operation: str, name: str, plan: kvarn.Plan, to_library: Any) -> None:
    good = arguments(operation, plan)[name]
    bad = np.zeros((), good.dtype)
    refused(operation, plan, name, to_library(bad), ValueError, " [] on cpu")
    if name not in ("x", "staging", "out") or operation == "append":
        refused(operation, plan, name, to_library(good[None]), ValueError, f" [1, {good.shape[0]}")


@pytest.mark.parametrize(("operation", "name"), [pair for pair in EVERY_ARGUMENT if pair[1] not in ("slots", "blocks", "seq_lens")])
def test_wrong_size(operation: str, name: str, plan: kvarn.Plan, to_library: Any) -> None:
    good = arguments(operation, plan)[name]
    if name == "workspace" and plan.workspace_bytes == 0:
        pytest.skip("this backend needs no workspace")
    bad = np.zeros((*good.shape[:-1], good.shape[-1] - 1), good.dtype)
    if name == "block_table":
        bad = np.zeros((3, 8), good.dtype)
    refused(operation, plan, name, to_library(bad), ValueError, "")


@pytest.mark.parametrize(("operation", "name"), EVERY_ARGUMENT)
def test_wrong_strides(operation: str, name: str, plan: kvarn.Plan, to_library: Any) -> None:
    good = arguments(operation, plan)[name]
    wide = np.zeros((*good.shape[:-1], 2 * good.shape[-1]), good.dtype)
    message = refused(operation, plan, name, to_library(wide[..., ::2]), ValueError, "with strides [")
    assert "contiguous" in message


NOT_ARRAYS = [[1, 2], (1, 2), "text", 3.0, 7, object()]


@pytest.mark.parametrize(("operation", "name"), EVERY_ARGUMENT)
@pytest.mark.parametrize("bad", NOT_ARRAYS, ids=lambda bad: type(bad).__name__)
def test_not_an_array(operation: str, name: str, bad: Any, plan: kvarn.Plan) -> None:
    refused(operation, plan, name, bad, TypeError, "got " + type(bad).__name__)


@pytest.mark.parametrize(("operation", "name"), [pair for pair in EVERY_ARGUMENT if pair not in EVERY_OUTPUT])
def test_inputs_are_checked_before_outputs_are_allocated(operation: str, name: str, plan: kvarn.Plan) -> None:
    """The message is the same when there is no output to take a shape or a type from."""
    values: dict[str, Any] = arguments(operation, plan)
    if operation not in ("append", "encode"):  # their outputs are not optional
        values = {key: value for key, value in values.items() if key not in OUTPUTS[operation]}
    if operation == "decode" and name != "destinations":
        del values["destinations"]
    for bad, kind in [(bad, TypeError) for bad in NOT_ARRAYS] + [(np.zeros((), values[name].dtype), ValueError)]:
        with pytest.raises(kind, match=re.escape(f"[kvarn.{operation}] {name}: expected ") + ".*, got ") as caught:
            call(operation, plan, values | {name: bad})
        assert isinstance(caught.value, kvarn.KvarnError)


SCALARS: dict[tuple[str, str], tuple[str, list[Any]]] = {
    ("hadamard", "inverse"): ("True or False", [None, 1, "yes", 0.0]),
    ("append", "rotated"): ("True or False", [None, 1]),
    ("encode", "normalisation"): ("one of scale_invariant, published", [None, 1, b"published"]),
    ("encode", "rounding"): ("one of auto, ", [None, 2]),
    ("decode", "rotated"): ("True or False", [None, 1]),
    ("attend", "softmax_scale"): ("a number", ["1", [1.0], 1j]),
    ("attend", "causal"): ("True or False", [None, "no"]),
    ("attend", "window"): ("an integer", [None, 2.5, "3", True]),
    ("attend", "logits_soft_cap"): ("a number", [None, "1"]),
    ("attend", "q_rotated"): ("True or False", [None, 2]),
    ("attend", "out_rotated"): ("True or False", [None, 2]),
    ("attend", "return_lse"): ("True or False", [None, 2]),
}


@pytest.mark.parametrize(("operation", "name"), list(SCALARS))
def test_scalars_of_the_wrong_type(operation: str, name: str, plan: kvarn.Plan) -> None:
    expected, every = SCALARS[operation, name]
    for bad in every:
        values: dict[str, Any] = arguments(operation, plan) | {name: bad}
        with pytest.raises(TypeError, match=re.escape(f"[kvarn.{operation}] {name}: expected {expected}")) as caught:
            call(operation, plan, values)
        assert str(caught.value).endswith("got " + ("None" if bad is None else type(bad).__name__))
        for output in OUTPUTS[operation]:
            assert (values[output] == 7).all()


def test_scalars_out_of_range(plan: kvarn.Plan) -> None:
    for name, bad, text in (
        ("window", -1, "expected at least 0, got -1"),
        ("window", 2**31, "expected -2147483648 to 2147483647, got 2147483648"),
        ("window", 10**30, f"expected -2147483648 to 2147483647, got {10**30}"),
        ("softmax_scale", float("nan"), "expected a finite number, got nan"),
        ("softmax_scale", 1e300, "expected a finite number, got inf"),
        ("logits_soft_cap", -1.0, "expected 0 or a finite positive number, got -1"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"[kvarn.attend] {name}: {text}")):
            call("attend", plan, arguments("attend", plan) | {name: bad})


def test_numbers_of_numpy_are_scalars(plan: kvarn.Plan) -> None:
    plain = call("attend", plan, arguments("attend", plan) | {"window": 3, "causal": False, "softmax_scale": 0.5})
    options = {"window": np.int64(3), "causal": np.False_, "softmax_scale": np.float32(0.5)}
    np.testing.assert_array_equal(call("attend", plan, arguments("attend", plan) | options), plain)


@pytest.mark.parametrize("operation", list(OUTPUTS))
def test_not_a_plan(operation: str, plan: kvarn.Plan) -> None:
    for bad in (None, 3, "k4v2_g32", kvarn.Format("k4v2_g32")):
        with pytest.raises(TypeError, match=rf"\[kvarn.{operation}\] plan: expected a kvarn.Plan, got {type(bad).__name__}|kvarn\."):
            call(operation, bad, arguments(operation, plan))  # type: ignore[arg-type]


OPTIONAL = [("hadamard", "out"), ("decode", "k"), ("decode", "v"), ("decode", "destinations")]
OPTIONAL += [("attend", name) for name in ("out", "lse", "alibi_slopes", "sinks", "workspace")]


@pytest.mark.parametrize(("operation", "name"), [pair for pair in EVERY_ARGUMENT if pair not in OPTIONAL])
def test_none_for_what_is_needed(operation: str, name: str, plan: kvarn.Plan) -> None:
    refused(operation, plan, name, None, TypeError, "got None")


@pytest.mark.parametrize(("operation", "name"), EVERY_OUTPUT)
def test_read_only_output(operation: str, name: str, plan: kvarn.Plan) -> None:
    good = arguments(operation, plan)[name]
    good.flags.writeable = False
    refused(operation, plan, name, good, ValueError, "read-only")


@pytest.mark.parametrize("operation", list(OUTPUTS))
def test_read_only_inputs_are_fine(operation: str, plan: kvarn.Plan) -> None:
    values = arguments(operation, plan)
    for name, value in values.items():
        if name not in OUTPUTS[operation]:
            value.flags.writeable = False
    call(operation, plan, values)


@pytest.mark.parametrize(("operation", "name"), [("hadamard", "out"), ("decode", "k"), ("attend", "out")])
def test_output_that_overlaps_itself(operation: str, name: str, plan: kvarn.Plan) -> None:
    torch = pytest.importorskip("torch")
    good = torch.from_numpy(arguments(operation, plan)[name])
    refused(operation, plan, name, good[:1].expand(good.shape), ValueError, "with strides [0,")


@pytest.mark.parametrize(("operation", "name"), EVERY_ARGUMENT)
def test_tensors_without_memory(operation: str, name: str, plan: kvarn.Plan) -> None:
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    good = torch.from_numpy(arguments(operation, plan)[name])
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(good)
    refused(operation, plan, name, fake, TypeError, "without memory")
    refused(operation, plan, name, good.to("meta"), TypeError, "got torch.Tensor")
    refused(operation, plan, name, torch.zeros(3).to_sparse(), TypeError, "got torch.Tensor")


@pytest.mark.parametrize(
    ("operation", "name"), [pair for pair in EVERY_ARGUMENT if pair[1] in ("x", "k", "v", "q", "staging", "out", "sinks")]
)
def test_requires_grad(operation: str, name: str, plan: kvarn.Plan) -> None:
    torch = pytest.importorskip("torch")
    good = torch.from_numpy(arguments(operation, plan)[name]).requires_grad_()
    refused(operation, plan, name, good, TypeError, f"that requires grad; pass {name}.detach()")
    values: dict[str, Any] = arguments(operation, plan)
    values[name] = good.detach()
    call(operation, plan, values)


def test_views_that_stand_for_other_values(plan: kvarn.Plan) -> None:
    masked = np.ma.masked_array(np.ones((3, DIM), np.float16), mask=True)
    for name in ("x", "out"):
        refused("hadamard", plan, name, masked, TypeError, "got numpy.ma.MaskedArray, whose mask would be lost")
    torch = pytest.importorskip("torch")
    negated = torch.view_as_complex(torch.ones(3, DIM, 2)).conj().imag
    assert negated.is_neg()
    for name in ("x", "out"):
        refused("hadamard", plan, name, negated, TypeError, "got torch.Tensor with a pending negation; pass its resolve_neg()")
    np.testing.assert_array_equal(ops.hadamard(plan, negated.resolve_neg()), ops.hadamard(plan, -torch.ones(3, DIM)))


def test_objects_whose_attributes_raise(plan: kvarn.Plan) -> None:
    class Everything:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(name)

    class Unprintable:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    class OnlyDtype:
        dtype = Unprintable()

    for bad in (Everything(), OnlyDtype()):
        refused("hadamard", plan, "x", bad, TypeError, f".{type(bad).__name__}")


def test_parameters_are_tensors(plan: kvarn.Plan) -> None:
    torch = pytest.importorskip("torch")
    x = torch.nn.Parameter(torch.ones(3, DIM), requires_grad=False)
    assert isinstance(ops.hadamard(plan, x.data), torch.Tensor)
    out = torch.empty(3, DIM)
    ops.hadamard(plan, x, out=out)


def test_other_numpy_types_are_refused(plan: kvarn.Plan) -> None:
    for dtype in ("complex64", ">f2", "U3", "O", "bool", "datetime64[s]"):
        with pytest.raises(TypeError, match=r"\[kvarn.hadamard\] x: expected float32\|float16\|bfloat16 \[\.\.\., 64\] on cpu, got "):
            ops.hadamard(plan, np.zeros((3, DIM), dtype), out=np.zeros((3, DIM), np.float16))


def test_misaligned_values(plan: kvarn.Plan) -> None:
    odd = np.frombuffer(bytearray(3 * DIM * 2 + 1), np.uint8)[1:].view(np.float16).reshape(3, DIM)
    for name in ("x", "out"):
        refused("hadamard", plan, name, odd, ValueError, "")


def test_ml_dtypes_bfloat16(plan: kvarn.Plan) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.arange(2 * DIM, dtype=np.float32).reshape(2, DIM).astype(ml_dtypes.bfloat16)
    out = ops.hadamard(plan, x)
    assert out.dtype == x.dtype
    torch = pytest.importorskip("torch")
    expected = ops.hadamard(plan, torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16))
    np.testing.assert_array_equal(out.view(np.uint16), expected.view(torch.uint16).numpy())
    x.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        ops.hadamard(plan, x, out=x)


def test_writes_land_in_the_callers_memory(plan: kvarn.Plan, to_library: Any) -> None:
    for operation, outputs in OUTPUTS.items():
        memory = arguments(operation, plan)
        before = {name: memory[name].copy() for name in outputs}
        call(operation, plan, {name: to_library(value) for name, value in memory.items()})
        for name in outputs:
            if name != "workspace":
                assert (memory[name] != before[name]).any(), (operation, name)


def test_given_outputs_are_returned(plan: kvarn.Plan, to_library: Any) -> None:
    values = {name: to_library(value) for name, value in arguments("hadamard", plan).items()}
    assert ops.hadamard(plan, **values) is values["out"]
    values = {name: to_library(value) for name, value in arguments("decode", plan).items()}
    k, v = ops.decode(plan, **values)
    assert k is values["k"]
    assert v is values["v"]
    values = {name: to_library(value) for name, value in arguments("attend", plan).items()}
    assert ops.attend(plan, **values) is values["out"]
    out, lse = ops.attend(plan, **values, return_lse=True)
    assert out is values["out"]
    assert lse is values["lse"]


def test_allocated_outputs_are_of_the_inputs_library(plan: kvarn.Plan, to_library: Any) -> None:
    values = {name: to_library(value) for name, value in arguments("attend", plan).items() if name not in OUTPUTS["attend"]}
    out, lse = ops.attend(plan, **values, return_lse=True)
    assert type(out) is type(lse) is type(values["q"])
    assert out.dtype == values["q"].dtype
    assert str(lse.dtype).endswith("float32")
    inputs = ("records", "blocks")
    values = {name: to_library(value) for name, value in arguments("decode", plan).items() if name in inputs}
    k, v = ops.decode(plan, **values)
    assert k.shape == v.shape == (2, HEADS, TILE, DIM)
    assert type(k) is type(values["records"])


def test_outputs_of_unknown_libraries_must_be_given(plan: kvarn.Plan) -> None:
    class Lender:
        """An array library that only lends."""

        def __init__(self, array: np.ndarray) -> None:
            self.array = array
            self.shape = array.shape

        def __dlpack__(self, **options: Any) -> Any:
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.array.__dlpack_device__()

    x = Lender(np.ones((3, DIM), np.float16))
    with pytest.raises(TypeError, match="only arrays of numpy, torch and cupy are allocated"):
        ops.hadamard(plan, x)
    out = Lender(np.full((3, DIM), 7, np.float16))
    assert ops.hadamard(plan, x, out=out) is out
    np.testing.assert_array_equal(out.array, ops.hadamard(plan, x.array))


class OnDevice:
    """An array that DLPack places on some device; its memory is the host's and must not be touched."""

    class Tensor(ctypes.Structure):
        _fields_ = (
            ("data", ctypes.c_void_p),
            ("device_type", ctypes.c_int32),
            ("device_index", ctypes.c_int32),
            ("ndim", ctypes.c_int32),
            ("code", ctypes.c_uint8),
            ("bits", ctypes.c_uint8),
            ("lanes", ctypes.c_uint16),
            ("shape", ctypes.POINTER(ctypes.c_int64)),
            ("strides", ctypes.POINTER(ctypes.c_int64)),
            ("byte_offset", ctypes.c_uint64),
            ("manager", ctypes.c_void_p),
            ("deleter", ctypes.c_void_p),
        )

    def __init__(self, device_type: int, device_index: int) -> None:
        self.memory = (ctypes.c_uint16 * (3 * DIM))(*([7] * 3 * DIM))
        self.dims = (ctypes.c_int64 * 2)(3, DIM)
        self.steps = (ctypes.c_int64 * 2)(DIM, 1)
        address = ctypes.addressof(self.memory)
        self.tensor = self.Tensor(address, device_type, device_index, 2, 2, 16, 1, self.dims, self.steps, 0, None, None)

    def __dlpack__(self, **options: Any) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self.tensor), b"dltensor", None)


@pytest.mark.parametrize(
    ("device", "name"),
    [((2, 0), "cuda:0"), ((2, 3), "cuda:3"), ((13, 0), "cuda:0"), ((10, 1), "rocm:1"), ((8, 0), "DLPack device type 8:0")],
)
def test_arrays_of_other_devices(device: tuple[int, int], name: str, plan: kvarn.Plan) -> None:
    away = OnDevice(*device)
    refused("hadamard", plan, "x", away, ValueError, f"expected float32|float16|bfloat16 [..., 64] on cpu, got float16 [3, 64] on {name}")
    refused("hadamard", plan, "out", away, ValueError, f"expected float16 [..., 64] on cpu, got float16 [3, 64] on {name}")
    assert set(away.memory) == {7}


@pytest.mark.parametrize("device", [1, 3, 11], ids=["pageable", "pinned by CUDA", "pinned by ROCm"])
def test_host_memory_of_every_kind(device: int, plan: kvarn.Plan) -> None:
    here = OnDevice(device, 0)
    out = np.zeros((3, DIM), np.float16)
    ops.hadamard(plan, here, out=out)
    np.testing.assert_array_equal(out, ops.hadamard(plan, np.array(here.memory).view(np.float16).reshape(3, DIM)))


def test_empty_arrays(plan: kvarn.Plan, to_library: Any) -> None:
    assert ops.hadamard(plan, to_library(np.zeros((0, DIM), np.float16))).shape == (0, DIM)
    values = arguments("append", plan)
    values.update(k=np.zeros((0, HEADS, DIM), np.float16), v=np.zeros((0, HEADS, DIM), np.float16), slot_mapping=np.zeros(0, np.int64))
    call("append", plan, {name: to_library(value) for name, value in values.items()})
    assert (values["staging"] == 7).all()
    values = arguments("encode", plan)
    values.update(slots=np.zeros(0, np.int32), blocks=np.zeros(0, np.int32))
    call("encode", plan, {name: to_library(value) for name, value in values.items()})
    assert (values["records"] == 7).all()
    values = arguments("attend", plan)
    values.update(records=np.zeros((0, HEADS, plan.record_bytes), np.uint8))
    call("attend", plan, {name: to_library(value) for name, value in values.items()})


def test_indices_out_of_range(plan: kvarn.Plan) -> None:
    values = arguments("append", plan)
    values["slot_mapping"][2] = 4 * TILE
    with pytest.raises(ValueError, match=r"\[kvarn.append\] slot_mapping\[2\]: expected .* got 128"):
        call("append", plan, values)
    assert (values["staging"] == 7).all()
    for name, index in (("slots", 4), ("blocks", 3), ("slots", -1), ("blocks", -1)):
        values = arguments("encode", plan)
        values[name][1] = index
        with pytest.raises(ValueError, match=rf"\[kvarn.encode\] {name}\[1\]: expected .* got {index}"):
            call("encode", plan, values)
        assert (values["records"] == 7).all()
    for name, index in (("blocks", 3), ("blocks", -1), ("destinations", 2), ("destinations", -1)):
        values = arguments("decode", plan)
        values[name][1] = index
        with pytest.raises(ValueError, match=rf"\[kvarn.decode\] {name}\[1\]: expected 0 to {1 + (name == 'blocks')}, got {index}"):
            call("decode", plan, values)
        assert (values["k"] == 7).all()
        assert (values["v"] == 7).all()
    values = arguments("attend", plan)
    values["block_table"][0, 0] = 3
    with pytest.raises(ValueError, match=r"\[kvarn.attend\] block_table\[0\]\[0\]: expected a block below 3"):
        call("attend", plan, values)
    values = arguments("attend", plan)
    values["seq_lens"][0] = 8 * TILE + 1
    with pytest.raises(ValueError, match=r"\[kvarn.attend\] seq_lens\[0\]: expected 0 to 256, got 257"):
        call("attend", plan, values)
    assert (values["out"] == 7).all()


def test_repeated_places_are_refused(plan: kvarn.Plan) -> None:
    for operation, name in (("append", "slot_mapping"), ("encode", "blocks"), ("decode", "destinations")):
        values = arguments(operation, plan)
        values[name][1] = values[name][0]
        text = rf"\[kvarn.{operation}\] {name}\[1\]: expected entries that are all different, got {values[name][0]} again \(first at 0\)"
        with pytest.raises(ValueError, match=text):
            call(operation, plan, values)
        for output in OUTPUTS[operation]:
            assert (values[output] == 7).all()


def test_decode_to_some_places_leaves_the_others(plan: kvarn.Plan, to_library: Any) -> None:
    values = arguments("decode", plan)
    for name in ("k", "v"):
        values[name] = np.full((5, HEADS, TILE, DIM), 7, np.float16)
    values["destinations"][:] = [3, 1]
    call("decode", plan, {name: to_library(value) for name, value in values.items()})
    for name in ("k", "v"):
        assert (values[name][[0, 2, 4]] == 7).all()
        assert (values[name][[1, 3]] == 0).all(), "a record of zeros decodes to zeros"
    # Without k and v there are no others to leave alone.
    alone = {name: value for name, value in values.items() if name not in ("k", "v")}
    with pytest.raises(TypeError, match=r"\[kvarn.decode\] k: expected k, v or both to write, .*, got None for both"):
        call("decode", plan, alone)


def test_choices_of_encode(plan: kvarn.Plan) -> None:
    for name in ("normalisation", "rounding"):
        with pytest.raises(ValueError, match=rf"\[kvarn.encode\] {name}: expected one of .*, got other"):
            ops.encode(plan, **arguments("encode", plan), **{name: "other"})


def test_attend_needs_a_plan_that_attends() -> None:
    plan = kvarn.Plan("k4v2_g32", head_dim=64, num_kv_heads=2)
    with pytest.raises(ValueError, match=r"\[kvarn.attend\] plan: expected .* num_q_heads = 0"):
        call("attend", plan, arguments("attend", plan))


def test_decode_of_k_and_v_share_strides(plan: kvarn.Plan) -> None:
    values = arguments("decode", plan)
    values["v"] = np.zeros((2, 3, TILE, DIM), np.float16)[:, :2]
    with pytest.raises(ValueError, match=r"\[kvarn.decode\] v: expected the strides of k"):
        call("decode", plan, values)


def test_the_gil_is_released(rng: np.random.Generator) -> None:
    plan = kvarn.Plan("k2v2_g256", head_dim=256, num_kv_heads=8, dtype="float32", num_threads=1)
    staging = rng.standard_normal((16, 2, 8, 256, 256), np.float32)
    records = np.zeros((16, 8, plan.record_bytes), np.uint8)
    index = np.arange(16, dtype=np.int32)
    started, done = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        ops.encode(plan, staging, records, index, index)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    steps = 0
    while not done.is_set():
        time.sleep(0.001)
        steps += 1
    thread.join()
    # A held GIL lets this thread take one step before the call and one after it. The call takes many times 10 ms.
    assert steps >= 10


def test_threads_may_share_a_plan(plan: kvarn.Plan, rng: np.random.Generator) -> None:
    x = rng.standard_normal((1024, DIM)).astype(np.float16)
    expected = ops.hadamard(plan, x)
    outputs = [np.zeros_like(x) for _ in range(4)]
    threads = [threading.Thread(target=lambda out=out: [ops.hadamard(plan, x, out=out) for _ in range(20)]) for out in outputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out in outputs:
        np.testing.assert_array_equal(out, expected)
