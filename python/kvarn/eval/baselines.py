"""Other methods of quantising a KV cache, from their papers or code. Each class says what it follows and what its bits are.

All are given the same tiles under the same rules (the first tile and the unfinished one stay as they are), unless a name asks for other
sink or recent tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from kvarn.eval.encoder import half, rotation
from kvarn.eval.quantisers import Quantiser, Widths, tiles, untile

if TYPE_CHECKING:
    from kvarn.eval.language_model import LanguageModel

Tensor = torch.Tensor


class Float8(Quantiser):
    """FP8 E4M3 (arXiv 2209.05433) with an fp32 scale of the largest magnitude over 448: of each sequence's layer within a tile, or of each
    head. 8 bits and the scale."""

    def __init__(self, per_head: bool) -> None:
        self.per_head = per_head

    def bits(self, head_dim: int, num_kv_heads: int) -> tuple[float, float]:
        bits = 8 + 32 / (self.tile_tokens * head_dim * (1 if self.per_head else num_kv_heads))
        return bits, bits

    def keys(self, x: Tensor, start: int) -> Tensor:
        t = tiles(x, self.tile_tokens)
        scale = t.abs().amax((-1, -2) if self.per_head else (-1, -2, -3), keepdim=True).clamp_min(1e-12) / 448
        return untile((t / scale).to(torch.float8_e4m3fn).float() * scale)

    values = keys


def _asymmetric(x: Tensor, bits: int) -> Tensor:
    """KIVI's rounding along the last axis: min-max, scale and minimum in fp16."""
    low = x.amin(-1, keepdim=True)
    scale = half((x.amax(-1, keepdim=True) - low) / (2**bits - 1))
    low = half(low)
    codes = ((x - low) / torch.where(scale > 0, scale, 1)).clamp(0, 2**bits - 1).round()
    return codes * scale + low


class Kivi(Quantiser):
    """KIVI (arXiv 2402.02750 and its code): K per channel in groups of tokens, V per token in groups of channels, asymmetric; the last 128
    tokens stay in 16 bits. Its K is flushed 128 tokens at a time, as here; its V one token at a time, which the tile of recent tokens here
    stands for. Bits: width + 32 / group."""

    def __init__(self, widths: Widths, group: int) -> None:
        self.widths, self.group = widths, group
        self.recent_tokens = (0, 128)

    def bits(self, head_dim: int, num_kv_heads: int) -> tuple[float, float]:
        return self.widths.k + 32 / self.group, self.widths.v + 32 / min(self.group, head_dim)

    def keys(self, x: Tensor, start: int) -> Tensor:
        groups = x.transpose(-1, -2).unflatten(-1, (-1, self.group))
        return _asymmetric(groups, self.widths.k).flatten(-2).transpose(-1, -2)

    def values(self, x: Tensor, start: int) -> Tensor:
        return _asymmetric(x.unflatten(-1, (-1, min(self.group, x.shape[-1]))), self.widths.v).flatten(-2)


class QuaRot(Quantiser):
    """QuaRot's cache (arXiv 2404.00456): Hadamard rotation of K (after the position encoding) and V, then asymmetric rounding of each
    token's head with the range clipped to 0.95 and an integer zero point. Bits: width + 32 / head_dim."""

    CLIP = 0.95

    def __init__(self, widths: Widths) -> None:
        self.widths = widths

    def bits(self, head_dim: int, num_kv_heads: int) -> tuple[float, float]:
        return self.widths.k + 32 / head_dim, self.widths.v + 32 / head_dim

    def _round_trip(self, x: Tensor, bits: int) -> Tensor:
        h = rotation(x.shape[-1], x.device)
        t = x @ h
        top = 2**bits - 1
        high = t.amax(-1, keepdim=True).clamp_min(0) * self.CLIP
        low = t.amin(-1, keepdim=True).clamp_max(0) * self.CLIP
        scale = half((high - low) / top)
        scale = torch.where(scale > 0, scale, 1)
        zero = (-low / scale).round()
        codes: Tensor = ((t / scale).round() + zero).clamp(0, top)
        return ((codes - zero) * scale) @ h.T

    def keys(self, x: Tensor, start: int) -> Tensor:
        return self._round_trip(x, self.widths.k)

    def values(self, x: Tensor, start: int) -> Tensor:
        return self._round_trip(x, self.widths.v)


@functools.lru_cache
def sphere_levels(bits: int, head_dim: int) -> Tensor:
    """The 2^bits levels of least squared error for a coordinate of a uniformly random unit vector times sqrt(head_dim), [levels] float64:
    Lloyd's iteration on the density (1 - x^2 / D)^((D - 3) / 2)."""
    edge = min(math.sqrt(head_dim), 8.0)
    x = torch.linspace(-edge, edge, 200_001, dtype=torch.float64)
    weight = (1 - x.square() / head_dim).clamp_min(0) ** ((head_dim - 3) / 2)
    levels = torch.linspace(-2.0, 2.0, 2**bits, dtype=torch.float64)
    for _ in range(2000):
        cell = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        mass = torch.zeros_like(levels).index_add_(0, cell, weight)
        new = torch.zeros_like(levels).index_add_(0, cell, weight * x) / mass.clamp_min(1e-300)
        moved = (new - levels).abs().max()
        levels = new
        if moved < 1e-9:
            break
    return levels


@functools.lru_cache
def random_rotation(head_dim: int, seed: int = 0) -> Tensor:
    """A uniformly random orthonormal matrix [D, D] float32."""
    q, r = torch.linalg.qr(torch.randn(head_dim, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    turn: Tensor = (q * r.diagonal().sign()).float()
    return turn


class TurboQuant(Quantiser):
    """TurboQuant's quantiser of least squared error (arXiv 2504.19874, Algorithm 1): each token's head is divided by its norm (kept in
    fp16), rotated by a random orthonormal matrix, and each coordinate takes the nearest of the levels that are best for its distribution.
    Bits: width + 16 / head_dim."""

    def __init__(self, widths: Widths) -> None:
        self.widths = widths

    def bits(self, head_dim: int, num_kv_heads: int) -> tuple[float, float]:
        return self.widths.k + 16 / head_dim, self.widths.v + 16 / head_dim

    def _round_trip(self, x: Tensor, bits: int) -> Tensor:
        d = x.shape[-1]
        turn, levels = random_rotation(d).to(x.device), sphere_levels(bits, d).float().to(x.device)
        norm = x.norm(dim=-1, keepdim=True)
        t = (x / norm.clamp_min(1e-12)) @ turn * math.sqrt(d)
        nearest = levels[torch.bucketize(t, (levels[1:] + levels[:-1]) / 2)]
        back: Tensor = nearest / math.sqrt(d) @ turn.T
        return back * half(norm)

    def keys(self, x: Tensor, start: int) -> Tensor:
        return self._round_trip(x, self.widths.k)

    def values(self, x: Tensor, start: int) -> Tensor:
        return self._round_trip(x, self.widths.v)


class GgmlBlocks(Quantiser):
    """llama.cpp's q8_0 and q4_0 (quantize_row_q8_0_ref and quantize_row_q4_0_ref of ggml-quants.c): blocks of 32 channels with one fp16
    scale: 8.5 and 4.5 bits. K and V alike; llama.cpp keeps no sinks."""

    def __init__(self, width: int) -> None:
        self.width = width

    def bits(self, head_dim: int, num_kv_heads: int) -> tuple[float, float]:
        return self.width + 0.5, self.width + 0.5

    def keys(self, x: Tensor, start: int) -> Tensor:
        b = x.unflatten(-1, (-1, 32))
        largest = b.gather(-1, b.abs().argmax(-1, keepdim=True))
        # The codes are rounded with the scale in fp32, read with the scale in fp16.
        d = largest.abs() / 127 if self.width == 8 else largest / -8
        inverse = torch.where(d != 0, 1 / torch.where(d != 0, d, 1), 0)
        if self.width == 8:
            scaled = b * inverse
            codes = scaled.sign() * (scaled.abs() + 0.5).floor()  # roundf: halves away from zero
        else:
            codes = (b * inverse + 8.5).trunc().clamp(0, 15) - 8
        back: Tensor = (codes * half(d)).flatten(-2)
        return back

    values = keys


class KvQuant(Quantiser):
    """KVQuant with dense and sparse parts (arXiv 2401.18079): K per channel before the position encoding, V per token; levels found by
    k-means weighted with the squared gradients of the loss (the diagonal of the Fisher information) on calibration text, one set for each
    layer's K and V, on values normalised to [-1, 1]; 1 % outliers, half on each side, are kept in 16 bits. K's thresholds and ranges come
    from the calibration, V's from each token. Bits: width + 1 % of 32 (value and index) + 32 / channels of a layer for V's range."""

    OUTLIERS = 0.01

    def __init__(self, widths: Widths) -> None:
        self.widths = widths
        self.k_levels: Tensor | None = None  # [L, levels]
        self.v_levels: Tensor | None = None
        self.k_low: Tensor | None = None  # [L, 1, H, 1, D]
        self.k_high: Tensor | None = None
        self._model: LanguageModel | None = None

    def prepare(self, model: LanguageModel) -> None:
        """Calibrates on the model's calibration text."""
        self._model = model
        found = model.calibration()
        k = model.unrotate(found.k, 0)
        # The gradient turns as K does.
        k_weight, v_weight = model.unrotate(found.k_gradient, 0).square(), found.v_gradient.square()
        half_share = self.OUTLIERS / 2
        flat = k.transpose(1, 2).flatten(2, 3)  # [L, H, tokens, D]
        self.k_low = _quantile(flat, half_share)[:, None, :, None]
        self.k_high = _quantile(flat, 1 - half_share)[:, None, :, None]
        inside = (k >= self.k_low) & (k <= self.k_high)
        self.k_levels = self._kmeans(_normalise(k, self.k_low, self.k_high), k_weight * inside, self.widths.k)
        low, high, inside = self._v_range(found.v)
        self.v_levels = self._kmeans(_normalise(found.v, low, high), v_weight * inside, self.widths.v)

    def _kmeans(self, x: Tensor, weight: Tensor, bits: int) -> Tensor:
        return torch.stack([weighted_kmeans(a.flatten(), w.flatten(), 2**bits) for a, w in zip(x, weight, strict=True)])

    def _v_range(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each token's range over all heads without its outliers, and what is inside."""
        channels = v.shape[2] * v.shape[4]
        count = max(1, round(self.OUTLIERS / 2 * channels))
        flat = v.transpose(2, 3).flatten(3)
        ordered = flat.sort(-1).values
        low, high = ordered[..., count, None], ordered[..., -1 - count, None]
        low, high = low[:, :, None], high[:, :, None]
        return low, high, (v >= low) & (v <= high)

    def bits(self, head_dim: int, num_kv_heads: int) -> tuple[float, float]:
        sparse = 32 * self.OUTLIERS
        return self.widths.k + sparse, self.widths.v + sparse + 32 / (head_dim * num_kv_heads)

    def keys(self, x: Tensor, start: int) -> Tensor:
        if self._model is None or self.k_levels is None or self.k_low is None or self.k_high is None:
            raise ValueError("[kvarn.eval] kvquant: expected a call of prepare before the first tile, got none")
        k = self._model.unrotate(x, start)
        return self._model.rotate(_by_levels(k, self.k_low, self.k_high, (k >= self.k_low) & (k <= self.k_high), self.k_levels), start)

    def values(self, x: Tensor, start: int) -> Tensor:
        if self.v_levels is None:
            raise ValueError("[kvarn.eval] kvquant: expected a call of prepare before the first tile, got none")
        return _by_levels(x, *self._v_range(x), self.v_levels)


def _quantile(x: Tensor, share: float) -> Tensor:
    """Along the axis of tokens, the outer of the two nearest: [L, H, tokens, D] -> [L, H, D]."""
    at = share * (x.shape[2] - 1)
    index = math.floor(at) if share < 0.5 else math.ceil(at)
    return x.sort(2).values[:, :, index]


def _normalise(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    middle, reach = (low + high) / 2, ((high - low) / 2).clamp_min(1e-12)
    return (x - middle) / reach


def _by_levels(x: Tensor, low: Tensor, high: Tensor, inside: Tensor, levels: Tensor) -> Tensor:
    low, high = half(low), half(high)
    middle, reach = (low + high) / 2, ((high - low) / 2).clamp_min(1e-12)
    out = []
    for a, level in zip((x - middle) / reach, levels, strict=True):
        out.append(level[torch.bucketize(a, (level[1:] + level[:-1]) / 2)])
    return torch.where(inside, torch.stack(out) * reach + middle, half(x))


def weighted_kmeans(x: Tensor, weight: Tensor, count: int, rounds: int = 50) -> Tensor:
    """Levels [count], rising, that minimise ``sum weight * (x - nearest level)^2``: Lloyd's iteration from the quantiles, deterministic.

    Values are gathered in 4,096 bins first: one percent of the finest levels' distance at 4 bits.
    """
    bins = 4096
    weight = weight.double() + 1e-12 * weight.double().mean().clamp_min(1e-30)
    index = ((x.clamp(-1, 1) + 1) / 2 * (bins - 1)).round().long()
    mass = torch.zeros(bins, dtype=torch.float64, device=x.device).index_add_(0, index, weight)
    at = torch.linspace(-1, 1, bins, dtype=torch.float64, device=x.device)
    share = mass.cumsum(0) / mass.sum()
    goal = (torch.arange(count, device=x.device, dtype=torch.float64) + 0.5) / count
    levels = at[torch.searchsorted(share, goal).clamp_max(bins - 1)]
    for _ in range(rounds):
        cell = torch.bucketize(at, (levels[1:] + levels[:-1]) / 2)
        total = torch.zeros_like(levels).index_add_(0, cell, mass)
        new = torch.zeros_like(levels).index_add_(0, cell, mass * at) / total.clamp_min(1e-300)
        levels = torch.where(total > 0, new, levels).sort().values
    return levels.float()


WITH_WIDTHS: dict[str, Callable[..., Quantiser]] = {
    "kivi32": lambda widths: Kivi(widths, 32),
    "kivi128": lambda widths: Kivi(widths, 128),
    "kvquant": KvQuant,
    "quarot": QuaRot,
    "turboquant": TurboQuant,
}
FIXED: dict[str, Callable[..., Quantiser]] = {
    "fp8": lambda: Float8(per_head=False),
    "fp8_head": lambda: Float8(per_head=True),
    "q8_0": lambda: GgmlBlocks(8),
    "q4_0": lambda: GgmlBlocks(4),
}
