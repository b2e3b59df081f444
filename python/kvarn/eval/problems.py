"""Decode-heavy problems with exact answers, solved through a cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvarn.demo.tasks import LEVELS, Problem, problem
from kvarn.eval.generate import generate
from kvarn.eval.language_model import LanguageModel
from kvarn.eval.quantisers import Quantiser
from kvarn.eval.statistics import paired, wilson

# New tokens allowed beyond the longest expected response.
_SLACK = 64


@dataclass
class TaskRun:
    """What one cache did with the problems of one task."""

    task: str
    level: str
    right: list[bool] = field(default_factory=list)
    traces: int = 0  #: responses equal to the expected one, working out included
    first_difference: list[int] = field(default_factory=list)  #: character at which each of the others first differs
    prompt_tokens: int = 0
    response_tokens: int = 0
    seconds: float = 0.0


def problems_of(task: str, level: str, count: int, first: int = 0) -> list[Problem]:
    """Problems `first` to ``first + count - 1`` of a task: the same on every machine."""
    return [problem(task, index, level) for index in range(first, first + count)]


def solve(
    model: LanguageModel,
    task: str,
    level: str,
    count: int,
    quantiser: Quantiser | None,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    first: int = 0,
    use_graphs: bool | None = None,
    on_step: Callable[[int], None] | None = None,
) -> TaskRun:
    """Solves `count` problems of a task, those with prompts of one length in one batch.

    Args:
        temperature, seed, use_graphs, on_step: as for `generate`.
        first: number of the first problem.
    """
    chosen = problems_of(task, level, count, first)
    prompts = [model.encode(p.prompt) for p in chosen]
    most = max(len(model.encode(p.response)) for p in chosen) + _SLACK
    run = TaskRun(task, level, [False] * count, prompt_tokens=max(map(len, prompts)), response_tokens=most - _SLACK)
    began = time.perf_counter()
    # A byte-level model's prompts are all of one length; with other tokens there are several, one batch each.
    for length in sorted({len(prompt) for prompt in prompts}):
        batch = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        tokens = generate(
            model,
            [prompts[i] for i in batch],
            most,
            quantiser,
            temperature=temperature,
            seed=seed,
            use_graphs=use_graphs,
            on_step=on_step,
        )
        for i, row in zip(batch, tokens, strict=True):
            text, wanted = model.decode(row), chosen[i].response
            run.right[i] = chosen[i].check(text)
            if text == wanted:
                run.traces += 1
            else:
                pairs = zip(wanted, text, strict=False)
                run.first_difference.append(next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(text), len(wanted))))
    run.seconds = time.perf_counter() - began
    return run


def runs_of(row: dict[str, Any]) -> list[TaskRun]:
    """The answers of a row of `Measurements.tasks`."""
    return [
        TaskRun(task, str(row.get("level")), [i not in wrong for i in range(row["count_by_task"][task])])
        for task, wrong in row["wrong"].items()
    ]


def task_names(level: str) -> list[str]:
    """Tasks of a level."""
    if level not in LEVELS:
        raise ValueError(f"[kvarn.eval] level: expected one of {', '.join(LEVELS)}, got {level!r}")
    return list(LEVELS[level])


def summary(runs: list[TaskRun], full: list[TaskRun] | None) -> dict[str, Any]:
    """Right answers in all and by task with 95 % intervals, and the paired difference from the run in 16 bits."""
    right = [answer for run in runs for answer in run.right]
    row: dict[str, Any] = {
        "right": sum(right),
        "count": len(right),
        "interval": wilson(sum(right), len(right)),
        "by_task": {run.task: [sum(run.right), len(run.right)] for run in runs},
        "traces": sum(run.traces for run in runs),
        "seconds": round(sum(run.seconds for run in runs), 1),
    }
    if full is not None:
        row["paired"] = paired([answer for run in full for answer in run.right], right)
    return row
