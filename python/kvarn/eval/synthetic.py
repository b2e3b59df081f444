"""Tensors with what large models' K and V are known for and small models lack.

- K: a few channels much louder than the others, with a mean of their own (KIVI, arXiv 2402.02750, Figure 2; KVQuant, arXiv 2401.18079,
  Section 3.1), in pairs that the rotary position encoding turns together;
- V: of small variance, without outlier channels (KIVI);
- both: some tokens whose norm is several times the others' (arXiv 2606.03458, Section 3), which is what variance normalisation is for.
"""

from __future__ import annotations

import math

import torch

from kvarn.eval.tensors import Sample


def sample(
    *,
    layers: int = 4,
    batch: int = 1,
    num_q_heads: int = 8,
    num_kv_heads: int = 2,
    tokens: int = 1024,
    head_dim: int = 128,
    loud_channels: int = 4,
    channel_factor: float = 10.0,
    loud_tokens: float = 0.02,
    token_factor: float = 6.0,
    value_size: float = 0.1,
    seed: int = 0,
) -> Sample:
    """Tensors of a model that never was, float32 on the CPU.

    Args:
        loud_channels: pairs of K's channels that are `channel_factor` times louder, half of that in their mean.
        loud_tokens: share of the tokens that are up to `token_factor` times louder, in K and V.
        value_size: standard deviation of V.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    shape = (layers, batch, num_kv_heads, tokens)
    channels = (0.3 * normal(layers, 1, num_kv_heads, 1, head_dim)).exp()
    means = torch.zeros_like(channels)
    for layer in range(layers):
        for head in range(num_kv_heads):
            loud = torch.randperm(head_dim // 2, generator=generator)[:loud_channels]
            for c in torch.cat([loud, loud + head_dim // 2]).tolist():
                channels[layer, :, head, :, c] *= channel_factor
                means[layer, :, head, :, c] = channels[layer, :, head, :, c] / 2 * (1 if c % 2 else -1)
    norms = (0.15 * normal(*shape, 1)).exp()
    is_loud = torch.rand(*shape, 1, generator=generator) < loud_tokens
    norms = torch.where(is_loud, 1 + (token_factor - 1) * torch.rand(*shape, 1, generator=generator), norms)
    # Tokens share directions: a low rank part and noise.
    low_rank = normal(layers, 1, num_kv_heads, 16, head_dim) / 4
    k = (normal(*shape, 16) @ low_rank + 0.5 * normal(*shape, head_dim)) * channels + means
    v = (normal(*shape, 16) @ (normal(layers, 1, num_kv_heads, 16, head_dim) / 4) + 0.5 * normal(*shape, head_dim)) * value_size
    # Queries use quiet channels as much as loud ones: their scores have a standard deviation of about 2.
    q = normal(layers, batch, num_q_heads, 128, head_dim) / channels.repeat_interleave(num_q_heads // num_kv_heads, 2)
    scale = 2 / math.sqrt(head_dim)
    return Sample(q, k * norms, v * norms, scale)
