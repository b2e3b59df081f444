"""The moments of a transformers model (`kvarn.prepare`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvarn import ops
from kvarn._errors import InvalidArgumentError
from kvarn._moments import CALIBRATION_TOKENS, WINDOW_TOKENS, Moments, config_fingerprint
from kvarn._plan import Plan
from kvarn._turns import BUCKET_TOKENS
from kvarn.integrations.sensitivity import Sensitivity, measure

__all__ = ["check_weights", "prepare", "rotation", "weights_fingerprint"]

# Positions that serve most uses.
_CONTEXT = 8192
# The last bucket is averaged over so many times the positions of the others.
_LATER = 4


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


def rotation(dim: int) -> NDArray[np.float64]:
    """The library's rotation ``[dim, dim]``: rows become ``x H``."""
    plan = Plan("k4v2_g128", head_dim=dim, num_kv_heads=1, dtype="float32", num_threads=1)
    signs: NDArray[np.float32] = np.sign(ops.hadamard(plan, np.eye(dim, dtype=np.float32)))
    matrix: NDArray[np.float64] = signs.astype(np.float64) / dim**0.5
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
    num_tokens: int = CALIBRATION_TOKENS,
    context: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Moments:
    """Makes the moments of a transformers causal LM, for `kvarn.Cache` and `KvarnCache`: one pass over tokens, forward and back.

    They come with what `kvarn.balance` changes the model by, so that rounding costs less still; unless it is called they serve as they are.

    A rotary position encoding turns K, so its moments are turned to buckets of 1,024 positions each. That needs an encoding that is
    recognised by what it does to K (pairs of channels, the same angle at every step); with another one, one moment serves all positions.

    Args:
        model: whose attention can be chosen (`set_attn_implementation`).
        text: what the moments are averaged over: token ids, or a str beside a `tokenizer`. None: random tokens, which serve worse.
        tokenizer: callable, ``tokenizer(text)["input_ids"]``.
        num_tokens: at most so many tokens, in windows of 8192, or of the model's positions if these are fewer. A few tokens have most
            of the gradients, so that it takes many.
        context: positions with a moment of their own bucket, best the length of the sequences that the caches will hold; later ones share
            one. None: the model's maximum, at most 8192.
        seed: of the random tokens, and of those that the model draws.
        progress: called with (windows done, windows) after each.

    Returns:
        The moments.

    Raises:
        UnsupportedError: a model whose K and V cannot be read, or whose gradients are not finite.
    """
    if num_tokens < 1:
        raise InvalidArgumentError(f"[kvarn.prepare] num_tokens: expected at least 1, got {num_tokens}")
    config = model.config.get_text_config(decoder=True)
    ids, source = _token_ids(model, text, tokenizer, num_tokens, seed)
    positions = getattr(config, "max_position_embeddings", WINDOW_TOKENS)
    found = measure(model, ids.split(min(WINDOW_TOKENS, positions)), seed, progress)
    most = min(positions, _CONTEXT) if context is None else context
    h = rotation(found.k.shape[-1])
    k, v = (h.T @ moment @ h for moment in (bucket_moments(found, most), found.v.numpy()))
    config_of, weights_of = config_fingerprint(model.config), weights_fingerprint(model)
    return Moments(k.astype(np.float32), v.astype(np.float32), config=config_of, weights=weights_of, source=source, balance=found.balance)


def bucket_moments(found: Sensitivity, context: int) -> NDArray[np.float64]:
    """K's moments [num_buckets, num_layers, num_kv_heads, head_dim, head_dim]: of every bucket up to `context`, and of what comes later."""
    moment: NDArray[np.float64] = found.k.numpy()
    if found.turns is None:
        return moment[None]
    count = -(-context // BUCKET_TOKENS)
    buckets = [found.turns.mean(moment, i * BUCKET_TOKENS, BUCKET_TOKENS) for i in range(count)]
    return np.stack([*buckets, found.turns.mean(moment, count * BUCKET_TOKENS, _LATER * max(1, count) * BUCKET_TOKENS)])
