"""The demonstration on the terminal: a progress bar, one problem as it is solved, the table; and the plot."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from kvarn.demo.model import decode, find_model, load_model
from kvarn.demo.tasks import Problem, problem

#: Batches of the standard demonstration: (task, level, problems).
BATCHES = (("chase", "demo", 6), ("retrieve", "demo", 6))
FORMATS = ("k4v4_g128", "k4v2_g128", "k2v2_g128")

_LINES = 14  # of the worked answer on screen


def run(*, model: Path | None, output: Path, formats: list[str], problems: int | None, threads: int, console: Console) -> int:
    """Runs the demonstration.

    Args:
        model: folder of the model; None: the project's.
        output: folder for the plot; made when missing.
        formats: record formats to compare with the 16-bit cache.
        problems: problems per task; None: the standard number.
        threads: of PyTorch; 0: PyTorch's choice. KVarN takes no more, and as KVARN_NUM_THREADS says where that is set.

    Returns:
        0.
    """
    # PyTorch's threads would otherwise spin between operations, on the cores that KVarN's need. Read when PyTorch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    began = time.perf_counter()
    folder = find_model(model)
    with console.status("loading PyTorch and the model"):
        import torch

        from kvarn.demo import plot, solve

        if threads:
            torch.set_num_threads(threads)
        lm = load_model(folder)
    console.print(_introduction(lm, formats))

    names = [solve.FULL, *formats]
    results = {name: solve.Result(name) for name in names}
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeElapsedColumn(), console=console
    )
    for task, level, standard in BATCHES:
        chosen = [problem(task, index, level) for index in range(problems or standard)]
        with console.status(f"{task}: reading {len(chosen)} prompts of {len(chosen[0].prompt)} bytes"):
            batch = solve.make_batch(lm, chosen)
        steps = max(len(p.response) for p in chosen) + 1
        with Live(console=console, refresh_per_second=8, transient=True) as live:
            full: Any = None
            for name in names:
                bar = progress.add_task(f"{task} {name:10}", total=steps)

                def show(
                    new: Any, counted: int, bar: Any = bar, name: str = name, chosen: list[Problem] = chosen, steps: int = steps
                ) -> None:
                    progress.update(bar, completed=min(new.shape[1], steps))
                    if new.shape[1] % 4 == 1:
                        live.update(Group(_worked(chosen[0], decode(new[0].tolist()), name), progress))

                texts = solve.generate(lm, batch, name, results[name], show)
                progress.update(bar, completed=steps)
                live.update(Group(_worked(chosen[0], texts[0], name), progress))
                seen = solve.log_probabilities(lm, batch, name)
                full = seen if full is None else full
                results[name].divergences += solve.divergences(full, seen)
                if name == names[min(2, len(names) - 1)]:
                    shown = _worked(chosen[0], texts[0], name)
        console.print(shown)
        progress.stop()
        for bar in list(progress.task_ids):
            progress.remove_task(bar)
    console.print(_table(list(results.values())))
    output.mkdir(parents=True, exist_ok=True)
    path = output / "kvarn-demo.png"
    plot.save(list(results.values()), path)
    console.print(f"plot: {path}    {time.perf_counter() - began:.0f} s in all")
    return 0


def _introduction(model: Any, formats: list[str]) -> Panel:
    import torch

    import kvarn

    config = model.config
    cpu = next(backend for backend in kvarn.backends() if backend.name == "cpu")
    text = (
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, {config.num_hidden_layers} layers, "
        f"{config.num_attention_heads} query and {config.num_key_value_heads} KV heads of {config.head_dim}; one token is one byte.\n"
        f"All caches: computed in float32 on the CPU ({cpu.detail}; {torch.get_num_threads()} PyTorch threads), the same prompts.\n"
        f"float16 holds 16 bits per value, preallocated, read by PyTorch's attention.\n"
        f"{', '.join(formats)} are KVarN records, read as they are, with the first tile of 128 tokens\n"
        "(attention sinks) and the unfinished tile in float16: both are counted."
    )
    return Panel(text, title="kvarn demo", title_align="left")


def _worked(shown: Problem, text: str, cache: str) -> Panel:
    """One problem and what the model has written so far; a wrong answer is marked."""
    lines = shown.prompt.rstrip("\n").split("\n")
    asked = lines if len(lines) <= 5 else [*lines[:2], f"... {len(lines) - 4} lines ...", *lines[-2:]]
    written = text.split("\n")
    body = Text("\n".join(asked) + "\n", style="dim")
    if len(written) > _LINES:
        body.append(f"... {len(written) - _LINES} lines ...\n", style="dim")
    body.append("\n".join(line[:110] for line in written[-_LINES:]))
    complete = shown.answer is not None and text.rstrip("\n").endswith(shown.response.rstrip("\n").rsplit("\n", 1)[-1])
    if complete or len(text) >= len(shown.response):
        right = shown.check(text)
        body.append("\nright" if right else f"\nwrong: expected {str(shown.answer)[-60:]!r}", style="green" if right else "red")
    return Panel(body, title=f"{shown.task}, problem 1, as {cache} solves it", title_align="left", height=_LINES + 10)


def _table(results: list[Any]) -> Table:
    caption = "KL: of the next token's distribution from float16's, in nats, over the expected responses; tokens/s: decoding a batch"
    table = Table(title="the same problems with each cache", title_justify="left", caption=caption, caption_justify="left")
    for column in ("cache", "megabytes", "bits/value", "smaller", "tokens/s", "KL", "right"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for result in results:
        table.add_row(
            result.cache,
            f"{result.bytes_used / 1e6:.2f}",
            f"{result.bits:.2f}",
            f"{result.compression:.2f} x",
            f"{result.tokens_per_second:.0f}",
            f"{result.divergence:.5f}" if result is not results[0] else "-",
            f"{result.right}/{result.problems}",
        )
    return table
