"""Measurements of one model as rows of plain numbers: what the reports are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvarn.eval import problems, tensors, text
from kvarn.eval.language_model import LanguageModel
from kvarn.eval.quantisers import Quantiser, parse

Row = dict[str, Any]
OnStep = Callable[[int], None] | None


class Measurements:
    """One model and one text.

    Args:
        model: the model.
        source: the text, documents separated by zero bytes.
        use_graphs: decode with CUDA graphs; None: on a GPU.
    """

    def __init__(self, model: LanguageModel, source: bytes, use_graphs: bool | None = None) -> None:
        self.model, self.source, self.use_graphs = model, source, use_graphs
        self.graph_failure: str | None = None
        self._key: tuple[int, int] | None = None
        self._reference: tuple[torch.Tensor, text.TextRun, text.Reference] | None = None

    def quantiser(self, name: str) -> Quantiser:
        """One that is ready for the model."""
        made = parse(name)
        made.prepare(self.model)
        return made

    def bits(self, quantiser: Quantiser) -> float:
        """Bits per value of K and V, metadata included."""
        return sum(quantiser.bits(self.model.head_dim, self.model.num_kv_heads)) / 2

    def reference(self, length: int, windows: int, on_step: OnStep = None) -> tuple[torch.Tensor, text.TextRun, text.Reference]:
        """Windows [B, length], the run without quantisation, and what the others are compared with."""
        if self._key != (length, windows) or self._reference is None:
            self._reference = None
            ids, _ = text.windows(self.model, self.source, length, windows)
            run, made = text.read(self.model, ids, on_step=on_step)
            assert made is not None
            self._key, self._reference = (length, windows), (ids, run, made)
        return self._reference

    def forget(self) -> None:
        """Frees the reference; it is made again when it is asked for."""
        self._key = self._reference = None

    def text(self, name: str, length: int, windows: int, step_tokens: int = 128, on_step: OnStep = None) -> Row:
        """Bits per byte and divergence from the unquantised run."""
        ids, full, reference = self.reference(length, windows)
        quantiser = self.quantiser(name)
        run, _ = text.read(self.model, ids, quantiser, reference, step_tokens=step_tokens, on_step=on_step)
        return {
            "bits": self.bits(quantiser),
            "tokens": ids.numel(),
            "full_bits_per_byte": full.bits_per_byte,
            "full_bits_per_token": full.bits_per_token,
            **text.summary(run, full),
        }

    def growth(self, name: str, length: int, windows: int, step_tokens: int = 128, on_step: OnStep = None) -> Row:
        """Accumulated against static: tiles quantised from the run's own K and V, and from the reference's."""
        ids, full, reference = self.reference(length, windows)
        quantiser = self.quantiser(name)
        row: Row = {"bits": self.bits(quantiser), "tokens": ids.numel()}
        for label in ("accumulated", "static"):
            run, _ = text.read(
                self.model,
                ids,
                quantiser,
                reference,
                step_tokens=step_tokens,
                accumulate=label == "accumulated",
                with_errors=True,
                on_step=on_step,
            )
            row[label] = {**text.summary(run, full), **text.growth(run)}
        return row

    def layers(self, name: str, length: int, windows: int, on_step: OnStep = None) -> Row:
        """Errors of K, V and attention, their mean over layers and each layer's."""
        ids, _ = text.windows(self.model, self.source, length, windows)
        quantiser = self.quantiser(name)
        rows = tensors.layer_errors(tensors.sample(self.model, ids), quantiser)
        if on_step is not None:
            on_step(1)
        return {"bits": self.bits(quantiser), **tensors.mean_row(rows), "layers": rows}

    def tasks(
        self,
        name: str,
        tasks: Sequence[str],
        level: str,
        count: int,
        full: Row | None = None,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        on_step: OnStep = None,
    ) -> Row:
        """Right answers; `full`: the row of the unquantised cache, to compare with problem by problem."""
        quantiser = self.quantiser(name)
        runs = [self._solve(task, level, count, quantiser, temperature, seed, on_step) for task in tasks]
        row = {
            "bits": self.bits(quantiser),
            **problems.summary(runs, None if full is None else problems.runs_of(full)),
            "wrong": {run.task: [i for i, right in enumerate(run.right) if not right] for run in runs},
            "count_by_task": {run.task: len(run.right) for run in runs},
        }
        return row if self.graph_failure is None else {**row, "graph_failure": self.graph_failure}

    def _solve(
        self, task: str, level: str, count: int, quantiser: Quantiser, temperature: float, seed: int, on_step: OnStep
    ) -> problems.TaskRun:
        """With CUDA graphs, or, once they have failed, without; the result says so."""

        def attempt(use_graphs: bool | None) -> problems.TaskRun:
            return problems.solve(
                self.model, task, level, count, quantiser, temperature=temperature, seed=seed, use_graphs=use_graphs, on_step=on_step
            )

        try:
            return attempt(self.use_graphs)
        except RuntimeError as error:
            if self.use_graphs is False or self.model.device.type != "cuda" or isinstance(error, torch.OutOfMemoryError):
                raise
            self.graph_failure, self.use_graphs = f"{type(error).__name__}: {error}"[:500], False
        return attempt(False)
