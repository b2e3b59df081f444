"""Moves between lanes: DPP, permutations, swizzles, readlane. References work on lane numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from amdsim import Module

U32 = np.uint32
Reference = Callable[[np.ndarray, int], np.ndarray]


def _gather(lane: Callable[[int], int | None], otherwise: Callable[[np.ndarray, int], int] = lambda x, i: 7) -> Reference:
    """The value of lane `lane(i)`, or `otherwise` where there is none. 7 is what the kernels keep in their destination."""

    def reference(x: np.ndarray, wave: int) -> np.ndarray:
        sources = [lane(i) for i in range(wave)]
        return np.array([otherwise(x, i) if s is None else x[s] for i, s in enumerate(sources)], U32)

    return reference


def _in_row(change: Callable[[int], int]) -> Callable[[int], int | None]:
    """A lane of the same row of 16; None where the change leaves the row."""
    return lambda i: (i & ~15) + change(i & 15) if 0 <= change(i & 15) < 16 else None


def _writelane(x: np.ndarray, wave: int) -> np.ndarray:
    result = x[:wave].copy()
    result[3] = x[0]
    return result


def _ballot(x: np.ndarray, wave: int) -> np.ndarray:
    below = [int(value < 100) for value in x[:wave]]
    words = [sum(bit << i for i, bit in enumerate(below[at : at + 32])) for at in range(0, wave, 32)]
    return np.array([words[i // 32] for i in range(wave)], U32)


def _row_sum(x: np.ndarray, wave: int) -> np.ndarray:
    values = x[:wave].view(np.float32).copy()
    for partner in (lambda i: i ^ 1, lambda i: i ^ 2, lambda i: i ^ 7, lambda i: i ^ 15):
        values = values + values[[partner(i) for i in range(wave)]]
    return values.view(U32)


def _neighbour_larger(x: np.ndarray, wave: int) -> np.ndarray:
    other = x[np.arange(wave) ^ 1]
    return np.where(other > x[:wave], other, U32(1))


REFERENCES: dict[str, Reference] = {
    "quad_perm_1032": _gather(lambda i: i ^ 1),
    "row_shl_3": _gather(_in_row(lambda r: r + 3)),
    "row_shr_1": _gather(_in_row(lambda r: r - 1)),
    "row_ror_4": _gather(_in_row(lambda r: (r - 4) % 16)),
    "row_mirror": _gather(_in_row(lambda r: 15 - r)),
    "row_half_mirror": _gather(_in_row(lambda r: r ^ 7)),
    "row_shr_1_zero": _gather(_in_row(lambda r: r - 1), lambda x, i: 0),
    # Rows 0 and 2 take part, of them banks (groups of four) 0 and 1.
    "row_shr_1_masked": _gather(lambda i: _in_row(lambda r: r - 1)(i) if i // 16 in (0, 2) and i % 16 < 8 else None),
    "row_bcast_15": _gather(lambda i: (i & ~15) - 1 if i >= 16 else None),
    "row_newbcast_5": _gather(_in_row(lambda r: 5)),
    "wave_shr_1": _gather(lambda i: i - 1 if i else None),
    "row_share_5": _gather(_in_row(lambda r: 5)),
    "row_xmask_6": _gather(_in_row(lambda r: r ^ 6)),
    "dpp8_76543210": _gather(lambda i: i ^ 7),
    "permlane16_reverse": _gather(_in_row(lambda r: 15 - r)),
    "permlanex16_identity": _gather(lambda i: i ^ 16),
    "swizzle_xor_9": _gather(lambda i: i ^ 9),
    "swizzle_quad_2301": _gather(lambda i: i ^ 2),
    "bpermute": lambda x, wave: (x[:wave] % wave * 3).astype(U32),
    "permute": _gather(lambda i: i ^ 5),
    "readlane_5": _gather(lambda i: 5),
    "readfirstlane_upper": _gather(lambda i: 9 if i >= 9 else None, lambda x, i: 0),
    "writelane_3": _writelane,
    "ballot_below_100": _ballot,
    "count_below": lambda x, wave: np.arange(wave, dtype=U32),
    "compare_with_neighbour": _neighbour_larger,
    "float_sum_of_row": _row_sum,
}


def test_every_kernel_matches_its_reference(target: str, kernels: Callable[[str, str], Module], rng: np.random.Generator) -> None:
    module = kernels("lanes", target)
    assert set(module.kernels) <= set(REFERENCES)
    module.prepare()
    for name, kernel in module.kernels.items():
        x = rng.integers(0, 200, 256, dtype=U32)
        if name == "float_sum_of_row":
            x = rng.standard_normal(256).astype(np.float32).view(U32)
        out = np.zeros(256, U32)
        module.launch(name, (1, 1, 1), (kernel.wave, 1, 1), [x, out])
        np.testing.assert_array_equal(out[: kernel.wave], REFERENCES[name](x, kernel.wave), err_msg=f"{target} {name}")
        # Straight code except for the branch around an empty part of the wave.
        assert module.coverage(name).fraction > 0.75, module.coverage(name).missed


def test_a_partly_empty_wave_leaves_the_other_lanes_alone(target: str, kernels: Callable[[str, str], Module]) -> None:
    module = kernels("lanes", target)
    x, out = np.arange(256, dtype=U32), np.full(256, 99, U32)
    module.launch("quad_perm_1032", (1, 1, 1), (6, 1, 1), [x, out])
    np.testing.assert_array_equal(out[:6], [1, 0, 3, 2, 5, 4])
    assert (out[6:] == 99).all()


@pytest.mark.parametrize("threads", [33, 64, 100])
def test_threads_fill_waves_in_order(target: str, threads: int, kernels: Callable[[str, str], Module]) -> None:
    module = kernels("lanes", target)
    wave = module.kernels["count_below"].wave
    x, out = np.zeros(256, U32), np.zeros(256, U32)
    module.launch("count_below", (1, 1, 1), (threads, 1, 1), [x, out])
    np.testing.assert_array_equal(out[:threads], np.arange(threads) % wave)
    assert not out[threads:].any()
