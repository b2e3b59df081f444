"""The project's own measurements, in order of importance, within a time budget: ``python -m kvarn.eval.campaign --out FOLDER``.

Every result is appended to FOLDER/results.jsonl as soon as it is there, and FOLDER/campaign.md is written anew, so that stopping it at any
moment loses nothing. A run that finds results in FOLDER goes on after them.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvarn._moments import CALIBRATION_TOKENS, WINDOW_TOKENS, damping_of
from kvarn.eval import problems, report, synthetic, tensors
from kvarn.eval.held_out import collect
from kvarn.eval.language_model import LanguageModel
from kvarn.eval.measure import Measurements
from kvarn.eval.quantisers import parse
from kvarn.eval.twins import TWINS

WIDTHS = ("k4v4", "k4v2", "k2v2")
MAIN = tuple(f"{method}-{width}" for width in WIDTHS for method in ("published", "balanced+kv", "kvarn+kv", "kvarn"))
GOALS = (*MAIN, *(f"{method}-{width}" for width in WIDTHS for method in ("kvarn+k", "kvarn+v")))
BASELINES = (
    *("fp8", "fp8_head", "q8_0", "q4_0", "bf16"),
    *(f"{method}-{width}" for width in WIDTHS for method in ("kivi32", "kivi128", "kvquant", "quarot", "turboquant", "rtn", "hadamard")),
)
TASK_BASELINES = ("fp8", "q4_0", "kivi32-k4v4", "kivi32-k4v2", "kivi32-k2v2", "quarot-k4v4", "quarot-k4v2", "quarot-k2v2", "kvquant-k2v2")
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
    *("order=natural;damping=0.1", "damping=0.1", "damping=0.03", "sweeps=1", "moments=queries", "bucket=128", "restretch=tile"),
    *(
        "order=natural;damping=0.03",
        "v.damping=0.1",
        "damping=0.01",
        "damping=0.3",
        "share=0.8",
        "share=0.8;stretch=1.015625",
        "share=0.8;restretch=tile",
    ),
    *("bucket=4096", "bucket=16384", "widening=1", "widening=0.95", "k.widening=0.95"),
    *("rotate=signed", "passes=2", "logit_bias", "k.rounding=unbiased"),
)
BALANCE_OPTIONS = ("recent=128", "per_head=0", "damping=0.1", "damping=0.03", "share=0.8")
PUBLISHED_OPTIONS = ("iterations=0", "iterations=16", "keep=last", "imbalance=variance", "scale_low=0.001")
PROTOCOLS = ("sink=0", "sink=0;recent=128", "recent=128", "sink=256")
FIGURES = tuple(f"{method}(repair={which})-{width}" for width in WIDTHS for method in ("kvarn", "hadamard") for which in ("worst", "rest"))


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
        """Of "full", for the figures in docs/ACCURACY.md, or of "tiny", to see that it runs."""
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
        self.models, self.source = models, collect()[0] if text_file is None else text_file.read_bytes()
        self.dtype = torch.float16 if device.startswith("cuda") else torch.float32
        self.until = time.monotonic() + seconds
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "results.jsonl"
        self.rows: list[dict[str, Any]] = []
        self._read()
        self.calibration = 256, 2  # tokens of a window, and how many
        self.shared = False  # whether other processes work on the same results
        self._measurements: dict[str, Measurements] = {}

    # ---- keeping results -------------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        if self.path.exists():
            complete = self.path.read_text().rpartition("\n")[0]  # another process may be writing
            self.rows = [json.loads(line) for line in complete.splitlines()]

    def _claim(self, key: dict[str, Any]) -> bool:
        """Whether this process, of several, is the one to do a piece of work."""
        if not self.shared:
            return True
        claims = self.out / "claims"
        claims.mkdir(exist_ok=True)
        try:
            (claims / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def has(self, **key: Any) -> bool:
        """Whether there is a result of this kind."""
        return any(_is(row, **key) for row in self.rows)

    def measure(self, work: Callable[[], dict[str, Any]], **key: Any) -> None:
        """Does a piece of work unless it was done or time is up, and keeps its result; a failure is kept as well, and the rest goes on."""
        if time.monotonic() > self.until or self.has(**key) or not self._claim(key):
            return
        began = time.perf_counter()
        row: dict[str, Any]
        try:
            row = {**key, **work()}
        except Exception as error:
            row = {**key, "error": f"{type(error).__name__}: {error}"[:500], "where": traceback.format_exc()[-1500:]}
        row = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
        row["wall_seconds"] = round(time.perf_counter() - began, 2)
        if self.shared:
            self._read()
            if self.device.startswith("cuda"):
                torch.cuda.empty_cache()
        self.rows.append(row)
        with self.path.open("ab", buffering=0) as file:  # one write, which other processes' writes do not break up
            file.write(json.dumps(row).encode() + b"\n")
        print(json.dumps({name: value for name, value in row.items() if name not in _LONG})[:400], flush=True)
        if not self.shared:
            self.write_report()

    def write_report(self) -> None:
        """What there is, for people."""
        report.write(report.sections(self.rows, figures=False), self.out / "campaign.md", "Accuracy campaign")

    # ---- pieces of work --------------------------------------------------------------------------------------------------------------

    def of(self, name: str) -> Measurements:
        """Measurements of a model of the folder, or of a twin of one: its name after a slash."""
        if name not in self._measurements:
            base, _, twin = name.partition("/")
            if twin:
                original = self.of(base).model
                model = LanguageModel(TWINS[twin].make(original.model), None, original.calibration_tokens)
            else:
                model = LanguageModel.load(self.models / base, self.device, self.dtype)
                model.calibration_tokens = self._calibration_tokens(model, base)
            kept = self._moments_file(name)
            if kept.exists():
                model.use_sensitivity(torch.load(kept, weights_only=False))
            self._measurements[name] = Measurements(model, self.source, self.use_graphs)
        for other, held in self._measurements.items():
            if other != name:
                held.forget()  # gigabytes
        return self._measurements[name]

    def _moments_file(self, name: str) -> Path:
        window, count = self.calibration
        return self.out / f"moments-{name.replace('/', '-')}-{count}x{window}.pt"

    def share_moments(self, parts: Sequence[str]) -> None:
        """Makes the moments of the models once for all processes."""
        names = ["tiny-llama"] if "llama" in parts else []
        names += ["tiny-reason", "tiny-code"] if set(parts) - {"llama"} else []
        for name in (*names, *(f"tiny-code/{twin}" for twin in TWINS if "twins" in parts)):
            torch.save(self.of(name).model.sensitivity(), self._moments_file(name))
        self._measurements.clear()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _calibration_tokens(self, model: LanguageModel, name: str) -> torch.Tensor:
        """Text that nothing is measured on: other problems, or the end of the text; of both for a model that was trained on both."""
        length, count = self.calibration
        of_problems = {"tiny-reason": count, "tiny-llama": count // 2}.get(name, 0) * length
        tokens: list[int] = []
        for index in itertools.count(1_000_000):
            if len(tokens) >= of_problems:
                break
            for task in problems.task_names("base"):
                (one,) = problems.problems_of(task, "base", 1, index)
                tokens += model.encode(one.prompt + one.response)
        of_text = length * count - of_problems
        tokens = tokens[:of_problems] + model.encode(self.source[-of_text - 4096 :].decode("utf-8", "replace"))[:of_text]
        return torch.tensor(tokens).view(count, length)

    def text(self, model: str, name: str, length: int) -> None:
        """Bits per byte and divergence of a format at a window length."""
        windows = max(1, self.sizes.tokens // length)
        self.measure(lambda: self.of(model).text(name, length, windows), kind="text", model=model, format=name, length=length)

    def growth(self, model: str, name: str, length: int, step_tokens: int = 128) -> None:
        """Accumulated against static, on a quarter of the text."""
        windows = max(1, self.sizes.tokens // length // 4)
        key = {"kind": "growth", "model": model, "format": name, "length": length, "step_tokens": step_tokens}
        self.measure(lambda: self.of(model).growth(name, length, windows, step_tokens), **key)

    def layers(self, model: str, name: str, length: int) -> None:
        """Errors of K, V and attention, layer by layer."""
        windows = min(4, max(1, self.sizes.tokens // length))
        self.measure(lambda: self.of(model).layers(name, length, windows), kind="layers", model=model, format=name, length=length)

    def tasks(self, model: str, name: str, level: str, count: int, temperature: float = 0.0, seed: int = 0) -> None:
        """Right answers of a format on the tasks of a level."""
        key = {"kind": "tasks", "model": model, "level": level, "problems": count, "temperature": temperature, "seed": seed}

        full = None
        if name != "fp16" and not self.has(**key, format=name):
            # Problem by problem it is compared with fp16, which this process or another one makes first.
            self.tasks(model, "fp16", level, count, temperature, seed)
            full = self._wait_for(**key, format="fp16")
            if full is None:
                return

        def work() -> dict[str, Any]:
            chosen = self.sizes.tasks or problems.task_names(level)
            paired = full if full is not None and "wrong" in full else None
            return self.of(model).tasks(name, chosen, level, count, paired, temperature=temperature, seed=seed)

        self.measure(work, **key, format=name)

    def _wait_for(self, **key: Any) -> dict[str, Any] | None:
        """A result that another process may be at, also of a failure; None: time is up."""
        while not self.has(**key) and self.shared and time.monotonic() < self.until:
            time.sleep(0.5)
            self._read()
        return next((row for row in self.rows if _is(row, **key)), None)

    # ---- the order -----------------------------------------------------------------------------------------------------------------------

    def run(self, only: Sequence[str] = ()) -> None:
        """The parts in their order (`only`: those), until time is up."""
        for part in only or PARTS:
            getattr(self, f"part_{part}")()

    def part_goals(self) -> None:
        """Added bits per byte and right answers of the formats that the goals name."""
        for name in ("fp16", *(g for g in GOALS if g.startswith(("published", "balanced+kv", "kvarn+kv")))):
            self.text("tiny-code", name, self.sizes.long)
        for name in ("fp16", *MAIN):
            self.tasks("tiny-reason", name, self.sizes.level, self.sizes.problems)
        for name in GOALS:
            self.text("tiny-code", name, self.sizes.long)

    def part_baselines(self) -> None:
        """Other methods."""
        for name in BASELINES:
            self.text("tiny-code", name, self.sizes.long)
        for name in TASK_BASELINES:
            self.tasks("tiny-reason", name, self.sizes.level, self.sizes.problems)

    def part_feedback(self) -> None:
        """Decisions within feedback."""
        for option in FEEDBACK_OPTIONS:
            for width in ("k2v2", "k4v4", "k4v2"):
                if option != f"damping={damping_of(int(width[1]))}":  # the default
                    self.text("tiny-code", f"kvarn+kv({option})-{width}", self.sizes.long)

    def part_balance(self) -> None:
        """Decisions within balancing, and each operand's alone."""
        for width in ("k4v4", "k4v2", "k2v2"):
            options = [f"({option})" for option in BALANCE_OPTIONS if option != f"damping={damping_of(int(width[1]))}"]
            for name in (*(f"balanced+kv{option}-{width}" for option in options), f"balanced+k-{width}", f"balanced+v-{width}"):
                self.text("tiny-code", name, self.sizes.long)
        for option in ("recent=128", "per_head=0"):
            for width in WIDTHS:
                self.tasks("tiny-reason", f"balanced+kv({option})-{width}", self.sizes.level, self.sizes.problems)
        for name in ("fp8(recent=128)", "kivi128(recent=128)-k4v4", "kvarn+kv(recent=128)-k4v4"):
            self.text("tiny-code", name, self.sizes.long)

    def part_answers(self) -> None:
        """Right answers by decisions within feedback, and of each operand's alone."""
        options = ("order=natural;damping=0.1", "damping=0.1", "damping=0.03", "sweeps=1", "moments=queries")
        for name in ("fp16", *GOALS, *(f"kvarn+kv({option})-{width}" for option in options for width in WIDTHS)):
            self.tasks("tiny-reason", name, self.sizes.level, self.sizes.problems)

    def part_layers(self) -> None:
        """Tensors: tails of norms with and without normalisation, attention, slopes."""
        for name in ("fp16", *GOALS, *BASELINES):
            self.layers("tiny-code", name, min(4096, self.sizes.long))

    def part_synthetic(self) -> None:
        """Tensors with the outliers of large models; without the methods that ask something of a model."""
        found = synthetic.sample(tokens=4096 if self.sizes.tokens > 4096 else 512)
        q, k, v = (t.to(self.device) for t in (found.q, found.k, found.v))
        found = tensors.Sample(q, k, v, found.softmax_scale)
        names = [name for name in (*GOALS, *BASELINES, *(f"kvarn({option})-k2v2" for option in ENCODER_OPTIONS)) if "+" not in name]

        def work(name: str) -> dict[str, Any]:
            quantiser = parse(name)
            rows = tensors.layer_errors(found, quantiser)
            return {"bits": sum(quantiser.bits(found.k.shape[-1], found.k.shape[2])) / 2, **tensors.mean_row(rows), "layers": rows}

        for name in names:
            if "kvquant" not in name:
                self.measure(partial(work, name), kind="layers", model="synthetic", format=name, length=found.k.shape[3])

    def part_growth(self) -> None:
        """Accumulation of errors."""
        methods = ("published", "kvarn", "kvarn+kv", "balanced+kv", "kivi32", "quarot", "kvquant", "turboquant")
        for name in ("fp8", *(f"{method}-{width}" for width in reversed(WIDTHS) for method in methods)):
            self.growth("tiny-code", name, self.sizes.short)

    def part_decode(self) -> None:
        """Accumulation when tokens are read one at a time."""
        for method in ("published", "kvarn", "kvarn+kv", "balanced+kv", "kivi32", "quarot"):
            self.growth("tiny-code", f"{method}-k2v2", self.sizes.short // 4, step_tokens=1)

    def part_twins(self) -> None:
        """Outlier twins."""
        others = ("fp8", "rtn-k4v2", "hadamard-k4v2", "kivi32-k4v2", "kivi32-k2v2", "quarot-k2v2", "kvquant-k2v2")
        for model in (*(f"tiny-code/{twin}" for twin in TWINS), "tiny-code"):
            for name in ("fp16", *MAIN, *others, *(f"kvarn+kv(k.rotate=none)-{width}" for width in ("k2v2", "k4v4"))):
                self.text(model, name, self.sizes.short)

    def part_formats(self) -> None:
        """Widths, tiles, 8-bit metadata; sinks and recent tokens."""
        for name in MORE_FORMATS:
            self.text("tiny-code", name, self.sizes.long)
        for option in PROTOCOLS:
            for width in ("k4v2", "k2v2"):
                self.text("tiny-code", f"kvarn+kv({option})-{width}", self.sizes.long)

    def part_encoder(self) -> None:
        """Decisions within the encoder."""
        for option in ENCODER_OPTIONS:
            for width in ("k2v2", "k4v4"):
                self.text("tiny-code", f"kvarn({option})-{width}", self.sizes.long)
        for option in PUBLISHED_OPTIONS:
            self.text("tiny-code", f"published({option})-k2v2", self.sizes.long)

    def part_repair(self) -> None:
        """The worst 5 % of the tokens against the rest."""
        for name in FIGURES:
            self.text("tiny-code", name, self.sizes.long)

    def part_long(self) -> None:
        """Larger problems, retrieval from 400 and 600 lines."""
        if self.sizes.level != "base":
            return
        for level in ("hard", "long", "longest"):
            count = self.sizes.problems // 4
            for name in ("fp16", "published-k4v2", "balanced+kv-k4v2", "balanced+kv-k4v4", "kvarn+kv-k4v2", "kvarn+kv-k4v4", "kivi32-k4v2"):
                self.tasks("tiny-reason", name, level, count)

    def part_sampled(self) -> None:
        """Sampled decoding, three runs."""
        for seed in range(3):
            for name in ("fp16", "published-k4v2", "balanced+kv-k4v2", "kvarn+kv-k4v2"):
                self.tasks("tiny-reason", name, self.sizes.level, self.sizes.problems, temperature=1.0, seed=seed)

    def part_llama(self) -> None:
        """A model of another shape: no norm of K, 64 channels, 8 query heads to a KV head."""
        methods = ("published", "balanced+kv", "kvarn+kv", "kvarn", "kivi32")
        for name in ("fp16", *(f"{method}-{width}" for width in WIDTHS for method in methods[:3]), "fp8", "kivi32-k2v2"):
            self.tasks("tiny-llama", name, self.sizes.level, self.sizes.problems)
        for name in ("fp16", "fp8", *(f"{method}-{width}" for width in WIDTHS for method in methods), "quarot-k2v2", "kivi128-k4v4"):
            self.text("tiny-llama", name, self.sizes.long)


#: In order of importance.
PARTS = (
    "goals",
    "baselines",
    "balance",
    "feedback",
    "answers",
    "layers",
    "synthetic",
    "growth",
    "twins",
    "formats",
    "encoder",
    "repair",
    "decode",
    "sampled",
    "long",
    "llama",
)


def _is(row: dict[str, Any], **key: Any) -> bool:
    return all(row.get(name) == value for name, value in key.items())


_LONG = {"wrong", "layers", "accumulated", "static", "where", "by_task", "count_by_task"}


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
    parser.add_argument("--resume", type=Path, help="results.jsonl of an earlier call, to go on after")
    parser.add_argument("--only", default="", help=f"parts, comma separated: {', '.join(PARTS)}")
    parser.add_argument("--calibration", type=int, default=CALIBRATION_TOKENS, help="tokens that moments are made of")
    parser.add_argument("--window", type=int, default=WINDOW_TOKENS, help="of them in each window")
    parser.add_argument("--no-graphs", action="store_true", help="decode without CUDA graphs")
    parser.add_argument("--processes", type=int, default=1, help="share the work: a small model leaves most of a GPU idle")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given_arguments = sys.argv[1:] if arguments is None else arguments
    given = parser.parse_args(given_arguments)
    if given.processes > 1 and given.worker:
        given.processes = 1
    only = [part for part in given.only.split(",") if part]
    if unknown := [part for part in only if part not in PARTS]:
        parser.error(f"--only: expected of {', '.join(PARTS)}, got {', '.join(unknown)}")
    if given.resume is not None and not given.worker:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "results.jsonl").write_text(given.resume.read_text())
    use_graphs = False if given.no_graphs else None
    campaign = Campaign(given.out, given.models, given.text, given.device, Sizes.named(given.size), given.seconds, use_graphs)
    if given.size == "full":
        campaign.calibration = given.window, given.calibration // given.window
    campaign.measure(lambda: environment(given.device), kind="environment", size=given.size)
    campaign.shared = given.processes > 1 or given.worker
    if given.processes > 1:
        shutil.rmtree(given.out / "claims", ignore_errors=True)  # of an earlier call
        campaign.share_moments(only or PARTS)
        command = [sys.executable, sys.argv[0], *given_arguments, "--worker"]
        workers = [subprocess.Popen(command) for _ in range(given.processes)]
        failed = [worker.wait() for worker in workers]
        campaign._read()
        campaign.write_report()
        return max(failed, key=abs)
    campaign.run(only)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
