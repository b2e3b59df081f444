"""Timing, the plain-read yardstick and the description of the machine, shared by the benchmarks of this folder."""

import ctypes
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import numpy as np


@dataclass
class Timing:
    """Seconds of single calls."""

    median: float
    low: float  # 10th percentile
    high: float  # 90th percentile
    calls: int


def time_calls(call: Callable[[int], object], *, min_calls: int, max_seconds: float, warm_up: int = 3) -> Timing:
    """Times call(i) for i = 0, 1, 2, ...: `min_calls` of them, or fewer (3 at least) when they take longer than `max_seconds`."""
    for i in range(warm_up):
        call(i)
    seconds: list[float] = []
    start = time.perf_counter()
    while len(seconds) < 3 or (len(seconds) < min_calls and time.perf_counter() - start < max_seconds):
        index = warm_up + len(seconds)
        before = time.perf_counter()
        call(index)
        seconds.append(time.perf_counter() - before)
    ordered = sorted(seconds)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
    return Timing(statistics.median(seconds), at(0.1), at(0.9), len(seconds))


class PlainRead:
    """Reads a buffer once with `threads` threads and does nothing else: what memory delivers to this process.

    memchr looks for a byte that does not occur; the C library's version loads 128 bytes per step with the widest instructions it has.
    """

    def __init__(self, num_bytes: int, threads: int):
        self.buffer = np.ones(num_bytes, np.uint8)
        self.pool = ThreadPoolExecutor(threads)
        libc = ctypes.CDLL(None)
        self.memchr = libc.memchr
        self.memchr.restype = ctypes.c_void_p
        self.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        edges = np.linspace(0, num_bytes, threads + 1).astype(np.int64)
        self.parts = [(self.buffer.ctypes.data + int(a), int(b - a)) for a, b in pairwise(edges)]

    def __call__(self, _: int = 0) -> None:
        if any(found is not None for found in self.pool.map(lambda part: self.memchr(part[0], 2, part[1]), self.parts)):
            raise RuntimeError("the plain read stopped early")

    def bytes_per_second(self) -> float:
        return self.buffer.nbytes / time_calls(self, min_calls=9, max_seconds=2.0, warm_up=1).median


def installed_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(threads: int, packages: list[str]) -> dict[str, object]:
    cpu, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                cpu = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    interesting = ["avx2", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return {
        "cpu": cpu,
        "instruction sets": [name for name in interesting if name in flags],
        "cores": usable_cores(),
        "threads": threads,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {package: installed_version(package) for package in packages},
        "commit": commit.stdout.strip(),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
    }
