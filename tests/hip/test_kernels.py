"""Every kernel of the HIP backend, for every target: its machine code run in the emulator."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from amdsim import Module
from amdsim.fake_runtime import build_fake_runtime, environment, read_coverage
from amdsim.testing import require_toolchain

#: gfx1201 has the code of gfx1200, which test_resources.py shows. gfx950 is built by newer compilers than clang 19.
TARGETS = ("gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100", "gfx1200")
DEVICE_TESTS = Path(__file__).parent / "device"
SOURCES = ("rows", "encode", "attend_generic", "attend_matrix")
#: One target of each wave size, for what costs more than it shows of the others.
TWO_TARGETS = ("gfx942", "gfx1100")
#: Needs torch and transformers, and seconds for each target.
TORCH_TEST = DEVICE_TESTS / "test_transformers_cache.py"
#: Part of a kernel's instructions that the tests execute, at least on every target. What is left: quotients of numbers beyond
#: 32 bits, some 130 instructions each; in the kernels for one head dimension the rotation of other ones; rows that are not aligned; the
#: rounding of NaN and of numbers beyond the normal range.
LEAST_COVERAGE = {
    "append_d64": 0.62,
    "append_d128": 0.65,
    "append_d256": 0.69,
    "append_d512": 0.73,
    "append_any": 0.77,
    "attend_d64_r8": 0.73,
    "attend_d64_r16": 0.72,
    "attend_d128_r8": 0.80,
    "attend_d128_r16": 0.80,
    "attend_d256_r8": 0.85,
    "attend_generic": 0.77,
    "decode_d64": 0.97,
    "decode_d128": 0.96,
    "decode_d256": 0.96,
    "decode_d512": 0.94,
    "decode_any": 0.88,
    "encode_f16": 0.91,
    "encode_bf16": 0.92,
    "encode_f32": 0.90,
    "hadamard_d64": 0.97,
    "hadamard_d128": 0.88,
    "hadamard_d256": 0.88,
    "hadamard_d512": 0.87,
    "hadamard_any": 0.85,
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


def run_target(target: str, hip_build: Path, coverage: Path) -> subprocess.CompletedProcess[str]:
    # Few multiprocessors, so that work is split unevenly and sequences are cut into parts, which come in random order.
    variables = environment(target, coverage=coverage) | library(hip_build) | {"AMDSIM_PROCESSORS": "3", "AMDSIM_INTERLEAVE": "1"}
    return device_tests(variables, str(DEVICE_TESTS), *(("--ignore", str(TORCH_TEST)) if target not in TWO_TARGETS else ()))


@pytest.fixture(scope="module")
def runs(request, hip_build, tmp_path_factory):
    """A function from a target to (finished process, folder of coverage) of tests/hip/device on the stand-in runtime. The targets of the
    tests that were chosen run side by side, first one of each wave size: what is compiled for one serves the others."""
    require_toolchain()
    build_fake_runtime()
    chosen = {item.callspec.params["target"] for item in request.session.items if "runs" in getattr(item, "fixturenames", ())}
    built = [target for target in TARGETS if target in chosen and (hip_build / f"rows.{target}.co").exists()]
    built.sort(key=lambda target: target not in TWO_TARGETS)
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        folders = {target: tmp_path_factory.mktemp(target) for target in built}
        started = {target: pool.submit(run_target, target, hip_build, folders[target]) for target in built}

        def run(target: str) -> tuple[subprocess.CompletedProcess[str], Path]:
            if target not in started:
                assert target == "gfx950"
                pytest.skip("the compiler of this build does not know gfx950")
            return started[target].result(), folders[target]

        yield run
        for future in started.values():
            future.cancel()


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
    low = {name: round(run.fraction, 3) for name, run in coverage.items() if run.fraction < LEAST_COVERAGE[name.removeprefix("kvarn_")]}
    assert not low
