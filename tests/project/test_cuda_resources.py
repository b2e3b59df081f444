"""Kernels that run at every decode step or hold a tile keep their values in registers: on no target do they spill or use local memory."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

BUILD = os.environ.get("KVARN_CMAKE_BUILD_DIR")
# Mangled names: attention on tensor cores, encoding of tiles in registers, and what append, hadamard and decode run.
KERNELS = ("attend_mma_kernel", "encode_registers_kernel", "append_kernel", "hadamard_kernel", "13decode_kernel")
ARCHITECTURE = re.compile(r"^arch = (sm_\w+)")
FUNCTION = re.compile(r"^\s*Function (\S+):")
# A spilled register and an array in local memory both lie on the stack.
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


def resources(report: str) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(architecture, kernel) -> registers, bytes of stack, bytes of local memory, out of what cuobjdump --dump-resource-usage prints."""
    found: dict[tuple[str, str], tuple[int, int, int]] = {}
    architecture = function = ""
    for line in report.splitlines():
        if match := ARCHITECTURE.search(line):
            architecture = match[1]
        elif match := FUNCTION.search(line):
            function = match[1]
        elif match := USAGE.search(line):
            found[architecture, function] = (int(match[1]), int(match[2]), int(match[3]))
    return found


def built_targets() -> set[str]:
    """Machine-code targets of the build: "sm_90a" of "90a-real"."""
    cache = (Path(BUILD or "") / "CMakeCache.txt").read_text()
    match = re.search(r"^KVARN_CUDA_ARCHITECTURES:\w+=(.*)$", cache, re.MULTILINE)
    return {f"sm_{name.removesuffix('-real')}" for name in (match[1] if match else "").split(";") if not name.endswith("-virtual")}


def test_kernels_do_not_spill():
    if not BUILD:
        pytest.skip("KVARN_CMAKE_BUILD_DIR is not set")
    library = Path(BUILD) / "lib" / "libkvarn_cuda.so"
    if not library.is_file():
        pytest.skip("the C++ build has no CUDA backend")
    if not shutil.which("cuobjdump"):
        pytest.skip("cuobjdump is not installed")
    report = subprocess.run(["cuobjdump", "--dump-resource-usage", str(library)], check=True, capture_output=True, text=True).stdout
    found = {key: usage for key, usage in resources(report).items() if re.search("|".join(KERNELS), key[1])}
    assert {architecture for architecture, _ in found} == built_targets()
    for kernel in KERNELS:
        assert any(kernel in name for _, name in found), f"no {kernel} in the report"
    spills = {f"{name} on {architecture}": usage for (architecture, name), usage in found.items() if usage[1] or usage[2]}
    assert not spills, "kernel: (registers, bytes of stack, bytes of local memory)"


def test_the_report_is_read_as_it_is_written():
    report = """
Fatbin elf code:
arch = sm_90a
Resource usage:
 Common:
  GLOBAL:0
 Function _ZN5kvarn4cuda17attend_mma_kernelEv:
  REG:168 STACK:88 SHARED:1024 LOCAL:0 CONSTANT[0]:1208 TEXTURE:0 SURFACE:0 SAMPLER:0
Fatbin elf code:
arch = sm_80
 Function _ZN5kvarn4cuda17attend_mma_kernelEv:
  REG:40 STACK:0 SHARED:0 LOCAL:16 CONSTANT[0]:1208 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    name = "_ZN5kvarn4cuda17attend_mma_kernelEv"
    assert resources(report) == {("sm_90a", name): (168, 88, 0), ("sm_80", name): (40, 0, 16)}
