"""The moments of a transformers model (`kvarn.prepare`): M_V from its weights, M_K from one pass over tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from kvarn import ops
from kvarn._errors import InvalidArgumentError, UnsupportedError
from kvarn._moments import Moments, config_fingerprint
from kvarn._plan import Plan

__all__ = ["check_weights", "prepare", "weights_fingerprint"]

_ATTENTION = "kvarn_moments"
# Names that models give their output projection.
_OUTPUT = ("o_proj", "out_proj", "dense", "wo")
# Tokens of one forward pass.
_WINDOW = 2048
# Positions that serve most uses.
_CONTEXT = 8192


def weights_fingerprint(model: Any) -> str:
    """SHA-256, 16 hexadecimal digits, over samples of the weights of the model's layers."""
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        # Parameters under a list of layers: the output head may be tied to the embedding, and then has no name of its own.
        if value.ndim == 2 and any(part.isdigit() for part in name.split(".")):
            rows = value.detach()[:: max(1, value.shape[0] // 4), :64]
            digest.update(rows.to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_weights(moments: Moments, model: Any) -> None:
    """Raises ValueError when the moments were made of a model with other weights."""
    got = weights_fingerprint(model)
    if moments.weights and moments.weights != got:
        raise InvalidArgumentError(
            f"[kvarn.Moments] moments: expected those of a model whose weights have the fingerprint {got}, got {moments.weights}"
        )


class _Collector:
    """Sums over the queries of each layer, and the layers' attention modules."""

    def __init__(self) -> None:
        self.sums: dict[int, torch.Tensor] = {}  # float64 [Hkv, D, D]
        self.counts: dict[int, int] = {}
        self.modules: dict[int, Any] = {}

    def take(self, module: Any, query: torch.Tensor, key: torch.Tensor) -> None:
        """query [batch, Hq, tokens, D], key [batch, Hkv, tokens, D]."""
        layer, heads, dim = module.layer_idx, key.shape[1], query.shape[-1]
        if key.shape[-1] != dim:
            raise UnsupportedError(f"[kvarn.prepare] layer {layer}: expected queries of K's head_dim {key.shape[-1]}, got {dim}")
        rows = query.float().unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 3)
        total = (rows.transpose(1, 2) @ rows).double().cpu()
        self.sums[layer] = self.sums.get(layer, 0) + total
        self.counts[layer] = self.counts.get(layer, 0) + rows.shape[1]
        self.modules[layer] = module


_collector: _Collector | None = None


def _attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any) -> Any:
    if _collector is not None:
        _collector.take(module, query, key)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def _output_moment(module: Any, layer: int, heads: int, dim: int) -> torch.Tensor:
    """Sum of W^T W over the query heads of each KV head, float64 [heads, dim, dim]."""
    projection = next((getattr(module, name) for name in _OUTPUT if hasattr(module, name)), None)
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.shape[1] % (heads * dim) != 0:
        shape = None if weight is None else f"{weight.dtype} {list(weight.shape)}"
        raise UnsupportedError(
            f"[kvarn.prepare] layer {layer}: expected an output projection ({', '.join(_OUTPUT)}) with floating-point weights "
            f"[hidden, query heads * {dim}], got {shape}"
        )
    w = weight.detach().double().cpu().unflatten(1, (heads, -1, dim))
    moment: torch.Tensor = torch.einsum("ikgd,ikge->kde", w, w)
    return moment


def _rotation(dim: int) -> torch.Tensor:
    plan = Plan("k4v2_g128", head_dim=dim, num_kv_heads=1, dtype="float32", num_threads=1)
    matrix: torch.Tensor = ops.hadamard(plan, torch.eye(dim)).sign().double() / dim**0.5
    return matrix


def _token_ids(model: Any, text: Any, tokenizer: Any, num_tokens: int, seed: int) -> tuple[torch.Tensor, str]:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if text is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(vocabulary, (num_tokens,), generator=generator), f"{num_tokens} random tokens of seed {seed}"
    if isinstance(text, str):
        if tokenizer is None:
            raise InvalidArgumentError("[kvarn.prepare] tokenizer: expected the model's tokenizer beside a text of type str, got None")
        text = tokenizer(text)["input_ids"]
    ids = torch.as_tensor(text, dtype=torch.int64).flatten()[:num_tokens]
    if len(ids) == 0 or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise InvalidArgumentError(f"[kvarn.prepare] text: expected at least one token, each from 0 to {vocabulary - 1}, got {ids[:8]}...")
    return ids, f"{len(ids)} tokens of text"


def prepare(
    model: Any,
    text: str | Sequence[int] | torch.Tensor | None = None,
    *,
    tokenizer: Any = None,
    num_tokens: int = 8192,
    context: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Moments:
    """Makes the moments of a transformers causal LM, for `kvarn.Cache` and `KvarnCache`.

    Args:
        model: whose attention can be chosen (`set_attn_implementation`), with linear output projections.
        text: what the queries are averaged over: token ids, or a str beside a `tokenizer`. None: random tokens, which serve worse.
        tokenizer: callable, ``tokenizer(text)["input_ids"]``.
        num_tokens: at most so many tokens, in windows of 2048.
        context: positions over which the windows are spread, because rotary embeddings turn queries with their position: best the length
            of the sequences that the caches will hold. None: the model's maximum, at most 8192.
        seed: of the random tokens.
        progress: called with (windows done, windows) after each.

    Returns:
        The moments.

    Raises:
        UnsupportedError: a model whose queries or output projections cannot be read.
    """
    global _collector
    if num_tokens < 1:
        raise InvalidArgumentError(f"[kvarn.prepare] num_tokens: expected at least 1, got {num_tokens}")
    config = model.config.get_text_config(decoder=True)
    ids, source = _token_ids(model, text, tokenizer, num_tokens, seed)
    windows = ids.split(_WINDOW)
    most = min(getattr(config, "max_position_embeddings", _CONTEXT), _CONTEXT) if context is None else context
    before = config._attn_implementation
    model.set_attn_implementation(_ATTENTION)
    _collector = collected = _Collector()
    try:
        with torch.inference_mode():
            for index, window in enumerate(windows):
                room = max(0, most - len(window))
                start = room * index // max(1, len(windows) - 1)
                positions = torch.arange(start, start + len(window), device=model.device)[None]
                model(input_ids=window[None].to(model.device), position_ids=positions, use_cache=False, logits_to_keep=1)
                if progress is not None:
                    progress(index + 1, len(windows))
    finally:
        _collector = None
        model.set_attn_implementation(before)
    layers = config.num_hidden_layers
    if sorted(collected.sums) != list(range(layers)) or len({total.shape for total in collected.sums.values()}) != 1:
        raise UnsupportedError(f"[kvarn.prepare] model: expected {layers} attention layers of one shape, got {sorted(collected.sums)}")
    heads, dim, _ = collected.sums[0].shape
    h = _rotation(dim)
    k = torch.stack([collected.sums[layer] / collected.counts[layer] for layer in range(layers)])
    v = torch.stack([_output_moment(collected.modules[layer], layer, heads, dim) for layer in range(layers)])
    rotated = [torch.einsum("di,lkde,ej->lkij", h, m, h).float().numpy() for m in (k, v)]
    return Moments(rotated[0], rotated[1], config=config_fingerprint(model.config), weights=weights_fingerprint(model), source=source)
