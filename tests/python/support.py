"""Plain float64 references, written from the definitions and from nothing else."""

from __future__ import annotations

import numpy as np

# The budget of attend (docs/DESIGN.md): relative L2 error of a row of float32 outputs.
ATTEND_ERROR = 5e-4


def sylvester(size: int) -> np.ndarray:
    """The orthonormal Hadamard matrix of a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    causal: bool = True,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One sequence. q [Tq, Hq, D], k and v [Tk, Hkv, D] in the model's frame; returns out [Tq, Hq, D] and lse [Tq, Hq]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    q_tokens, q_heads, dim = q.shape
    group = q_heads // k.shape[1]
    key = np.arange(len(k))
    out = np.zeros(q.shape)
    lse = np.full((q_tokens, q_heads), -np.inf)
    for i in range(q_tokens):
        position = len(k) - q_tokens + i
        visible = key <= position if causal else np.full(len(k), True)
        if window > 0:
            visible &= (key > position - window) & (key <= position)
        for head in range(q_heads):
            scores = k[:, head // group] @ q[i, head] / np.sqrt(dim)
            if soft_cap > 0:
                scores = soft_cap * np.tanh(scores / soft_cap)
            if alibi_slopes is not None:
                scores = scores + alibi_slopes[head] * (key - position)
            scores = scores[visible]
            logits = scores if sinks is None else np.append(scores, sinks[head])
            if len(logits) == 0:
                continue
            top = logits.max()
            total = np.exp(logits - top).sum()
            lse[i, head] = top + np.log(total)
            out[i, head] = np.exp(scores - top) / total @ v[visible, head // group]
    return out, lse


def assert_lse(got: np.ndarray, expected: np.ndarray) -> None:
    """A weight off by ATTEND_ERROR of itself is a score off by as much, absolutely, and so is the log of their sum.

    float32 adds 2^-24 of it in each of some ten operations.
    """
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=ATTEND_ERROR)


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest relative L2 error of a row."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float((np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max())
