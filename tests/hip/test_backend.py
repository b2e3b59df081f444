"""What the HIP backend says where it cannot run, and what its Python side refuses. Each case is a process of its own: the library looks
for the runtime once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from amdsim.fake_runtime import environment
from amdsim.testing import require_toolchain

DETAIL = "import kvarn; print(next(b for b in kvarn.backends() if b.name == 'hip').detail)"
PLAN = """
import kvarn
try:
    kvarn.Plan("k4v2_g128", head_dim=128, num_kv_heads=1, backend="hip")
except kvarn.UnavailableError as error:
    print(error)
"""


def run(hip_build, code: str, variables: dict[str, str]) -> str:
    variables = {"KVARN_BACKEND_PATH": str(hip_build.parent / "lib"), **variables}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | variables, check=True
    ).stdout.strip()


def test_without_a_runtime_the_reason_names_the_libraries(hip_build):
    expected = "no AMD runtime (looked for libamdhip64.so.7, libamdhip64.so.6, libamdhip64.so.5, libamdhip64.so)"
    assert run(hip_build, DETAIL, {}) == expected
    assert run(hip_build, PLAN, {}) == f"[kvarn.plan_create] backend: expected an available backend, got hip: {expected}"


def test_without_a_device_the_reason_is_the_runtimes(hip_build):
    require_toolchain()
    assert run(hip_build, DETAIL, environment(None)) == "libamdhip64.so.7: hipErrorNoDevice: no ROCm-capable device is detected"


def test_a_runtime_that_lacks_a_function_is_named(hip_build, tmp_path):
    require_toolchain()
    compiler = os.environ.get("CXX", "g++")
    (tmp_path / "old.cpp").write_text("")
    library = tmp_path / "libamdhip64.so.7"
    subprocess.run([compiler, "-shared", "-o", str(library), str(tmp_path / "old.cpp")], check=True)
    assert run(hip_build, DETAIL, {"LD_LIBRARY_PATH": str(tmp_path)}) == "libamdhip64.so.7: no function hipGetDeviceCount"


def test_a_device_of_another_target_is_told_what_was_built(hip_build):
    require_toolchain()
    if "gfx950" in (hip_build / "bundles.cpp").read_text():
        pytest.skip("this build has kernels for every target that the stand-in runtime knows")
    detail = run(hip_build, DETAIL, environment("gfx950"))
    assert detail.startswith("emulated gfx950 (gfx950): built for gfx90a, gfx942, gfx1030, gfx1100, gfx1200")
    assert "hipErrorNoBinaryForGpu" in detail


def test_a_device_is_listed_with_its_target(hip_build):
    require_toolchain()
    assert run(hip_build, DETAIL, environment("gfx1100")) == "emulated gfx1100 (gfx1100)"


ATTENTION = """
import itertools, kvarn
bits, dims = (2, 3, 4, 5, 6, 8), (64, 80, 96, 112, 128, 160, 192, 256, 512)
tokens, dtypes = (32, 64, 128, 256), ("float16", "bfloat16", "float32")
cases = [(f"k{k}v{v}_g128", dim, "float16") for k, v in zip(bits + bits, bits + bits[::-1]) for dim in dims]
cases += [(f"k4v2_g{g}{m}", 128, dtype) for g in tokens for m in ("", "_m8") for dtype in dtypes]
for name, dim, dtype in cases:
    config = {"head_dim": dim, "num_kv_heads": 1, "num_q_heads": 4, "dtype": dtype, "max_num_seqs": 1, "max_q_tokens": 1, "max_tiles": 1}
    plan = kvarn.Plan(name, backend="hip", **config)
    print(name, dim, dtype, plan.describe.rsplit(", ", 1)[1], sep="|")
"""


@pytest.mark.parametrize("target", ["gfx942", "gfx1100"])
def test_every_format_has_attention_and_the_plan_says_which(hip_build, target):
    """README.md says the same: matrix instructions for the formats of a rule, vector instructions for all others."""
    require_toolchain()
    lines = [line.split("|") for line in run(hip_build, ATTENTION, environment(target)).splitlines()]
    assert len(lines) == 12 * 9 + 24
    for name, dim, dtype, attention in lines:
        widths = set(name[1:4:2]) <= set("2348")
        dims = (64, 128, 256) if target == "gfx942" else (64, 128)
        matrix = widths and name.endswith("_g128") and int(dim) in dims and dtype != "float32"
        assert attention == ("matrix cores" if matrix else "generic attention"), name


HOST_ARRAY = """
import numpy as np, kvarn
plan = kvarn.Plan("k4v2_g128", head_dim=128, num_kv_heads=1, backend="hip")
try:
    kvarn.ops.hadamard(plan, np.zeros((1, 128), np.float16))
except kvarn.InvalidArgumentError as error:
    print(error)
"""


def test_host_arrays_are_refused(hip_build):
    require_toolchain()
    message = run(hip_build, HOST_ARRAY, environment("gfx942"))
    assert message == "[kvarn.hadamard] x: expected float32|float16|bfloat16 [..., 128] on rocm:0, got float16 [1, 128] on cpu"


CUDA_ARRAY = HOST_ARRAY.replace("np.zeros((1, 128), np.float16)", "array").replace(
    "try:",
    """from kvarn._hip_memory import HipArray, HipRuntime
array = HipArray(HipRuntime(), np.zeros((1, 128), np.float16))
array.managed.tensor.device.type = 2
try:""",
)


def test_arrays_of_cuda_devices_are_refused(hip_build):
    require_toolchain()
    assert "on rocm:0, got float16 [1, 128] on cuda:0" in run(hip_build, CUDA_ARRAY, environment("gfx942"))


@pytest.mark.slow
def test_the_doctor_finds_nothing_wrong(hip_build, tmp_path):
    require_toolchain()
    report = tmp_path / "report.txt"
    command = f"from kvarn.cli import app; app(['doctor', '--backend', 'hip', '--output', {str(report)!r}])"
    assert "checks passed; the report is in" in run(hip_build, command, environment("gfx942"))
    lines = report.read_text().splitlines()
    checks = [line for line in lines if line.startswith(("ok  ", "FAIL"))]
    assert not [line for line in checks if line.startswith("FAIL")]
    for operation in ("append", "encode", "encode with feedback", "decode", "attend"):
        assert sum(line.startswith(f"ok   {operation}, ") for line in checks) == 8, operation
