"""Generated problems whose answers can be checked.

Each task writes its working out, and each written step depends on text written before it, so that an error in the cache carries on to the
answer.
All fields have a fixed width: problems of one task and size have prompts of the same length.

- ``chase``: follow rules "kq>wm+37" from state to state, adding up modulo 100;
- ``regs``: run a program on registers; every use of a register repeats its latest value;
- ``add``: running total of a column of numbers, digits least significant first;
- ``sort``: insertion sort, one written-out list per inserted number;
- ``retrieve``: look up lines "line 0371: REGISTER_CONTENT is <48213>".
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

#: Sizes by task: what `problem` passes to the task.
LEVELS: dict[str, dict[str, dict[str, int]]] = {
    "demo": {  # long to read, short to write
        "chase": {"rules": 96, "steps": 40},
        "retrieve": {"lines": 64, "queries": 16},
    },
    "easy": {
        "chase": {"rules": 48, "steps": 32},
        "regs": {"registers": 8, "steps": 24},
        "add": {"count": 16, "digits": 8},
        "sort": {"count": 14},
        "retrieve": {"lines": 50, "queries": 16},
    },
    "base": {
        "chase": {"rules": 96, "steps": 64},
        "regs": {"registers": 8, "steps": 48},
        "add": {"count": 32, "digits": 8},
        "sort": {"count": 24},
        "retrieve": {"lines": 100, "queries": 16},
    },
    "hard": {
        "chase": {"rules": 128, "steps": 100},
        "regs": {"registers": 8, "steps": 80},
        "add": {"count": 48, "digits": 10},
        "sort": {"count": 30},
        "retrieve": {"lines": 200, "queries": 16},
    },
    "long": {"retrieve": {"lines": 400, "queries": 16}},
    "longest": {"retrieve": {"lines": 600, "queries": 16}},
}
TASKS = tuple(LEVELS["base"])

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_NAMES = [a + b for a in _LETTERS for b in _LETTERS if a + b != "zz"]


@dataclass(frozen=True)
class Problem:
    """A prompt, and the worked answer that is expected."""

    task: str
    prompt: str
    response: str

    @property
    def answer(self) -> str | None:
        """The answer alone."""
        return answer_of(self.task, self.response)

    def check(self, text: str) -> bool:
        """Whether `text` ends in the right answer; the working out may differ."""
        return answer_of(self.task, text) == self.answer


def answer_of(task: str, text: str) -> str | None:
    """The answer within a response; None when there is none."""
    if task == "retrieve":
        return text.strip()
    _, mark, tail = text.rpartition("answer ")
    return tail.strip() if mark else None


def problem(task: str, index: int, level: str = "base") -> Problem:
    """Problem number `index` of a task; the same on every machine.

    Raises:
        ValueError: an unknown task or level.
    """
    if level not in LEVELS or task not in LEVELS[level]:
        raise ValueError(
            f"[kvarn.demo] problem: expected a task of {', '.join(TASKS)} and a level of {', '.join(LEVELS)}, got {task}, {level}"
        )
    size = LEVELS[level][task]
    # The seed names the split that the model was not trained on.
    return make(task, random.Random(f"public/{task}/{sorted(size.items())}/{index}"), **size)


def make(task: str, source: random.Random, **size: int) -> Problem:
    """A problem of any size, from a random source of the caller's; `LEVELS` shows what `size` a task takes."""
    return Problem(task, *_MAKE[task](source, **size))


def _chase(r: random.Random, rules: int, steps: int) -> tuple[str, str]:
    names = r.sample(_NAMES, rules)
    chain = [*names[:steps], "zz"]
    table = {a: (b, r.randrange(100)) for a, b in itertools.pairwise(chain)}
    for a in names[steps:]:
        table[a] = (r.choice(names), r.randrange(100))
    order = list(table)
    r.shuffle(order)
    prompt = f"chase from {names[0]} to zz\n" + "".join(f"{a}>{table[a][0]}+{table[a][1]:02d}\n" for a in order) + "run\n"
    total, lines = 0, []
    for a in chain[:-1]:
        b, value = table[a]
        total = (total + value) % 100
        lines.append(f"{a}>{b}+{value:02d}={total:02d}\n")
    return prompt, "".join(lines) + f"answer {total:02d}\n"


def _regs(r: random.Random, registers: int, steps: int) -> tuple[str, str]:
    names = sorted(r.sample(_LETTERS, registers))
    value = {a: r.randrange(100) for a in names}

    def show() -> str:
        return " ".join(f"{a}{value[a]:02d}" for a in names)

    prompt, lines = [f"regs {show()}\n"], []
    for i in range(1, steps + 1):
        a, b, c, op = r.choice(names), r.choice(names), r.choice(names), r.choice("+-")
        result = (value[a] + value[b] if op == "+" else value[a] - value[b]) % 100
        prompt.append(f"{i:02d} {a}{op}{b}={c}\n")
        lines.append(f"{i:02d} {a}{value[a]:02d}{op}{b}{value[b]:02d}={c}{result:02d}\n")
        value[c] = result
    prompt.append(f"{steps + 1:02d} end\nrun\n")
    return "".join(prompt), "".join(lines) + f"{steps + 1:02d} end\nanswer {show()}\n"


def _add(r: random.Random, count: int, digits: int) -> tuple[str, str]:
    def write(x: int) -> str:
        return f"{x:0{digits}d}"[::-1]

    total, prompt, lines = 0, ["add\n"], []
    for i in range(1, count + 1):
        x = r.randrange(10**digits)
        new = (total + x) % 10**digits
        prompt.append(f"{i:02d} {write(x)}\n")
        lines.append(f"{i:02d} {write(x)}+{write(total)}={write(new)}\n")
        total = new
    return "".join(prompt) + f"{count + 1:02d} end\nrun\n", "".join(lines) + f"{count + 1:02d} end\nanswer {write(total)}\n"


def _sort(r: random.Random, count: int) -> tuple[str, str]:
    def write(xs: list[int]) -> str:
        return " ".join(f"{x:02d}" for x in xs)

    numbers = r.sample(range(100), count)
    held: list[int] = []
    lines = []
    for x in numbers:
        held = sorted([*held, x])
        lines.append(f"+{x:02d}: {write(held)}\n")
    return f"sort {write(numbers)} end\nrun\n", "".join(lines) + f"+end\nanswer {write(held)}\n"


def _retrieve(r: random.Random, lines: int, queries: int) -> tuple[str, str]:
    content = [r.randrange(100000) for _ in range(lines)]
    asked = r.sample(range(lines), min(queries, lines))
    prompt = "".join(f"line {i + 1:04d}: REGISTER_CONTENT is <{value:05d}>\n" for i, value in enumerate(content))
    prompt += "query " + " ".join(f"{i + 1:04d}" for i in asked) + " end\nrun\n"
    return prompt, "".join(f"{i + 1:04d} <{content[i]:05d}>\n" for i in asked) + "end\n"


_MAKE: dict[str, Callable[..., tuple[str, str]]] = {"chase": _chase, "regs": _regs, "add": _add, "sort": _sort, "retrieve": _retrieve}
