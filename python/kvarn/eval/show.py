"""``kvarn eval`` on the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from kvarn._errors import InvalidArgumentError
from kvarn._moments import WINDOW_TOKENS
from kvarn.eval import held_out, report
from kvarn.eval.quantisers import parse, split_names

FORMATS = "fp16,k4v4_g128,kvarn+kv-k4v4,k4v2_g128,kvarn+kv-k4v2,k2v2_g128,kvarn+kv-k2v2,published-k4v2,kivi32-k4v2,fp8"
WHAT = ("text", "growth", "layers")


def run(
    *,
    model: str,
    formats: str,
    what: str,
    tasks: str,
    level: str,
    problems: int,
    temperature: float,
    seeds: int,
    text: Path | None,
    length: int,
    windows: int,
    step_tokens: int,
    calibration: int,
    device: str,
    dtype: str,
    threads: int,
    report_path: Path | None,
    console: Console,
) -> list[dict[str, Any]]:
    """Measures formats on a model, prints the tables and writes the report.

    Args:
        model: folder or hub name of a causal language model of transformers.
        formats: names as `kvarn.eval.quantisers.parse` reads them, comma separated.
        what: of "text", "growth", "layers", comma separated.
        tasks: names of tasks, comma separated, or "all"; "": none.
        level, problems, temperature, seeds: of the tasks; runs per format when sampled.
        text: a text file; None: the sources of the packages that `kvarn.eval.held_out` names.
        length, windows: tokens of a window, and how many.
        step_tokens: tokens that are read at once: 128, or 1 as decoding does.
        calibration: tokens of the end of the text, at most, for methods that calibrate and for feedback's moments.
        report_path: .md or .html; the rows are written beside it as they come, to a file of the same name that ends in .jsonl, of which
            `kvarn.eval.report` makes the report of a run that was stopped.

    Returns:
        The rows that were measured.

    Raises:
        InvalidArgumentError: a name or number that is none.
    """
    names = split_names(formats)
    kinds = [kind for kind in what.split(",") if kind]
    if wrong := [kind for kind in kinds if kind not in WHAT]:
        raise InvalidArgumentError(f"[kvarn.eval] what: expected of {', '.join(WHAT)}, got {', '.join(wrong)}")
    if report_path is not None and report_path.suffix not in (".md", ".html"):
        raise InvalidArgumentError(f"[kvarn.eval] report: expected a name that ends in .md or .html, got {report_path}")
    if length < 256 or length % 128:
        raise InvalidArgumentError(f"[kvarn.eval] length: expected a multiple of 128 from 256 on, got {length}")
    try:
        for name in names:
            parse(name)
    except ValueError as error:
        raise InvalidArgumentError(str(error)) from None
    with console.status("loading PyTorch and the model"):
        import torch

        from kvarn.eval.campaign import environment
        from kvarn.eval.language_model import LanguageModel
        from kvarn.eval.measure import Measurements
        from kvarn.eval.problems import task_names

        if threads:
            torch.set_num_threads(threads)
        kind = getattr(torch, dtype if dtype != "auto" else "float16" if device.startswith("cuda") else "float32")
        lm = LanguageModel.load(model, device, kind)
    source, versions = (text.read_bytes(), {}) if text is not None else held_out.collect()
    # Calibration (of methods that need it, and of feedback's moments) sees the end of the text, which nothing is measured on.
    cut = len(source) * 9 // 10
    tail = lm.encode(source[cut:].replace(b"\0", b"\n").decode("utf-8", "replace"))
    per = min(WINDOW_TOKENS, getattr(lm.config, "max_position_embeddings", WINDOW_TOKENS), calibration, len(tail))
    if per:
        lm.calibration_tokens = torch.tensor(tail[: min(calibration, len(tail)) // per * per]).view(-1, per)
    measured = Measurements(lm, source[:cut])
    chosen = list(task_names(level)) if tasks == "all" else [task for task in tasks.split(",") if task]

    rows: list[dict[str, Any]] = []
    log = None if report_path is None else report_path.with_suffix(".jsonl")
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        if log is not None:
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")

    keep({**environment(device), "model": model, **versions})
    runs = len(kinds) * len(names) + len(chosen and names) * (seeds if temperature else 1)
    with _progress(console) as progress:
        overall = progress.add_task("all", total=runs)

        def measure(label: str, total: int, work: Callable[..., dict[str, Any]], **key: Any) -> None:
            bar = progress.add_task(label, total=total)
            keep({**key, **work(on_step=lambda done: progress.update(bar, completed=min(done, total)))})
            progress.remove_task(bar)
            progress.advance(overall)

        for name in names:
            key = {"model": model, "format": name, "length": length}
            if "text" in kinds:
                text_of = partial(measured.text, name, length, windows, step_tokens)
                measure(f"text, {name}", length, text_of, kind="text", **key)
            if "growth" in kinds:
                growth_of = partial(measured.growth, name, length, windows, step_tokens)
                measure(f"growth, {name}", length, growth_of, kind="growth", **key, step_tokens=step_tokens)
            if "layers" in kinds:
                layers_of = partial(measured.layers, name, length, min(windows, 4))
                measure(f"layers, {name}", 1, layers_of, kind="layers", **key)
        for seed in range(seeds if temperature else 1):
            full: dict[str, Any] | None = None
            for name in names if chosen else ():
                solve = partial(measured.tasks, name, chosen, level, problems, full, temperature=temperature, seed=seed)
                key = {"model": model, "format": name, "level": level, "temperature": temperature, "seed": seed}
                measure(f"problems, {name}", 2048, solve, kind="tasks", **key)
                if name == "fp16":
                    full = rows[-1]
    for section in report.sections(rows, figures=False):
        console.rule(section.title, align="left")
        for part in section.parts:
            console.print(_rich(part) if isinstance(part, report.Table) else part)
    if report_path is not None:
        report.write(report.sections(rows), report_path, f"Accuracy of quantised KV caches: {Path(model).name}")
        console.print(f"report: {report_path}")
    return rows


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True
    )


def _rich(table: report.Table) -> RichTable:
    made = RichTable(box=None)
    for i, name in enumerate(table.header):
        made.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in table.rows:
        made.add_row(*row)
    return made
