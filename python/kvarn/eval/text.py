"""Text read through a quantised cache: bits per byte, divergence of the next token's distribution, and how errors accumulate.

Pseudo-decode: the text is fed in steps (of one tile, or of one token, which is true decoding), each of which reads the quantised cache of
those before it; a tile is quantised as soon as it is complete, so that later K and V are computed from outputs that saw quantised ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from kvarn.demo.model import BEGIN
from kvarn.eval.attention import norm_errors
from kvarn.eval.language_model import LanguageModel
from kvarn.eval.quantisers import Quantiser
from kvarn.eval.statistics import mean_interval, quantile

Tensor = torch.Tensor


@dataclass
class Reference:
    """The run without quantisation: log-probabilities [B, T, vocabulary] float32, and K and V [L, B, H, T, D]."""

    log_probabilities: Tensor
    k: Tensor
    v: Tensor


@dataclass
class TextRun:
    """What one cache made of B windows of T tokens. Everything is on the CPU, float32.

    nll: [B, T - 1] negative log-likelihood of each next token, nats; counted: which of them are text (bool).
    kl: [B, T] divergence from the reference, nats; agree: [B, T] whether the likeliest token is the same. None without a reference.
    errors: by "k" and "v", `norm_errors` of the cache against the reference's [L, B, tiles, H].
    """

    nll: Tensor
    counted: Tensor
    bytes: int
    kl: Tensor | None = None
    agree: Tensor | None = None
    errors: dict[str, dict[str, Tensor]] | None = None

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text."""
        return float((self.nll.double() * self.counted).sum()) / self.bytes / math.log(2)

    @property
    def bits_per_token(self) -> float:
        """Bits per token of text."""
        return float((self.nll.double() * self.counted).sum()) / int(self.counted.sum()) / math.log(2)


def windows(model: LanguageModel, text: bytes, length: int, count: int) -> tuple[Tensor, int]:
    """The first `count` windows of `length` tokens of a text [B, length], and how many windows the text has. Documents are separated by
    zero bytes; each begins as the model's documents do."""
    tokens: list[int] = []
    for document in text.split(b"\0"):
        if document:
            tokens += model.encode(document.decode("utf-8", "replace"))
        if len(tokens) >= length * count:
            break
    n = min(count, len(tokens) // length)
    if n == 0:
        raise ValueError(f"[kvarn.eval] text: expected at least {length} tokens, got {len(tokens)}")
    return torch.tensor(tokens[: n * length]).view(n, length), n


@torch.no_grad()
def read(
    model: LanguageModel,
    ids: Tensor,
    quantiser: Quantiser | None = None,
    reference: Reference | None = None,
    *,
    step_tokens: int = 128,
    accumulate: bool = True,
    with_errors: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> tuple[TextRun, Reference | None]:
    """Reads windows [B, T].

    Args:
        quantiser: None: the reference itself; it is returned.
        reference: what to compare with.
        step_tokens: tokens of a step.
        accumulate: False: tiles are quantised from the reference's K and V, not from the run's own.
        with_errors: compare the cache with the reference's.
        on_step: called with the number of tokens read.
    """
    batch, length = ids.shape
    ids = ids.to(model.device)
    source = None if accumulate or reference is None else (reference.k, reference.v)
    cache = model.cache(batch, length, quantiser, source)
    nll = torch.zeros(batch, length - 1)
    kl = torch.zeros(batch, length) if reference is not None else None
    agree = torch.zeros(batch, length) if reference is not None else None
    kept = []
    for first in range(0, length, step_tokens):
        last = min(first + step_tokens, length)
        own = model.step(ids[:, first:last], cache).log_softmax(-1)
        cache.advance(last - first)
        target = ids[:, first + 1 : last + 1]
        if target.shape[1]:
            nll[:, first : first + target.shape[1]] = -own[:, : target.shape[1]].gather(-1, target[..., None])[..., 0].cpu()
        if reference is not None and kl is not None and agree is not None:
            full = reference.log_probabilities[:, first:last].to(model.device)
            kl[:, first:last] = functional.kl_div(own, full, reduction="none", log_target=True).sum(-1).clamp_min(0).cpu()
            agree[:, first:last] = (own.argmax(-1) == full.argmax(-1)).float().cpu()
        elif quantiser is None:
            kept.append(own)
        if on_step is not None:
            on_step(last)
    counted = torch.ones_like(nll, dtype=torch.bool)
    if model.is_bytes:
        counted = (ids[:, 1:] < BEGIN).cpu()
        size = int(counted.sum())
    else:
        size = sum(len(model.decode(row).encode()) for row in ids[:, 1:].tolist())
    run = TextRun(nll, counted, size, kl, agree)
    if with_errors and reference is not None:
        end = length // 128 * 128
        run.errors = {
            name: {key: value.cpu() for key, value in norm_errors(full[:, :, :, :end], mine[:, :, :, :end]).items()}
            for name, full, mine in (("k", reference.k, cache.k), ("v", reference.v, cache.v))
        }
    made = Reference(torch.cat(kept, 1), cache.k, cache.v) if quantiser is None and reference is None else None
    return run, made


def join(runs: list[TextRun]) -> TextRun:
    """One run of several batches of windows."""

    def both(name: str) -> Any:
        parts = [getattr(run, name) for run in runs]
        return None if parts[0] is None else torch.cat(parts)

    errors = None
    if runs[0].errors is not None:
        errors = {
            x: {y: torch.cat([run.errors[x][y] for run in runs if run.errors], 1) for y in part} for x, part in runs[0].errors.items()
        }
    return TextRun(both("nll"), both("counted"), sum(run.bytes for run in runs), both("kl"), both("agree"), errors)


def summary(run: TextRun, full: TextRun, skip: int = 128) -> dict[str, float]:
    """Numbers of a run beside the reference's. Divergences leave out the first `skip` tokens, which no cache quantises.

    The interval of the added bits is over windows, which are independent pieces of text.
    """
    added = ((run.nll - full.nll) * full.counted).double().sum(1) / math.log(2) / max(1, full.bytes) * len(full.nll)
    row = {
        "bits_per_byte": run.bits_per_byte,
        "bits_per_token": run.bits_per_token,
        "added_bits_per_byte": run.bits_per_byte - full.bits_per_byte,
        "added_interval": mean_interval(added)[1],
    }
    if run.kl is not None and run.agree is not None:
        kl = run.kl[:, skip:] if run.kl.shape[1] > 2 * skip else run.kl
        agree = run.agree[:, skip:] if run.agree.shape[1] > 2 * skip else run.agree
        row |= {
            "kl_mean": float(kl.double().mean()),
            "kl_interval": mean_interval(kl.mean(1))[1],
            "kl_median": quantile(kl, 0.5),
            "kl_999": quantile(kl, 0.999),
            "top1_agreement": float(agree.double().mean()),
        }
    return row


def growth(run: TextRun) -> dict[str, list[float]]:
    """Relative squared error of K and V by tile (the mean over layers, windows and heads), and the share of it in the tokens' norms."""
    if run.errors is None:
        raise ValueError("[kvarn.eval] run: expected one with errors, got none")
    rows: dict[str, list[float]] = {}
    for name, parts in run.errors.items():
        relative = parts["error"] / parts["square"].clamp_min(1e-12)
        rows[name] = relative.double().mean((0, 1, 3)).tolist()
        total = parts["error"].double().sum((0, 1, 3))
        rows[name + "_norm_share"] = (parts["norm_error"].double().sum((0, 1, 3)) / total.clamp_min(1e-12)).tolist()
    return rows
