"""The attention function "kvarn_eval": attention over a `SimulatedCache`, for models of transformers whose attention can be chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers.modeling_utils import AttentionInterface

from kvarn.eval.quantisers import Quantiser, tiles

Tensor = torch.Tensor

ATTENTION = "kvarn_eval"

# Values of K or V that a quantiser is given at once: 256 MB of float32 and what it makes of them.
_VALUES_AT_ONCE = 1 << 26

#: Called with (layer, q [B, Hq, t, D], k [B, H, n, D], v) at every attention.
Observer = Callable[[int, Tensor, Tensor, Tensor], None]


@dataclass
class _Active:
    cache: SimulatedCache | None = None
    observer: Observer | None = None


_active = _Active()


@contextlib.contextmanager
def attending(cache: SimulatedCache | None = None, observer: Observer | None = None) -> Iterator[None]:
    """What attention reads and tells, for the forward passes inside."""
    global _active
    before, _active = _active, _Active(cache, observer)
    try:
        yield
    finally:
        _active = before


class SimulatedCache:
    """K and V of all layers in full precision [L, B, H, length, D]; complete tiles are replaced by what a quantiser gives back.

    Args:
        shape: (layers, batch, KV heads, length, head_dim).
        quantiser: None: nothing is replaced.
        source: (K, V) of another run: tiles are replaced by what the quantiser makes of these, so that errors do not accumulate.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int, int],
        device: torch.device,
        dtype: torch.dtype,
        quantiser: Quantiser | None = None,
        source: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.quantiser, self.source = quantiser, source
        self.length = 0
        self.done = [0, 0]  # tokens of K and V that have been seen to
        if quantiser is not None:
            tile = quantiser.tile_tokens
            self.done = [-(-quantiser.sink_tokens // tile) * tile] * 2
        self.noise: Tensor | None = None  # mean squared error of each token of K [L, B, H, length], for a quantiser with a logit bias
        if quantiser is not None and quantiser.logit_bias:
            self.noise = torch.zeros(shape[:-1], device=device)
        self.position: Tensor | None = None  # int64 [1]: where the next token goes, when a graph is captured
        self.limit = 0  # tokens that a captured graph attends to

    def rows(self, rows: slice) -> SimulatedCache:
        """The same memory, some sequences of it, empty."""
        part = SimulatedCache.__new__(SimulatedCache)
        part.k, part.v = self.k[:, rows], self.v[:, rows]
        part.quantiser = part.source = part.noise = part.position = None
        part.length, part.done, part.limit = 0, [0, 0], 0
        return part

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes K and V [B, H, t, D] of one layer after the tokens that are there; returns all of them."""
        if self.position is not None:
            self.k[layer_idx].index_copy_(2, self.position, k)
            self.v[layer_idx].index_copy_(2, self.position, v)
            return self.k[layer_idx][:, :, : self.limit], self.v[layer_idx][:, :, : self.limit]
        end = self.length + k.shape[2]
        self.k[layer_idx][:, :, self.length : end] = k
        self.v[layer_idx][:, :, self.length : end] = v
        return self.k[layer_idx][:, :, :end], self.v[layer_idx][:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens, for transformers."""
        return self.length

    def advance(self, tokens: int) -> None:
        """Counts the tokens of a step and replaces the tiles that are complete and not recent."""
        self.length += tokens
        if self.quantiser is None:
            return
        tile = self.quantiser.tile_tokens
        for which, (store, call) in enumerate(((self.k, self.quantiser.keys), (self.v, self.quantiser.values))):
            last = (self.length - self.quantiser.recent_tokens[which]) // tile * tile
            per = max(1, _VALUES_AT_ONCE // store[:, :, :, :tile].numel()) * tile
            source = store if self.source is None else self.source[which]
            for first in range(self.done[which], last, per):
                end = min(first + per, last)
                given = source[:, :, :, first:end].float()
                back = call(given, first)
                if self.noise is not None and which == 0:
                    self.noise[:, :, :, first:end] = (back - given).square().mean(-1)
                store[:, :, :, first:end] = back.to(store.dtype)
            self.done[which] = max(self.done[which], last)


def norm_errors(x: Tensor, y: Tensor, tile_tokens: int = 128) -> dict[str, Tensor]:
    """Errors of y for x, both [L, B, H, n * G, D]; sums over each tile [L, B, n, H]: of squares, of the squared error, and of its part in
    the tokens' norms: ``|x - y|^2 = (|x| - |y|)^2 + 2 |x| |y| (1 - cos)``."""
    a, b = tiles(x.float(), tile_tokens), tiles(y.float(), tile_tokens)
    norms = (a.norm(dim=-1) - b.norm(dim=-1)).square().sum(-1)
    return {"square": a.square().sum((-1, -2)), "error": (a - b).square().sum((-1, -2)), "norm_error": norms}


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    cache = _active.cache
    layer = int(getattr(module, "layer_idx", -1))
    if _active.observer is not None:
        _active.observer(layer, query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    new, total = query.shape[2], key.shape[2]
    position = None if cache is None else cache.position
    bias = None
    if cache is not None and cache.noise is not None:  # [B, Hq, t, n]
        noise = cache.noise[layer][:, :, :total].repeat_interleave(query.shape[1] // key.shape[1], 1)
        bias = -0.5 * (scale * query.float().norm(dim=-1, keepdim=True)).square() * noise[:, :, None]
    plain = not softcap and s_aux is None and bias is None and not (sliding_window and sliding_window < total)
    if new == 1 and plain:
        return _attend_one(query, key, value, scale, position), None
    if plain and new == total:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale).transpose(1, 2).contiguous(), None
    columns = torch.arange(total, device=query.device)
    own = torch.arange(total - new, total, device=query.device) if position is None else position
    seen = columns <= own[:, None]
    if sliding_window:
        seen &= columns > own[:, None] - sliding_window
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if plain:
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)
        return out.transpose(1, 2).contiguous(), None
    scores = (query @ key.transpose(2, 3)).float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~seen, -torch.inf)
    if s_aux is None:
        weights = scores.softmax(-1)
    else:
        sinks = s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None


def _attend_one(query: Tensor, key: Tensor, value: Tensor, scale: float, position: Tensor | None) -> Tensor:
    """One query token over all columns, or those up to `position`; no copy of K and V."""
    batch, heads, _, head_dim = query.shape
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    scores = torch.bmm(query.reshape(len(keys), -1, head_dim) * scale, keys.transpose(1, 2)).float()
    if position is not None:
        scores = scores.masked_fill(torch.arange(key.shape[2], device=key.device) > position, -torch.inf)
    return torch.bmm(scores.softmax(-1).to(values.dtype), values).view(batch, 1, heads, head_dim)


AttentionInterface.register(ATTENTION, _attend)
