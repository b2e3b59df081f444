"""Registry of the functions that translate instructions: each takes the mnemonics that its pattern matches."""

from __future__ import annotations

import re
from collections.abc import Callable

from .disassembly import Instruction
from .emitter import Emitter

# Returns C++ statements that carry out the instruction; `return` in them must name the next instruction.
Rule = Callable[[Emitter, Instruction, "re.Match[str]"], str]
_RULES: list[tuple[re.Pattern[str], Rule]] = []


def rule(pattern: str) -> Callable[[Rule], Rule]:
    """Registers a translation for the mnemonics (without encoding suffix) that match `pattern` as a whole."""

    def register(function: Rule) -> Rule:
        _RULES.append((re.compile(pattern), function))
        return function

    return register


def find_rule(name: str) -> tuple[Rule, re.Match[str]] | None:
    for pattern, function in _RULES:
        if match := pattern.fullmatch(name):
            return function, match
    return None
