"""Measuring: problems solved greedily, and next-token distributions compared, with any cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, StoppingCriteriaList

from kvarn.demo.full_cache import Float16Cache
from kvarn.demo.model import END, decode, encode
from kvarn.demo.tasks import Problem
from kvarn.integrations.transformers import KvarnCache, enable

#: Name of the cache that the others are compared with.
FULL = "float16"
# Response tokens per step when distributions are compared: what a speculative step might verify.
_CHUNK = 64


@dataclass
class Result:
    """What one cache did."""

    cache: str
    bytes_used: int = 0  #: at the end of every batch, added up
    bytes_full: int = 0  #: the same tokens with 16 bits per value
    new_tokens: int = 0
    seconds: float = 0.0  #: decoding only
    divergences: list[float] = field(default_factory=list)  #: KL to the 16-bit cache, nats, one per token of the expected responses
    right: int = 0
    problems: int = 0
    growth: list[tuple[int, int]] = field(default_factory=list)  #: (tokens of the first batch, bytes)

    @property
    def compression(self) -> float:
        """How much smaller than with 16 bits per value."""
        return self.bytes_full / self.bytes_used if self.bytes_used else 0.0

    @property
    def bits(self) -> float:
        """Bits per value of K and V."""
        return 16 / self.compression if self.bytes_used else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed, all sequences of a batch together."""
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def divergence(self) -> float:
        """Mean KL divergence in nats."""
        return sum(self.divergences) / len(self.divergences) if self.divergences else 0.0


@dataclass
class Batch:
    """Problems with prompts of equal length, and their prompts' K and V (all but the last token's)."""

    problems: list[Problem]
    prompts: torch.Tensor  # [problems, tokens]
    filled: DynamicCache


def make_batch(model: Any, problems: list[Problem]) -> Batch:
    """Reads the prompts once, in full precision; every cache starts from the same K and V, as it would had it read them itself."""
    prompts = torch.tensor([encode(problem.prompt) for problem in problems])
    filled = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(prompts[:, :-1], past_key_values=filled, logits_to_keep=1)
    return Batch(problems, prompts, filled)


def make_cache(model: Any, batch: Batch, name: str) -> Any:
    """A cache, `FULL` or a format, that holds the batch's prompts."""
    if name == FULL:
        return Float16Cache.from_cache(batch.filled)
    return KvarnCache.from_cache(model.config, batch.filled, name, dtype=torch.float16)


def bytes_used(cache: Any) -> int:
    """Bytes in use."""
    return int(cache.used_bytes if isinstance(cache, Float16Cache) else cache.usage().used)


def generate(model: Any, batch: Batch, name: str, result: Result, on_token: Callable[[torch.Tensor, int], None] | None = None) -> list[str]:
    """Solves the batch with one cache; adds what was measured to `result`.

    Args:
        on_token: called after every step with the new tokens [problems, tokens so far] and the bytes in use (0: not counted).

    Returns:
        The responses.
    """
    enable(model)
    cache = make_cache(model, batch, name)
    start = batch.prompts.shape[1]
    most = max(len(problem.response) for problem in batch.problems) + 32
    growth: list[tuple[int, int]] = []

    def step(tokens: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        new = tokens[:, start:]
        counted = bytes_used(cache) if new.shape[1] % 16 == 1 else 0
        if counted:
            growth.append((tokens.shape[1] * tokens.shape[0], counted))
        if on_token is not None:
            on_token(new, counted)
        return torch.zeros(len(tokens), dtype=torch.bool)

    with torch.inference_mode():
        began = time.perf_counter()
        tokens = model.generate(
            batch.prompts,
            attention_mask=torch.ones_like(batch.prompts),
            past_key_values=cache,
            max_new_tokens=most,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([step]),
        )
        result.seconds += time.perf_counter() - began
    new = tokens[:, start:].tolist()
    texts = [decode(row) for row in new]
    result.new_tokens += sum(row.index(END) + 1 if END in row else len(row) for row in new)
    result.right += sum(problem.check(text) for problem, text in zip(batch.problems, texts, strict=True))
    result.problems += len(texts)
    held = bytes_used(cache)
    result.bytes_used += held
    result.bytes_full += held if name == FULL else cache.usage().full_precision
    result.growth = result.growth or growth
    return texts


def log_probabilities(model: Any, batch: Batch, name: str) -> torch.Tensor:
    """Log-probabilities after each token of the expected responses [problems, tokens, vocabulary], read in chunks over the cache."""
    enable(model)
    cache = make_cache(model, batch, name)
    length = min(len(problem.response) for problem in batch.problems)
    responses = torch.tensor([list(problem.response.encode())[:length] for problem in batch.problems])
    tokens = torch.cat([batch.prompts[:, -1:], responses], 1)
    with torch.inference_mode():
        parts = [model(chunk, past_key_values=cache).logits.float().log_softmax(-1) for chunk in tokens.split(_CHUNK, 1)]
    return torch.cat(parts, 1)


def divergences(full: torch.Tensor, other: torch.Tensor) -> list[float]:
    """KL(full || other) of each token, in nats."""
    values: list[float] = (full.exp() * (full - other)).sum(-1).clamp(min=0).flatten().tolist()
    return values
