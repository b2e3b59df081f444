"""Configuring with and without a compiler for AMD GPUs: what is chosen, and what is said where nothing is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from amdsim.testing import require_toolchain
from amdsim.toolchain import toolchain

ROOT = Path(__file__).resolve().parents[2]
BASE = {"KVARN_CUDA": "OFF", "KVARN_BUILD_TESTS": "OFF", "KVARN_HIP_ARCHITECTURES": "gfx90a"}


@pytest.fixture
def configure(tmp_path):
    """A function from options and variables of the environment to a finished ``cmake`` in tmp_path/build."""
    require_toolchain()
    if not shutil.which("cmake"):
        pytest.skip("cmake is not installed")

    def run(options: dict[str, str], **variables: str) -> subprocess.CompletedProcess[str]:
        command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build")]
        command += [f"-D{name}={value}" for name, value in (BASE | options).items()]
        environment = {name: value for name, value in os.environ.items() if name != "ROCM_PATH"} | variables
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    return run


def said(process: subprocess.CompletedProcess[str]) -> str:
    return " ".join((process.stdout + process.stderr).split())


#: CMake finds no program but those that it is given, as on a machine without a clang.
NO_CLANG = {
    "CMAKE_FIND_ROOT_PATH": "/nonexistent",
    "CMAKE_FIND_ROOT_PATH_MODE_PROGRAM": "ONLY",
    "CMAKE_CXX_COMPILER": shutil.which("g++") or "",
    "CMAKE_MAKE_PROGRAM": shutil.which("make") or shutil.which("ninja") or "",
    "CMAKE_AR": shutil.which("ar") or "",
}


def test_without_a_compiler_the_rest_is_built_and_a_note_says_so(configure, tmp_path):
    done = configure(NO_CLANG)
    assert done.returncode == 0, said(done)
    assert "HIP backend: not built (no clang++ found that compiles for AMD GPUs (Debian: clang-19 and lld-19))" in said(done)
    targets = subprocess.run(["cmake", "--build", str(tmp_path / "build"), "--target", "help"], capture_output=True, text=True, check=True)
    assert re.search(r"\bkvarn\b", targets.stdout)
    assert "kvarn_hip" not in targets.stdout


def test_without_a_compiler_that_is_asked_for_configuring_ends(configure):
    done = configure({**NO_CLANG, "KVARN_HIP": "ON"})
    assert done.returncode != 0
    assert "KVARN_HIP=ON: no clang++ found that compiles for AMD GPUs" in said(done)


def test_a_compiler_that_does_not_compile_for_amd_is_refused(configure):
    done = configure({"KVARN_HIP": "ON", "KVARN_HIP_CLANG": "/bin/false"})
    assert done.returncode != 0
    assert "KVARN_HIP=ON: /bin/false does not compile for AMD GPUs" in said(done)


@pytest.mark.parametrize("place", ["llvm/bin/amdclang++", "llvm/bin/clang++", "bin/amdclang++", "bin/hipcc"])
def test_the_compiler_of_a_rocm_that_the_environment_names_is_taken(configure, tmp_path, place):
    """Debian's clang in the places of a ROCm: AMD's own was not to be had."""
    compiler = tmp_path / "rocm" / place
    compiler.parent.mkdir(parents=True)
    if place.endswith("hipcc"):  # in ROCm a program that calls clang with more arguments
        compiler.write_text(f'#!/bin/sh\nexec {toolchain().clang} "$@"\n')
        compiler.chmod(0o755)
    else:
        compiler.symlink_to(toolchain().clang)
    done = configure({"KVARN_HIP": "ON", "CMAKE_GENERATOR": "Ninja"}, ROCM_PATH=str(tmp_path / "rocm"))
    assert done.returncode == 0, said(done)
    assert f"HIP backend: {compiler} for gfx90a" in said(done)
    build = ["cmake", "--build", str(tmp_path / "build"), "--target", "hip/rows.gfx90a.co"]
    assert subprocess.run(build, capture_output=True, check=False).returncode == 0
    assert (tmp_path / "build" / "hip" / "rows.gfx90a.co").read_bytes()[:4] == b"\x7fELF"


def test_a_rocm_without_a_compiler_is_passed_over_aloud(configure, tmp_path):
    done = configure({"KVARN_HIP": "ON"}, ROCM_PATH=str(tmp_path / "rocm"))
    assert done.returncode == 0, said(done)
    assert f"HIP backend: no compiler in ROCM_PATH={tmp_path / 'rocm'} compiles for AMD GPUs" in said(done)
    assert re.search(r"HIP backend: \S*clang\+\+\S* for gfx90a", said(done))


def test_rocm_headers_that_cannot_be_used_end_the_configuration(configure, tmp_path):
    options = {"KVARN_HIP": "ON", "KVARN_HIP_ROCM_HEADERS": "ON", "KVARN_HIP_CLANG": str(toolchain().clang)}
    configured = configure(options, ROCM_PATH=str(tmp_path / "none"))
    assert configured.returncode != 0
    expected = r"KVARN_HIP_ROCM_HEADERS=ON: expected a ROCm whose <hip/hip_runtime.h> \S+ compiles for gfx90a .*ROCM_PATH.*, got: .*error"
    assert re.search(expected, said(configured))
