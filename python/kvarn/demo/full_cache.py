"""The cache to compare with: K and V with 16 bits each."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

# Room is made in steps of this many tokens.
_STEP = 1024


class Float16Layer(CacheLayerMixin):  # type: ignore[no-untyped-call, unused-ignore]
    """One layer. The values are rounded to float16 and held in the model's dtype, so that no time goes into converting them at every step;
    the new ones are written in place, and nothing is concatenated."""

    is_croppable = True
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = 0
        self.keys: Any = None
        self.values: Any = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates nothing yet."""
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds K and V [batch, heads, tokens, D] and returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.keys.shape[2]:
            self.keys, self.values = self._longer(self.keys, end), self._longer(self.values, end)
        self.keys[:, :, self.length : end] = key_states.half()
        self.values[:, :, self.length : end] = value_states.half()
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _longer(self, old: torch.Tensor, length: int) -> torch.Tensor:
        batch, heads, _, head_dim = old.shape
        new = old.new_empty(batch, heads, -(-length // _STEP) * _STEP, head_dim)
        new[:, :, : self.length] = old[:, :, : self.length]
        return new

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns of the mask, first column)."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens."""
        return self.length

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` tokens."""
        self.length += tokens_to_remove


class Float16Cache(Cache):
    """A cache with 16 bits per value, for any model whose layers all attend to everything."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=Float16Layer)

    @property
    def used_bytes(self) -> int:
        """Bytes of the K and V that it holds, at 16 bits each."""
        layers: list[Any] = self.layers
        return sum(2 * 2 * int(layer.keys[:, :, : layer.length].numel()) for layer in layers)

    @classmethod
    def from_cache(cls, cache: Cache) -> Float16Cache:
        """One with the tokens of another cache."""
        made, layers = cls(), list[Any](cache.layers)
        for index, layer in enumerate(layers):
            made.update(layer.keys, layer.values, index)
        return made
