"""The roofline of docs/DESIGN.md is what the machine code of attention executes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from roofline import KERNEL, MACHINES, WAVES_PER_BLOCK, TileCost, tile_cost

from amdsim import Module
from amdsim.inspect import resources
from amdsim.testing import require_toolchain

_DESIGN = Path(__file__).parents[2] / "docs" / "DESIGN.md"
#: Least part of the bandwidth that the model must expect.
GOALS = {"gfx90a": 0.77, "gfx942": 0.85, "gfx1030": 0.63, "gfx1100": 0.80, "gfx1200": 0.95}
#: Compilers differ in what they make of the same source.
TOLERANCE = 0.03


@functools.cache
def _cost(target: str, build: Path) -> TileCost:
    return tile_cost(target, build)


def _documented(row: str) -> dict[str, str]:
    """The cells of a row of the table, by target."""
    lines = _DESIGN.read_text().splitlines()
    targets = next(line for line in lines if line.startswith("|") and "gfx90a:" in line).split("|")[2:-1]
    cells = next(line for line in lines if line.startswith(f"| {row} |")).split("|")[2:-1]
    return {target.split(":")[0].strip(): cell.strip() for target, cell in zip(targets, cells, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("target", MACHINES)
def test_the_machine_code_costs_what_the_roofline_says(hip_build, target):
    require_toolchain()
    cost = _cost(target, hip_build)
    assert cost.bandwidth_fraction >= GOALS[target]
    vector = float(_documented("vector instructions of a wave")[target].replace(",", ""))
    assert cost.vector == pytest.approx(vector, rel=TOLERANCE)
    assert cost.matrix == float(_documented("matrix instructions of a wave")[target].split()[0].replace(",", ""))
    fraction = int(_documented("expected part of the bandwidth")[target].rstrip(" %")) / 100
    assert cost.bandwidth_fraction == pytest.approx(fraction, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("target", MACHINES)
def test_what_is_launched_fits_as_the_roofline_says(hip_build, target):
    require_toolchain()
    report = resources(Module(hip_build / f"attend_matrix.{target}.co"), KERNEL)
    by_registers = int(_documented("vector registers, waves of a SIMD by them")[target].split(", ")[1])
    by_memory = int(_documented("shared memory of a block, waves of a SIMD by it")[target].split(", ")[1])
    blocks = int(_documented("blocks launched per multiprocessor of HIP")[target])
    assert report.waves_by_registers >= by_registers
    assert report.waves_by_lds() >= by_memory
    # A block has one wave on each SIMD of what HIP counts.
    assert report.simds == WAVES_PER_BLOCK
    assert blocks <= min(by_registers, by_memory)
    assert _cost(target, hip_build).blocks == blocks
