"""Counts what attention executes per tile and prints the roofline of docs/DESIGN.md, from machine code run in the emulator.

``PYTHONPATH=tests/amdsim python tests/hip/roofline.py build/release/hip`` prints the table.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from amdsim import Module
from amdsim.fake_runtime import environment, read_hits
from amdsim.inspect import instruction_names, resources

KERNEL = "kvarn_attend_d128_r8"
#: Of a k4v2_g128 record of head_dim 128: codes, and 16-bit metadata of 128 tokens and 128 channels.
RECORD_BYTES = 13824
WAVES_PER_BLOCK = 4
#: Multiples of the waves of 3, 4 and 5 blocks, so that every wave has work in both runs.
_FEW_TILES, _MANY_TILES = 120, 240
_TRANSCENDENTAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
_TRANSCENDENTAL_SLOTS = 4  # they run at a quarter of the rate
_MATRIX = re.compile(r"v_(mfma|wmma|smfmac)_|v_dot2c_f32_f16")


@dataclass(frozen=True)
class Machine:
    """A GPU by its published figures.

    Attributes:
        bytes_per_second: memory bandwidth.
        units: compute units.
        hertz: clock.
        vectors_per_cycle: vector instructions of a wave that a compute unit issues in a cycle.
        matrix_cycles: cycles of a compute unit that one matrix instruction of a wave takes.
        beside: whether vector instructions are issued while matrix instructions run.
    """

    name: str
    bytes_per_second: float
    units: int
    hertz: float
    vectors_per_cycle: int
    matrix_cycles: float
    beside: bool


# Matrix rates, fp16 with fp32 sums, in operations per cycle and compute unit: CDNA2 1,024, CDNA3 2,048, RDNA3 512, RDNA4 1,024; a product
# of 16 x 16 x 16 is 8,192 operations. On RDNA2 a dot product is a vector instruction.
MACHINES = {
    "gfx90a": Machine("MI250X, one of two dies", 1.64e12, 110, 1.7e9, 1, 8, beside=True),
    "gfx942": Machine("MI300X", 5.3e12, 304, 2.1e9, 1, 4, beside=True),
    "gfx1030": Machine("RX 6900 XT", 0.512e12, 80, 2.25e9, 2, 0.5, beside=False),
    "gfx1100": Machine("RX 7900 XTX", 0.96e12, 96, 2.5e9, 2, 16, beside=False),
    "gfx1200": Machine("RX 9070 XT", 0.64e12, 64, 2.97e9, 2, 8, beside=False),
}


@dataclass(frozen=True)
class TileCost:
    """What one wave executes for one record: issue slots of vector instructions, matrix instructions, and all names with their counts.

    blocks: that were launched for a multiprocessor, as HIP counts them.
    """

    target: str
    vector: float
    matrix: float
    names: Counter[str]
    blocks: float

    @property
    def byte_cycles(self) -> float:
        """Cycles in which a compute unit's share of the bandwidth brings the record."""
        m = MACHINES[self.target]
        return RECORD_BYTES / (m.bytes_per_second / m.units / m.hertz)

    @property
    def vector_cycles(self) -> float:
        return self.vector / MACHINES[self.target].vectors_per_cycle

    @property
    def matrix_cycles(self) -> float:
        return self.matrix * MACHINES[self.target].matrix_cycles

    @property
    def cycles(self) -> float:
        """Cycles of a compute unit that the record's instructions take."""
        if MACHINES[self.target].beside:
            return max(self.vector_cycles, self.matrix_cycles)
        return self.vector_cycles + self.matrix_cycles

    @property
    def bandwidth_fraction(self) -> float:
        return min(1.0, self.byte_cycles / self.cycles)


def tile_cost(target: str, build: Path) -> TileCost:
    """Runs attention over a few and over many records, 4 query rows on one KV head, and divides the difference.

    Args:
        build: the folder hip/ of the C++ build.
    """
    (few, _), (many, waves) = (_executed(target, build, tiles) for tiles in (_FEW_TILES, _MANY_TILES))
    many.subtract(few)
    names = Counter({name: count / (_MANY_TILES - _FEW_TILES) for name, count in many.items() if count})
    vector = matrix = 0.0
    for name, count in names.items():
        if _MATRIX.match(name):
            matrix += count
        elif name.startswith("v_"):
            vector += count * (_TRANSCENDENTAL_SLOTS if _TRANSCENDENTAL.match(name) else 1)
    return TileCost(target, vector, matrix, names, waves / WAVES_PER_BLOCK)


def _executed(target: str, build: Path, tiles: int) -> tuple[Counter[str], int]:
    """How often the kernel's instructions ran, by name, and how many waves ran; the halves of a dual-issue instruction count as one."""
    with tempfile.TemporaryDirectory() as folder:
        variables = environment(target, coverage=Path(folder))
        variables |= {"KVARN_BACKEND_PATH": str(build.parent / "lib"), "AMDSIM_PROCESSORS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("attend_tiles.py")), str(tiles)]
        subprocess.run(command, env=os.environ | variables, check=True)
        texts, counts = read_hits(Path(folder))[target, KERNEL]
    names: Counter[str] = Counter()
    for text, count in zip(texts, counts, strict=True):
        names["+".join(instruction_names(text))] += int(count)
    return names, int(counts[0])


def _print_table(build: Path) -> None:
    costs = [tile_cost(target, build) for target in MACHINES]
    machines = [MACHINES[cost.target] for cost in costs]
    reports = [resources(Module(build / f"attend_matrix.{cost.target}.co"), KERNEL) for cost in costs]

    def row(name: str, cells: list[str]) -> None:
        print(f"| {name} | " + " | ".join(cells) + " |")

    row("", [f"{cost.target}: {machine.name}" for cost, machine in zip(costs, machines, strict=True)])
    row("---", ["---:"] * len(costs))
    row("bandwidth, compute units, clock", [f"{m.bytes_per_second / 1e12:.2f} TB/s, {m.units}, {m.hertz / 1e9:.2f} GHz" for m in machines])
    row("cycles of a compute unit that the bytes of a tile take", [f"{cost.byte_cycles:,.0f}" for cost in costs])
    row("vector instructions of a wave", [f"{cost.vector:,.0f}" for cost in costs])
    row("matrix instructions of a wave", [f"{cost.matrix:,.0f}" for cost in costs])
    row("cycles of a compute unit: vector", [f"{cost.vector_cycles:,.0f}" for cost in costs])
    row(
        "and matrix",
        [f"{cost.matrix_cycles:,.0f}, {'beside' if m.beside else 'after'} them" for cost, m in zip(costs, machines, strict=True)],
    )
    row("expected part of the bandwidth", [f"{cost.bandwidth_fraction:.0%}" for cost in costs])
    row("vector registers, waves of a SIMD by them", [f"{report.vgprs}, {report.waves_by_registers}" for report in reports])
    row("shared memory of a block, waves of a SIMD by it", [f"{report.lds:,} B, {report.waves_by_lds():.0f}" for report in reports])
    row("blocks launched per multiprocessor of HIP", [f"{cost.blocks:.0f}" for cost in costs])


if __name__ == "__main__":
    _print_table(Path(sys.argv[1]).resolve())
