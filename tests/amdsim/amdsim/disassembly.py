"""Reads llvm-objdump's text of a code object into instructions."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

from .toolchain import toolchain

_LINE = re.compile(r"^\s+(.*?)\s*// ([0-9A-F]+): ((?:[0-9A-F]{8} ?)+)")
_SYMBOL = re.compile(r"^([0-9a-f]+) <(.+)>:$")
_SUFFIX = re.compile(r"_(e64_dpp|dpp8|dpp|sdwa|e32|e64)$")
# Their operands are expressions of the assembler: kept whole.
_OPAQUE = re.compile(r"s_(waitcnt|delay_alu|clause|sendmsg|getreg|setreg|wait|version|barrier)|ds_swizzle")


@dataclass
class Instruction:
    """One instruction; `modifiers` holds what follows the operands (offset:16, op_sel:[0,1], glc)."""

    text: str
    mnemonic: str = ""
    operands: list[str] = field(default_factory=list)
    modifiers: dict[str, str] = field(default_factory=dict)
    pc: int = 0
    words: list[int] = field(default_factory=list)
    function: str = ""

    @property
    def name(self) -> str:
        """The mnemonic without the suffix of its encoding."""
        return _SUFFIX.sub("", self.mnemonic)

    @property
    def end(self) -> int:
        return self.pc + 4 * len(self.words)

    @property
    def branch_target(self) -> int | None:
        """Where a branch goes; None for other instructions."""
        if not re.match(r"s_branch|s_cbranch_", self.mnemonic):
            return None
        offset = self.words[0] & 0xFFFF
        return self.end + 4 * (offset - 0x10000 if offset & 0x8000 else offset)

    def flags(self, key: str, count: int, default: int) -> list[int]:
        """A modifier like op_sel:[0,1] as a list of `count` numbers."""
        if key not in self.modifiers:
            return [default] * count
        given = [int(x) for x in self.modifiers[key].strip("[]").split(",")]
        return given + [default] * (count - len(given))

    def offset(self, key: str = "offset") -> int:
        return int(self.modifiers.get(key, "0"), 0)


def split_operands(text: str) -> list[str]:
    """Splits at the commas outside of brackets."""
    parts, depth, part = [], 0, ""
    for char in text:
        depth += (char in "[(") - (char in "])")
        if char == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += char
    if part.strip():
        parts.append(part.strip())
    return parts


def parse(text: str) -> Instruction:
    """Parses one instruction's text (one half of a dual-issue pair)."""
    mnemonic, _, rest = text.partition(" ")
    instruction = Instruction(text, mnemonic)
    if _OPAQUE.match(mnemonic):
        instruction.operands = split_operands(rest.split(" offset:")[0])
        return instruction
    rest = re.sub(r"\b(\w+):\s*\[", r"\1:[", rest)
    rest = re.sub(r"\[([^\]]*)\]", lambda m: "[" + m[1].replace(" ", "") + "]", rest)
    for part in split_operands(rest):
        first = True
        for token in part.split():
            if first and (token.startswith("src_") or not re.match(r"^[a-z_]\w*:[^:]", token)):
                instruction.operands.append(token)
            elif ":" in token:
                key, _, value = token.partition(":")
                instruction.modifiers[key] = value
            else:
                instruction.modifiers[token] = "1"
            first = False
    return instruction


def disassemble(path: Path, symbol: str | None = None) -> dict[int, Instruction]:
    """The instructions of the code object's .text, or of one function there, by address."""
    command = [toolchain().objdump, "-d", *([f"--disassemble-symbols={symbol}"] if symbol else []), str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions: dict[int, Instruction] = {}
    parsed: dict[str, Instruction] = {}
    in_text, function = False, ""
    for line in listing.splitlines():
        if line.startswith("Disassembly of section"):
            in_text = ".text" in line
        elif match := _SYMBOL.match(line):
            function = match[2]
        elif in_text and (match := _LINE.match(line)):
            text = match[1]
            if text not in parsed:
                parsed[text] = Instruction(text) if " :: " in text else parse(text)
            words = [int(word, 16) for word in match[3].split()]
            instruction = replace(parsed[text], pc=int(match[2], 16), words=words, function=function)
            instructions[instruction.pc] = instruction
    return instructions
