"""The stand-in HIP runtime, called as a backend calls AMD's."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from amdsim import Module, write_bundle
from amdsim.fake_runtime import build_fake_runtime, environment, read_coverage

SUCCESS, INVALID_VALUE, INVALID_CONFIGURATION, NO_DEVICE, NO_BINARY, NOT_FOUND, ILLEGAL_ADDRESS, LAUNCH_FAILURE, CAPTURE_UNSUPPORTED = (
    0,
    1,
    9,
    100,
    209,
    500,
    700,
    719,
    900,
)
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
N = 256
Kernels = Callable[[str, str], Module]


class Hip:
    """The library, with a call that checks the status."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(build_fake_runtime() / "libamdhip64.so.7"))
        self.library.hipGetErrorString.restype = ctypes.c_char_p
        self.library.hipGetErrorName.restype = ctypes.c_char_p
        self.library.amdsim_last_trap.restype = ctypes.c_char_p

    def __call__(self, name: str, *arguments: object, expect: int = SUCCESS) -> None:
        status = getattr(self.library, name)(*arguments)
        assert status == expect, f"{name}: {self.library.hipGetErrorName(status).decode()}"

    def malloc(self, size: int) -> ctypes.c_void_p:
        pointer = ctypes.c_void_p()
        self("hipMalloc", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer

    def upload(self, array: np.ndarray) -> ctypes.c_void_p:
        pointer = self.malloc(array.nbytes)
        self("hipMemcpy", pointer, ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), HOST_TO_DEVICE)
        return pointer

    def download(self, pointer: ctypes.c_void_p, like: np.ndarray) -> np.ndarray:
        result = np.empty_like(like)
        self("hipMemcpy", ctypes.c_void_p(result.ctypes.data), pointer, ctypes.c_size_t(result.nbytes), DEVICE_TO_HOST)
        return result

    def function(self, bundle: bytes, name: str) -> ctypes.c_void_p:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self("hipModuleLoadData", ctypes.byref(module), bundle)
        self("hipModuleGetFunction", ctypes.byref(function), module, name.encode())
        return function

    def launch(self, function: ctypes.c_void_p, *arguments: object, threads: int = N, stream: object = None, expect: int = SUCCESS) -> None:
        pointers = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(a) for a in arguments])
        self("hipModuleLaunchKernel", function, 1, 1, 1, threads, 1, 1, 0, stream, pointers, None, expect=expect)


@pytest.fixture
def hip(target: str, monkeypatch: pytest.MonkeyPatch) -> Hip:
    """The runtime with one device of the target."""
    for name, value in environment(target).items():
        monkeypatch.setenv(name, value)
    return Hip()


@pytest.fixture
def bundle(target: str, kernels: Kernels, tmp_path: Path) -> bytes:
    """Kernels of this target and of one other, as they are embedded in a library."""
    other = "gfx1100" if target != "gfx1100" else "gfx90a"
    paths = {name: kernels("memory", name).code_object.path for name in (other, target)}
    write_bundle(tmp_path / "bundle", paths)
    return (tmp_path / "bundle").read_bytes()


def test_device_reports_its_target(target: str, hip: Hip) -> None:
    count, value = ctypes.c_int(), ctypes.c_int()
    hip("hipGetDeviceCount", ctypes.byref(count))
    assert count.value == 1
    properties = ctypes.create_string_buffer(1472)
    hip("hipGetDevicePropertiesR0600", properties, 0)
    assert properties.raw[1160:1416].split(b"\0")[0].decode().split(":")[0] == target
    wave_size_attribute = 87
    hip("hipDeviceGetAttribute", ctypes.byref(value), wave_size_attribute, 0)
    assert value.value == (64 if target.startswith("gfx9") else 32)
    hip("hipSetDevice", 1, expect=101)
    hip("hipDeviceGetAttribute", ctypes.byref(value), 9998, 0, expect=INVALID_VALUE)


def test_no_device(hip: Hip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AMDSIM_TARGET")
    count, pointer = ctypes.c_int(), ctypes.c_void_p()
    hip("hipGetDeviceCount", ctypes.byref(count), expect=NO_DEVICE)
    assert count.value == 0
    hip("hipMalloc", ctypes.byref(pointer), ctypes.c_size_t(4), expect=NO_DEVICE)
    assert hip.library.hipGetErrorString(NO_DEVICE) == b"no ROCm-capable device is detected"


def test_kernel_of_a_bundle_runs(hip: Hip, bundle: bytes) -> None:
    x, out = np.arange(1024, dtype=np.uint32), np.zeros(1024, np.uint32)
    device_x, device_out = hip.upload(x), hip.upload(out)
    hip.launch(hip.function(bundle, "global_wide"), device_x, device_out)
    hip("hipDeviceSynchronize")
    np.testing.assert_array_equal(hip.download(device_out, out).reshape(N, 4), x.reshape(N, 4)[:, ::-1])
    hip("hipFree", device_x)
    hip("hipFree", device_out)
    hip("hipFree", device_out, expect=17)


def test_work_on_a_stream_waits_for_its_synchronization(hip: Hip, bundle: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMDSIM_DEFERRED", "1")
    x, out = np.arange(1024, dtype=np.uint32), np.zeros(1024, np.uint32)
    device_x, device_out, stream = hip.malloc(x.nbytes), hip.malloc(out.nbytes), ctypes.c_void_p()
    function = hip.function(bundle, "global_wide")
    hip("hipStreamCreate", ctypes.byref(stream))
    hip("hipMemcpyAsync", device_x, ctypes.c_void_p(x.ctypes.data), ctypes.c_size_t(x.nbytes), HOST_TO_DEVICE, stream)
    hip("hipMemsetAsync", device_out, 0, ctypes.c_size_t(out.nbytes), stream)
    hip.launch(function, device_x, device_out, stream=stream)
    hip("hipMemcpyAsync", ctypes.c_void_p(out.ctypes.data), device_out, ctypes.c_size_t(out.nbytes), DEVICE_TO_HOST, stream)
    assert not out.any()
    hip("hipStreamSynchronize", stream)
    np.testing.assert_array_equal(out.reshape(N, 4), x.reshape(N, 4)[:, ::-1])
    hip("hipStreamDestroy", stream)


def test_errors_are_statuses_with_reasons(target: str, hip: Hip, bundle: bytes, kernels: Kernels) -> None:
    out = ctypes.c_void_p()
    foreign = kernels("memory", target).code_object.path.read_bytes()
    hip("hipModuleLoadData", ctypes.byref(out), foreign + bytes(64), expect=NO_BINARY)
    module = ctypes.c_void_p()
    hip("hipModuleLoadData", ctypes.byref(module), bundle)
    hip("hipModuleGetFunction", ctypes.byref(out), module, b"absent", expect=NOT_FOUND)
    function = hip.function(bundle, "global_wide")
    small, large = hip.malloc(64), hip.malloc(4096)
    hip.launch(function, small, large, threads=0, expect=INVALID_CONFIGURATION)
    hip.launch(function, small, large, expect=ILLEGAL_ADDRESS)
    assert b"global_wide: workgroup (0, 0, 0), wave 0" in hip.library.amdsim_last_trap()
    assert hip.library.hipGetLastError() == ILLEGAL_ADDRESS
    assert hip.library.hipGetLastError() == SUCCESS
    hip("hipMemcpy", small, large, ctypes.c_size_t(65), DEVICE_TO_HOST + 1, expect=INVALID_VALUE)


def test_a_graph_repeats_what_a_stream_captured(hip: Hip, bundle: bytes) -> None:
    x, out = np.arange(1024, dtype=np.uint32), np.zeros(1024, np.uint32)
    device_x, device_out, stream, graph, executable = hip.upload(x), hip.upload(out), *(ctypes.c_void_p() for _ in range(3))
    function = hip.function(bundle, "global_wide")
    hip("hipStreamCreate", ctypes.byref(stream))
    hip("hipStreamBeginCapture", stream, 1)
    hip.launch(function, device_x, device_out, stream=stream)
    # Nothing may wait, be allocated or go elsewhere in between.
    hip("hipDeviceSynchronize", expect=CAPTURE_UNSUPPORTED)
    hip("hipStreamSynchronize", stream, expect=CAPTURE_UNSUPPORTED)
    hip("hipMalloc", ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(64), expect=CAPTURE_UNSUPPORTED)
    hip.launch(function, device_x, device_out, expect=CAPTURE_UNSUPPORTED)
    hip("hipStreamEndCapture", stream, ctypes.byref(graph))
    hip("hipGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
    hip("hipGraphDestroy", graph)
    assert not hip.download(device_out, out).any()
    for values in (x, x + 7):
        hip("hipMemcpy", device_x, ctypes.c_void_p(values.ctypes.data), ctypes.c_size_t(values.nbytes), HOST_TO_DEVICE)
        hip("hipGraphLaunch", executable, stream)
        hip("hipStreamSynchronize", stream)
        np.testing.assert_array_equal(hip.download(device_out, out).reshape(N, 4), values.reshape(N, 4)[:, ::-1])
    hip("hipGraphExecDestroy", executable)
    hip("hipGraphLaunch", executable, stream, expect=400)


def test_each_device_has_its_own_modules_and_memory(target: str, hip: Hip, bundle: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMDSIM_TARGET", f"{target},gfx906,{target}")
    count, current = ctypes.c_int(), ctypes.c_int()
    hip("hipGetDeviceCount", ctypes.byref(count))
    assert count.value == 3
    x = np.arange(1024, dtype=np.uint32)
    try:
        hip("hipSetDevice", 2)
        hip("hipGetDevice", ctypes.byref(current))
        assert current.value == 2
        device_x, device_out, function = hip.upload(x), hip.upload(x), hip.function(bundle, "global_wide")
        hip("hipSetDevice", 1)
        hip("hipModuleLoadData", ctypes.byref(ctypes.c_void_p()), bundle, expect=NO_BINARY)
        foreign = hip.upload(x)
        hip.launch(function, device_x, device_out, expect=400)
        hip("hipSetDevice", 2)
        hip.launch(function, device_x, foreign, expect=ILLEGAL_ADDRESS)
        hip.launch(function, device_x, device_out)
        np.testing.assert_array_equal(hip.download(device_out, x).reshape(N, 4), x.reshape(N, 4)[:, ::-1])
    finally:
        hip("hipSetDevice", 0)
    hip("hipSetDevice", 3, expect=101)


def test_memory_that_is_free(hip: Hip) -> None:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    hip("hipMemGetInfo", ctypes.byref(free), ctypes.byref(total))
    before = free.value
    pointer = hip.malloc(1 << 20)
    hip("hipMemGetInfo", ctypes.byref(free), ctypes.byref(total))
    assert (before - free.value, total.value) == (1 << 20, 16 << 30)
    hip("hipFree", pointer)


def test_code_objects_lie_in_the_temporary_folder(hip: Hip, bundle: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    module = ctypes.c_void_p()
    (tmp_path / "temporary").mkdir()
    hip("hipModuleLoadData", ctypes.byref(module), bundle)
    (file,) = (tmp_path / "temporary").iterdir()
    assert file.read_bytes()[:4] == b"\x7fELF"
    hip("hipModuleUnload", module)
    assert not file.exists()


def test_registered_host_memory_is_device_memory(hip: Hip, bundle: bytes) -> None:
    x, out = np.arange(1024, dtype=np.uint32), np.zeros(1024, np.uint32)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (x, out)]
    attributes = (ctypes.c_int * 8)()
    hip("hipPointerGetAttributes", attributes, pointers[0])
    assert list(attributes[:2]) == [0, -1]
    for pointer in pointers:
        hip("amdsim_register", pointer, ctypes.c_size_t(x.nbytes))
    hip("hipPointerGetAttributes", attributes, pointers[0])
    device_memory = 2
    assert list(attributes[:2]) == [device_memory, 0]
    hip.launch(hip.function(bundle, "global_wide"), *pointers)
    np.testing.assert_array_equal(out.reshape(N, 4), x.reshape(N, 4)[:, ::-1])
    for pointer in pointers:
        hip("amdsim_unregister", pointer)
    hip.launch(hip.function(bundle, "global_wide"), *pointers, expect=ILLEGAL_ADDRESS)
    # Memory that was given back and is registered with other limits is what was said last.
    hip("amdsim_register", pointers[0], ctypes.c_size_t(x.nbytes))
    hip("amdsim_register", pointers[1], ctypes.c_size_t(64))
    hip("amdsim_register", ctypes.c_void_p(out.ctypes.data + 32), ctypes.c_size_t(x.nbytes - 32))
    hip.launch(hip.function(bundle, "global_wide"), *pointers, expect=ILLEGAL_ADDRESS)
    hip("amdsim_register", pointers[1], ctypes.c_size_t(x.nbytes))
    hip.launch(hip.function(bundle, "global_wide"), *pointers)
    for pointer in pointers:
        hip("amdsim_unregister", pointer)


def test_coverage_is_written_when_a_module_is_unloaded(
    target: str, hip: Hip, bundle: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMDSIM_COVERAGE", str(tmp_path))
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    hip("hipModuleLoadData", ctypes.byref(module), bundle)
    hip("hipModuleGetFunction", ctypes.byref(function), module, b"jump_table")
    x, out = np.arange(1024, dtype=np.uint32), np.zeros(1024, np.uint32)
    device_x, device_out = hip.upload(x), hip.upload(out)
    hip.launch(function, device_x, device_out)
    hip("hipModuleUnload", module)
    coverage = read_coverage(tmp_path)[target, "jump_table"]
    # One of eight cases ran.
    assert 0 < coverage.executed < coverage.total
    assert len(coverage.missed) == coverage.total - coverage.executed


def test_a_process_without_the_translator_says_so(hip: Hip, bundle: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMDSIM_PACKAGE", os.devnull)
    a, b = hip.malloc(4096), hip.malloc(4096)
    hip.launch(hip.function(bundle, "scratch"), a, b, expect=LAUNCH_FAILURE)
    assert b"translation failed" in hip.library.amdsim_last_trap()
