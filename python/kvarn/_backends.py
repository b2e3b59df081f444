"""What this build can run on, here and now."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from kvarn import _core


@dataclass(frozen=True)
class BackendInfo:
    """One backend: the device or instruction set it would use, or the exact reason why it is not available."""

    name: str
    available: bool
    detail: str
    num_devices: int
    num_threads: int


def backends() -> list[BackendInfo]:
    """Every backend that kvarn knows, available or not, "cpu" first. Looks for GPU libraries, so that the reasons are true; before that a
    torch built for ROCm is imported, which brings a HIP runtime."""
    _load_runtime_of_torch()
    return [BackendInfo(*info) for info in _core.backends()]


def cpu_isas() -> list[str]:
    """CPU instruction sets that this build has and this machine runs, best first: ["avx2", "generic"]."""
    return _core.cpu_isas().split(",")


def library_path() -> Path:
    """The loaded libkvarn."""
    return Path(_core.library_path())


def include_dir() -> Path:
    """Directory of the C and C++ headers, for compilers."""
    return _package_dir() / "include"


def cmake_dir() -> Path:
    """Directory of kvarnConfig.cmake: ``cmake -Dkvarn_DIR=$(kvarn --cmake-dir)``."""
    return _package_dir() / "lib" / "cmake" / "kvarn"


def _load_runtime_of_torch() -> None:
    """Imports torch where it is a ROCm build: it brings a HIP runtime of its own, which must be the process's only one."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ImportError):
        if "rocm" in importlib.metadata.version("torch"):
            importlib.import_module("torch")


def _package_dir() -> Path:
    # In an editable install the Python files are elsewhere; what CMake installed lies beside the extension module.
    return Path(str(_core.__file__)).parent
