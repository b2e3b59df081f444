"""Planted mistakes: each must be caught, with a message that names it, and its correct twin must pass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from amdsim import Module, TrapError, UnsupportedError
from amdsim.testing import compile_text

Kernels = Callable[[str, str], Module]
THREADS = 128


def _arrays() -> tuple[np.ndarray, np.ndarray]:
    return np.ones(THREADS, np.uint32), np.zeros(THREADS, np.uint32)


# Which of two racing waves is seen second depends on their order.
_RACE = r"LDS race: wave \d+ (reads word \d+ written|writes word \d+ read) by wave \d+"
CAUGHT = {
    "reads_beyond": "global read of 4 bytes out of bounds",
    "writes_beyond": "global write of 4 bytes out of bounds",
    "reads_before": "global read of 4 bytes out of bounds",
    "adds_beyond": "global atomic of 4 bytes out of bounds",
    "writes_constant": "to read-only memory",
    "races_read_after_write": _RACE,
    "races_write_after_read": _RACE,
    "races_two_writes": r"LDS race: wave \d+ writes word \d+ written by wave \d+",
    "races_atomic_and_read": r"LDS race: wave \d+ updates word 0 read by wave \d+",
    "races_by_halves": r"LDS race: wave \d+ writes word \d+ written by wave \d+",
    "reads_unwritten_lds": r"LDS read of word \d+, which nothing has written",
    "reads_unwritten_byte": r"LDS read of word \d+, which nothing has written",
    "waits_at_two_barriers": "the waves wait at different barriers",
}


@pytest.mark.parametrize("name", CAUGHT)
def test_planted_mistake_is_caught(target: str, name: str, kernels: Kernels) -> None:
    # The racing kernels also read what their other waves have yet to write.
    uninitialized = not name.startswith("races")
    with pytest.raises(TrapError, match=CAUGHT[name]) as caught:
        kernels("traps", target).launch(name, (1, 1, 1), (THREADS, 1, 1), _arrays(), check_uninitialized_lds=uninitialized)
    # The message names the place: workgroup, wave, address and text of the instruction.
    assert f"{target} {name}: workgroup (0, 0, 0), wave " in str(caught.value)
    assert "pc 0x" in str(caught.value)


@pytest.mark.parametrize("reverse", [False, True])
def test_halves_of_a_word_belong_to_different_waves(target: str, reverse: bool, kernels: Kernels) -> None:
    x, out = _arrays()
    x[:] = np.arange(THREADS)
    kernels("traps", target).launch("shares_words_by_halves", (1, 1, 1), (THREADS, 1, 1), [x, out], reverse=reverse)
    np.testing.assert_array_equal(out, x)


def test_waves_that_wait_at_one_barrier_pass(target: str, kernels: Kernels) -> None:
    x, out = _arrays()
    kernels("traps", target).launch("waits_at_one_barrier", (1, 1, 1), (THREADS, 1, 1), [x, out])
    np.testing.assert_array_equal(out, x)


def test_write_to_a_read_only_array_is_caught(target: str, kernels: Kernels) -> None:
    x, out = _arrays()
    module = kernels("traps", target)
    module.launch("writes_input", (1, 1, 1), (THREADS, 1, 1), [x, out])
    with pytest.raises(TrapError, match="global write of 4 bytes to read-only memory"):
        module.launch("writes_input", (1, 1, 1), (THREADS, 1, 1), [x, out], read_only=[x])


@pytest.mark.parametrize(("shift", "caught"), [(0, False), (1, True), (1 << 20, True)])
def test_lds_beyond_the_allocation_is_caught(target: str, shift: int, caught: bool, kernels: Kernels) -> None:
    module = kernels("traps", target)
    if not caught:
        module.launch("lds_beyond", (1, 1, 1), (THREADS, 1, 1), [*_arrays(), shift])
        return
    with pytest.raises(TrapError, match=r"LDS write of 4 bytes at .* beyond the 512 of the workgroup"):
        module.launch("lds_beyond", (1, 1, 1), (THREADS, 1, 1), [*_arrays(), shift])


def test_scratch_beyond_the_lane_is_caught(target: str, kernels: Kernels) -> None:
    module = kernels("traps", target)
    x, out = _arrays()
    x[:8] = np.arange(8)
    module.launch("scratch_beyond", (1, 1, 1), (8, 1, 1), [x, out])
    np.testing.assert_array_equal(out[:8], np.arange(8))
    x[3] = 1 << 20
    with pytest.raises(TrapError, match=r"scratch access of 4 bytes at .* beyond"):
        module.launch("scratch_beyond", (1, 1, 1), (8, 1, 1), [x, out])


_GROUP_RACES = {
    "two_writes": "writes what workgroup 0 wrote",
    "read_after_write": "reads what workgroup 0 wrote",
    "write_after_read": "writes what other workgroups read",
}


@pytest.mark.parametrize("name", _GROUP_RACES)
def test_races_between_workgroups_are_caught(target: str, name: str, kernels: Kernels) -> None:
    x, out = np.ones(THREADS, np.uint32), np.zeros(2048, np.uint32)
    module = kernels("traps", target)
    with pytest.raises(TrapError, match=rf"workgroup \(1, 0, 0\).*global race: the workgroup {_GROUP_RACES[name]} in this launch"):
        module.launch(f"races_of_groups_{name}", (2, 1, 1), (THREADS, 1, 1), [x, out], threads=1)
    module.launch(f"races_of_groups_{name}", (2, 1, 1), (THREADS, 1, 1), [x, out], check_global_races=False)
    module.launch(f"races_of_groups_{name}", (1, 1, 1), (THREADS, 1, 1), [x, out])


def test_a_result_that_is_published_before_it_is_stored_is_caught(target: str, kernels: Kernels) -> None:
    x, out = np.ones(THREADS, np.uint32), np.zeros(2048, np.uint32)
    module = kernels("traps", target)
    with pytest.raises(TrapError, match=r"global race: an atomic while stores of wave \d are not waited for"):
        module.launch("publishes_early", (2, 1, 1), (THREADS, 1, 1), [x, out])
    out[0] = 0
    module.launch("publishes_late", (2, 1, 1), (THREADS, 1, 1), [x, out])
    assert out[0] == 2 * THREADS


def test_interleaved_workgroups_show_a_missing_barrier(target: str, kernels: Kernels) -> None:
    """The sums of four workgroups: one after another they come out right by chance."""
    x = np.arange(THREADS, dtype=np.uint32)
    module = kernels("traps", target)

    def sums(name: str, interleave: int) -> np.ndarray:
        out = np.zeros(1024, np.uint32)
        module.launch(name, (4, 1, 1), (THREADS, 1, 1), [x, out], interleave=interleave)
        return out[128:256]

    np.testing.assert_array_equal(sums("adds_up_early", 0), 4 * x)
    assert any((sums("adds_up_early", seed) != 4 * x).any() for seed in range(1, 9))
    for seed in range(9):
        np.testing.assert_array_equal(sums("adds_up", seed), 4 * x)


def test_workgroups_that_keep_apart_pass(target: str, kernels: Kernels) -> None:
    x, out = np.arange(THREADS, dtype=np.uint32), np.zeros(2048, np.uint32)
    kernels("traps", target).launch("groups_apart", (2, 1, 1), (THREADS, 1, 1), [x, out])
    np.testing.assert_array_equal(out.view(np.uint8)[: 2 * THREADS], np.repeat(x, 2).astype(np.uint8))
    np.testing.assert_array_equal(out[1024:1026], [0, 1])


def test_endless_loop_is_caught(target: str, kernels: Kernels) -> None:
    with pytest.raises(TrapError, match="the limit of instructions"):
        kernels("traps", target).launch("never_ends", (1, 1, 1), (1, 1, 1), _arrays(), max_instructions=10_000)


def test_order_of_workgroups_can_be_reversed(target: str, kernels: Kernels) -> None:
    last = []
    for reverse in (False, True):
        out = np.zeros(1, np.uint32)
        kernels("traps", target).launch(
            "depends_on_order", (3, 1, 1), (1, 1, 1), [out], reverse=reverse, threads=1, check_global_races=False
        )
        last.append(int(out[0]))
    assert last == [2, 0]


def test_missing_replication_of_rdna3_operands_is_caught(kernels: Kernels) -> None:
    x, out = np.arange(256, dtype=np.float16), np.zeros(256, np.float32)
    with pytest.raises(TrapError, match=r"lanes 16\.\.31 of an operand do not repeat lanes 0\.\.15"):
        kernels("traps", "gfx1100").launch("wmma_without_replication", (1, 1, 1), (32, 1, 1), [x, out])


@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        ("gfx90a", "s_memtime s[0:1]"),
        ("gfx942", "v_mfma_f32_4x4x4_16b_f16 v[0:3], v[4:5], v[6:7], v[0:3]"),
        ("gfx1100", "s_getreg_b32 s0, hwreg(HW_REG_HW_ID1)"),
    ],
)
def test_unknown_instruction_is_a_failure_even_if_it_never_runs(target: str, instruction: str) -> None:
    source = f"""
extern "C" __attribute__((global)) void k(const unsigned* in, unsigned* out) {{
  if (in[0] == 12345) asm volatile("{instruction}" ::: "s0", "s1", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7");
  out[0] = 1;
}}"""
    module = Module(compile_text(source, target))
    with pytest.raises(UnsupportedError, match=instruction.split()[0]):
        module.launch("k", (1, 1, 1), (1, 1, 1), _arrays())


def test_arguments_are_checked(kernels: Kernels) -> None:
    module = kernels("traps", "gfx90a")
    x, out = _arrays()
    with pytest.raises(TypeError, match="expected 2 arguments, got 1"):
        module.launch("reads_beyond", (1, 1, 1), (1, 1, 1), [x])
    with pytest.raises(TypeError, match="expected an argument of 4 bytes, got 8"):
        module.launch("lds_beyond", (1, 1, 1), (1, 1, 1), [x, out, np.float64(1)])
    with pytest.raises(KeyError, match="no kernel missing"):
        module.launch("missing", (1, 1, 1), (1, 1, 1), [x])
    with pytest.raises(TrapError, match="1 to 1024 threads"):
        module.launch("reads_beyond", (1, 1, 1), (2048, 1, 1), [x, out])
