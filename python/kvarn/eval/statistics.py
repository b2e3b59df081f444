"""Intervals and summaries."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_Z95 = 1.959963984540054
# Student's 97.5 % quantiles by degrees of freedom, from 1 on; beyond them the normal one, 4 % smaller at most.
_T95: tuple[float, ...] = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
)
_T95 += (2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


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
    """Mean of independent values [n], and half its 95 % interval (Student's); nan for fewer than two."""
    values = values.double().flatten()
    if len(values) < 2:
        return float(values.mean()), math.nan
    factor = _T95[len(values) - 2] if len(values) - 2 < len(_T95) else _Z95
    return float(values.mean()), float(factor * values.std() / math.sqrt(len(values)))


def quantile(values: torch.Tensor, share: float) -> float:
    """A quantile of any number of values (torch.quantile takes 16 million at most), the nearest rank."""
    flat = values.flatten()
    rank = min(len(flat), max(1, math.ceil(share * len(flat))))
    return float(flat.kthvalue(rank).values)
