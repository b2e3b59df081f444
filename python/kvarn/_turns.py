"""Rotary position encoding as second moments see it: channels turn in pairs, by an angle that grows with the position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["BUCKET_TOKENS", "Turns"]

# Positions that share a moment of K, from a multiple of this on. What turns by much less within them than over all positions gains from it.
BUCKET_TOKENS = 1024


@dataclass(frozen=True)
class Turns:
    """How K turns: at position t, channels (a, b) of pair i become ``a + ib`` times ``exp(i t frequency)``; other channels stay.

    Args:
        pairs: int32 ``[num_pairs, 2]``, channels, each at most once.
        frequencies: float64 ``[num_layers, num_pairs]``, radians a token.
    """

    pairs: NDArray[np.int32]
    frequencies: NDArray[np.float64]

    def mean(self, moment: NDArray[np.float64], start: int, count: int) -> NDArray[np.float64]:
        """The mean of ``R_t M R_t^T`` over the `count` positions from `start` on.

        Args:
            moment: float64 ``[num_layers, num_kv_heads, head_dim, head_dim]``.
        """
        first, second = self.pairs.T
        rest = np.setdiff1d(np.arange(moment.shape[-1]), self.pairs)
        real = np.concatenate([first, rest])
        n, paired = len(real), len(first)
        angle = np.pad(self.frequencies, ((0, 0), (0, n - paired)))[:, None]  # channels that stay are pairs without a second half
        block = {"xx": moment[:, :, real[:, None], real]}
        for name, rows, columns in (("xy", real, second), ("yx", second, real), ("yy", second, second)):
            part = moment[:, :, rows[:, None], columns]
            block[name] = np.pad(part, ((0, 0), (0, 0), (0, n - part.shape[2]), (0, n - part.shape[3])))
        # With z = x + i y: the means of z_i conj(z_j) and of z_i z_j turn with the difference and with the sum of the frequencies.
        with_conjugate = block["xx"] + block["yy"] + 1j * (block["yx"] - block["xy"])
        without = block["xx"] - block["yy"] + 1j * (block["xy"] + block["yx"])
        with_conjugate *= _mean_turn(angle[..., :, None] - angle[..., None, :], start, count)
        without *= _mean_turn(angle[..., :, None] + angle[..., None, :], start, count)
        total, difference = with_conjugate + without, without - with_conjugate
        out = np.empty_like(moment)
        out[:, :, real[:, None], real] = total.real / 2
        out[:, :, second[:, None], real] = total.imag[:, :, :paired] / 2
        out[:, :, real[:, None], second] = difference.imag[..., :paired] / 2
        out[:, :, second[:, None], second] = -difference.real[:, :, :paired, :paired] / 2
        return out


def _mean_turn(step: NDArray[np.float64], start: int, count: int) -> NDArray[np.complex128]:
    """The mean of ``exp(i t step)`` over the positions t: a geometric series."""
    half = np.sin(step / 2)
    small = np.abs(half) < 1e-12
    size = np.where(small, 1.0, np.sin(count * step / 2) / np.where(small, 1.0, count * half))
    turned: NDArray[np.complex128] = size * np.exp(1j * step * (start + (count - 1) / 2))
    return turned
