"""Outlier twins: models with the same function whose K or V are harder to quantise.

What a twin computes equals the original's in real arithmetic, so that any loss of quality is the cache's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor


def _layers(model: Any) -> list[Any]:
    found = [m for name, m in model.named_modules() if name.endswith("self_attn")]
    if not found or not all(hasattr(m, "v_proj") and hasattr(m, "o_proj") for m in found):
        raise ValueError(f"[kvarn.eval] model: expected attention with v_proj and o_proj, got {type(model).__name__}")
    return found


def _chosen(channels: int, count: int, seed: int) -> list[int]:
    return torch.randperm(channels, generator=torch.Generator().manual_seed(seed))[:count].tolist()


@torch.no_grad()
def key_outliers(model: Any, factor: float = 8.0, count: int = 4, seed: int = 0) -> Any:
    """A copy with `count` pairs of K's channels `factor` times larger and the same channels of q that much smaller.

    Channels c and c + D/2 turn together in the rotary position encoding, so both get the factor. Where the model normalises K the weights
    of k_norm and q_norm change, else the rows of k_proj and q_proj.
    """
    twin = copy.deepcopy(model)
    for index, layer in enumerate(_layers(twin)):
        head_dim = layer.head_dim
        scale = torch.ones(head_dim)
        for c in _chosen(head_dim // 2, count, seed + index):
            scale[c] = scale[c + head_dim // 2] = factor
        if hasattr(layer, "k_norm"):
            layer.k_norm.weight.mul_(scale.to(layer.k_norm.weight))
            layer.q_norm.weight.div_(scale.to(layer.q_norm.weight))
            continue
        for projection, power in ((layer.k_proj, 1), (layer.q_proj, -1)):
            rows = scale.pow(power).to(projection.weight).repeat(len(projection.weight) // head_dim)
            projection.weight.mul_(rows[:, None])
            if projection.bias is not None:
                projection.bias.mul_(rows)
    return twin


@torch.no_grad()
def value_outliers(model: Any, factor: float = 8.0, count: int = 4, size: float = 1.0, seed: int = 0) -> Any:
    """A copy with `count` channels of each KV head's V `factor` times larger, and all of V `size` times as large; the output projection
    undoes both. A size of 1/16 gives V of the small variance that large models have."""
    twin = copy.deepcopy(model)
    for index, layer in enumerate(_layers(twin)):
        head_dim = layer.head_dim
        heads = len(layer.v_proj.weight) // head_dim
        scale = torch.full((heads, head_dim), size)
        for head in range(heads):
            for c in _chosen(head_dim, count, seed + index * heads + head):
                scale[head, c] *= factor
        rows = scale.flatten().to(layer.v_proj.weight)
        layer.v_proj.weight.mul_(rows[:, None])
        if layer.v_proj.bias is not None:
            layer.v_proj.bias.mul_(rows)
        groups = layer.o_proj.weight.shape[1] // (heads * head_dim)
        layer.o_proj.weight.div_(scale.repeat_interleave(groups, 0).flatten().to(layer.o_proj.weight)[None])
    return twin


@dataclass(frozen=True)
class Twin:
    """A kind of twin."""

    what: str
    make: Callable[[Any], Any]


TWINS = {
    "k-outliers": Twin("4 channel pairs of K 8 times larger", lambda model: key_outliers(model)),
    "v-outliers": Twin("4 channels of V 8 times larger", lambda model: value_outliers(model)),
    "v-small": Twin("V 16 times smaller, 4 of its channels 8 times larger", lambda model: value_outliers(model, size=1 / 16)),
}
