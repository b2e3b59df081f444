"""What a quantiser does to K and V themselves, layer by layer: squared errors and their split, tails of the tokens' norms, and what
attention makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvarn.eval.language_model import LanguageModel
from kvarn.eval.quantisers import Quantiser
from kvarn.eval.statistics import quantile

Tensor = torch.Tensor


@dataclass
class Sample:
    """q [L, B, Hq, queries, D] of the last positions, K and V [L, B, H, T, D] of a run in full precision, float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    softmax_scale: float


@torch.no_grad()
def sample(model: LanguageModel, ids: Tensor, queries: int = 128) -> Sample:
    """The tensors of windows [B, T]; T is cut to whole tiles of 256 tokens."""
    ids = ids[:, : ids.shape[1] // 256 * 256].to(model.device)
    kept: list[tuple[Tensor, ...]] = []

    def observe(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        kept.append((q[:, :, -queries:].float(), k.float(), v.float()))

    model.step(ids, model.cache(*ids.shape), True, observe)
    q, k, v = (torch.stack([part[i] for part in kept]) for i in range(3))
    attention = next(m for name, m in model.model.named_modules() if name.endswith("self_attn"))
    return Sample(q, k, v, float(getattr(attention, "scaling", model.head_dim**-0.5)))


def _tails(x: Tensor, y: Tensor) -> dict[str, float]:
    """Relative error of tokens' norms."""
    norms = x.norm(dim=-1)
    error = (y.norm(dim=-1) - norms).abs() / norms.clamp_min(1e-12)
    return {name: quantile(error, share) for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("p999", 0.999), ("max", 1.0))}


@torch.no_grad()
def layer_errors(found: Sample, quantiser: Quantiser) -> list[dict[str, float]]:
    """One row per layer.

    k_error, v_error: relative squared errors of the quantised tokens; k_norm_share, v_norm_share: the part of them in the tokens' norms;
    k_norm_p50 ... v_norm_max: quantiles of the relative error of tokens' norms; attention_kl: mean divergence of the attention weights
    of the last queries, nats, when K is quantised; logit_slope: slope of the regression of quantised on full scores (1: neither
    flattened nor sharpened); logit_noise: standard deviation of the rest of the scores' error; output_error: relative squared error of
    attention's output.
    """
    tile = max(quantiser.tile_tokens, 128)
    length = found.k.shape[3] // tile * tile
    first = -(-quantiser.sink_tokens // tile) * tile
    k, v = found.k.clone(), found.v.clone()
    k[:, :, :, first:length] = quantiser.keys(found.k[:, :, :, first:length], first)
    v[:, :, :, first:length] = quantiser.values(found.v[:, :, :, first:length], first)
    rows = []
    for layer in range(len(k)):
        row: dict[str, float] = {}
        for name, x, y in (("k", found.k, k), ("v", found.v, v)):
            a, b = x[layer, :, :, first:length], y[layer, :, :, first:length]
            error = (a - b).square().sum()
            row[f"{name}_error"] = float(error / a.square().sum())
            row[f"{name}_norm_share"] = float((a.norm(dim=-1) - b.norm(dim=-1)).square().sum() / error.clamp_min(1e-30))
            row |= {f"{name}_norm_{tail}": value for tail, value in _tails(a, b).items()}
        rows.append(row | _attention(found, layer, k[layer], v[layer], first, length))
    return rows


def _attention(found: Sample, layer: int, k: Tensor, v: Tensor, first: int, length: int) -> dict[str, float]:
    q = found.q[layer]
    groups, new, total = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]

    def scores(keys: Tensor) -> Tensor:
        return q @ keys.repeat_interleave(groups, 1).transpose(2, 3) * found.softmax_scale

    full, own = scores(found.k[layer]), scores(k)
    seen = torch.arange(total, device=q.device) <= torch.arange(total - new, total, device=q.device)[:, None]
    log_full, log_own = (s.masked_fill(~seen, -1e30).log_softmax(-1) for s in (full, own))
    kl = (log_full.exp() * (log_full - log_own)).sum(-1)
    a, b = (s[..., first : min(length, total - new)] for s in (full, own))
    a, b = (s - s.mean(-1, keepdim=True) for s in (a, b))
    slope = (a * b).sum(-1) / a.square().sum(-1).clamp_min(1e-30)
    noise = (b - slope[..., None] * a).square().mean(-1).sqrt()
    full_out = log_full.exp() @ found.v[layer].repeat_interleave(groups, 1)
    own_out = log_own.exp() @ v.repeat_interleave(groups, 1)
    return {
        "attention_kl": float(kl.mean()),
        "logit_slope": float(slope.mean()),
        "logit_noise": float(noise.mean()),
        "output_error": float((own_out - full_out).square().sum() / full_out.square().sum()),
    }


def mean_row(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean over layers; of "max" the largest."""
    return {key: (max if key.endswith("max") else _mean)([row[key] for row in rows]) for key in rows[0]}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
