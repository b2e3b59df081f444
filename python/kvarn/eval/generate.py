"""Greedy or sampled decoding of many equally long prompts at once over a simulated cache."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvarn.eval.attention import SimulatedCache
from kvarn.eval.language_model import LanguageModel
from kvarn.eval.quantisers import Quantiser

Tensor = torch.Tensor

# Prompt tokens that are read in one forward pass.
_TOKENS_AT_ONCE = 1 << 18
# A captured decode step attends to a multiple of this many tokens, the rest masked; each multiple is captured once.
_GRAPH_STEP = 512
_WARM_UP_STEPS = 2


class _Decoder:
    """One decode step of a batch: as it is on the CPU; captured as a CUDA graph on a GPU, where launching costs more than computing."""

    def __init__(self, model: LanguageModel, cache: SimulatedCache, use_graphs: bool) -> None:
        self.model, self.cache, self.use_graphs = model, cache, use_graphs
        self._limit = 0
        if use_graphs:
            self._token = torch.zeros(cache.k.shape[1], 1, dtype=torch.long, device=model.device)
            self._position = torch.zeros(1, dtype=torch.long, device=model.device)

    def __call__(self, token: Tensor) -> Tensor:
        """Logits [B, vocabulary] after `token` [B, 1]."""
        if not self.use_graphs:
            return self.model.step(token, self.cache, True)[:, -1]
        self._token.copy_(token)
        self._position.fill_(self.cache.length)
        if self.cache.length + 1 > self._limit:
            self._capture()
        self._graph.replay()
        return self._logits[:, -1]

    def _capture(self) -> None:
        self._limit = min(-(-(self.cache.length + 1) // _GRAPH_STEP) * _GRAPH_STEP, self.cache.k.shape[3])
        self.cache.position, self.cache.limit = self._position, self._limit
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):  # writes the same values to the same place
                self.model.step(self._token, self.cache, True)
        torch.cuda.current_stream().wait_stream(stream)
        # Memory of its own: one shared with the graph before would be gone with that graph.
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self.model.step(self._token, self.cache, True)
        self.cache.position = None


def pick(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """The next token [B, 1] of logits [B, vocabulary]: the likeliest, or sampled at a temperature."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: list[list[int]],
    most: int,
    quantiser: Quantiser | None,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    use_graphs: bool | None = None,
    on_step: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """New tokens of each prompt, up to the one that ends the response.

    The prompt is read in full precision and its tiles are replaced afterwards, as a server does.

    Args:
        prompts: of equal length.
        most: new tokens at most.
        temperature: 0: greedy.
        seed: of the sampling.
        use_graphs: CUDA graphs; None: on a GPU.
        on_step: called with the number of new tokens.
    """
    ids = torch.tensor(prompts, device=model.device)
    batch, length = ids.shape
    cache = model.cache(batch, length + most, quantiser)
    per = max(1, _TOKENS_AT_ONCE // length)
    first = []
    for row in range(0, batch, per):
        rows = slice(row, row + per)
        first.append(model.step(ids[rows], cache.rows(rows), True)[:, -1])
    cache.advance(length)
    generator = torch.Generator(model.device).manual_seed(seed) if temperature else None
    token = pick(torch.cat(first), temperature, generator)
    ends = torch.tensor(model.end_tokens, device=model.device)
    fill = int(ends[0]) if len(ends) else 0
    over = torch.zeros(batch, 1, dtype=torch.bool, device=model.device)
    out = torch.full((batch, most), fill, device=model.device)
    decode = _Decoder(model, cache, model.device.type == "cuda" if use_graphs is None else use_graphs)
    for step in range(most):
        token = torch.where(over, fill, token)
        over |= torch.isin(token, ends)
        out[:, step : step + 1] = token
        if on_step is not None:
            on_step(step + 1)
        if step + 1 == most or (step % 16 == 0 and bool(over.all())):
            break
        logits = decode(token)
        cache.advance(1)
        token = pick(logits, temperature, generator)
    stop = set(model.end_tokens)
    return [row[: next((i for i, t in enumerate(row) if t in stop), len(row))] for row in out.tolist()]
