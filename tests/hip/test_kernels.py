"""Every kernel of the HIP backend, for every target: its machine code run in the emulator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from amdsim import Module
from amdsim.fake_runtime import environment, read_coverage
from amdsim.testing import require_target, require_toolchain

#: gfx1201 has the code of gfx1200, which test_resources.py shows. gfx950 is built by newer compilers than clang 19.
TARGETS = ("gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100", "gfx1200")
DEVICE_TESTS = Path(__file__).parent / "device"
SOURCES = ("rows", "encode", "attend_generic", "attend_matrix")
#: One target of each wave size, for what costs more than it shows of the others.
TWO_TARGETS = ("gfx942", "gfx1100")
#: Needs torch and transformers, and seconds for each target.
TORCH_TEST = DEVICE_TESTS / "test_transformers_cache.py"
#: Part of a kernel's instructions that the tests execute, at least, by the beginning of its name. What is left: quotients of numbers beyond
#: 32 bits, some 130 instructions each; in the kernels for one head dimension the rotation of other ones; rows that are not aligned; the
#: rounding of NaN and of numbers beyond the normal range.
LEAST_COVERAGE = {
    "kvarn_append_": 0.63,
    "kvarn_attend_d128_": 0.80,
    "kvarn_attend_d256_": 0.85,
    "kvarn_attend_d64_": 0.72,
    "kvarn_attend_generic": 0.77,
    "kvarn_decode_": 0.80,
    "kvarn_encode_": 0.85,
    "kvarn_hadamard_": 0.85,
}


def library(hip_build: Path) -> dict[str, str]:
    return {"KVARN_BACKEND_PATH": str(hip_build.parent / "lib")}


def device_tests(variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, check=False)


def check(process: subprocess.CompletedProcess[str]) -> None:
    summary = process.stdout.strip().splitlines()[-1] if process.stdout.strip() else ""
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    assert "passed" in summary
    assert "skipped" not in summary


@pytest.fixture(scope="module")
def runs(hip_build, tmp_path_factory):
    """A function from a target to (finished process, folder of coverage) of tests/hip/device on the stand-in runtime, run once."""
    done: dict[str, tuple[subprocess.CompletedProcess[str], Path]] = {}

    def run(target: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        require_target(target)
        if target == "gfx950" and not (hip_build / "rows.gfx950.co").exists():
            pytest.skip("the compiler of this build does not know gfx950")
        if target not in done:
            coverage = tmp_path_factory.mktemp(target)
            variables = environment(target, coverage=coverage)
            # Few multiprocessors, so that work is split unevenly and sequences are cut into parts, which come in random order.
            variables |= library(hip_build) | {"AMDSIM_PROCESSORS": "3", "AMDSIM_INTERLEAVE": "1"}
            arguments = (str(DEVICE_TESTS), *(("--ignore", str(TORCH_TEST)) if target not in TWO_TARGETS else ()))
            done[target] = (device_tests(variables, *arguments), coverage)
        return done[target]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_machine_code_passes_the_device_tests(runs, target):
    process, _ = runs(target)
    check(process)


@pytest.mark.slow
@pytest.mark.parametrize("target", TWO_TARGETS)
def test_work_that_runs_late_and_in_descending_order_gives_the_same(hip_build, target):
    """Queued work runs when something waits for it, workgroups and waves from the last to the first."""
    require_toolchain()
    variables = environment(target) | library(hip_build) | {"AMDSIM_PROCESSORS": "3", "AMDSIM_DEFERRED": "1", "AMDSIM_REVERSE": "1"}
    check(device_tests(variables, str(DEVICE_TESTS / "test_attend.py"), str(DEVICE_TESTS / "test_cache_with_moments.py")))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_device_tests_execute_the_kernels(runs, hip_build, target):
    _, folder = runs(target)
    coverage = {kernel: executed for (_, kernel), executed in read_coverage(folder).items()}
    kernels = {kernel for source in SOURCES for kernel in Module(hip_build / f"{source}.{target}.co").kernels}
    assert set(coverage) == kernels
    least = {kernel: [part for name, part in LEAST_COVERAGE.items() if kernel.startswith(name)] for kernel in kernels}
    low = {kernel: round(executed.fraction, 3) for kernel, executed in coverage.items() if [executed.fraction] < least[kernel]}
    assert not low
