"""Plans and arrays of a GPU on machines without one: refusals, and what reaches a backend, through the test backends of the C++ build."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvarn

BUILD = os.environ.get("KVARN_CMAKE_BUILD_DIR")

# GPU arrays without a GPU: DLPack capsules of memory that nobody touches. The class stands in a module named as the library it plays.
FAKE_ARRAYS = """
import contextlib, ctypes, sys, types
import kvarn

class Managed(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device", ctypes.c_int32), ("ndim", ctypes.c_int32),
                ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p),
                ("strides", ctypes.c_void_p), ("offset", ctypes.c_uint64), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]

class Array:
    def __init__(self, device=1, kind=2):
        self.shape, self.dtype, self.index, self.kind = (3, 128), "float32", device, kind
        self.device = contextlib.nullcontext()
        self.sizes = (ctypes.c_int64 * 2)(3, 128)
        self.managed = Managed(0x10000, kind, device, 2, 2, 32, 1, ctypes.addressof(self.sizes), None, 0, None, None)
    def __dlpack_device__(self):
        return (self.kind, self.index)
    def __dlpack__(self, **options):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.managed), b"dltensor", None)

class Stream:
    def __init__(self, device):
        self.ptr = 0x1230 + device

cupy = sys.modules["cupy"] = types.ModuleType("cupy")
cupy.empty = lambda shape, dtype: Array() if (shape, dtype) == ((3, 128), "float32") else None
cupy.cuda = types.SimpleNamespace(get_current_stream=Stream)

def attempt(call):
    try:
        call()
    except kvarn.KvarnError as error:
        print(f"{type(error).__name__}: {error}")

plan = kvarn.Plan("k4v2_g128", head_dim=128, num_kv_heads=1, backend="cuda", device=1)
"""


def run(code: str, backends: str, **environment: str) -> list[str]:
    """Lines that `code` prints where the loadable backends are those of the C++ build's folder `backends`."""
    if not BUILD:
        pytest.skip("KVARN_CMAKE_BUILD_DIR is not set")
    folder = Path(BUILD).resolve() / backends
    if not (folder / "libkvarn_cuda.so").is_file():
        pytest.skip(f"the C++ build has no {backends}/libkvarn_cuda.so")
    variables = {**os.environ, "KVARN_BACKEND_PATH": str(folder), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_arrays_reach_the_backend_on_the_stream_of_their_library() -> None:
    code = FAKE_ARRAYS + 'Array.__module__ = "cupy._core.core"\nattempt(lambda: kvarn.ops.hadamard(plan, Array()))'
    assert run(code, "tests/cpp/backends/working") == [
        "LaunchError: [kvarn.hadamard] the test backend never launches 3 rows on stream 0x1231"
    ]


def test_a_library_whose_stream_is_not_known_is_refused() -> None:
    code = FAKE_ARRAYS + 'Array.__module__ = "somewhere.else"\nx = Array()\nattempt(lambda: kvarn.ops.hadamard(plan, x, out=x))'
    (line,) = run(code, "tests/cpp/backends/working")
    assert line.startswith("ArgumentTypeError: [kvarn.hadamard] x: expected an array of torch or cupy, or of a type with ")
    assert line.endswith("got float32 [3, 128] on cuda:1 of somewhere")


def test_arrays_of_another_device_are_refused() -> None:
    code = FAKE_ARRAYS + (
        "import numpy as np\n"
        'Array.__module__ = "cupy"\n'
        "attempt(lambda: kvarn.ops.hadamard(plan, np.zeros((3, 128), np.float32)))\n"
        "attempt(lambda: kvarn.ops.hadamard(plan, Array(device=0), out=Array()))\n"
        "attempt(lambda: kvarn.ops.hadamard(plan, Array(kind=10), out=Array()))\n"
        'attempt(lambda: kvarn.ops.hadamard(kvarn.Plan("k4v2_g128", head_dim=128, num_kv_heads=1), Array(), out=Array()))\n'
        'attempt(lambda: kvarn.Plan("k4v2_g128", head_dim=128, num_kv_heads=1, backend="cuda", device=2))'
    )
    expected = "InvalidArgumentError: [kvarn.hadamard] x: expected float32|float16|bfloat16 [..., 128] on "
    assert run(code, "tests/cpp/backends/working") == [
        expected + "cuda:1, got float32 [3, 128] on cpu",
        expected + "cuda:1, got float32 [3, 128] on cuda:0",
        expected + "cuda:1, got float32 [3, 128] on rocm:1",
        expected + "cpu, got float32 [3, 128] on cuda:1",
        "InvalidArgumentError: [kvarn.plan_create] device: expected 0 or 1",
    ]


NO_DEVICE = """
import kvarn, numpy as np
for make in (
    lambda: kvarn.Plan("k4v2_g128", head_dim=128, num_kv_heads=1, backend="cuda"),
    lambda: kvarn.Plan("k4v2_g128", head_dim=128, num_kv_heads=1),
):
    try:
        make()
    except kvarn.UnavailableError as error:
        print(error)
plan = kvarn.Plan("k4v2_g128", head_dim=128, num_kv_heads=1, backend="cpu")
print(kvarn.ops.hadamard(plan, np.ones((1, 128), np.float32))[0, 1:].any())
"""


@pytest.mark.parametrize("backends", ["lib", "tests/cpp/backends/unavailable"])
def test_a_machine_without_a_device(backends: str) -> None:
    """The CUDA backend that was built here, and a test backend, where no device is: an error that says so, and a CPU that works on."""
    if backends == "lib" and Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a CUDA device")
    *refused, works = run(NO_DEVICE, backends, KVARN_BACKEND="cuda")
    assert len(refused) == 2
    for source, line in zip(("backend", "KVARN_BACKEND"), refused, strict=True):
        assert line.startswith(f"[kvarn.plan_create] {source}: expected an available backend, got cuda: ")
        reason = line.partition("got cuda: ")[2]
        assert reason == "no device today" if "unavailable" in backends else "cudaError" in reason or reason == "no CUDA device"
    assert works == "False"


def test_a_cache_on_a_gpu_without_one() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("torch has a CUDA device")
    with pytest.raises(kvarn.UnavailableError, match=r"\[kvarn.Cache\] device: expected a torch that can use cuda, got .* without a GPU"):
        kvarn.Cache("k4v2_g128", num_layers=1, num_kv_heads=1, head_dim=128, device="cuda")
