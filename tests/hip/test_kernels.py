"""Every kernel of the HIP backend, for every target: its machine code run in the emulator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from amdsim import Module
from amdsim.fake_runtime import environment, read_coverage
from amdsim.testing import require_toolchain

#: gfx1201 has the code of gfx1200, which test_resources.py shows.
TARGETS = ("gfx90a", "gfx942", "gfx1030", "gfx1100", "gfx1200")
DEVICE_TESTS = Path(__file__).parent / "device"
SOURCES = ("rows", "encode", "attend_generic", "attend_matrix")
#: Part of each kernel's instructions that the tests must execute. What is left are branches for quotients of 64 bits, for rows that are not
#: aligned, for element types that a kernel shares with others, and for numbers beyond the normal range.
LEAST_COVERAGE = 0.6


@pytest.fixture(scope="module")
def runs(hip_build, tmp_path_factory):
    """A function from a target to (finished process, folder of coverage) of tests/hip/device on the stand-in runtime, run once."""
    require_toolchain()
    done: dict[str, tuple[subprocess.CompletedProcess[str], Path]] = {}

    def run(target: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        if target not in done:
            coverage = tmp_path_factory.mktemp(target)
            variables = environment(target, coverage=coverage)
            # Few multiprocessors, so that work is split unevenly and sequences are cut into parts, which come in random order.
            variables |= {"KVARN_BACKEND_PATH": str(hip_build.parent / "lib"), "AMDSIM_PROCESSORS": "3", "AMDSIM_INTERLEAVE": "1"}
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(DEVICE_TESTS)]
            process = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, check=False)
            done[target] = (process, coverage)
        return done[target]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_machine_code_passes_the_device_tests(runs, target):
    process, _ = runs(target)
    summary = process.stdout.strip().splitlines()[-1] if process.stdout.strip() else ""
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    assert "passed" in summary
    assert "skipped" not in summary


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_device_tests_execute_the_kernels(runs, hip_build, target):
    _, folder = runs(target)
    coverage = {kernel: executed for (_, kernel), executed in read_coverage(folder).items()}
    kernels = {kernel for source in SOURCES for kernel in Module(hip_build / f"{source}.{target}.co").kernels}
    assert set(coverage) == kernels
    low = {kernel: round(executed.fraction, 3) for kernel, executed in coverage.items() if executed.fraction < LEAST_COVERAGE}
    assert not low
