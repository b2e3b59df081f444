"""Operands of instructions: registers, constants, and their number types."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

# Numbers of the scalar register file in runtime/machine.h.
VCC, TTMP, EXEC, M0 = 106, 108, 126, 128
ACCUMULATORS = 256  # of the vector register file: a0 is v256
_NAMED = {
    "vcc": VCC,
    "vcc_lo": VCC,
    "vcc_hi": VCC + 1,
    "exec": EXEC,
    "exec_lo": EXEC,
    "exec_hi": EXEC + 1,
    "m0": M0,
    "flat_scratch": 102,
    "flat_scratch_lo": 102,
    "flat_scratch_hi": 103,
    "xnack_mask": 104,
    "xnack_mask_lo": 104,
    "xnack_mask_hi": 105,
}
# Scalar sources without storage, as C++ expressions.
_SPECIAL = {
    "null": "0u",
    "off": "0u",
    "src_scc": "(u32)w.scc",
    "src_vccz": "(u32)(w.mask(kVcc)==0)",
    "src_execz": "(u32)(w.exec()==0)",
    "src_shared_base": "kSharedAperture",
    "src_private_base": "kPrivateAperture",
    "src_shared_limit": "0xffffu",
    "src_private_limit": "0xffffffu",
}
# C++ types by the letter and width of the tables' types: b32 unsigned bits, i32 signed, f32 float. Half floats are computed as floats.
CPP_TYPES = {
    "b8": "u8",
    "i8": "i8",
    "b16": "u16",
    "i16": "i16",
    "f16": "float",
    "b32": "u32",
    "i32": "i32",
    "f32": "float",
    "b64": "u64",
    "i64": "i64",
    "f64": "double",
}
_ONE_OVER_TWO_PI = 0.15915494309189532


class UnsupportedError(Exception):
    """An instruction or a form of one that the emulator does not model."""


def width(kind: str) -> int:
    """Bits of a type such as f16."""
    return int(kind[1:])


@dataclass(frozen=True)
class Register:
    """`bank`: 's' scalar, 'v' vector or accumulator, '-' a scalar source without storage."""

    bank: str
    index: int
    count: int
    name: str = ""

    @property
    def expression(self) -> str:
        return _SPECIAL[self.name]


def register(operand: str) -> Register | None:
    """The register that an operand names; None for a constant."""
    if operand in _NAMED:
        return Register("s", _NAMED[operand], 2 if operand in ("vcc", "exec", "flat_scratch", "xnack_mask") else 1, operand)
    if operand in _SPECIAL:
        return Register("-", -1, 1, operand)
    match = re.fullmatch(r"(s|v|a|ttmp)(?:(\d+)|\[(\d+):(\d+)\])", operand)
    if not match:
        return None
    first = int(match[2] or match[3])
    count = 1 if match[2] else int(match[4]) - first + 1
    if match[1] == "ttmp":
        return Register("s", first + TTMP, count, operand)
    if match[1] == "a":
        return Register("v", first + ACCUMULATORS, count, operand)
    return Register(match[1], first, count, operand)


def constant(operand: str, kind: str) -> int:
    """The bits of a literal or inline constant as a value of a type."""
    match = re.fullmatch(r"lit(?:64)?\((.*)\)", operand)
    text = match[1] if match else operand
    if re.fullmatch(r"-?\d+\.\d+(e[-+]?\d+)?", text):
        value = _ONE_OVER_TWO_PI if text.startswith("0.1591549") else float(text)
        if width(kind) == 16:
            return int(np.float16(value).view(np.uint16))
        if width(kind) == 64:
            return int(np.float64(value).view(np.uint64))
        return int(np.float32(value).view(np.uint32))
    try:
        number = int(text, 0)
    except ValueError:
        raise UnsupportedError(f"operand {operand}") from None
    if kind == "f64" and text.startswith("0x") and len(text) <= 10:
        return number << 32  # a 32-bit literal is the high half of a double
    return number & ((1 << width(kind)) - 1)


@dataclass(frozen=True)
class Source:
    """A source operand without its modifiers."""

    operand: str
    negate: bool = False
    absolute: bool = False
    sign_extend: bool = False
    half: int | None = None  # of a 16-bit register operand: .l is 0, .h is 1


def source(text: str) -> Source:
    """Splits -|v0.h| into the operand and its modifiers."""
    negate = absolute = sign_extend = False
    half = None
    if match := re.fullmatch(r"sext\((.*)\)", text):
        text, sign_extend = match[1], True
    if match := re.fullmatch(r"neg\((.*)\)", text):
        text, negate = match[1], True
    if text.startswith("-") and not re.match(r"-\d", text):
        text, negate = text[1:], True
    if match := re.fullmatch(r"\|(.*)\||abs\((.*)\)", text):
        text, absolute = match[1] or match[2], True
    if match := re.fullmatch(r"(.*)\.([lh])", text):
        text, half = match[1], int(match[2] == "h")
    return Source(text, negate, absolute, sign_extend, half)
