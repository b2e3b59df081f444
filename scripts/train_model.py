"""Trains a small byte-level Llama on one GPU for a fixed time, on Python source and on problems that are long to write out.

``python scripts/train_model.py FOLDER --seconds 540`` writes a folder that transformers' AutoModelForCausalLM loads, and train.json in it:
the settings, the steps and how the losses fell. It needs torch and transformers, no network and no build of the package. Two runs of one
schedule: ``--schedule 0 0.5 --state S``, then ``--resume S --schedule 0.5 1``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from packed_llama import BEGIN, END, PADDING, PackedLlama, choose_attention, llama_config, new_model
from torch.utils.data import DataLoader
from train_data import KINDS, Array, Mixture, Pack, Packs, read_corpus, source_roots

Tensor = torch.Tensor

_WARMUP_STEPS = 150
# Share of the peak that the learning rate falls to.
_LEAST_RATE = 0.02
_CHECKPOINT_SECONDS = 120.0


@dataclass(frozen=True)
class Settings:
    """What a run is told; see `parse`."""

    folder: Path
    seconds: float = 540.0
    resume: Path | None = None
    state: Path | None = None
    schedule: tuple[float, float] = (0.0, 1.0)
    code_share: float = 0.35
    tokens_per_step: int = 131072
    peak: float = 2e-3
    device: str = "cuda"
    max_steps: int = 1_000_000
    workers: int = 12
    seed: int = 0
    compiled: bool = True
    log_steps: int = 100


@dataclass
class Progress:
    """What all runs of a model have done."""

    runs: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tokens_by_kind: dict[str, int] = field(default_factory=dict)  #: of those that were learnt
    log: list[dict[str, Any]] = field(default_factory=list)


def parse(arguments: Sequence[str]) -> Settings:
    """Settings of a command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, metavar="FOLDER", help="where the model goes")
    p.add_argument("--seconds", type=float, default=540.0, help="from the start to the last step; writing the model takes a few more")
    p.add_argument("--resume", type=Path, metavar="STATE", help="state of an earlier run to go on from")
    p.add_argument("--state", type=Path, help="file for the weights and the optimiser's moments, for --resume")
    p.add_argument("--schedule", type=float, nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"), help="part of the schedule to run")
    p.add_argument("--code-share", type=float, default=0.35, help="share of the tokens that are code; the rest are problems")
    p.add_argument("--tokens-per-step", type=int, default=131072)
    p.add_argument("--peak", type=float, default=2e-3, help="highest learning rate")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--max-steps", type=int, default=1_000_000)
    p.add_argument("--workers", type=int, default=12, help="processes that make the packs; 0: none beside this one")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--eager", dest="compiled", action="store_false", help="do not compile the layers")
    p.add_argument("--log-steps", type=int, default=100)
    given = vars(p.parse_args(arguments))
    return Settings(**{**given, "schedule": tuple(given["schedule"])})


# ---- model and optimiser -------------------------------------------------------------------------------------------------------------


def new_optimiser(model: Any, settings: Settings) -> torch.optim.AdamW:
    """AdamW; weight decay is for matrices only."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.peak, betas=(0.9, 0.95), fused=settings.device == "cuda")


def learning_rate(peak: float, position: float, steps: int) -> float:
    """Half a cosine over the schedule, below a straight line over the first steps."""
    fall = _LEAST_RATE + (1 - _LEAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, position)))
    return peak * min(fall, (steps + 1) / _WARMUP_STEPS)


def save_folder(model: Any, folder: Path, report: dict[str, Any]) -> None:
    """Writes the model in bfloat16 and train.json. Each file replaces its former one at once, so that an end at any time leaves a model."""
    part = folder / "part"
    small = copy.deepcopy(model).to("cpu", torch.bfloat16)
    small.generation_config = transformers.GenerationConfig(
        bos_token_id=BEGIN, eos_token_id=END, pad_token_id=PADDING, do_sample=False, use_cache=True
    )
    small.save_pretrained(part)
    (part / "train.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for path in part.iterdir():
        os.replace(path, folder / path.name)
    shutil.rmtree(part)


def save_state(path: Path, model: Any, optimiser: torch.optim.Optimizer, progress: Progress) -> None:
    """Writes what `restore` reads. The moments are in bfloat16: next to their noise its rounding is nothing, and the file is smaller."""
    moments = optimiser.state_dict()
    moments["state"] = {
        index: {name: x.cpu() if name == "step" else x.to("cpu", torch.bfloat16) for name, x in of.items()}
        for index, of in moments["state"].items()
    }
    weights = {name: p.detach().cpu() for name, p in model.named_parameters()}
    part = path.with_name(path.name + ".part")
    torch.save({"weights": weights, "moments": moments, "progress": vars(progress)}, part)
    os.replace(part, path)


def restore(state: dict[str, Any], model: Any, optimiser: torch.optim.Optimizer) -> Progress:
    """Takes over the weights and moments of a state and returns what was done."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(state["weights"][name])
    optimiser.load_state_dict(state["moments"])
    return Progress(**state["progress"])


# ---- training ------------------------------------------------------------------------------------------------------------------------


class Clock:
    """The position in the schedule, by the share of the run's time or steps that has passed.

    Args:
        begun: when the run began, as of time.monotonic(). Time until `start` is called, for reading and compiling, is not of the schedule.
    """

    def __init__(self, settings: Settings, begun: float) -> None:
        self._settings, self._started, self._end = settings, begun, begun + settings.seconds
        self._first, self._last = settings.schedule

    def start(self) -> None:
        """The first step is done."""
        self._started = time.monotonic()

    def tick(self, steps: int) -> float | None:
        """The position after so many steps of this run; None when it is over."""
        of_time = (time.monotonic() - self._started) / max(1e-3, self._end - self._started) if steps else 0.0
        share = max(of_time, steps / self._settings.max_steps)
        return self._first + share * (self._last - self._first) if share < 1 else None


class Meter:
    """Losses by kind since the last line of the log, added up on the device, where nothing waits for them."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, len(KINDS), dtype=torch.float64, device=device)
        self._mark, self._tokens = time.monotonic(), 0
        self.waited = 0.0  # seconds that the steps waited for packs

    def add(self, sums: Tensor, counts: Tensor, tokens: int) -> None:
        """Takes the losses of a step [kinds]."""
        self._sums += torch.stack([sums, counts])
        self._tokens += tokens

    def check(self) -> tuple[list[float], list[float]]:
        """Sums of losses and numbers of tokens by kind; waits for the device.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        sums, counts = self._sums.tolist()
        if not math.isfinite(sum(sums)):
            raise FloatingPointError(f"[kvarn.train] loss: expected finite ones, got {dict(zip(KINDS, sums, strict=True))}")
        return sums, counts

    def line(self, progress: Progress) -> dict[str, Any]:
        """Mean losses and speed; then starts anew."""
        sums, counts = self.check()
        now = time.monotonic()
        for kind, count in zip(KINDS, counts, strict=True):
            progress.tokens_by_kind[kind] = progress.tokens_by_kind.get(kind, 0) + int(count)
        means = {kind: s / n for kind, s, n in zip(KINDS, sums, counts, strict=True) if n}
        line = {
            "loss": round(sum(sums) / max(1.0, sum(counts)), 5),
            "nats": {kind: round(mean, 5) for kind, mean in means.items()},
            "tokens": progress.tokens,
            "million_tokens_per_second": round(self._tokens / (now - self._mark) / 1e6, 4),
            "waited_seconds": round(self.waited, 2),
        }
        if "code" in means:
            line["code_bits_per_byte"] = round(means["code"] / math.log(2), 4)
        self._sums.zero_()
        self._mark, self._tokens, self.waited = now, 0, 0.0
        return line


def report_of(settings: Settings, model: Any, progress: Progress) -> dict[str, Any]:
    """train.json: without paths, as they say nothing about the model."""
    plain = {name: value for name, value in vars(settings).items() if not isinstance(value, Path)}
    last = progress.log[-1] if progress.log else {}
    return {
        "settings": plain | {"resume": settings.resume is not None, "state": settings.state is not None},
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "loss_by_kind": last.get("nats", {}),
        **vars(progress),
    }


def stream(settings: Settings, corpus: Array, seed: int, position: Callable[[], float]) -> Any:
    """An endless iterator of packs, made by worker processes that run ahead."""
    workers = settings.workers
    loader: Any = DataLoader(
        Packs(Mixture(settings.tokens_per_step, settings.code_share, seed), corpus, position),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="fork" if workers else None,  # the workers share the corpus's memory
        pin_memory=settings.device == "cuda",
    )
    return iter(loader)


def train(settings: Settings, config: Any, corpus: Array, begun: float | None = None) -> Progress:
    """Trains and saves a model.

    Args:
        config: its shape.
        corpus: of `read_corpus`; not read where the settings want no code.
        begun: when the run began, as of time.monotonic(); None: it begins here.
    """
    clock = Clock(settings, time.monotonic() if begun is None else begun)
    settings.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    model = new_model(config)
    state = None if settings.resume is None else torch.load(settings.resume, map_location="cpu", weights_only=True)
    # The workers start before the device does, and read the position from memory that they share. A run that begins a schedule anew with a
    # trained model has no use for its small problems.
    shared = multiprocessing.get_context("fork").Value("d", 0.0)
    grown = state is not None and settings.schedule[0] == 0
    shared.value = 1.0 if grown else settings.schedule[0]
    earlier = state["progress"]["runs"] if state is not None else 0
    packs = stream(settings, corpus, settings.seed + 1000 * earlier, lambda: float(shared.value))

    device = torch.device(settings.device)
    torch.set_float32_matmul_precision("high")
    model = model.to(device)
    optimiser = new_optimiser(model, settings)
    progress = restore(state, model, optimiser) if state is not None else Progress()
    progress.runs += 1
    packed = PackedLlama(model, choose_attention(device, config), settings.compiled)
    meter = Meter(device)
    began = saved = time.monotonic()
    before, steps = progress.seconds, 0
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters; {progress.steps} steps done before", flush=True)

    def save() -> None:
        meter.check()  # a model that went wrong does not replace one that had not
        progress.seconds = before + time.monotonic() - began
        save_folder(model, settings.folder, report_of(settings, model, progress))
        if settings.state is not None:
            save_state(settings.state, model, optimiser, progress)

    while (place := clock.tick(steps)) is not None:
        if not grown:
            shared.value = place
        rate = learning_rate(settings.peak, place, steps if settings.schedule[0] == 0 else _WARMUP_STEPS)
        for group in optimiser.param_groups:
            group["lr"] = rate
        asked = time.monotonic()
        pack = next(packs)
        meter.waited += time.monotonic() - asked
        meter.add(*step(packed, optimiser, pack, device), settings.tokens_per_step)
        steps += 1
        progress.steps += 1
        progress.tokens += settings.tokens_per_step
        if steps == 1:
            meter.line(progress)
            clock.start()
            print(f"first step after {time.monotonic() - began:.1f} s", flush=True)
        elif steps % settings.log_steps == 0 or steps == settings.max_steps:
            line = meter.line(progress)
            seconds = round(before + time.monotonic() - began, 1)
            progress.log.append({"step": progress.steps, "seconds": seconds, "schedule": round(place, 4), "rate": round(rate, 7), **line})
            print(json.dumps(progress.log[-1]), flush=True)
        if time.monotonic() - saved > _CHECKPOINT_SECONDS:
            save()
            saved = time.monotonic()
    save()
    return progress


def step(packed: PackedLlama, optimiser: torch.optim.Optimizer, pack: Pack, device: torch.device) -> tuple[Tensor, Tensor]:
    """One step of the optimiser; sums of losses and numbers of tokens by kind."""
    arrays = (torch.as_tensor(x).to(device, non_blocking=True) for x in pack[:4])
    ids, positions, kinds, ends = arrays
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss, sums, counts = packed.loss(ids.long(), positions.long(), kinds, ends, pack.longest, len(KINDS))
    loss.backward()
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return sums, counts


def main(arguments: Sequence[str]) -> int:
    """Trains as the command line says."""
    begun = time.monotonic()
    settings = parse(arguments)
    transformers.utils.logging.disable_progress_bar()
    corpus: Array = np.zeros(0, np.uint8)
    if settings.code_share > 0:
        corpus = read_corpus(source_roots())
        print(f"{len(corpus) / 1e6:.1f} MB of Python source, read in {time.monotonic() - begun:.1f} s", flush=True)
    progress = train(settings, llama_config(), corpus, begun)
    print(f"{settings.folder}: {progress.steps} steps, {progress.tokens / 1e6:.1f} million tokens, {progress.seconds:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
