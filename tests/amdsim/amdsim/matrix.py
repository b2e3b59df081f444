"""Matrix instructions: MFMA (CDNA) and WMMA (RDNA 3 and 4)."""

from __future__ import annotations

import re

from .disassembly import Instruction
from .emitter import Emitter
from .operands import UnsupportedError, constant, register
from .rules import rule

_ELEMENTS = {"f16": "kF16", "bf16": "kBf16", "bf16_1k": "kBf16", "i8": "kI8", "f32": "kF32"}


def _accumulator(e: Emitter, operand: str) -> str:
    """(pointer to the accumulator's lanes or null, its constant) as arguments."""
    if register(operand) is None:
        return f"nullptr,{e.let('const u32', e.parameter(constant(operand, 'b32')))}"
    return f"{e.vector(operand)},0u"


@rule(r"v_mfma_(f32|i32)_(16x16|32x32)x(\d+)_?(f16|bf16|bf16_1k|i8|f32|fp8_fp8)")
def _mfma(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    operands, m, k = instruction.operands, int(match[2][:2]), int(match[3])
    destination = register(operands[0])
    assert destination is not None
    if destination.count != m * m // 64 or any(key in instruction.modifiers for key in ("cbsz", "abid", "blgp")):
        raise UnsupportedError(f"{instruction.text}: multiple blocks and broadcasts")
    fp8 = "kFp8Fnuz" if e.target in ("gfx940", "gfx941", "gfx942") else "kFp8"
    element = fp8 if match[4] == "fp8_fp8" else _ELEMENTS[match[4]]
    registers = ",".join(e.vector_index(operand) for operand in operands[:3])
    integer = "true" if match[1] == "i32" else "false"
    flush = "true" if e.target == "gfx90a" and match[4] in ("f16", "bf16", "bf16_1k") else "false"
    return f"mfma<{m},{k},Element::{element},{integer},{flush}>(w,{registers},{_accumulator(e, operands[3])});"


@rule(r"v_wmma_(f32|f16|bf16|i32)_16x16x(16|32)_(f16|bf16|iu8|iu4|fp8_fp8)")
def _wmma(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    operands, kind = instruction.operands, match[3]
    signed = instruction.flags("neg_lo", 3, 0)  # for integers; a negation of the others is not modelled
    integer = kind in ("iu8", "iu4")
    if "clamp" in instruction.modifiers or (not integer and (any(signed) or any(instruction.flags("neg_hi", 3, 0)))):
        raise UnsupportedError(instruction.text)
    if integer:
        left, right = (f"Element::k{'I' if is_signed else 'U'}{kind[-1]}" for is_signed in signed[:2])
    else:
        left = right = f"Element::{'kFp8' if kind == 'fp8_fp8' else _ELEMENTS[kind]}"
    total = {"f32": "kF32", "f16": "kF16", "bf16": "kBf16", "i32": "kI32"}[match[1]]
    high = "true" if instruction.flags("op_sel", 3, 0)[2] else "false"
    registers = ",".join(e.vector_index(operand) for operand in operands[:3])
    arguments = f"w,{registers},{_accumulator(e, operands[3])},{high}"
    return f"wmma<{match[2]},{left},{right},Sum::{total},{'true' if e.gfx == 12 else 'false'}>({arguments});"
