"""``kvarn doctor`` and ``kvarn bench`` on the HIP backend: over the stand-in runtime, and what they say where something is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from amdsim.fake_runtime import environment
from amdsim.testing import require_toolchain

MAIN = "import sys; from kvarn.__main__ import main; sys.exit(main())"
BENCH = ("bench", "--backend", "hip", "--tokens", "300", "--q-heads", "4", "--kv-heads", "1", "--seconds", "0.05")
NO_TORCH = "import sys; sys.modules['torch'] = None"


@pytest.fixture
def command(hip_build):
    """A function from variables and arguments, and Python code to run before, to a finished ``kvarn``."""
    require_toolchain()

    def run(variables: dict[str, str], *arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
        variables = {"KVARN_BACKEND_PATH": str(hip_build.parent / "lib"), "COLUMNS": "200", **variables}
        command = [sys.executable, "-c", f"{code}\n{MAIN}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, check=False)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gfx942", "gfx1201"])
def test_the_doctor_finds_nothing_wrong(command, tmp_path, target):
    report = tmp_path / "report.json"
    done = command(environment(target), "doctor", "--backend", "hip", "--quick", "--output", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(report.read_text())
    assert data["result"] == "passed"
    assert data["plan"] == f"hip:0, emulated {target} ({target}), matrix cores"
    assert data["runtime"] == "HIP 7.0.0 (libamdhip64.so.7)"
    outcomes = {result["group"]: result["outcome"] for result in data["results"]}
    cache = outcomes.pop("cache")
    assert set(outcomes) == {"hadamard", "append", "encode and decode", "attend", "graph", "refusals"}
    assert set(outcomes.values()) == {"passed"}
    # Arrays of a cache are torch's, and this torch has no AMD GPU.
    assert cache == "skipped"
    reasons = {result["reason"] for result in data["results"] if result["group"] == "cache"}
    assert all("expected a torch built for ROCm" in reason or "expected torch" in reason for reason in reasons)


# One bit of whatever is read back from the device is wrong.
WRONG_DEVICE = """
from kvarn import _hip_memory
true = _hip_memory.HipArray.numpy
def wrong(self, **arguments):
    host = true(self, **arguments)
    if host.nbytes: host.reshape(-1).view("u1")[host.nbytes // 2] ^= 64
    return host
_hip_memory.HipArray.numpy = wrong
"""


def test_the_doctor_reports_a_device_that_computes_wrongly(command, tmp_path):
    report = tmp_path / "report.md"
    done = command(environment("gfx1100"), "doctor", "--backend", "hip", "--quick", "--output", str(report), code=WRONG_DEVICE)
    assert done.returncode == 1
    outcomes = {tuple(line.partition(": ")[0].split(maxsplit=1)) for line in done.stdout.splitlines()[:-1]}
    # A bit may be lost in the tolerance of attention.
    for group in ("hadamard", "append", "encode and decode", "graph", "refusals"):
        assert {outcome for outcome, name in outcomes if name == group} == {"failed"}, group
    assert report.read_text().startswith("# kvarn doctor, backend hip: failed\n")


# Blocks beyond the end of an array that is said to be longer than it is: the emulator's device faults.
FAULT = """
from kvarn._doctor import checks
true = checks._hadamard
def beyond(dim, device):
    from kvarn import ops
    import numpy as np
    reference, plan = checks._plans(device, "k4v2_g32", head_dim=dim, num_kv_heads=1)
    short = device.put(np.zeros((1, dim), np.float16))
    short._shape[0] = 4096
    ops.hadamard(plan, short, out=short)
    yield from ()
checks._hadamard = beyond
"""


def test_the_doctor_reports_a_fault_of_the_device(command, tmp_path):
    report = tmp_path / "report.md"
    done = command(environment("gfx942"), "doctor", "--backend", "hip", "--quick", "--output", str(report), code=FAULT)
    assert done.returncode == 1
    assert "hipErrorIllegalAddress" in report.read_text()


@pytest.mark.parametrize("name", ["doctor", "bench"])
def test_without_a_runtime_or_a_device_the_reason_is_theirs(command, no_runtime, tmp_path, name):
    arguments = BENCH if name == "bench" else ("doctor", "--backend", "hip", "--output", str(tmp_path / "report.md"))
    for variables, reason in (
        (no_runtime, "no AMD runtime (looked for libamdhip64.so.7, libamdhip64.so.6, libamdhip64.so.5, libamdhip64.so)"),
        (environment(None), "libamdhip64.so.7: hipErrorNoDevice: no ROCm-capable device is detected"),
    ):
        for code in ("", NO_TORCH):
            done = command(variables, *arguments, code=code)
            assert done.returncode == 1
            assert done.stderr == f"kvarn: [kvarn.{name}] backend: expected one that can run here, got hip: {reason}\n"


@pytest.mark.parametrize("target", ["gfx90a", "gfx1100"])
def test_bench_needs_no_torch(command, target):
    done = command(environment(target), *BENCH, code=NO_TORCH)
    assert done.returncode == 0, done.stderr
    assert f"1 x 300 tokens, 4 query heads over 1, k4v2_g128, float16, hip:0, emulated {target} ({target}), matrix cores" in done.stdout
    assert "no comparison with PyTorch's attention: it is not installed" in done.stdout
    for row in ("copy of as many bytes", "attend, k4v2_g128", "append and encode"):
        assert row in done.stdout
    assert "PyTorch attention" not in done.stdout


def test_bench_does_not_compare_with_a_torch_that_has_no_amd_gpu(command):
    torch = pytest.importorskip("torch")
    if torch.version.hip:
        pytest.skip("this torch is built for ROCm")
    done = command(environment("gfx942"), *BENCH, "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert f"expected a torch built for ROCm, got {torch.__version__} built for " in done.stdout


CACHE = """
import kvarn
try:
    kvarn.Cache("k4v2_g128", num_layers=1, num_kv_heads=1, head_dim=128, device="hip")
except kvarn.UnavailableError as error:
    print(error)
sys.exit()
"""


def test_a_cache_says_whether_a_runtime_a_device_or_a_torch_is_missing(command, no_runtime):
    pytest.importorskip("torch")
    asked = [
        command(variables, code=code + CACHE).stdout.strip()
        for variables, code in (
            (no_runtime, "import sys\n"),
            (environment(None), "import sys\n"),
            (environment("gfx942"), NO_TORCH + "\n"),
            (environment("gfx942"), "import sys\n"),
        )
    ]
    assert "got none: no AMD runtime (looked for" in asked[0]
    assert "got none: libamdhip64.so.7: hipErrorNoDevice" in asked[1]
    assert asked[2] == "[kvarn.Cache] device: expected torch, which allocates on hip, got none"
    assert "expected a torch built for ROCm, which allocates on hip, got" in asked[3]
