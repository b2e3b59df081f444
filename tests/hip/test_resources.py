"""Registers and shared memory of every kernel of the HIP backend, for every target that was built, and what they leave room for."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

from amdsim import Module
from amdsim.inspect import Resources, problems, resources
from amdsim.testing import require_toolchain

SOURCES = ("rows", "encode", "attend_generic", "attend_matrix")
TARGETS = ("gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100", "gfx1200", "gfx1201")
#: The instruction that makes the products of the matrix kernels, by generation of the instruction set.
PRODUCTS = {
    9: r"v_mfma_f32_16x16x16_?f16",
    10: r"v_dot2c_f32_f16",
    11: r"v_wmma_f32_16x16x16_f16",
    12: r"v_wmma_f32_16x16x16_f16",
}
#: Blocks of the matrix kernels that docs/DESIGN.md counts on and the backend launches for every multiprocessor of HIP.
BLOCKS = {
    9: {"d64_r8": 3, "d64_r16": 3, "d128_r8": 3, "d128_r16": 3, "d256_r8": 2},
    10: {"d64_r8": 5, "d64_r16": 2, "d128_r8": 4, "d128_r16": 2},
    11: {"d64_r8": 5, "d64_r16": 2, "d128_r8": 5, "d128_r16": 2},
    12: {"d64_r8": 5, "d64_r16": 2, "d128_r8": 5, "d128_r16": 2},
}
#: Waves of a SIMD that the other kernels leave registers for, at least: eight warps of 32 lanes on each.
OTHER_WAVES = {9: 4, 10: 8, 11: 8, 12: 8}


def generation(target: str) -> int:
    return int(target[3:-2])


@pytest.fixture(params=TARGETS)
def target(request, hip_build) -> str:
    require_toolchain()
    if not (hip_build / f"rows.{request.param}.co").exists():
        # Every compiler that the backend is built with knows the other ones.
        assert request.param == "gfx950"
        pytest.skip("the compiler of this build does not know gfx950")
    return request.param


@functools.cache
def reports(build: Path, source: str, target: str) -> list[Resources]:
    module = Module(build / f"{source}.{target}.co")
    return [resources(module, kernel) for kernel in module.kernels]


def test_kernels_use_no_stack_and_spill_nothing(hip_build, target):
    found, kernels = [], 0
    for source in SOURCES:
        for report in reports(hip_build, source, target):
            needs = (PRODUCTS[generation(target)],) if source == "attend_matrix" else ()
            found += problems(report, needs=needs, max_lds=65536)
            kernels += 1
    assert kernels >= 23
    assert not found


def test_as_many_blocks_fit_as_are_launched(hip_build, target):
    blocks = {}
    for report in reports(hip_build, "attend_matrix", target):
        # One wave of a block on each SIMD of what HIP calls a multiprocessor: a compute unit, or a pair of them.
        assert report.max_threads == report.simds * report.wave
        assert report.paired == (generation(target) > 9)
        fit = min(report.waves_by_registers, report.groups_by_lds())
        name = re.sub("^kvarn_attend_", "", report.kernel)
        blocks[name] = min(fit, BLOCKS[generation(target)][name])
    assert blocks == BLOCKS[generation(target)]


def test_the_other_kernels_leave_room_for_more_than_one_block(hip_build, target):
    for source in ("rows", "encode", "attend_generic"):
        for report in reports(hip_build, source, target):
            assert report.waves_by_registers >= OTHER_WAVES[generation(target)], report.kernel


def test_gfx1201_runs_what_is_executed_for_gfx1200(hip_build):
    """The emulator executes gfx1200's code objects; those of gfx1201 hold the same bytes of code, registers, memory and arguments."""
    require_toolchain()
    for source in SOURCES:
        executed, same = (Module(hip_build / f"{source}.{target}.co").code_object for target in ("gfx1200", "gfx1201"))
        assert len(executed.code) > 1000
        assert same.code == executed.code
        assert same.kernels == executed.kernels
        assert same.relocations == executed.relocations
