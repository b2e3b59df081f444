"""What `train_model.py` reads: Python sources of this machine and generated problems, packed into streams of a fixed length.

The package's own __init__ is left out, as the compiled core need not be there.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

if "kvarn" not in sys.modules:
    package = types.ModuleType("kvarn")
    package.__path__ = [str(Path(__file__).resolve().parents[1] / "python" / "kvarn")]
    sys.modules["kvarn"] = package

from kvarn.demo.model import BEGIN, END, PADDING
from kvarn.demo.tasks import TASKS, Problem, make
from kvarn.eval.held_out import PACKAGES

Array = np.ndarray[Any, np.dtype[Any]]

#: What a token's loss counts for, in the order of `Pack.kinds`.
KINDS = ("code", *TASKS)

# Share of the problems by task. One that looks up lines is several times as long as another.
_TASK_WEIGHTS = {"chase": 1.0, "regs": 1.0, "add": 1.0, "sort": 1.0, "retrieve": 0.4}
# Share of the schedule over which problems grow to their full size.
_GROWTH = 0.25
# Problems drawn in search of one that fits into a pack; at full size most fit into 4,096 tokens.
_MOST_DRAWS = 1000
# Share of the code's tokens by window length, up to a position of the schedule: attention over 32K tokens costs several times the rest of
# the model, so most of the text is read in windows that are cheap.
_WINDOWS: tuple[tuple[float, dict[int, float]], ...] = (
    (0.15, {2048: 1.0}),
    (0.40, {2048: 0.3, 4096: 0.7}),
    (1.00, {2048: 0.10, 4096: 0.43, 8192: 0.25, 16384: 0.12, 32768: 0.10}),
)
# Sources shorter than this say little; longer ones are cut. A mean line above the last one is that of a generated table.
_LEAST_BYTES, _MOST_BYTES, _MOST_LINE_BYTES = 200, 400_000, 120


# ---- code ----------------------------------------------------------------------------------------------------------------------------


def source_roots() -> list[Path]:
    """The folders of the standard library and of installed packages."""
    names = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    names |= {name for name in sys.path if Path(name).name in ("site-packages", "dist-packages")}
    return sorted({Path(name).resolve() for name in names})


def is_held_out(path: Path) -> bool:
    """Whether a file, relative to its root, is of a held-out package, or of a copy of one that another package brings along."""
    return any(part.lower() in PACKAGES for part in path.with_suffix("").parts)


def read_corpus(roots: Iterable[Path]) -> Array:
    """Every Python source below `roots` once, each after a zero byte [bytes] uint8; held-out packages and generated tables are left out.

    Files are in the order of their paths: what lies near in a window is of one package, so that text far back is worth reading.

    Raises:
        FileNotFoundError: there is no source.
    """
    held_out: dict[Path, bool] = {}
    for root in roots:
        for folder, _, names in os.walk(root):
            for path in (Path(folder, name) for name in names if name.endswith(".py")):
                held_out[path] = held_out.get(path, False) or is_held_out(path.relative_to(root))
    paths = sorted(held_out)
    with ThreadPoolExecutor(32) as pool:
        texts = list(pool.map(_read, paths))
    digests = [hashlib.sha1(text, usedforsecurity=False).digest() for text in texts]
    seen = {digest for path, digest in zip(paths, digests, strict=True) if held_out[path]}
    kept = []
    for text, digest in zip(texts, digests, strict=True):
        if text and digest not in seen:
            seen.add(digest)
            kept.append(text)
    if not kept:
        raise FileNotFoundError(f"[kvarn.train] roots: expected Python sources, got none in {', '.join(map(str, roots))}")
    return np.frombuffer(b"\0" + b"\0".join(kept), np.uint8)


def _read(path: Path) -> bytes:
    """A source; empty where it is not worth reading."""
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES)
    except OSError:
        return b""
    is_table = len(text) > _MOST_LINE_BYTES * (text.count(b"\n") + 1)
    return b"" if len(text) < _LEAST_BYTES or is_table or b"\0" in text else text


# ---- problems ------------------------------------------------------------------------------------------------------------------------


def sizes(r: random.Random, task: str, grown: float) -> dict[str, int]:
    """A random size of a task, which `grown` bounds: at 1 sizes reach a little beyond every level of the evaluation."""

    def upto(least: int, most: int) -> int:
        return r.randint(least, max(least, round(most * grown)))

    if task == "chase":
        rules = upto(8, 136)
        return {"rules": rules, "steps": r.randint(4, min(rules, 108))}
    if task == "regs":
        return {"registers": r.randint(3, 9), "steps": upto(4, 86)}
    if task == "add":
        return {"count": upto(3, 52), "digits": r.randint(3, 11)}
    if task == "sort":
        return {"count": upto(3, 32)}
    # Numbers of lines spread evenly on a logarithmic scale, from 10 to 640.
    return {"lines": int(10 * 64 ** (grown * r.random())), "queries": r.randint(8, 40)}


def training_problem(r: random.Random, grown: float = 1.0) -> Problem:
    """A problem of a random task and size. The evaluation's problems come from other seeds."""
    task = r.choices(TASKS, [_TASK_WEIGHTS[name] for name in TASKS])[0]
    return make(task, r, **sizes(r, task, grown))


# ---- packs ---------------------------------------------------------------------------------------------------------------------------


class Pack(NamedTuple):
    """One step's tokens: documents one after the other, padding as the last of them.

    ids: [T] int16; positions: [T] int16, within the document.
    kinds: [T] int8, the index in `KINDS` of what predicting the next token counts for; -1: it is not learnt.
    ends: [documents + 1] int32, from 0 to T; longest: tokens of the longest document.
    """

    ids: Array
    positions: Array
    kinds: Array
    ends: Array
    longest: int


@dataclass(frozen=True)
class Mixture:
    """What packs are made of: `tokens` a pack, of which `code_share` are code; `seed` of the random numbers."""

    tokens: int
    code_share: float
    seed: int


class Packer:
    """Makes packs.

    Args:
        corpus: of `read_corpus`.
        position: the position in the schedule, 0 to 1, when a pack is begun.
        worker: each has random numbers of its own.
    """

    def __init__(self, mixture: Mixture, corpus: Array, position: Callable[[], float], worker: int = 0) -> None:
        self._mixture, self._corpus, self._position = mixture, corpus, position
        self._random = random.Random(f"train/{mixture.seed}/{worker}")
        self._window = 0  # length of the next one; 0: to be drawn
        self._owed = 0.0  # tokens of code that earlier packs had no room for
        self._problem: tuple[Array, Array] | None = None  # the next one's document

    def pack(self) -> Pack:
        """The next pack."""
        position, total = self._position(), self._mixture.tokens
        ids, kinds = np.full(total, PADDING, np.int16), np.full(total, -1, np.int8)
        positions, ends = np.zeros(total, np.int16), [0]
        for document in self._documents(position):
            first, last = ends[-1], ends[-1] + len(document[0])
            ids[first:last], kinds[first:last] = document
            positions[first:last] = np.arange(last - first)
            ends.append(last)
        if ends[-1] < total:
            positions[ends[-1] :] = np.arange(total - ends[-1])
            ends.append(total)
        return Pack(ids, positions, kinds, np.array(ends, np.int32), int(np.diff(ends).max()))

    def _documents(self, position: float) -> Iterator[tuple[Array, Array]]:
        """Token ids int16 and kinds int8 of the documents of one pack."""
        room = self._mixture.tokens
        only_code = self._mixture.code_share >= 1
        self._owed += room * self._mixture.code_share
        while self._owed > 0:
            self._window = self._window or self._draw_window(position)
            length = min(self._window, room) if only_code else self._window
            if not 2 <= length <= min(room, self._owed):
                break
            self._window, self._owed, room = 0, self._owed - length, room - length
            yield self._code(length)
        while not only_code:
            if self._problem is None:
                self._problem = self._draw_problem(position)
            if len(self._problem[0]) > room:
                break
            document, self._problem = self._problem, None
            room -= len(document[0])
            yield document

    def _draw_window(self, position: float) -> int:
        shares = next(shares for until, shares in _WINDOWS if position <= until or until == 1)
        length = self._random.choices(list(shares), [share / length for length, share in shares.items()])[0]
        return min(length, self._mixture.tokens, len(self._corpus))

    def _code(self, length: int) -> tuple[Array, Array]:
        first = self._random.randrange(len(self._corpus) - length + 1)
        ids = self._corpus[first : first + length].astype(np.int16)
        ids[ids == 0] = BEGIN
        kinds = np.zeros(length, np.int8)
        kinds[-1] = -1
        return ids, kinds

    def _draw_problem(self, position: float) -> tuple[Array, Array]:
        grown = min(1.0, 0.1 + position / _GROWTH)
        for _ in range(_MOST_DRAWS):
            problem = training_problem(self._random, grown)
            text = np.frombuffer((problem.prompt + problem.response).encode(), np.uint8)
            if len(text) + 2 <= self._mixture.tokens:
                break
        else:
            raise ValueError(f"[kvarn.train] tokens: expected packs that hold a problem, got {self._mixture.tokens} tokens")
        ids = np.concatenate([[BEGIN], text, [END]]).astype(np.int16)
        kinds = np.full(len(ids), -1, np.int8)
        kinds[len(problem.prompt) : -1] = KINDS.index(problem.task)
        return ids, kinds


class Packs(IterableDataset[Pack]):
    """An endless stream of packs; the workers of a DataLoader share it."""

    def __init__(self, mixture: Mixture, corpus: Array, position: Callable[[], float]) -> None:
        self._arguments = mixture, corpus, position

    def __iter__(self) -> Iterator[Pack]:
        info = get_worker_info()
        packer = Packer(*self._arguments, info.id if info else 0)
        while True:
            yield packer.pack()
