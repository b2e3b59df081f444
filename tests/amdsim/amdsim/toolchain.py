"""Finds the tools: a clang that compiles for AMDGPU, lld, llvm-objdump, and the host's C++ compiler."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

TARGETS = ("gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100", "gfx1200")
_VERSIONS = ("-22", "-21", "-20", "-19", "-18", "-17", "")
_ROCM = "/opt/rocm/llvm/bin"


class MissingToolError(RuntimeError):
    """What this machine lacks to compile and run AMDGPU code."""


@dataclass(frozen=True)
class Toolchain:
    clang: str
    objdump: str
    host_compiler: str
    targets: tuple[str, ...]

    def compile(self, source: Path, target: str, output: Path, *flags: str) -> Path:
        """Compiles a HIP source for one target into a code object (an ELF file).

        Raises:
            RuntimeError: with the compiler's messages, when the source does not compile.
        """
        command = [
            self.clang,
            "-x",
            "hip",
            f"--offload-arch={target}",
            "--offload-device-only",
            "--no-gpu-bundle-output",
            "-nogpulib",
            "-nogpuinc",
        ]
        command += ["-O3", "-std=c++17", "-mcode-object-version=5", *flags, "-c", str(source), "-o", str(output)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{source.name} does not compile for {target}:\n{result.stderr}")
        return output


def _find(name: str, version: str) -> str | None:
    return shutil.which(name + version) or shutil.which(name + version, path=_ROCM)


def _known_targets(clang: str) -> tuple[str, ...]:
    listing = subprocess.run(
        [clang, "--target=amdgcn-amd-amdhsa", "-nogpulib", "--print-supported-cpus"], capture_output=True, text=True, check=False
    )
    words = set((listing.stdout + listing.stderr).split())
    return tuple(target for target in TARGETS if target in words)


@functools.cache
def toolchain() -> Toolchain:
    """The newest usable set of tools.

    Raises:
        MissingToolError: says which tool was looked for under which names.
    """
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if platform.machine() not in ("x86_64", "AMD64") or "avx2" not in flags or "f16c" not in flags:
        raise MissingToolError("the emulator's host code needs an x86-64 processor with AVX2 and F16C")
    host = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not host:
        raise MissingToolError("no host C++ compiler: looked for $CXX, g++, c++")
    tried = []
    for version in _VERSIONS:
        clang, lld, objdump = (_find(name, version) for name in ("clang++", "ld.lld", "llvm-objdump"))
        if not clang:
            continue
        if not lld or not objdump:
            tried.append(f"{clang} has no {'ld.lld' if not lld else 'llvm-objdump'}{version} beside it")
            continue
        targets = _known_targets(clang)
        if targets:
            return Toolchain(clang, objdump, host, targets)
        tried.append(f"{clang} has no AMDGPU back end")
    reason = "; ".join(tried) or "looked for clang++" + ", clang++".join(_VERSIONS[:-1]) + " and clang++"
    raise MissingToolError(f"no clang that compiles for AMDGPU: {reason} (Debian: apt-get install clang-19 lld-19 llvm-19)")
