"""Memory in every width and space, atomics, control flow, and dispatch, against numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from amdsim import Module

U32 = np.uint32
N = 256
Reference = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _global_bytes(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    out.view(np.uint8)[:N] = x.view(np.uint8)[: 3 * N : 3] + np.uint8(1)
    out[N : 2 * N] = x.view(np.int8)[:N].astype(np.int32).view(U32)
    return out


def _global_halves(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    out.view(np.uint16)[:N] = x.view(np.uint16)[: 3 * N : 3]
    out[N : 2 * N] = x.view(np.int16)[:N].astype(np.int32).view(U32)
    return out


def _pair_of_halves(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    h = x.view(np.float16)
    pairs = np.stack([h[:N], h[100 : 100 + N]], 1)
    out[:N] = (pairs + pairs).view(U32)[:, 0]
    return out


def _global_three(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    out[: 3 * N] = x[: 3 * N].reshape(N, 3)[:, [2, 0, 1]].ravel()
    return out


def _lds_pairs(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    p = x.view(np.uint64)
    out.view(np.uint64)[:N] = p[N - 1 :: -1] ^ p[2 * N - 1 : N - 1 : -1]
    return out


def _lds_narrow(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    i = np.arange(N)
    out[:N] = (x[N - 1 - i] & U32(0xFFFF)) | (x[i ^ 1] >> U32(16) & U32(0xFF)) << U32(16)
    out[N : 2 * N] = (x[i ^ 3] >> U32(24)).astype(np.uint8).view(np.int8).astype(np.int32).view(U32)
    return out


def _atomics(x: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Sum, and, or, xor, maximum; then halves added up to float 5."""
    v = x[:N]
    words = start[:8].copy()
    words[0] += np.sum(v, dtype=U32)
    words[1] &= np.bitwise_and.reduce(v)
    words[2] |= np.bitwise_or.reduce(v)
    words[3] ^= np.bitwise_xor.reduce(v)
    words[4] = max(words[4], v.max())
    return words


def _lds_atomics(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    start = np.zeros(8, U32)
    start[1] = 0xFFFFFFFF
    out[:8] = _atomics(x, start)
    out[5] = np.float32(N / 2).view(U32)
    # Lanes and waves follow one another in the emulator.
    out[N : 2 * N] = np.concatenate([[0], np.cumsum(x[:N], dtype=U32)[:-1]])
    return out


def _global_atomics(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    words = _atomics(x, out)
    words[5] = min(out[5], x[:N].min())
    words[6] = np.float32(N / 2).view(U32)
    words[7] = N
    out[:8] = words
    out[8:10] = np.array([np.sum(x[:N].astype(np.uint64) << np.uint64(20))]).view(U32)
    out[N : 2 * N] = np.arange(N)
    return out


def _compare_and_swap(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    for i in range(N):
        out[N + i] = out[0]
        out[0] = (int(out[0]) * 3 + int(x[i])) & 0xFFFFFFFF
    return out


def _scratch(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    for i in range(N):
        out[i] = sum(int(x[i]) * ((int(x[i + j]) & 31) + 1) for j in range(8)) & 0xFFFFFFFF
    return out


def _buffer(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    loaded = np.where(np.arange(N) < 127, x[1 : N + 1], 0)
    out[:128] = loaded[:128] + U32(1)
    out[N + 128 : 2 * N] = loaded[128:]
    return out


def _divergent_loop(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    for t in range(N):
        r = 0
        for i in range(int(x[t]) & 15):
            r = (r + int(x[i])) & 0xFFFFFFFF if i & 1 else r ^ int(x[i + 1])
        out[t] = r
    return out


def _jump_table(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    v = x[:N]
    cases = [v + U32(1), v * U32(3), v ^ U32(5), ~v, v >> U32(3), v << U32(2), v % U32(11), v - U32(9)]
    out[:N] = cases[x[0] & 7]
    return out


def _call(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    def callee(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a * U32(17) + (b ^ (a >> U32(3)))

    out[:N] = callee(x[:N], x[N : 2 * N]) + callee(x[N : 2 * N], x[:N])
    return out


def _copy(index: Callable[[np.ndarray], np.ndarray], words: int = 1) -> Reference:
    def reference(x: np.ndarray, out: np.ndarray) -> np.ndarray:
        out[: N * words] = index(x[: N * words].reshape(N, words)).ravel()
        return out

    return reference


REFERENCES: dict[str, Reference] = {
    "global_bytes": _global_bytes,
    "global_halves": _global_halves,
    "global_pair_of_halves": _pair_of_halves,
    "global_wide": _copy(lambda rows: rows[:, ::-1], 4),
    "global_three": _global_three,
    "lds_wide": _copy(lambda rows: rows[::-1], 4),
    "lds_pairs": _lds_pairs,
    "lds_narrow": _lds_narrow,
    "lds_atomics": _lds_atomics,
    "global_atomics": _global_atomics,
    "compare_and_swap": _compare_and_swap,
    "scratch": _scratch,
    "buffer": _buffer,
    "divergent_loop": _divergent_loop,
    "jump_table": _jump_table,
    "call": _call,
    "branches": _copy(lambda rows: np.full_like(rows, 0x20 | 0x40 | 0x80 | 0x100 | 0x200)),
    "long_branch": _copy(lambda rows: rows * U32(2)),
    "long_branch_back": _copy(lambda rows: rows * U32(2)),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_kernel_matches_its_reference(target: str, name: str, kernels: Callable[[str, str], Module], rng: np.random.Generator) -> None:
    x = rng.integers(0, 2**32, 1024, dtype=U32)
    if name == "global_pair_of_halves":
        x = rng.standard_normal(2048).astype(np.float16).view(U32)
    out = np.zeros(1024, U32)
    if name == "global_atomics":
        out[[1, 5]] = 0xFFFFFFFF
    expected = REFERENCES[name](x, out.copy())
    kernels("memory", target).launch(name, (1, 1, 1), (N, 1, 1), [x, out])
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("case", range(8))
def test_every_entry_of_a_jump_table(target: str, case: int, kernels: Callable[[str, str], Module]) -> None:
    x, out = np.arange(case, case + 1024, dtype=U32), np.zeros(1024, U32)
    kernels("memory", target).launch("jump_table", (1, 1, 1), (N, 1, 1), [x, out])
    np.testing.assert_array_equal(out, _jump_table(x, np.zeros_like(out)))


@pytest.mark.parametrize("first", [0, 1])
def test_generic_pointers_reach_lds_and_global_memory(target: str, first: int, kernels: Callable[[str, str], Module]) -> None:
    x, out = np.arange(first, first + 1024, dtype=U32), np.zeros(1024, U32)
    kernels("memory", target).launch("flat", (1, 1, 1), (N, 1, 1), [x, out])
    source = x[:N] if first else x[N : 2 * N]
    np.testing.assert_array_equal(out[:N], source[::-1])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("reverse", [False, True])
def test_ids_and_sizes_of_a_three_dimensional_grid(target: str, threads: int, reverse: bool, kernels: Callable[[str, str], Module]) -> None:
    grid, block = (3, 4, 2), (4, 3, 2)
    shape = tuple(g * b for g, b in zip(grid, block, strict=True))[::-1]
    out = np.zeros(shape, U32)
    kernels("memory", target).launch("ids", grid, block, [out, 1, 3 << 32], reverse=reverse, threads=threads)
    z, y, x = np.indices(shape)
    np.testing.assert_array_equal(out, (x + 100 * y + 10000 * z) * 3)
