"""Balancing a transformers model (`kvarn.balance`): weights with the same function, whose K and V a cache rounds at less cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvarn._errors import InvalidArgumentError, UnsupportedError
from kvarn._moments import Moments
from kvarn.integrations.frames import moved
from kvarn.integrations.moments import check_weights, rotation, weights_fingerprint
from kvarn.integrations.sensitivity import observing, read

__all__ = ["balance"]

# Tokens by which the model is compared with itself; a number that no model has of heads.
_PROBE_TOKENS = 61
# The most that K and V may deviate from being the same, scaled, and the predictions' divergence: what weights rounded anew bring about.
_TOLERANCES = {torch.float32: (1e-3, 1e-5), torch.float16: (0.05, 0.02), torch.bfloat16: (0.05, 0.02)}


@torch.no_grad()
def balance(model: Any, moments: Moments, *, per_head: bool = True) -> Moments:
    """Changes a model's weights, not what it computes, so that K and V cost less to round: ``k_scale`` goes from K into the queries (the
    weights of their norms, or rows of their projections) and ``v_frame`` from V into the output projection.

    The result is checked by a few tokens, within what weights rounded anew bring about. In 16 bits that check is coarse: a model that gates
    or normalises the input of its o_proj may pass it although it computes something else, so compare such a model's predictions
    yourself. In bfloat16, biases of K in the hundreds are rounded too coarsely, and such a model is refused or drifts. Where the rotary
    encoding is not recognised, K gets no scale. Parameters are replaced by new ones, which an optimiser made before does not know.

    Nothing else changes: the same records, kernels and speed. What `KvarnCache` is given afterwards are the moments returned.

    Args:
        model: a decoder of transformers that `kvarn.prepare` can read, with linear layers named q_proj, k_proj, v_proj (or qkv_proj) and
            o_proj, whose weights are float32, float16 or bfloat16. Weights are replaced, in place.
        moments: of this model, as `kvarn.prepare` returns them.
        per_head: each KV head has K's scale of its own. A norm of K that all heads share then gets weights for each, which no
            configuration describes: such a model cannot be saved and loaded again. False: heads of a layer share a scale.

    Returns:
        The moments of the balanced model.

    Raises:
        ValueError: moments of another model, or without a balance (those of a model that is balanced already).
        UnsupportedError: a model of another structure, or one that computes something else afterwards; it is as it was.
    """
    if moments.balance is None:
        raise InvalidArgumentError("[kvarn.balance] moments: expected those that kvarn.prepare returns, got some without a balance")
    check_weights(moments, model)
    layers, heads, dim = moments.shape
    config = model.config.get_text_config(decoder=True)
    attentions = _attentions(model, layers)
    ids = torch.randint(config.vocab_size, (_PROBE_TOKENS,), generator=torch.Generator().manual_seed(0))
    before = _probe(model, ids, attentions)
    k_scale, v_frame = (torch.from_numpy(x).to(model.device, torch.float64) for x in (moments.balance.k_scale, moments.balance.v_frame))
    if not per_head:
        k_scale = k_scale.log().mean(1, keepdim=True).exp().expand_as(k_scale)
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for layer, attention in enumerate(attentions):
            change = _Change(attention, heads, config.num_attention_heads, dim)
            change.scale_keys(k_scale[layer], before.norm_shapes.get(layer), per_head)
            change.turn_values(v_frame[layer])
            change.apply(replaced)
        try:
            after = _probe(model, ids, attentions)
        except RuntimeError as error:  # norms that take no weights for each head
            raise UnsupportedError(f"[kvarn.balance] model: expected one that runs balanced (per_head={per_head}), got {error}") from error
        _compare(before, after, k_scale, v_frame, model.dtype)
    except BaseException:
        for module, name, parameter in reversed(replaced):
            setattr(module, name, parameter)
        raise
    h = torch.from_numpy(rotation(dim)).to(model.device)
    backs = h.T @ (k_scale[..., None] * h), h.T @ torch.linalg.inv(v_frame) @ h  # to the model's frame, both rotated
    k, v = (
        moved(torch.from_numpy(moment).to(back), back).float().cpu().numpy()
        for moment, back in zip((moments.k, moments.v), backs, strict=True)
    )
    weights = weights_fingerprint(model)
    return Moments(k, v, config=moments.config, weights=weights, source=f"{moments.source}, balanced")


def _attentions(model: Any, layers: int) -> list[Any]:
    found = {m.layer_idx: m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int) and hasattr(m, "o_proj")}
    if sorted(found) != list(range(layers)):
        raise UnsupportedError(
            f"[kvarn.balance] model: expected {layers} attention layers with an o_proj, got {len(found)} in {type(model).__name__}"
        )
    return [found[layer] for layer in range(layers)]


# ---- what stays the same -----------------------------------------------------------------------------------------------------------------


@dataclass
class _Probe:
    """What a model computes of a few tokens: K and V of each layer [heads, tokens, D] and log-probabilities [tokens, vocabulary]; and the
    shape of what each layer's norm of K reads."""

    kv: dict[int, tuple[torch.Tensor, torch.Tensor]]
    predictions: torch.Tensor
    norm_shapes: dict[int, tuple[int, ...]]


def _probe(model: Any, ids: torch.Tensor, attentions: list[Any]) -> _Probe:
    probe = _Probe({}, torch.empty(0), {})

    def note(layer: int, x: torch.Tensor) -> None:
        probe.norm_shapes[layer] = tuple(x.shape)

    def keep(layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        probe.kv[layer] = (k[0].double(), v[0].double())

    hooks = [
        attention.k_norm.register_forward_pre_hook(lambda module, args, layer=layer: note(layer, args[0]))
        for layer, attention in enumerate(attentions)
        if isinstance(getattr(attention, "k_norm", None), nn.Module)
    ]
    try:
        with observing(model):
            probe.predictions = read(model, ids, 0, keep, 0).float().log_softmax(-1)
    finally:
        for hook in hooks:
            hook.remove()
    return probe


def _compare(before: _Probe, after: _Probe, k_scale: torch.Tensor, v_frame: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance, most = _TOLERANCES[dtype]
    for layer, (k, v) in before.kv.items():
        expected = k / k_scale[layer][:, None], v @ v_frame[layer]
        for name, a, b in zip("KV", expected, after.kv[layer], strict=True):
            error = float((a - b).norm() / a.norm())
            if not error <= tolerance:
                raise UnsupportedError(f"[kvarn.balance] layer {layer}: expected {name} as before, balanced, got one {error:.3g} from it")
    divergence = float(nn.functional.kl_div(after.predictions, before.predictions, reduction="none", log_target=True).sum(-1).mean())
    if not divergence <= most:
        raise UnsupportedError(f"[kvarn.balance] model: expected the predictions of before, got some that diverge by {divergence:.3g}")


# ---- what changes ------------------------------------------------------------------------------------------------------------------------


@dataclass
class _Rows:
    """Rows of a linear layer: those of the queries, of K or of V."""

    linear: Any
    first: int
    count: int


class _Change:
    """New weights of one attention layer, which `apply` puts in."""

    def __init__(self, attention: Any, kv_heads: int, q_heads: int, dim: int) -> None:
        self.attention, self.kv_heads, self.q_heads, self.dim = attention, kv_heads, q_heads, dim
        self._new: dict[tuple[nn.Module, str], torch.Tensor] = {}
        sizes = (q_heads * dim, kv_heads * dim, kv_heads * dim)
        if hasattr(attention, "qkv_proj"):
            starts = (0, sizes[0], sizes[0] + sizes[1])
            self.q, self.k, self.v = (_Rows(attention.qkv_proj, start, count) for start, count in zip(starts, sizes, strict=True))
            expected = sum(sizes)
        else:
            names = ("q_proj", "k_proj", "v_proj")
            self.q, self.k, self.v = (_Rows(getattr(attention, name, None), 0, count) for name, count in zip(names, sizes, strict=True))
            expected = 0
        for rows in (self.q, self.k, self.v):
            self._check(rows.linear, 0, expected or rows.count)
        self._check(attention.o_proj, 1, q_heads * dim)

    def _check(self, linear: Any, axis: int, size: int) -> None:
        weight = linear.weight if isinstance(linear, nn.Linear) else None
        if weight is None or weight.dtype not in _TOLERANCES or weight.shape[axis] != size:
            got = type(linear).__name__ if weight is None else f"{list(weight.shape)} {weight.dtype}"
            what = "columns" if axis else "rows"
            raise UnsupportedError(f"[kvarn.balance] projection: expected a linear layer of {size} {what} of floats, got {got}")

    def _weight(self, module: nn.Module, name: str) -> torch.Tensor:
        """float64 of a parameter, to be changed in place."""
        if (module, name) not in self._new:
            self._new[module, name] = getattr(module, name).detach().double().clone()
        return self._new[module, name]

    def _parts(self, rows: _Rows) -> list[torch.Tensor]:
        """Weights [rows, hidden] and bias [rows, 1] of some rows, as views."""
        names = ["weight"] + (["bias"] if rows.linear.bias is not None else [])
        parts = [self._weight(rows.linear, name)[rows.first : rows.first + rows.count] for name in names]
        return [part if part.ndim == 2 else part[:, None] for part in parts]

    def scale_keys(self, scale: torch.Tensor, norm_shape: tuple[int, ...] | None, per_head: bool) -> None:
        """K [kv_heads, D] is divided by the scale and the queries are multiplied."""
        of_queries = scale.repeat_interleave(self.q_heads // self.kv_heads, 0)
        if norm_shape is None:
            for rows, by in ((self.q, of_queries), (self.k, 1 / scale)):
                for part in self._parts(rows):
                    part *= by.flatten()[:, None]
            return
        for norm, by, heads in ((self.attention.q_norm, of_queries, self.q_heads), (self.attention.k_norm, 1 / scale, self.kv_heads)):
            weight = getattr(norm, "weight", None)
            if weight is None or weight.numel() not in (self.dim, heads * self.dim) or getattr(norm, "bias", None) is not None:
                raise UnsupportedError(f"[kvarn.balance] norm of K: expected {self.dim} weights and no bias, got {type(norm).__name__}")
            # Gemma's norms multiply by 1 + weight.
            offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0
            full = weight.detach().double() + offset
            if weight.numel() == self.dim:
                # [heads, D], or with the axes that lie between them where the norm reads [batch, heads, tokens, D].
                heads_axis = norm_shape.index(self.kv_heads, 1) if self.kv_heads in norm_shape[1:-1] else len(norm_shape) - 2
                between = [1] * (len(norm_shape) - 2 - heads_axis)
                full = full * (by.view(heads, *between, self.dim) if per_head else by[0])
            else:
                full = (full.reshape(heads, self.dim) * by).view_as(full)  # [heads * D], or a weight for each head already
            self._new[norm, "weight"] = full - offset

    def turn_values(self, frame: torch.Tensor) -> None:
        """V becomes ``V @ frame`` [kv_heads, D, D], and the output projection takes it back."""
        for part in self._parts(self.v):
            part.copy_(torch.einsum("hde,hdi->hei", frame, part.unflatten(0, (self.kv_heads, self.dim))).flatten(0, 1))
        back = torch.linalg.inv(frame).repeat_interleave(self.q_heads // self.kv_heads, 0)
        out = self._weight(self.attention.o_proj, "weight")
        out.copy_(torch.einsum("ihd,hcd->ihc", out.unflatten(1, (self.q_heads, self.dim)), back).flatten(1, 2))

    def apply(self, replaced: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
        """Puts the new weights in, and notes each old one in `replaced` before it goes."""
        for (module, name), value in self._new.items():
            parameter = getattr(module, name)
            new = nn.Parameter(value.to(parameter.dtype), requires_grad=parameter.requires_grad)
            replaced.append((module, name, parameter))
            setattr(module, name, new)
