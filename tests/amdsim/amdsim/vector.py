"""Vector instructions that are not in the table: comparisons, carries, selections, moves between lanes, division, 8-bit floats."""

from __future__ import annotations

import re

from .disassembly import Instruction
from .emitter import Emitter, dpp_source
from .operands import CPP_TYPES, M0, UnsupportedError, register
from .rules import rule
from .vector_table import COMPARISONS, OPERATIONS

_COMPARED = {"u16": "b16", "u32": "b32", "u64": "b64", "i16": "i16", "i32": "i32", "i64": "i64", "f16": "f16", "f32": "f32", "f64": "f64"}
# On gfx9, too, these leave the other half of the destination alone.
_KEEPS_UPPER_HALF = {"v_fma_f16", "v_mad_f16", "v_mad_u16", "v_mad_i16", "v_div_fixup_f16"}
_SUBNORMAL = {
    "f16": "(std::fabs(a)<0x1p-14f)",
    "f32": "(std::fpclassify(a)==FP_SUBNORMAL)",
    "f64": "(std::fpclassify(a)==FP_SUBNORMAL)",
}


def table_parts(e: Emitter, instruction: Instruction) -> tuple[str, str, str, str] | None:
    """A table instruction as (before, lane statements, result type, result expression); None when it is not in the table."""
    operation = OPERATIONS.get(instruction.name)
    if operation is None:
        return None
    result, kinds, expression = operation
    operands = instruction.operands[1:]
    explicit = [kind for kind in kinds if kind != "D"]
    if len(operands) != len(explicit):
        raise UnsupportedError(instruction.text)
    halves = instruction.flags("op_sel", 4, 0)
    before, body = e.sources(instruction, operands, explicit, halves)
    if "D" in kinds:
        body += f"const {CPP_TYPES[result]} {'abc'[len(explicit)]}={e.read(instruction.operands[0], result, halves[len(explicit)])};"
    expression = f"({expression})"
    modifiers = instruction.modifiers
    if result[0] == "f":
        if "mul" in modifiers:
            expression = f"({expression}*{modifiers['mul']})"
        if "div" in modifiers:
            expression = f"({expression}/{modifiers['div']})"
        if "clamp" in modifiers:
            expression = f"({CPP_TYPES[result]})clamp01({expression})"
    elif "clamp" in modifiers:
        expression = _saturated(instruction, expression)
    return before, body, result, expression


def _saturated(instruction: Instruction, expression: str) -> str:
    """Integer results that saturate where the instruction has a clamp bit."""
    wide = {
        "v_add_u16": "(u16)std::min(65535,(int)a+b)",
        "v_add_nc_u16": "(u16)std::min(65535,(int)a+b)",
        "v_sub_u16": "(u16)std::max(0,(int)a-b)",
        "v_sub_nc_u16": "(u16)std::max(0,(int)a-b)",
        "v_add_u32": "(u32)std::min<u64>(~0u,(u64)a+b)",
        "v_add_nc_u32": "(u32)std::min<u64>(~0u,(u64)a+b)",
        "v_sub_u32": "(a>b?a-b:0u)",
        "v_sub_nc_u32": "(a>b?a-b:0u)",
        "v_add_i32": "(u32)saturate((i64)(i32)a+(i32)b)",
        "v_add_nc_i32": "(u32)saturate((i64)(i32)a+(i32)b)",
        "v_sub_i32": "(u32)saturate((i64)(i32)a-(i32)b)",
        "v_sub_nc_i32": "(u32)saturate((i64)(i32)a-(i32)b)",
    }
    if instruction.name not in wide:
        raise UnsupportedError(instruction.text)
    return wide[instruction.name]


@rule("|".join(map(re.escape, OPERATIONS)))
def _table(e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    parts = table_parts(e, instruction)
    assert parts is not None
    before, body, result, expression = parts
    if instruction.modifiers.get("dst_sel", "DWORD") != "DWORD":
        write = e.write_sdwa(instruction, instruction.operands[0], result, expression)
    else:
        num_sources = len(instruction.operands) - 1
        keep = True if instruction.name in _KEEPS_UPPER_HALF else None
        write = e.write(instruction.operands[0], result, expression, instruction.flags("op_sel", 4, 0)[num_sources], keep)
    return e.lanes(body + write, before)


def bit_function(table: int) -> str:
    """The expression of a, b and c, bit for bit, whose value for bits (a, b, c) is bit 4 a + 2 b + c of a table."""
    terms = (
        "&".join(letter if number >> shift & 1 else f"~{letter}" for letter, shift in zip("abc", (2, 1, 0), strict=True))
        for number in range(8)
        if table >> number & 1
    )
    return "|".join(f"({term})" for term in terms) or "0u"


@rule(r"v_bitop3_b(16|32)")
def _bit_function(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    kind, operands = "b" + match[1], instruction.operands
    before, body = e.sources(instruction, operands[1:], [kind] * 3, instruction.flags("op_sel", 4, 0))
    expression = bit_function(int(instruction.modifiers.get("bitop3", "0"), 0))
    return e.lanes(
        body + e.write(operands[0], kind, f"({CPP_TYPES[kind]})({expression})", instruction.flags("op_sel", 4, 0)[3], True), before
    )


@rule(r"v_cndmask_b(16|32)")
def _select(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    operands = instruction.operands
    mask = e.mask(operands[3]) if len(operands) > 3 else e.vcc()
    kind = "b" + match[1]
    # As a float operation it takes sign modifiers on 32-bit sources too.
    before, body = e.sources(instruction, operands[1:3], [kind, kind], instruction.flags("op_sel", 3, 0))
    if instruction.modifiers.get("dst_sel", "DWORD") != "DWORD":
        return e.lanes(body + e.write_sdwa(instruction, operands[0], kind, f"({mask}>>l&1?b:a)"), before)
    return e.lanes(body + e.write(operands[0], kind, f"({mask}>>l&1?b:a)", instruction.flags("op_sel", 3, 0)[2]), before)


@rule(r"v_cmp(x?)_(class|[a-z]+)_([uif]\d+)")
def _compare(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    to_exec, comparison, kind = match[1], match[2], _COMPARED[match[3]]
    # From gfx10 on v_cmpx writes EXEC alone; before, it also writes its destination.
    destination, operands = (
        (instruction.operands[0], instruction.operands[1:]) if len(instruction.operands) == 3 else (None, instruction.operands)
    )
    kinds = [kind, "b32" if comparison == "class" else kind]
    before, body = e.sources(instruction, operands, kinds, instruction.flags("op_sel", 3, 0))
    condition = f"is_class(a,b,{_SUBNORMAL[kind]})" if comparison == "class" else COMPARISONS[comparison]
    write = e.set_mask(destination, "r") if destination else ""
    if to_exec:
        write += e.set_exec("r")
    return f"{{u64 r=0;{e.lanes(f'{body}r|=(u64)({condition})<<l;', before)}{write}}}"


@rule(r"v_(add|sub|subrev)(?:c|b|brev)?(?:_co)?(?:_ci)?_u32")
def _carry(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    operands = instruction.operands
    if len(operands) not in (4, 5):
        raise UnsupportedError(instruction.text)
    carry_in = e.mask(operands[4]) if len(operands) == 5 else "0ull"
    before, body = e.sources(instruction, operands[2:4], ["b32", "b32"], [0, 0])
    reverse = match[1] == "subrev" or "brev" in instruction.name
    wide = "(u64)a+b+ci" if match[1] == "add" else "(u64)b-a-ci" if reverse else "(u64)a-b-ci"
    body += f"const u64 ci={carry_in}>>l&1,z={wide};r|=(z>>32&1)<<l;"
    body += e.write(operands[0], "b32", "(u32)z")
    return f"{{u64 r=0;{e.lanes(body, before)}{e.set_mask(operands[1], 'r')}}}"


@rule(r"v_mad(?:_co)?_(u64_u32|i64_i32)")
def _multiply_add_wide(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    operands = instruction.operands
    kind = "i32" if match[1] == "i64_i32" else "b32"
    a, b, c = e.read(operands[2], kind), e.read(operands[3], kind), e.read(operands[4], "b64")
    product = f"(u64)((i64){a}*{b})" if kind == "i32" else f"(u64){a}*{b}"
    body = f"const u64 y={c};const u64 z={product}+y;r|=(u64)(z<y)<<l;{e.write(operands[0], 'b64', 'z')}"
    return f"{{u64 r=0;{e.lanes(body)}{e.set_mask(operands[1], 'r')}}}"


@rule(r"v_div_scale_f32")
def _div_scale(e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    a, b, c = (e.read(operand, "f32") for operand in instruction.operands[2:5])
    body = f"bool vc;const float z=div_scale({a},{b},{c},vc);r|=(u64)vc<<l;{e.write(instruction.operands[0], 'f32', 'z')}"
    return f"{{u64 r=0;{e.lanes(body)}{e.set_mask(instruction.operands[1], 'r')}}}"


@rule(r"v_div_fmas_f32")
def _div_fmas(e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    a, b, c = (e.read(operand, "f32") for operand in instruction.operands[1:4])
    return e.lanes(e.write(instruction.operands[0], "f32", f"div_fmas({a},{b},{c},{e.vcc()}>>l&1)"))


# ---- between lanes -----------------------------------------------------------------------------------------------------


@rule(r"v_readfirstlane_b32")
def _read_first_lane(e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    value = e.read(instruction.operands[1])
    return f"{{const u64 ex=w.exec();const int l=ex?__builtin_ctzll(ex):0;{e.write(instruction.operands[0], 'b32', value)}}}"


@rule(r"v_readlane_b32")
def _read_lane(e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    lane, value = e.read(instruction.operands[2]), e.read(instruction.operands[1])
    return f"{{const int l={lane}&(kWave-1);{e.write(instruction.operands[0], 'b32', value)}}}"


@rule(r"v_writelane_b32")
def _write_lane(e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    lane, value = e.read(instruction.operands[2]), e.read(instruction.operands[1])
    return f"{{const int l={lane}&(kWave-1);{e.write(instruction.operands[0], 'b32', value)}}}"


@rule(r"v_permlane(x?)16_b32")
def _permute_rows(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    destination, source, low, high = instruction.operands
    fetch_inactive, bound_control = instruction.flags("op_sel", 2, 0)
    selectors = e.let("const u64", f"(u64){e.read(low)}|(u64){e.read(high)}<<32")
    body = f"const int q=((l&~15)^{16 if match[1] else 0})|(int)({selectors}>>4*(l&15)&15);"
    row = e.vector(destination)
    if not fetch_inactive:
        body += f"if(!(ex>>q&1)){{{f'{row}[l]=0;' if bound_control else ''}continue;}}"
    return e.lanes(body + f"{row}[l]=t0[q];", _copy(e, source))


@rule(r"v_permlane64_b32")
def _permute_halves(e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    before = _copy(e, instruction.operands[1])
    return e.lanes(e.write(instruction.operands[0], "b32", "t0[l^32&(kWave-1)]"), before)


def _copy(e: Emitter, operand: str) -> str:
    """Keeps a register's lanes, because the destination may be the same register."""
    return f"u32 t0[kWave];memcpy(t0,{e.vector(operand)},sizeof t0);"


@rule(r"v_swap_b32")
def _swap(e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    a, b = (e.vector(operand) for operand in instruction.operands)
    return e.lanes(f"const u32 x={a}[l];{a}[l]={b}[l];{b}[l]=x;")


@rule(r"v_permlane(16|32)_swap_b32")
def _swap_rows(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    """gfx950: the odd rows of 16 (or 32) lanes of the first register change places with the even rows of the second."""
    step = match[1]
    a, b = (e.vector(operand) for operand in instruction.operands)
    return e.lanes(f"if(l&{step}){{const u32 x={a}[l];{a}[l]={b}[l^{step}];{b}[l^{step}]=x;}}")


@rule(r"v_movrel(d|s|sd)_b32")
def _move_relative(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    """The register number of the destination, the source or both is offset by M0."""
    offset = e.let("const u32", f"w.s[{M0}]")
    rows = []
    for operand, letter in zip(instruction.operands, "ds", strict=True):
        index = e.vector_index(operand)
        rows.append(e.let("u32*const", f"w.v[relative({index},{offset if letter in match[1] else '0u'})]"))
    return e.lanes(f"{rows[0]}[l]={rows[1]}[l];")


# ---- 8-bit floats ------------------------------------------------------------------------------------------------------


def _fnuz(e: Emitter) -> str:
    return "true" if e.target in ("gfx940", "gfx941", "gfx942") else "false"


@rule(r"v_cvt_pk_fp8_f32")
def _pack_fp8(e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    a, b = (e.read(operand, "f32") for operand in instruction.operands[1:3])
    z = f"to_fp8({a},{_fnuz(e)})|(u32)to_fp8({b},{_fnuz(e)})<<8"
    return e.lanes(e.write(instruction.operands[0], "b16", z, instruction.flags("op_sel", 3, 0)[2], True))


@rule(r"v_cvt_pk_f32_fp8")
def _unpack_fp8(e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    upper = instruction.flags("op_sel", 2, 0)[0] or instruction.modifiers.get("src0_sel") == "WORD_1"
    a, d = e.raw(instruction.operands[1], 32), e.vector(instruction.operands[0])
    fnuz = _fnuz(e)
    return e.lanes(f"const u32 a={a}>>{16 if upper else 0};{d}[l]=bits(fp8(a,{fnuz}));{d}[l+kWave]=bits(fp8(a>>8,{fnuz}));")


@rule(r"v_cvt_f32_fp8")
def _convert_fp8(e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    selection = instruction.modifiers.get("src0_sel", "BYTE_0")
    shift = 8 * int(selection[-1]) + 8 * instruction.offset("byte_sel")
    value = e.raw(instruction.operands[1], 32)
    return e.lanes(e.write(instruction.operands[0], "f32", f"fp8({value}>>{shift},{_fnuz(e)})"))


# ---- dual issue --------------------------------------------------------------------------------------------------------


def dual_issue(e: Emitter, halves: list[Instruction]) -> str:
    """RDNA3's VOPD: both halves read their sources before either writes."""
    body, writes, vcc = "", "", e.vcc()
    for n, half in enumerate(halves):
        half.mnemonic = half.mnemonic.replace("v_dual_", "v_")
        if half.name == "v_cndmask_b32":
            _, sources = e.sources(half, half.operands[1:3], ["b32", "b32"], [0, 0])
            body += f"u32 z{n};{{{sources}z{n}={vcc}>>l&1?b:a;}}"
        else:
            parts = table_parts(e, half)
            if parts is None or parts[0] or dpp_source(half):
                raise UnsupportedError(half.text)
            _, statements, result, expression = parts
            if result not in ("b32", "f32"):
                raise UnsupportedError(half.text)
            value = f"bits({expression})" if result == "f32" else expression
            body += f"u32 z{n};{{{statements}z{n}={value};}}"
        destination = register(half.operands[0])
        assert destination is not None
        writes += f"{e.vector(destination)}[l]=z{n};"
    return e.lanes(body + writes)
