"""The environment report of ``python -m kvarn``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

from kvarn import _core
from kvarn._backends import backends, cpu_isas, library_path

_PACKAGES = ("numpy", "nanobind-backend", "torch", "transformers", "vllm", "sglang")
_VARIABLES = ("KVARN_BACKEND", "KVARN_BACKEND_PATH", "KVARN_CPU_ISA", "KVARN_NUM_THREADS", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def _installed(package: str) -> str:
    # Metadata only: importing torch takes seconds and may touch a GPU.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment_report() -> str:
    """Versions, backends with the reason why one is missing, instruction sets and threads, one fact per line."""
    lines = [
        f"kvarn {_core.version()}",
        f"  library     {library_path()}",
        f"  python      {sys.version.split()[0]} ({sys.executable})",
        f"  system      {platform.system()} {platform.release()} {platform.machine()}",
        f"  CPU ISAs    {', '.join(cpu_isas())}",
        f"  CPUs        {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} usable",
        "backends",
    ]
    for info in backends():
        state = "available" if info.available else "not available"
        threads = f", {info.num_threads} threads" if info.num_threads else ""
        devices = f", {info.num_devices} devices" if info.available and info.name != "cpu" else ""
        lines.append(f"  {info.name:<11} {state}: {info.detail}{threads}{devices}")
    lines.append("packages")
    lines += [f"  {package:<17} {_installed(package)}" for package in _PACKAGES]
    variables = [f"  {name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    return "\n".join([*lines, "environment", *(variables or ["  none of " + ", ".join(_VARIABLES)])])
