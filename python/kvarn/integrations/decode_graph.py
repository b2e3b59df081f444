"""Decode steps of a transformers model on a `KvarnCache` as one CUDA graph.

A decode step of an 8B model launches about a thousand kernels. Run eagerly, Python takes longer to launch them than the GPU to run them;
a graph launches them at once::

    graph = DecodeGraph(model, cache)                      # after the prompt: model(**inputs, past_key_values=cache)
    logits = graph.step(token)                             # int64 [batch, 1] -> [batch, vocabulary]
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvarn._errors import InvalidArgumentError, UnsupportedError
from kvarn._schedule import Schedule
from kvarn.cache import Step, _AttendView
from kvarn.integrations.transformers import KvarnCache

__all__ = ["DecodeGraph"]

# Columns that the block table has room for beyond what it holds, so that a graph outlives many tiles.
_SPARE_TILES = 64


class DecodeGraph:
    """Runs one token of every sequence at a time, on the fused path.

    What changes from step to step (tokens, positions, slots, block table, lengths) lies in arrays of its own, which every step fills and
    the graph reads. The graph is captured at the first step, and again when the cache's arrays have moved or the block table is too narrow.
    Between steps the cache may be cropped, reordered or used by the model itself.

    Args:
        model: a decoder after `enable`, in inference.
        cache: holds the prompt of every sequence, without padding.
        graph: False runs the same steps without a graph, on any device.

    Raises:
        UnsupportedError: the plain path, sliding-window layers, padding, or a graph on a device that is not CUDA.
    """

    def __init__(self, model: Any, cache: KvarnCache, *, graph: bool = True) -> None:
        store = cache.store
        if not cache.is_fused:
            raise UnsupportedError(
                "[kvarn.DecodeGraph] model: expected one after kvarn.integrations.transformers.enable, got the plain path"
            )
        if any(kind != "full_attention" for kind in getattr(cache.config, "layer_types", None) or []):
            raise UnsupportedError("[kvarn.DecodeGraph] model: expected full_attention layers, got others")
        if graph and store.memory.backend == "cpu":
            raise UnsupportedError("[kvarn.DecodeGraph] graph: expected a cache on a GPU, got one on the CPU (graph=False runs there)")
        self._model, self._cache, self._uses_graph = model, cache, graph
        self._graph: torch.cuda.CUDAGraph | None = None
        self._fixed: Step | None = None
        self._logits: torch.Tensor | None = None
        self._captured: tuple[int, ...] = ()

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends one token to every sequence.

        Args:
            tokens: int64 ``[batch, 1]``.

        Returns:
            Logits ``[batch, vocabulary]`` of the next token; with a graph, memory that the next step overwrites.
        """
        cache, store = self._cache, self._cache.store
        batch = len(cache.sequences)
        if tuple(tokens.shape) != (batch, 1):
            raise InvalidArgumentError(f"[kvarn.DecodeGraph.step] tokens: expected [{batch}, 1], got {list(tokens.shape)}")
        if cache._real is not None:
            raise UnsupportedError("[kvarn.DecodeGraph.step] cache: expected sequences without padding, got some with")
        position = cache.get_seq_length()
        cache._begin(1, None)
        opened = cache._step
        assert opened is not None
        view = opened._view
        fixed = self._fixed
        if fixed is None or fixed.num_tokens != batch or fixed._view.block_table.shape[1] < view.max_tiles:
            fixed = self._fixed = self._make_step(batch, view.max_tiles + _SPARE_TILES)
            self._graph = None
            self._tokens = torch.zeros_like(tokens)
            self._positions = torch.zeros_like(tokens)
        # Makes a plan that is large enough before anything is captured.
        plan = store._plan_for(batch, batch, fixed._view.max_tiles)
        assert fixed._early is not None
        fixed._early.copy_(opened._early)
        fixed._view.block_table[:, : view.max_tiles] = view.block_table
        fixed._view.seq_lens.copy_(view.seq_lens)
        self._tokens.copy_(tokens)
        self._positions.fill_(position)
        opened._open, fixed._open = False, True
        cache._step, cache._is_prepared = fixed, True
        try:
            if not self._uses_graph:
                return self._forward()
            # A captured call uses the plan and the addresses of its time.
            uses = (plan.handle, store.records.data_ptr(), store.staging.data_ptr())
            if self._graph is None or uses != self._captured:
                self._capture()
                self._captured = uses
            assert self._graph is not None
            assert self._logits is not None
            self._graph.replay()
            return self._logits
        finally:
            fixed._open = cache._is_prepared = False

    def _make_step(self, batch: int, columns: int) -> Step:
        """A step whose arrays stay where they are."""
        store = self._cache.store
        step = Step(store, [], [1] * batch, Schedule(batch, early=np.full(batch, -1, np.int64)))
        put = store.memory.put
        table, lens, starts = np.zeros((batch, columns), np.int32), np.zeros(batch, np.int32), np.arange(batch + 1, dtype=np.int32)
        step._view = _AttendView(batch, columns, put(table), put(lens), put(starts))
        return step

    def _forward(self) -> torch.Tensor:
        result = self._model(input_ids=self._tokens, position_ids=self._positions, past_key_values=self._cache, use_cache=True)
        logits: torch.Tensor = result.logits[:, -1]
        return logits

    def _capture(self) -> None:
        # Twice eagerly: libraries do what is lazy, and a step that is run again writes the same values to the same places.
        self._graph = self._logits = None
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._forward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._forward()
        self._graph = graph
