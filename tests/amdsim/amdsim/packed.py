"""Packed 16-bit arithmetic, mixed precision, and integer dot products."""

from __future__ import annotations

import re

from .disassembly import Instruction
from .emitter import Emitter
from .operands import CPP_TYPES, UnsupportedError, constant, register
from .rules import rule

_HALF_FMA = "(double)a*(double)b+(double)c"  # exact in double before its one rounding
_HALF = {
    "fma": _HALF_FMA,
    "fmac": _HALF_FMA,
    "mul": "a*b",
    "add": "a+b",
    "max": "max_num(a,b)",
    "max_num": "max_num(a,b)",
    "min": "min_num(a,b)",
    "min_num": "min_num(a,b)",
}
_INTEGER = {
    "add": "a+b",
    "add_nc": "a+b",
    "sub": "a-b",
    "sub_nc": "a-b",
    "mul_lo": "(u32)a*(u32)b",
    "mad": "(u32)a*(u32)b+(u32)c",
    "max": "std::max(a,b)",
    "min": "std::min(a,b)",
    "lshlrev": "b<<(a&15)",
    "lshrrev": "b>>(a&15)",
    "ashrrev": "b>>(a&15)",
}
_SINGLE = {"fma": "std::fmaf(a,b,c)", "mul": "a*b", "add": "a+b"}


@rule(r"v_pk_(\w+)_(f16|i16|u16|b16)")
def _packed_halves(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    operation, kind = match[1], {"u16": "b16"}.get(match[2], match[2])
    expression = (_HALF if kind == "f16" else _INTEGER).get(operation)
    if expression is None:
        raise UnsupportedError(instruction.text)
    sources = instruction.operands[1:] + (instruction.operands[:1] if operation == "fmac" else [])
    selections = (instruction.flags("op_sel", 3, 0), instruction.flags("op_sel_hi", 3, 1))
    negations = (instruction.flags("neg_lo", 3, 0), instruction.flags("neg_hi", 3, 0))
    words = [_word(e, operand, kind) for operand in sources]
    body = ""
    for part in (0, 1):
        declared = ""
        for i, word in enumerate(words):
            bits = f"(u16)({word}>>16)" if selections[part][i] else f"(u16)({word})"
            declared += f"const {CPP_TYPES[kind]} {'abc'[i]}={e.modified(bits, kind, bool(negations[part][i]), False)};"
        result = expression
        if "clamp" in instruction.modifiers:
            if kind != "f16":
                raise UnsupportedError(instruction.text)
            result = f"clamp01({result})"
        result = f"half({result})" if kind == "f16" else f"(u16)({result})"
        body += f"u32 z{part};{{{declared}z{part}={result};}}"
    return e.lanes(body + f"{e.vector(instruction.operands[0])}[l]=z0|z1<<16;")


def _word(e: Emitter, operand: str, kind: str) -> str:
    """The 32 bits of a packed source. A float constant is a half in the low part; an integer one keeps its 32 bits."""
    if register(operand) is None:
        return e.let("const u32", e.parameter(constant(operand, "f16" if "." in operand else "b32")))
    return e.raw(operand, 32)


@rule(r"v_pk_(fma|mul|add)_f32")
def _packed_singles(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    selections = (instruction.flags("op_sel", 3, 0), instruction.flags("op_sel_hi", 3, 1))
    negations = (instruction.flags("neg_lo", 3, 0), instruction.flags("neg_hi", 3, 0))
    body = ""
    pairs = [_pair(e, operand) for operand in instruction.operands[1:]]
    for part in (0, 1):
        declared = "".join(
            f"const float {'abc'[i]}={'-' if negations[part][i] else ''}f32({pair[selections[part][i]]});" for i, pair in enumerate(pairs)
        )
        body += f"u32 z{part};{{{declared}z{part}=bits({_SINGLE[match[1]]});}}"
    d = e.vector(instruction.operands[0])
    return e.lanes(body + f"{d}[l]=z0;{d}[l+kWave]=z1;")


@rule(r"v_pk_mov_b32")
def _packed_move(e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    low, high = (_pair(e, operand) for operand in instruction.operands[1:3])
    d = e.vector(instruction.operands[0])
    first = low[instruction.flags("op_sel", 2, 0)[0]]
    second = high[instruction.flags("op_sel_hi", 2, 1)[1]]
    return e.lanes(f"const u32 z0={first},z1={second};{d}[l]=z0;{d}[l+kWave]=z1;")


def _pair(e: Emitter, operand: str) -> tuple[str, str]:
    """Both 32-bit words of a 64-bit source; a constant and a single register stand for both."""
    reg = register(operand)
    if reg is None:
        value = e.let("const u32", e.parameter(constant(operand, "f32")))
        return value, value
    if reg.bank == "s":
        index = e.scalar_index(operand)
        low = e.let("const u32", f"w.s[{index}]")
        return (low, e.let("const u32", f"w.s[{index}+1]")) if reg.count > 1 else (low, low)
    row = e.vector(operand)
    return f"{row}[l]", f"{row}[l{'+kWave' if reg.count > 1 else ''}]"


@rule(r"v_(?:fma|mad)_mix(lo|hi)?_(f32|f16)")
def _mixed(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    """Each source is a float, or the half that op_sel names when op_sel_hi is set; neg_hi takes absolute values."""
    selections, halves = instruction.flags("op_sel", 3, 0), instruction.flags("op_sel_hi", 3, 0)
    body = ""
    for i, operand in enumerate(instruction.operands[1:4]):
        body += f"const float {'abc'[i]}={e.read(operand, 'f16' if halves[i] else 'f32', selections[i])};"
    if "neg_lo" in instruction.modifiers or "neg_hi" in instruction.modifiers:
        raise UnsupportedError(instruction.text)
    value = "std::fmaf(a,b,c)"
    if "clamp" in instruction.modifiers:
        value = f"clamp01({value})"
    if match[1] is None:
        return e.lanes(body + e.write(instruction.operands[0], "f32", value))
    return e.lanes(body + e.write(instruction.operands[0], "f16", value, int(match[1] == "hi"), True))


@rule(r"v_dot(2|4|8)(c?)_(i32|u32)_(iu8|i8|u8|iu4|i4|u4|i16|u16)")
def _dot_product(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    """Integer elements of 16, 8 or 4 bits, summed into 32 bits; neg_lo makes an iu operand signed."""
    count, accumulate, kind = int(match[1]), match[2], match[4]
    bits = 32 // count
    operands = instruction.operands
    signed = [bool(flag) for flag in instruction.flags("neg_lo", 2, 0)[:2]] if kind.startswith("iu") else [kind.startswith("i")] * 2
    total = f"(i64){e.read(operands[0] if accumulate else operands[3], 'i32' if match[3] == 'i32' else 'b32')}"
    for j in range(count):
        left, right = (
            f"((i64)((i32)({name}<<{32 - bits * (j + 1)})>>{32 - bits}))" if is_signed else f"(i64)({name}>>{bits * j}&{(1 << bits) - 1})"
            for name, is_signed in zip("ab", signed, strict=True)
        )
        total += f"+{left}*{right}"
    result = "(u32)z"
    if "clamp" in instruction.modifiers:
        result = "(u32)saturate(z)" if match[3] == "i32" else "(u32)std::min<i64>(z,0xffffffffll)"
    before, body = e.sources(instruction, operands[1:3], ["b32", "b32"], [0, 0])
    return e.lanes(f"{body}const i64 z={total};{e.write(operands[0], 'b32', result)}", before)
