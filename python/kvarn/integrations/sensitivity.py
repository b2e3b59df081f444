"""How sensitive a model's predictions are to its K and V: second moments of gradients, and of K and V themselves, from a pass over tokens,
forward and back."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import AttentionInterface

from kvarn._balance import Balance
from kvarn._errors import UnsupportedError
from kvarn._turns import Turns
from kvarn.integrations.frames import k_scales, v_frames

__all__ = ["Sensitivity", "find_turns", "measure", "observed", "observing", "read"]

_ATTENTION = "kvarn_sensitivity"
# Tokens, and the positions they are read at, by which a rotary encoding is recognised; and the most that K may deviate from being the same,
# turned: 16-bit models deviate by a few percent in their last layers, the wrong encoding by more than one.
_PROBE_TOKENS = 64
_PROBE_START = 1000
_PROBE_ERROR = 0.2
# Tokens whose predictions are in fp32 at once: 512 MB for a vocabulary of 128,000.
_PREDICTIONS_AT_ONCE = 1024
# Tokens about whose mean K varies, as in a tile. The first ones of a window, which read little and are unlike the others, are left out.
_TILE_TOKENS = 128

#: Called with (layer, K [B, Hkv, tokens, D], V) at every attention.
Observer = Callable[[int, torch.Tensor, torch.Tensor], None]
_observer: Observer | None = None


@dataclass(frozen=True)
class Sensitivity:
    """k, v: float64 ``[num_layers, num_kv_heads, head_dim, head_dim]`` on the CPU, the means over tokens of ``g^T g`` for gradients g of a
    log-likelihood for a token's K and V; K's without its position encoding when `turns` is known, otherwise as K lies in the cache.
    balance: the scale and the frame in which K and V are rounded best."""

    k: torch.Tensor
    v: torch.Tensor
    turns: Turns | None
    balance: Balance


def _attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    if _observer is not None:
        if key.shape[-1] != query.shape[-1] or value.shape != key.shape:
            raise UnsupportedError(
                f"[kvarn.prepare] layer {module.layer_idx}: expected queries, K and V of one head_dim, got {query.shape[-1]}, "
                f"{key.shape[-1]} and {value.shape[-1]}"
            )
        _observer(module.layer_idx, key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


@contextlib.contextmanager
def observing(model: Any) -> Iterator[None]:
    """The model with an attention that tells its K and V, without gradients of weights."""
    before = model.config.get_text_config(decoder=True)._attn_implementation
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training
    model.set_attn_implementation(_ATTENTION)
    model.eval()
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)
        model.train(training)
        model.set_attn_implementation(before)


@contextlib.contextmanager
def _recomputing(model: Any) -> Iterator[None]:
    """The model with layers that keep only their inputs and run again on the way back: else long windows of large models do not fit."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Tells an observer of every attention, within `observing`."""
    global _observer
    _observer = observer
    try:
        yield
    finally:
        _observer = None


def read(model: Any, ids: torch.Tensor, start: int, observer: Observer, logits_to_keep: int) -> torch.Tensor:
    """Logits [logits_to_keep, or all with 0, vocabulary] of tokens [n] at positions from `start` on, within `observing`."""
    positions = torch.arange(start, start + len(ids), device=model.device)[None]
    with observed(observer):
        out = model(input_ids=ids[None].to(model.device), position_ids=positions, use_cache=False, logits_to_keep=logits_to_keep)
    logits: torch.Tensor = out.logits[0]
    return logits


def measure(model: Any, windows: Sequence[torch.Tensor], seed: int = 0, progress: Callable[[int, int], None] | None = None) -> Sensitivity:
    """The moments of a causal LM of transformers, for tokens that it draws itself after every token of the windows (Fisher's
    information): to second order, an error e of a token's K costs ``e M_K e^T / 2`` in the divergence of what the model predicts.

    Args:
        windows: int64 [tokens] each.
        seed: of the drawn tokens.
        progress: called with (windows done, windows) after each.
    """
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    generator = torch.Generator().manual_seed(seed)
    sums: dict[int, list[torch.Tensor]] = {}
    # Where all windows are as short as a tile, there is nothing else to take.
    first = _TILE_TOKENS if max(len(window) for window in windows) > _TILE_TOKENS else 0
    with observing(model):
        turns = _find_turns(model, windows[0][:_PROBE_TOKENS], layers)
        embedding = model.get_input_embeddings()
        hook = embedding.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
        try:
            for index, window in enumerate(windows):
                kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

                def keep(layer: int, k: torch.Tensor, v: torch.Tensor, kept: Any = kept) -> None:
                    k.retain_grad()
                    v.retain_grad()
                    kept[layer] = (k, v)

                with torch.enable_grad(), _recomputing(model):
                    logits = read(model, window, 0, keep, 0)
                    logits.backward(_draw_gradient(logits.detach(), generator))
                del logits
                for layer, pair in kept.items():
                    parts = [_gradient(operand, layer) for operand in pair]
                    if turns is not None:
                        parts[0] = _turn_back(parts[0], turns, layer)
                    moments = [(g.transpose(1, 2) @ g).cpu() for g in parts]
                    moments += _spread(*(operand.detach()[0, :, first:].double() for operand in pair))
                    sums[layer] = [a + b for a, b in zip(sums[layer], moments, strict=True)] if layer in sums else moments
                if progress is not None:
                    progress(index + 1, len(windows))
        finally:
            hook.remove()
    if sorted(sums) != list(range(layers)) or len({pair[0].shape for pair in sums.values()}) != 1:
        raise UnsupportedError(f"[kvarn.prepare] model: expected {layers} attention layers of one shape, got {sorted(sums)}")
    count = sum(len(window) for window in windows)
    # Counts do not matter to the spreads: frames depend on how they differ between channels.
    k, v, k_spread, v_spread = (torch.stack([sums[layer][i] for layer in range(layers)]) for i in range(4))
    k, v = k / count, v / count
    # Where the model is: on a machine of many cores small matrices take long.
    pairs = None if turns is None else torch.from_numpy(turns.pairs).to(model.device, torch.int64)
    scale = k_scales(k_spread.to(model.device), k.to(model.device), pairs)
    frame = v_frames(v_spread.to(model.device), v.to(model.device))
    return Sensitivity(k, v, turns, Balance(scale.float().cpu().numpy(), frame.float().cpu().numpy()))


def _spread(k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """Sums over the tokens of K and V [heads, tokens, D]: K's squares about its mean in each tile [heads, D], and ``v^T v``."""
    squares = k.new_zeros(k.shape[0], k.shape[2])
    for tile in k.split(_TILE_TOKENS, 1) if k.shape[1] else ():
        squares += ((tile - tile.mean(1, keepdim=True)) ** 2).sum(1)
    return [squares.cpu(), (v.transpose(1, 2) @ v).cpu()]


def _draw_gradient(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The gradient, for logits [tokens, vocabulary], of the negative log-likelihood of tokens that are drawn from them."""
    gradient = torch.empty_like(logits)
    for part, out in zip(logits.split(_PREDICTIONS_AT_ONCE), gradient.split(_PREDICTIONS_AT_ONCE), strict=True):
        probability = part.float().softmax(-1)
        total = probability.cumsum(-1)
        chance = torch.rand(len(part), 1, generator=generator).to(total.device)  # of the CPU: the same on every device
        drawn = torch.searchsorted(total, chance * total[:, -1:], right=True).clamp_max(total.shape[-1] - 1)
        out.copy_(probability.scatter_add(1, drawn, -torch.ones_like(chance)))
    return gradient


def _gradient(operand: torch.Tensor, layer: int) -> torch.Tensor:
    gradient = None if operand.grad is None else operand.grad[0].double()
    if gradient is None or not bool(gradient.isfinite().all()):
        raise UnsupportedError(f"[kvarn.prepare] layer {layer}: expected finite gradients of K and V, got none or others")
    return gradient


def _turn_back(x: torch.Tensor, turns: Turns, layer: int) -> torch.Tensor:
    """x [heads, tokens, D] float64 of positions from 0 on, without its encoding."""
    return _turned(x, turns.pairs, turns.frequencies[layer], 0, -1.0)


def _turned(x: torch.Tensor, pairs: Any, frequencies: Any, start: int, sign: float = 1.0) -> torch.Tensor:
    first, second = torch.as_tensor(pairs, device=x.device, dtype=torch.long).T
    positions = torch.arange(start, start + x.shape[1], device=x.device, dtype=torch.float64)
    angle = sign * positions[:, None] * torch.as_tensor(frequencies, device=x.device)
    out, a, b = x.clone(), x[..., first], x[..., second]
    out[..., first], out[..., second] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return out


def find_turns(model: Any, tokens: torch.Tensor) -> Turns | None:
    """The rotary encoding of a model's K, recognised by what it does to the same tokens at other positions; None when it is another one."""
    with observing(model):
        return _find_turns(model, tokens, model.config.get_text_config(decoder=True).num_hidden_layers)


def _find_turns(model: Any, tokens: torch.Tensor, layers: int) -> Turns | None:
    candidates = _candidates(model)
    if not candidates:  # positions that are learned may end before those that are read here
        return None
    keys: list[dict[int, torch.Tensor]] = [{}, {}]
    with torch.no_grad():
        for start, into in zip((0, _PROBE_START), keys, strict=True):

            def keep(layer: int, k: torch.Tensor, v: torch.Tensor, into: Any = into) -> None:
                into[layer] = k[0].double()

            read(model, tokens, start, keep, 1)
    if sorted(keys[0]) != list(range(layers)):
        return None
    for pairing in ("half", "neighbours"):
        chosen = []
        for layer in range(layers):
            errors = []
            for angles in candidates:
                if 2 * len(angles) > keys[0][layer].shape[-1]:
                    continue
                moved = _shift(keys[0][layer], _pairs(pairing, len(angles)), angles)
                errors.append((float((moved - keys[1][layer]).norm() / keys[1][layer].norm()), angles))
            best = min(errors, key=lambda pair: pair[0], default=(np.inf, np.zeros(0)))
            if best[0] > _PROBE_ERROR:
                break
            chosen.append(best[1])
        if len(chosen) == layers and len({len(angles) for angles in chosen}) == 1:
            return Turns(_pairs(pairing, len(chosen[0])), np.stack(chosen))
    return None


def _pairs(pairing: str, count: int) -> Any:
    index = np.arange(count, dtype=np.int32)
    return np.stack([index, index + count] if pairing == "half" else [2 * index, 2 * index + 1], 1)


def _shift(x: torch.Tensor, pairs: Any, frequencies: Any) -> torch.Tensor:
    """All tokens of x turned by _PROBE_START positions."""
    flat = x.flatten(0, 1)[:, None]  # each a sequence of one token
    return _turned(flat, pairs, frequencies, _PROBE_START)[:, 0].view_as(x)


def _candidates(model: Any) -> list[Any]:
    """Frequencies [pairs] float64 of the model's rotary modules, and of layers without an encoding."""
    found: list[Any] = []
    at_one = torch.ones(1, 1, dtype=torch.long, device=model.device)
    for name, module in model.named_modules():
        if not name.split(".")[-1].startswith("rotary"):
            continue
        try:
            cos, sin = module(torch.zeros(1, device=model.device, dtype=torch.float32), at_one)
        except TypeError:  # one that is asked otherwise
            continue
        angles = torch.atan2(sin.float(), cos.float()).flatten().double().cpu().numpy()
        half = len(angles) // 2
        # Each frequency is there twice: one half after the other, or side by side.
        found.append(angles[:half] if np.allclose(angles[:half], angles[half:]) else angles[::2])
    return [*found, np.zeros_like(found[0])] if found else []
