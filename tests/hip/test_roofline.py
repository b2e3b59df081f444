"""The roofline of docs/DESIGN.md is what the machine code of attention executes."""

from __future__ import annotations

from pathlib import Path

import pytest
from roofline import MACHINES, tile_cost

from amdsim.testing import require_toolchain

_DESIGN = Path(__file__).parents[2] / "docs" / "DESIGN.md"
#: Least part of the bandwidth that the model must expect.
GOALS = {"gfx90a": 0.74, "gfx942": 0.80, "gfx1030": 0.63, "gfx1100": 0.80, "gfx1200": 0.95}
#: Compilers differ in what they make of the same source.
TOLERANCE = 0.03


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
    cost = tile_cost(target, hip_build)
    assert cost.bandwidth_fraction >= GOALS[target]
    vector = float(_documented("vector instructions of a wave")[target].replace(",", ""))
    assert cost.vector == pytest.approx(vector, rel=TOLERANCE)
    assert cost.matrix == float(_documented("matrix instructions of a wave")[target].split()[0].replace(",", ""))
    fraction = int(_documented("expected part of the bandwidth")[target].rstrip(" %")) / 100
    assert cost.bandwidth_fraction == pytest.approx(fraction, rel=TOLERANCE)
