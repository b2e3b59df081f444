"""The project's own measurements, in order of importance, within a time budget: ``python -m kvarn.eval.campaign --out FOLDER``.

Every result is appended to FOLDER/results.jsonl as soon as it is there, and FOLDER/campaign.md is written anew, so that stopping it at any
moment loses nothing. A run that finds results in FOLDER goes on after them.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvarn.eval import problems, tensors, text
from kvarn.eval.language_model import LanguageModel
from kvarn.eval.quantisers import Quantiser, parse
from kvarn.eval.twins import TWINS

WIDTHS = ("k4v4", "k4v2", "k2v2")
GOALS = tuple(f"{method}-{width}" for width in WIDTHS for method in ("published", "kvarn+kv", "kvarn", "kvarn+k", "kvarn+v"))
BASELINES = (
    *("fp8", "fp8_head", "q8_0", "q4_0", "bf16"),
    *(f"{method}-{width}" for width in WIDTHS for method in ("kivi32", "kivi128", "kvquant", "quarot", "turboquant", "rtn", "hadamard")),
)
MORE_FORMATS = (
    *("kvarn-k4v2_g128_m8", "kvarn+kv-k4v2_g128_m8", "kvarn-k2v2_g128_m8", "kvarn+kv-k2v2_g128_m8"),
    *("kvarn-k3v3", "kvarn+kv-k3v3", "kvarn-k3v2", "kvarn+kv-k3v2", "kvarn+kv-k4v3", "kvarn-k8v8", "kvarn-k6v6"),
    *(f"kvarn+kv-k4v2_g{tile}" for tile in (32, 64, 256)),
    *(f"kvarn-k2v2_g{tile}" for tile in (32, 64, 256)),
)
#: Decisions of the encoder, one at a time, on top of plain and of fed rounding.
ENCODER_OPTIONS = (
    *(f"iterations={count}" for count in (0, 1, 2, 4, 16)),
    *("keep=last", "keep=error", "imbalance=variance", "target=axis;size_share=1", "size_share=1", "size_share=0.25", "rescore"),
    *(
        "rotate=signed",
        "k.rotate=none",
        "v.rotate=none",
        "normalisation=none",
        "starts=6",
        "refits=1",
        "rounding=minmax",
        "rounding=unbiased",
    ),
    *("rounding=least_squares", "k.rounding=unbiased", "v.rounding=unbiased", "k.rounding=minmax", "v.rounding=minmax"),
)
FEEDBACK_OPTIONS = (
    *("damping=0.001", "damping=0.03", "damping=0.1", "damping=0.3", "order=largest", "order=smallest", "restretch"),
    *("k.restretch", "v.restretch", "rounding=minmax", "rounding=unbiased", "v.rounding=unbiased", "k.rounding=unbiased", "starts=6"),
)
PUBLISHED_OPTIONS = ("iterations=0", "iterations=16", "keep=last", "imbalance=variance", "scale_low=0.001")
PROTOCOLS = ("sink=0", "sink=0;recent=128", "recent=128", "sink=256")
FIGURES = tuple(f"{method}(repair={which})-{width}" for width in WIDTHS for method in ("kvarn", "hadamard") for which in ("worst", "rest"))


def ablations() -> Iterator[str]:
    """Names of formats, the most telling first."""
    for option in FEEDBACK_OPTIONS:
        yield from (f"kvarn+kv({option})-{width}" for width in ("k2v2", "k4v2", "k4v4"))
    for option in ENCODER_OPTIONS:
        yield from (f"kvarn({option})-{width}" for width in ("k2v2", "k4v4"))
    for option in PUBLISHED_OPTIONS:
        yield f"published({option})-k2v2"
    for option in PROTOCOLS:
        yield from (f"kvarn+kv({option})-{width}" for width in ("k4v2", "k2v2"))


@dataclass
class Sizes:
    """How much is measured."""

    problems: int  #: per task
    tokens: int  #: of text in each run
    long: int  #: tokens of a window
    short: int
    level: str
    tasks: tuple[str, ...] | None  #: None: all of the level

    @classmethod
    def named(cls, name: str) -> Sizes:
        """ "full", as the published figures; "tiny", to see that it runs."""
        if name == "full":
            return cls(200, 196_608, 16_384, 4_096, "base", None)
        return cls(2, 1_024, 512, 512, "easy", ("retrieve",))


class Campaign:
    """Models, text and what has been measured.

    Args:
        models: folder with tiny-reason and tiny-code.
        text_file: of `kvarn.eval.held_out`.
    """

    def __init__(
        self, out: Path, models: Path, text_file: Path | None, device: str, sizes: Sizes, seconds: float, use_graphs: bool | None
    ) -> None:
        self.out, self.device, self.sizes, self.use_graphs = out, device, sizes, use_graphs
        self.models, self.text_file = models, text_file
        self.dtype = torch.float16 if device.startswith("cuda") else torch.float32
        self.until = time.monotonic() + seconds
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "results.jsonl"
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            self.rows = [json.loads(line) for line in self.path.read_text().splitlines()]
        self._language_models: dict[str, LanguageModel] = {}
        self._references: dict[Any, Any] = {}
        self.graph_failure: str | None = None

    # ---- keeping results -------------------------------------------------------------------------------------------------------------

    def has(self, **key: Any) -> bool:
        """Whether there is a result of this kind."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def measure(self, work: Callable[[], dict[str, Any]], **key: Any) -> None:
        """Does a piece of work unless it was done or time is up, and keeps its result; a failure is kept as well, and the rest goes on."""
        if time.monotonic() > self.until or self.has(**key):
            return
        began = time.perf_counter()
        row: dict[str, Any]
        try:
            row = {**key, **work()}
        except Exception as error:
            row = {**key, "error": f"{type(error).__name__}: {error}"[:500], "where": traceback.format_exc()[-1500:]}
        row = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
        row["wall_seconds"] = round(time.perf_counter() - began, 2)
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({name: value for name, value in row.items() if name not in _LONG})[:400], flush=True)
        from kvarn.eval.report import campaign_markdown

        (self.out / "campaign.md").write_text(campaign_markdown(self.rows))

    # ---- models, texts -----------------------------------------------------------------------------------------------------------------

    def model(self, name: str) -> LanguageModel:
        """ "tiny-reason", "tiny-code", or one of them with "/" and the name of a twin."""
        if name not in self._language_models:
            base, _, twin = name.partition("/")
            if twin:
                original = self.model(base)
                self._language_models[name] = LanguageModel(TWINS[twin].make(original.model), None, original.calibration_tokens)
            else:
                loaded = LanguageModel.load(self.models / base, self.device, self.dtype)
                loaded.calibration_tokens = self._calibration_tokens(loaded, base)
                self._language_models[name] = loaded
        return self._language_models[name]

    def _calibration_tokens(self, model: LanguageModel, name: str) -> torch.Tensor:
        """Text that nothing is measured on: other problems, or the end of the text."""
        length, count = (2048, 4) if self.sizes.tokens > 4096 else (256, 2)
        if name == "tiny-reason":
            tokens: list[int] = []
            index = 1_000_000
            while len(tokens) < length * count:
                for task in problems.task_names("base"):
                    (one,) = problems.problems_of(task, "base", 1, index)
                    tokens += model.encode(one.prompt + one.response)
                index += 1
            return torch.tensor(tokens[: length * count]).view(count, length)
        return torch.tensor(model.encode(self._text()[-length * count - 4096 :].decode("utf-8", "replace"))[: length * count]).view(
            count, length
        )

    def _text(self) -> bytes:
        if self.text_file is None:
            from kvarn.eval.held_out import collect

            return collect()[0]
        return self.text_file.read_bytes()

    def quantiser(self, name: str, model: LanguageModel) -> Quantiser:
        """One that is ready for a model."""
        made = parse(name)
        made.prepare(model)
        return made

    # ---- pieces of work ----------------------------------------------------------------------------------------------------------------

    def reference(self, model: str, length: int, count: int | None = None) -> Any:
        """(windows, run, reference) of a model at a window length."""
        key = (model, length, count)
        if key not in self._references:
            self._references.clear()
            gc.collect()
            lm = self.model(model)
            ids, _ = text.windows(lm, self._text(), length, count or max(1, self.sizes.tokens // length))
            self._references[key] = (ids, *text.read(lm, ids))
        return self._references[key]

    def text(self, model: str, name: str, length: int) -> None:
        """Bits per byte and divergence of a format at a window length."""

        def work() -> dict[str, Any]:
            lm = self.model(model)
            ids, full, reference = self.reference(model, length)
            quantiser = self.quantiser(name, lm)
            run, _ = text.read(lm, ids, quantiser, reference)
            k, v = quantiser.bits(lm.head_dim, lm.num_kv_heads)
            return {"bits": (k + v) / 2, "tokens": ids.numel(), "full_bits_per_byte": full.bits_per_byte, **text.summary(run, full)}

        self.measure(work, kind="text", model=model, format=name, length=length)

    def growth(self, model: str, name: str, length: int, count: int) -> None:
        """Accumulated against static: the same format on the run's own K and V, and on the reference's."""

        def work() -> dict[str, Any]:
            lm = self.model(model)
            ids, full, reference = self.reference(model, length, count)
            quantiser = self.quantiser(name, lm)
            row: dict[str, Any] = {"tokens": ids.numel()}
            for label, accumulate in (("accumulated", True), ("static", False)):
                run, _ = text.read(lm, ids, quantiser, reference, accumulate=accumulate, with_errors=True)
                assert run.kl is not None
                row[label] = {
                    **text.summary(run, full),
                    **text.growth(run),
                    "kl_by_tile": run.kl.unflatten(1, (-1, 128)).mean((0, 2)).tolist(),
                }
            k, v = quantiser.bits(lm.head_dim, lm.num_kv_heads)
            return {"bits": (k + v) / 2, **row}

        self.measure(work, kind="growth", model=model, format=name, length=length)

    def layers(self, model: str, name: str, length: int) -> None:
        """Errors of K, V and attention, layer by layer."""

        def work() -> dict[str, Any]:
            lm = self.model(model)
            ids, _ = text.windows(lm, self._text(), length, 4)
            rows = tensors.layer_errors(tensors.sample(lm, ids), self.quantiser(name, lm))
            return {**tensors.mean_row(rows), "layers": rows}

        self.measure(work, kind="layers", model=model, format=name, length=length)

    def tasks(self, model: str, name: str, level: str, count: int, temperature: float = 0.0, seed: int = 0) -> None:
        """Right answers of a format on all tasks of a level."""

        def work() -> dict[str, Any]:
            lm = self.model(model)
            quantiser = self.quantiser(name, lm)
            runs = [
                self._solve(lm, task, level, count, quantiser, temperature, seed) for task in self.sizes.tasks or problems.task_names(level)
            ]
            full = self._answers_in_16_bits(model, level, count, temperature, seed)
            k, v = quantiser.bits(lm.head_dim, lm.num_kv_heads)
            wrong = {run.task: [i for i, right in enumerate(run.right) if not right] for run in runs}
            graphs = {} if self.graph_failure is None else {"graph_failure": self.graph_failure}
            return {"bits": (k + v) / 2, **problems.summary(runs, full), "wrong": wrong, **graphs}

        self.measure(work, kind="tasks", model=model, format=name, level=level, count=count, temperature=temperature, seed=seed)

    def _solve(
        self, model: LanguageModel, task: str, level: str, count: int, quantiser: Quantiser, temperature: float, seed: int
    ) -> problems.TaskRun:
        """With CUDA graphs, or, once they have failed, without; the result says so."""

        def attempt(use_graphs: bool | None) -> problems.TaskRun:
            return problems.solve(model, task, level, count, quantiser, temperature=temperature, seed=seed, use_graphs=use_graphs)

        try:
            return attempt(self.use_graphs)
        except RuntimeError as error:
            if self.use_graphs is False or model.device.type != "cuda" or isinstance(error, torch.OutOfMemoryError):
                raise
            self.graph_failure, self.use_graphs = f"{type(error).__name__}: {error}"[:500], False
        return attempt(False)

    def _answers_in_16_bits(self, model: str, level: str, count: int, temperature: float, seed: int) -> list[problems.TaskRun] | None:
        for row in self.rows:
            wanted = {
                "kind": "tasks",
                "model": model,
                "format": "fp16",
                "level": level,
                "count": count,
                "temperature": temperature,
                "seed": seed,
            }
            if "wrong" in row and all(row.get(key) == value for key, value in wanted.items()):
                return [problems.TaskRun(task, level, [i not in wrong for i in range(count)]) for task, wrong in row["wrong"].items()]
        return None

    # ---- the order -----------------------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Everything, until time is up."""
        s = self.sizes
        everything = ("fp16", *GOALS)
        for name in ("fp16", *(g for g in GOALS if g.startswith(("published", "kvarn+kv")))):
            self.text("tiny-code", name, s.long)
        for name in everything:
            self.tasks("tiny-reason", name, s.level, s.problems)
        for name in (*everything, *BASELINES):
            self.text("tiny-code", name, s.long)
        for name in (*everything, *(b for b in BASELINES if not b.startswith(("rtn", "hadamard")))):
            self.layers("tiny-code", name, min(4096, s.long))
        accumulating = [f"{m}-{w}" for w in WIDTHS for m in ("published", "kvarn", "kvarn+kv", "kivi32", "quarot", "kvquant", "turboquant")]
        for name in ("fp8", *accumulating):
            self.growth("tiny-code", name, s.short, max(1, s.tokens // s.short // 4))
        for twin in TWINS:
            for name in ("fp16", *GOALS, "fp8", "kivi32-k4v2", "kivi32-k2v2", "quarot-k2v2", "kvquant-k2v2"):
                self.text(f"tiny-code/{twin}", name, s.short)
        for name in MORE_FORMATS:
            self.text("tiny-code", name, s.long)
        for name in ablations():
            self.text("tiny-code", name, s.long)
        for name in FIGURES:
            self.text("tiny-code", name, s.long)
        for name in everything:
            self.text("tiny-code", name, s.short)
        for name in (
            "kivi32-k4v2",
            "quarot-k4v4",
            "kivi32-k2v2",
            "kvquant-k2v2",
            "q4_0",
            "fp8",
            "kvarn+kv-k3v3",
            "kvarn+kv(restretch)-k2v2",
        ):
            self.tasks("tiny-reason", name, s.level, s.problems)
        for level in ("hard", "long", "longest") if s.level == "base" else ():
            for name in ("fp16", *(g for g in GOALS if "+k-" not in g and "+v-" not in g)):
                self.tasks("tiny-reason", name, level, s.problems // 4 if level != "hard" else s.problems)
        for seed in range(3):
            for name in ("fp16", "published-k4v2", "kvarn+kv-k4v2", "kvarn-k4v2"):
                self.tasks("tiny-reason", name, s.level, s.problems, temperature=1.0, seed=seed)


_LONG = {"wrong", "layers", "accumulated", "static", "where", "by_task"}


def environment(device: str) -> dict[str, Any]:
    """What the figures were measured with."""
    import transformers

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or platform.machine()
    return {
        "kind": "environment",
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--text", type=Path, help="held-out text; default: collected from the installed packages")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--seconds", type=float, default=1e9, help="time budget; a piece of work that has begun is finished")
    parser.add_argument("--no-graphs", action="store_true", help="decode without CUDA graphs")
    given = parser.parse_args(arguments)
    use_graphs = False if given.no_graphs else None
    campaign = Campaign(given.out, given.models, given.text, given.device, Sizes.named(given.size), given.seconds, use_graphs)
    campaign.measure(lambda: environment(given.device), kind="environment", size=given.size)
    campaign.run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
