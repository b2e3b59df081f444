"""Translates a kernel's instructions into a program: a list of handlers, and each instruction's handler and parameters."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field

# Importing the rules registers them.
from . import matrix, memory, packed, scalar, vector  # noqa: F401
from .code_object import CodeObject, Kernel
from .disassembly import Instruction, disassemble, parse
from .emitter import Emitter
from .operands import UnsupportedError
from .rules import find_rule

_INDIRECT = ("s_swappc_b64", "s_setpc_b64")
# What a handler does depends on the instruction's text alone, except for these.
_DEPENDS_ON_ADDRESS = re.compile(r"s_(c?branch|getpc|swappc)|ds_swizzle")
_PRELOAD_PROLOGUE_BYTES = 256  # skipped by hardware that preloads arguments


@dataclass(frozen=True)
class Step:
    """One instruction of a program: an index into its handlers, and that handler's parameters."""

    instruction: Instruction
    handler: int
    parameters: tuple[int, ...]


@dataclass
class Program:
    kernel: Kernel
    steps: list[Step] = field(default_factory=list)
    handlers: list[str] = field(default_factory=list)  # C++ bodies
    names: list[str] = field(default_factory=list)  # symbols of the handlers


def handler_name(body: str) -> str:
    return "h_" + hashlib.sha256(body.encode()).hexdigest()[:20]


def kernel_code(code_object: CodeObject, kernel: Kernel) -> list[Instruction]:
    """The instructions that a kernel can reach, by address; with an indirect jump, also every function that is no kernel."""
    function = disassemble(code_object.path, kernel.name)
    own = _reachable(function, kernel, set())
    names = Counter(instruction.mnemonic for instruction in own)
    long_branches = sum(i.mnemonic == "s_getpc_b64" and _long_branch_target(function, i.pc) is not None for i in own)
    if names["s_swappc_b64"] == 0 and names["s_setpc_b64"] == long_branches:
        return own
    return _reachable(disassemble(code_object.path), kernel, {k.entry for k in code_object.kernels.values()})


_LONG_BRANCH = re.compile(r"s_add(?:_co)?_u32 (s\d+), \1, (0x[0-9a-f]+|-?\d+)")


def _long_branch_target(instructions: dict[int, Instruction], pc: int) -> int | None:
    """Where a branch beyond the reach of s_branch goes: s_getpc_b64, a sum with a constant, s_setpc_b64."""
    base = at = instructions[pc].end
    offset = None
    for _ in range(8):
        instruction = instructions.get(at)
        if instruction is None:
            return None
        if match := _LONG_BRANCH.match(instruction.text):
            offset = int(match[2], 0) & 0xFFFFFFFF
        elif instruction.mnemonic in ("s_addc_u32", "s_add_co_ci_u32") and offset is not None and instruction.operands[2] == "-1":
            offset -= 1 << 32
        elif instruction.mnemonic == "s_setpc_b64":
            return None if offset is None else base + offset
        at = instruction.end
    return None


def _reachable(instructions: dict[int, Instruction], kernel: Kernel, kernel_entries: set[int]) -> list[Instruction]:
    functions: dict[str, int] = {}
    for pc in sorted(instructions):
        functions.setdefault(instructions[pc].function, pc)
    callable_entries = [pc for pc in functions.values() if pc not in kernel_entries]
    seen: set[int] = set()
    work = [kernel.entry + (_PRELOAD_PROLOGUE_BYTES if kernel.preload & 127 else 0)]
    calls = False
    while work:
        pc = work.pop()
        while pc in instructions and pc not in seen:
            seen.add(pc)
            instruction = instructions[pc]
            name = instruction.mnemonic
            if (target := instruction.branch_target) is not None:
                work.append(target)
            if name == "s_getpc_b64" and (target := _long_branch_target(instructions, pc)) is not None:
                work.append(target)
            if name in _INDIRECT and not calls:
                calls = True
                work += callable_entries
            if name in ("s_branch", "s_endpgm", "s_setpc_b64"):
                break
            pc = instruction.end
    return [instructions[pc] for pc in sorted(seen)]


def handler_body(e: Emitter, instruction: Instruction) -> str:
    """The C++ statements of one instruction.

    Raises:
        UnsupportedError: when no rule knows the instruction, or its form is not modelled.
    """
    if " :: " in instruction.text:
        return vector.dual_issue(e, [parse(half.strip()) for half in instruction.text.split(" :: ")])
    found = find_rule(instruction.name)
    if found is None:
        raise UnsupportedError(instruction.text)
    function, match = found
    try:
        return function(e, instruction, match)
    except (KeyError, ValueError, IndexError) as error:
        raise UnsupportedError(f"{instruction.text} ({type(error).__name__}: {error})") from error


def translate(code_object: CodeObject, kernel: Kernel) -> Program:
    """Raises UnsupportedError, naming the instruction, when the kernel holds one that is not modelled."""
    selected = kernel_code(code_object, kernel)
    position = {instruction.pc: i for i, instruction in enumerate(selected)}
    program = Program(kernel)
    numbers: dict[str, int] = {}
    known: dict[tuple[str, bool], tuple[int, tuple[int, ...]]] = {}
    for i, instruction in enumerate(selected):
        follows = i + 1 < len(selected) and selected[i + 1].pc == instruction.end
        key = (instruction.text, follows)
        if key in known and not _DEPENDS_ON_ADDRESS.match(instruction.text):
            program.steps.append(Step(instruction, *known[key]))
            continue
        e = Emitter(code_object.target, kernel.wave)
        if (target := instruction.branch_target) is not None:
            if target not in position:
                raise UnsupportedError(f"{instruction.text}: the branch leaves the kernel")
            e.parameter(position[target] - i)
        body = handler_body(e, instruction)
        last = "return i+1;" if follows else 'throw Trap("execution runs out of the kernel");'
        text = "".join(e.setup) + body + last
        if text not in numbers:
            numbers[text] = len(numbers)
            program.handlers.append(text)
            program.names.append(handler_name(text))
        known[key] = (numbers[text], tuple(e.parameters))
        program.steps.append(Step(instruction, *known[key]))
    return program
