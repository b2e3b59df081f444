"""Timing on a GPU and the description of it, shared by the GPU benchmarks of this folder."""

import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import installed_version

# Caches are left behind: whatever is read in turn adds up to this much before anything is read again. L2 of an H100 holds 50 MB.
COLD_BYTES = 512 << 20


@dataclass
class GpuTiming:
    """Microseconds of one call."""

    median: float
    low: float  # 10th percentile
    high: float  # 90th percentile


def time_graph(call: Callable[[int], object], calls: int, *, repeats: int = 30) -> GpuTiming:
    """Captures call(0) ... call(calls - 1) in one CUDA graph and times its replays with events: the device's time of one call, without the
    host's launch gaps, with whatever the calls leave in the cache for one another."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(min(calls, 3)):  # what is lazy in a library happens here
            call(i)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for i in range(repeats + 3):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end) * 1e3 / calls)
    ordered = sorted(times)
    return GpuTiming(statistics.median(times), ordered[len(times) // 10], ordered[len(times) * 9 // 10])


def copy_bytes_per_second() -> float:
    """Bytes read and written per second by a device-to-device copy of 1 GiB: the yardstick of every table."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(33):  # on the stream: in a graph the copy engine does it, which is slower
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return 2 * source.nbytes / statistics.median(times[3:])


def _smi(fields: str) -> dict[str, str]:
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", str(torch.cuda.current_device())],
        capture_output=True,
        text=True,
        check=False,
    )
    return dict(zip(fields.split(","), (part.strip() for part in done.stdout.strip().split(",")), strict=False))


def clocks() -> dict[str, str]:
    """Clocks, temperature and power now."""
    return _smi("clocks.sm,clocks.mem,temperature.gpu,power.draw")


def describe_gpu(packages: list[str]) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory GiB": round(properties.total_memory / 2**30, 1),
        **_smi("driver_version,clocks.max.sm,clocks.max.mem"),
        "CUDA of torch": torch.version.cuda,
        "python": sys.version.split()[0],
        "packages": {package: installed_version(package) for package in packages},
        "commit": commit.stdout.strip(),
        "command": shlex.join(["python", *sys.argv]),
    }


def machine_lines(machine: dict[str, object]) -> list[str]:
    """The description as a Markdown list."""
    lines = []
    for key, value in machine.items():
        text = ", ".join(f"{a} {b}" for a, b in value.items()) if isinstance(value, dict) else str(value)
        lines.append(f"- {key}: {f'`{text}`' if key == 'command' else text}")
    return lines


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, first column left, the others right."""
    return ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1), *("| " + " | ".join(row) + " |" for row in rows)]
