"""Balancing a transformers model (`kvarn.balance`): weights with the same function, whose K and V a cache rounds at less cost."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvarn._errors import ArgumentTypeError, InvalidArgumentError, UnsupportedError
from kvarn._moments import Moments
from kvarn.integrations.frames import moved
from kvarn.integrations.moments import check_weights, rotation, weights_fingerprint
from kvarn.integrations.sensitivity import observed, observing, read

__all__ = ["balance"]

# Tokens by which the model is compared with itself; a number that no model has of heads.
_PROBE_TOKENS = 61
# The most by which each attention layer's output, K and V may differ, relative to their norms, and the mean divergence of predictions: what
# weights rounded anew bring about is at most a third of it. A layer that does something else with them differs by a tenth and more.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.005, torch.bfloat16: 0.02}


@torch.no_grad()
def balance(model: Any, moments: Moments, *, per_head: bool = True) -> Moments:
    """Changes a model's weights, not what it computes, so that K and V cost less to round: ``k_scale`` goes from K into the queries (the
    weights of their norms, or rows of their projections) and ``v_frame`` from V into the output projection.

    Nothing else changes: the same records, kernels and speed. What `KvarnCache` is given afterwards are the moments returned. Parameters
    are replaced by new ones, which an optimiser made before does not know; those that layers share come apart.

    Where K's projection has biases, which may be large, and 16-bit weights, K's scales are rounded to powers of two, so that nothing of K
    is rounded anew; about half of its gain is left. Where the rotary encoding is not recognised, K gets no scale.

    Args:
        model: a decoder of transformers that `kvarn.prepare` can read, with linear layers named q_proj, k_proj, v_proj (or qkv_proj) and
            o_proj, whose weights are float32, float16 or bfloat16. Weights are replaced, in place.
        moments: of this model, as `kvarn.prepare` returns them.
        per_head: each KV head has K's scale of its own. A norm of K that all heads share then gets weights for each, which no
            configuration describes: such a model cannot be saved and loaded again. False: heads of a layer share a scale.

    Returns:
        The moments of the balanced model, in the weights' dtype.

    Raises:
        TypeError: moments that are none.
        ValueError: moments of another model, without a balance (those of a model that is balanced already), or whose frames of V have no
            inverse.
        UnsupportedError: a model of another structure, or one that computes something else afterwards; it is as it was.
    """
    if not isinstance(moments, Moments):
        raise ArgumentTypeError(f"[kvarn.balance] moments: expected kvarn.Moments, got {type(moments).__name__}")
    if moments.balance is None:
        raise InvalidArgumentError("[kvarn.balance] moments: expected those that kvarn.prepare returns, got some without a balance")
    config = model.config.get_text_config(decoder=True)
    layers, heads, dim = moments.shape
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    moments.check(num_layers=config.num_hidden_layers, num_kv_heads=kv_heads, head_dim=head_dim, config=model.config)
    check_weights(moments, model)
    changes = [_Change(attention, heads, config.num_attention_heads, dim) for attention in _attentions(model, layers)]
    k_scale, v_frame = (torch.from_numpy(x).to(model.device, torch.float64) for x in (moments.balance.k_scale, moments.balance.v_frame))
    if not per_head:
        k_scale = k_scale.log().mean(1, keepdim=True).exp().expand_as(k_scale)
    if any(change.rounds_biases for change in changes):
        k_scale = k_scale.log2().round().exp2()
    v_back, failed = torch.linalg.inv_ex(v_frame)
    if bool(failed.any()):
        raise InvalidArgumentError("[kvarn.balance] moments: expected frames of V that have an inverse, got one that has none")
    ids = torch.randint(config.vocab_size, (_PROBE_TOKENS,), generator=torch.Generator().manual_seed(0))
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    with observing(model):
        probe = _Probe(model, ids, [change.attention for change in changes])
        try:
            for layer, change in enumerate(changes):
                change.scale_keys(k_scale[layer], probe.norm_shapes.get(layer), per_head)
                change.turn_values(v_frame[layer], v_back[layer])
                change.apply(replaced)
            try:
                probe.compare(k_scale, v_frame)
            except (UnsupportedError, torch.OutOfMemoryError):
                raise
            except RuntimeError as error:  # norms that take no weights for each head
                what = f"expected one that runs balanced (per_head={per_head})"
                raise UnsupportedError(f"[kvarn.balance] model: {what}, got {error}") from error
        except BaseException:
            for module, name, parameter in reversed(replaced):
                setattr(module, name, parameter)
            raise
    h = torch.from_numpy(rotation(dim)).to(model.device)
    backs = h.T @ (k_scale[..., None] * h), h.T @ v_back @ h  # to the model's frame, both rotated
    k, v = (
        moved(torch.from_numpy(moment).to(back), back).float().cpu().numpy()
        for moment, back in zip((moments.k, moments.v), backs, strict=True)
    )
    what = "balanced" if bool((k_scale != 1).any()) else "V balanced"
    return Moments(k, v, config=moments.config, weights=weights_fingerprint(model), source=f"{moments.source}, {what}")


def _attentions(model: Any, layers: int) -> list[Any]:
    found = {m.layer_idx: m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int) and hasattr(m, "o_proj")}
    if sorted(found) != list(range(layers)):
        raise UnsupportedError(
            f"[kvarn.balance] model: expected {layers} attention layers with an o_proj, got {len(found)} in {type(model).__name__}"
        )
    return [found[layer] for layer in range(layers)]


# ---- what stays the same -----------------------------------------------------------------------------------------------------------------


class _Probe:
    """What a model computes of a few tokens, and what each of its attention layers makes of what it read then: compared layer by layer, an
    error shows however little the layer matters, and what rounding does to later layers (experts that are chosen otherwise) does not.

    norm_shapes: of what each layer's norm of K reads, where it has one.
    """

    def __init__(self, model: Any, ids: torch.Tensor, attentions: list[Any]) -> None:
        self._model, self._ids, self._attentions = model, ids, attentions
        self.norm_shapes: dict[int, tuple[int, ...]] = {}
        self._read: dict[int, tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]] = {}
        self._kv: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        hooks = []
        for layer, attention in enumerate(attentions):
            hooks.append(attention.register_forward_hook(functools.partial(self._keep, layer), with_kwargs=True))
            if isinstance(getattr(attention, "k_norm", None), nn.Module):
                hooks.append(attention.k_norm.register_forward_pre_hook(functools.partial(self._note, layer)))
        try:
            self._predictions = self._run(self._kv)
        finally:
            for hook in hooks:
                hook.remove()
        if sorted(self._read) != list(range(len(attentions))) or sorted(self._kv) != sorted(self._read):
            raise UnsupportedError(f"[kvarn.balance] model: expected {len(attentions)} attention layers that run, got {sorted(self._kv)}")

    def _keep(self, layer: int, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        self._read[layer] = (arguments, named, output[0])

    def _note(self, layer: int, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments:
            self.norm_shapes[layer] = tuple(arguments[0].shape)

    def _run(self, kv: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Log-probabilities [tokens, vocabulary]; into `kv` K and V of each layer [heads, tokens, D]."""
        logits = read(self._model, self._ids, 0, functools.partial(_keep_in, kv), 0)
        return logits.float().log_softmax(-1)

    def compare(self, k_scale: torch.Tensor, v_frame: torch.Tensor) -> None:
        """Raises UnsupportedError where the balanced model computes something else."""
        most = 0.0
        for layer, attention in enumerate(self._attentions):
            arguments, named, output = self._read[layer]
            kv: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
            with observed(functools.partial(_keep_in, kv)):
                found = attention(*arguments, **named)[0]
            k, v = self._kv[layer]
            tolerance = _TOLERANCES[attention.o_proj.weight.dtype]
            most = max(most, tolerance)
            for name, a, b in (
                ("K", k / k_scale[layer][:, None].to(k.device), kv[layer][0]),
                ("V", v @ v_frame[layer].to(v.device), kv[layer][1]),
                ("output", output.double(), found.double()),
            ):
                error, size = float((a - b).norm()), float(a.norm())
                if not error <= tolerance * size:
                    got = error / size if size else error
                    expected = f"expected the {name} of before, balanced, within {tolerance:g}"
                    raise UnsupportedError(f"[kvarn.balance] layer {layer}: {expected}, got one {got:.3g} from it")
        predictions = self._run({})
        terms = (self._predictions.exp() * (self._predictions - predictions)).nan_to_num(0.0)  # -inf: tokens that are never predicted
        divergence = float(terms.sum(-1).mean())
        if not divergence <= most:
            raise UnsupportedError(f"[kvarn.balance] model: expected the predictions of before, got some that diverge by {divergence:.3g}")


def _keep_in(kv: dict[int, tuple[torch.Tensor, torch.Tensor]], layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
    kv[layer] = (k[0].double(), v[0].double())


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
        weight = linear.weight if isinstance(linear, nn.Linear) and "weight" in linear._parameters else None
        if weight is None or weight.dtype not in _TOLERANCES or weight.shape[axis] != size:
            got = type(linear).__name__ if weight is None else f"{list(weight.shape)} {weight.dtype}"
            what = "columns" if axis else "rows"
            raise UnsupportedError(f"[kvarn.balance] projection: expected a linear layer of {size} {what} of floats, got {got}")

    @property
    def rounds_biases(self) -> bool:
        """Whether K's biases, divided, would be rounded anew to 16 bits; a constant error on every key."""
        return self.k.linear.bias is not None and self.k.linear.bias.dtype != torch.float32

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
        scale = scale.to(self.k.linear.weight.device)
        of_queries = scale.repeat_interleave(self.q_heads // self.kv_heads, 0)
        if norm_shape is None:
            for rows, by in ((self.q, of_queries), (self.k, 1 / scale)):
                for part in self._parts(rows):
                    part *= by.flatten()[:, None]
            return
        for name, by, heads in (("q_norm", of_queries, self.q_heads), ("k_norm", 1 / scale, self.kv_heads)):
            norm = getattr(self.attention, name, None)
            weight = getattr(norm, "weight", None)
            if (
                norm is None
                or weight is None
                or weight.numel() not in (self.dim, heads * self.dim)
                or getattr(norm, "bias", None) is not None
            ):
                raise UnsupportedError(f"[kvarn.balance] {name}: expected {self.dim} weights and no bias, got {type(norm).__name__}")
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

    def turn_values(self, frame: torch.Tensor, back: torch.Tensor) -> None:
        """V becomes ``V @ frame`` [kv_heads, D, D], and the output projection takes it back, by the inverse."""
        frame, back = frame.to(self.v.linear.weight.device), back.to(self.attention.o_proj.weight.device)
        for part in self._parts(self.v):
            part.copy_(torch.einsum("hde,hdi->hei", frame, part.unflatten(0, (self.kv_heads, self.dim))).flatten(0, 1))
        back = back.repeat_interleave(self.q_heads // self.kv_heads, 0)
        out = self._weight(self.attention.o_proj, "weight")
        out.copy_(torch.einsum("ihd,hcd->ihc", out.unflatten(1, (self.q_heads, self.dim)), back).flatten(1, 2))

    def apply(self, replaced: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
        """Puts the new weights in, and notes each old one in `replaced` before it goes."""
        for (module, name), value in self._new.items():
            parameter = getattr(module, name)
            new = nn.Parameter(value.to(parameter.dtype), requires_grad=parameter.requires_grad)
            replaced.append((module, name, parameter))
            setattr(module, name, new)
