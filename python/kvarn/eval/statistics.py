"""Intervals and summaries."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_Z95 = 1.959963984540054


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    if count == 0:
        return 0.0, 1.0
    p, z2 = right / count, _Z95**2
    middle = (p + z2 / (2 * count)) / (1 + z2 / count)
    reach = _Z95 * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def paired(full: Sequence[bool], other: Sequence[bool]) -> tuple[float, float, float]:
    """Difference of two shares of right answers to the same problems, other minus full, with its 95 % interval (Agresti and Min 2005: half
    an answer is added to each cell of the table of pairs)."""
    lost = sum(a and not b for a, b in zip(full, other, strict=True)) + 0.5
    won = sum(b and not a for a, b in zip(full, other, strict=True)) + 0.5
    n = len(full) + 2
    middle = (won - lost) / n
    reach = _Z95 * math.sqrt(won + lost - (won - lost) ** 2 / n) / n
    return (sum(other) - sum(full)) / max(1, len(full)), middle - reach, middle + reach


def mean_interval(values: torch.Tensor) -> tuple[float, float]:
    """Mean of independent values [n], and half its 95 % interval (normal); nan for fewer than two."""
    values = values.double().flatten()
    if len(values) < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), float(_Z95 * values.std() / math.sqrt(len(values)))


def quantile(values: torch.Tensor, share: float) -> float:
    """A quantile of any number of values (torch.quantile takes 16 million at most), the nearest rank."""
    flat = values.flatten()
    rank = min(len(flat), max(1, math.ceil(share * len(flat))))
    return float(flat.kthvalue(rank).values)
