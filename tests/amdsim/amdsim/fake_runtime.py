"""Builds the stand-in HIP runtime of ../fake_runtime, and reads the coverage that it writes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from .build import FAKE_RUNTIME, cache_directory, compile_library
from .module import Coverage, coverage_of, instruction_texts

_PACKAGE_FOLDER = Path(__file__).resolve().parents[1]


def build_fake_runtime() -> Path:
    """Compiles libamdhip64.so.7 when it is not in the cache; returns its folder, for LD_LIBRARY_PATH."""
    folder = cache_directory() / "fake_runtime"
    folder.mkdir(exist_ok=True)
    library = folder / "libamdhip64.so.7"
    if not library.exists():
        compile_library(FAKE_RUNTIME, library, "-O1", "-Wall", "-Wl,-soname,libamdhip64.so.7")
    return folder


def environment(target: str | None, *, coverage: Path | None = None) -> dict[str, str]:
    """Variables under which a process finds the runtime with one device of a target (with none when it is None)."""
    variables = {
        "LD_LIBRARY_PATH": str(build_fake_runtime()),
        "AMDSIM_PYTHON": sys.executable,
        "AMDSIM_PACKAGE": str(_PACKAGE_FOLDER),
    }
    if target:
        variables["AMDSIM_TARGET"] = target
    if coverage:
        variables["AMDSIM_COVERAGE"] = str(coverage)
    return variables


def _read_hits(folder: Path) -> dict[tuple[str, str], tuple[Path, np.ndarray]]:
    hits: dict[tuple[str, str], tuple[Path, np.ndarray]] = {}
    for file in sorted(folder.glob("*.hits")):
        header, *counts = file.read_text().splitlines()
        target, kernel, program = header.split(" ", 2)
        before = hits[target, kernel][1] if (target, kernel) in hits else 0
        hits[target, kernel] = (Path(program), before + np.array(counts, np.uint64))
    return hits


def read_hits(folder: Path) -> dict[tuple[str, str], tuple[list[str], np.ndarray]]:
    """By (target, kernel) the texts of its instructions and how often each ran, summed over all processes that wrote to a folder."""
    return {key: (instruction_texts(program), counts) for key, (program, counts) in _read_hits(folder).items()}


def read_coverage(folder: Path) -> dict[tuple[str, str], Coverage]:
    """Coverage by (target, kernel), summed over all processes that wrote to a folder."""
    return {key: coverage_of(program, counts) for key, (program, counts) in _read_hits(folder).items()}
