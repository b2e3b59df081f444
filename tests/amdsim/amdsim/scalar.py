"""Scalar instructions: arithmetic, control flow, loads, modes."""

from __future__ import annotations

import re

from .disassembly import Instruction
from .emitter import Emitter
from .operands import CPP_TYPES, UnsupportedError, register, width
from .rules import rule
from .vector_table import COMPARISONS


@rule(r"s_waitcnt|s_waitcnt_vscnt|s_wait_storecnt|s_wait_storecnt_dscnt")
def _wait(e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    """Stores are done at once; whether the kernel waits for them before it tells others is what counts. gfx9 counts them with loads."""
    waits = r"s_waitcnt .*\bvmcnt\(0\)" if e.gfx == 9 else r"s_waitcnt_vscnt null, (0x)?0$|s_wait_storecnt\w* (0x)?0$"
    return "w.stores_pending=false;" if re.match(waits, instruction.text) else ""


# Without effect here: other waits, caches, priorities, hints.
_IGNORED = (
    r"s_(waitcnt\w*|wait_\w+|nop|delay_alu|clause|sleep|inst_prefetch|set_inst_prefetch_distance|prefetch_\w+|icache_inv|code_end|sendmsg|"
    r"setprio|dcache_\w+|ttracedata\w*|version|singleuse_vdst|barrier_signal|wait_alu)|"
    r"buffer_(gl0_inv|gl1_inv|inv|inv\w*|wb\w*|wbinvl1\w*)|global_(inv|wb|wbinv)|v_nop"
)


@rule(_IGNORED)
def _ignore(_e: Emitter, _instruction: Instruction, _match: re.Match[str]) -> str:
    return ""


# ---- control flow ------------------------------------------------------------------------------------------------------


@rule(r"s_endpgm")
def _end(_e: Emitter, _instruction: Instruction, _match: re.Match[str]) -> str:
    return "w.state=State::kEnded;return nullptr;"


@rule(r"s_barrier|s_barrier_wait")
def _barrier(_e: Emitter, _instruction: Instruction, _match: re.Match[str]) -> str:
    return "w.state=State::kBarrier;w.next=i+1;return nullptr;"


_CONDITIONS = {
    "s_branch": "true",
    "s_cbranch_scc0": "!w.scc",
    "s_cbranch_scc1": "w.scc",
    "s_cbranch_vccz": "!w.mask(kVcc)",
    "s_cbranch_vccnz": "w.mask(kVcc)",
    "s_cbranch_execz": "!w.exec()",
    "s_cbranch_execnz": "w.exec()",
}


@rule("|".join(_CONDITIONS))
def _branch(_e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    # The translator puts the distance of the target, in instructions, into the first parameter.
    return f"if({_CONDITIONS[instruction.mnemonic]})return i+(i64)i->p[0];"


@rule(r"s_getpc_b64")
def _get_pc(e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    return f"w.set_s64({e.scalar_index(instruction.operands[0])},c.image+{e.parameter(instruction.end)});"


@rule(r"s_setpc_b64")
def _set_pc(e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    return f"return c.at(w.s64({e.scalar_index(instruction.operands[0])}));"


@rule(r"s_swappc_b64")
def _swap_pc(e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    target = e.raw(instruction.operands[1], 64)
    return f"w.set_s64({e.scalar_index(instruction.operands[0])},c.image+{e.parameter(instruction.end)});return c.at({target});"


# ---- modes -------------------------------------------------------------------------------------------------------------

_HWREG = re.compile(r"hwreg\((\w+)(?:,\s*(\d+),\s*(\d+))?\)")


def _mode_field(instruction: Instruction, operand: str) -> tuple[int, int]:
    """(offset, width) of a field of the MODE register; other hardware registers are not modelled."""
    match = _HWREG.fullmatch(operand)
    if not match or match[1] != "HW_REG_MODE":
        raise UnsupportedError(instruction.text)
    return int(match[2] or 0), int(match[3] or 32)


@rule(r"s_setreg(_imm32)?_b32")
def _set_register(e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    if "HW_REG_FLAT_SCR" in instruction.operands[0]:
        return ""  # scratch is reached without its address
    offset, count = _mode_field(instruction, instruction.operands[0])
    return f"set_mode(w,{offset},{count},{e.raw(instruction.operands[1], 32)});"


@rule(r"s_getreg_b32")
def _get_register(e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    offset, count = _mode_field(instruction, instruction.operands[1])
    field = (1 << count) - 1
    return f"w.s[{e.scalar_index(instruction.operands[0])}]=w.mode>>{offset}&{field}u;"


@rule(r"s_(round|denorm)_mode")
def _short_mode(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    return f"set_mode(w,{0 if match[1] == 'round' else 4},4,{e.raw(instruction.operands[0], 32)});"


# ---- loads -------------------------------------------------------------------------------------------------------------

_LOAD_WORDS = {"dword": 1, "b32": 1, "dwordx2": 2, "b64": 2, "dwordx3": 3, "b96": 3, "dwordx4": 4, "b128": 4, "dwordx8": 8, "b256": 8}
_LOAD_WORDS |= {"dwordx16": 16, "b512": 16}


@rule(r"s_(buffer_)?load_(\w+)")
def _load(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    destination, base, offset = instruction.operands[:3]
    d = e.scalar_index(destination)
    reg = register(offset)
    immediate = e.parameter(int(offset, 0)) if reg is None else e.raw(offset, 32)
    address = f"(u64)(i64){immediate}+(u64)(i64){e.parameter(instruction.offset())}"
    if match[1]:
        b = e.scalar_index(base)
        words = _LOAD_WORDS.get(match[2])
        if words is None:
            raise UnsupportedError(instruction.text)
        body = f"for(u32 j=0;j<{words};++j){{const u8*q=c.buffer(w,{b},(u32)((o+4*j)&~3ull),0,4,Access::kRead);t[j]=q?load<u32>(q):0;}}"
        return f"{{const u64 o={address};u32 t[{words}];{body}memcpy(w.s+{d},t,{4 * words});}}"
    start = f"const u64 p={e.raw(base, 64)}+{address};"
    if match[2] in ("u8", "i8", "u16", "i16"):
        size = int(match[2][1:]) // 8
        return f"{{{start}w.s[{d}]=(u32)(i32)load<{match[2]}>(c.global(p,{size},Access::kRead));}}"
    words = _LOAD_WORDS.get(match[2])
    if words is None:
        raise UnsupportedError(instruction.text)
    body = f"const u8*q=c.global(p&~3ull,{4 * words},Access::kRead);u32 t[{words}];memcpy(t,q,{4 * words});memcpy(w.s+{d},t,{4 * words});"
    return f"{{{start}{body}}}"


# ---- comparisons -------------------------------------------------------------------------------------------------------

_TYPES = {"u16": "b16", "u32": "b32", "u64": "b64"}


@rule(r"s_cmp_(\w+)_(i32|u32|u64|f32|f16)")
def _compare(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    kind = _TYPES.get(match[2], match[2])
    a, b = (e.read(operand, kind) for operand in instruction.operands)
    return f"{{const {CPP_TYPES[kind]} a={a},b={b};w.scc={COMPARISONS[match[1]]};}}"


def _sixteen_bits(operand: str, signed: bool) -> int:
    value = int(operand, 0) & 0xFFFF
    return value - 0x10000 if signed and value & 0x8000 else value


@rule(r"s_cmpk_(\w+)_(i32|u32)")
def _compare_constant(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    kind = _TYPES.get(match[2], match[2])
    b = e.parameter(_sixteen_bits(instruction.operands[1], match[2] == "i32"))
    a = e.read(instruction.operands[0], kind)
    return f"{{const {CPP_TYPES[kind]} a={a},b=({CPP_TYPES[kind]}){b};w.scc={COMPARISONS[match[1]]};}}"


@rule(r"s_bitcmp([01])_b(32|64)")
def _compare_bit(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    a, b = e.raw(instruction.operands[0], int(match[2])), e.raw(instruction.operands[1], 32)
    return f"w.scc=({a}>>({b}&{int(match[2]) - 1})&1)=={match[1]};"


# ---- arithmetic --------------------------------------------------------------------------------------------------------

_LOGIC = {
    "and": "a&b",
    "or": "a|b",
    "xor": "a^b",
    "andn2": "a&~b",
    "and_not1": "a&~b",
    "orn2": "a|~b",
    "or_not1": "a|~b",
    "nand": "~(a&b)",
    "nor": "~(a|b)",
    "xnor": "~(a^b)",
    "andn1": "~a&b",
    "and_not0": "~a&b",
    "orn1": "~a|b",
    "or_not0": "~a|b",
}


@rule(r"s_(\w+)_saveexec_b(32|64)")
def _save_exec(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    if match[1] not in _LOGIC:
        raise UnsupportedError(instruction.text)
    kind = f"b{match[2]}"
    cpp = CPP_TYPES[kind]
    a, b = e.raw(instruction.operands[1], width(kind)), e.raw("exec", 64) if kind == "b64" else e.raw("exec_lo", 32)
    write = e.write(instruction.operands[0], kind, "b") + e.write("exec" if kind == "b64" else "exec_lo", kind, "z")
    return f"{{const {cpp} a={a},b={b},z={_LOGIC[match[1]]};{write}w.scc=z!=0;}}"


# operation -> (types of a and b or None where b is missing, C++ expression, condition for SCC or ""); y is a 64-bit intermediate.
_Scalar = tuple[str, str | None, str, str]
_OVERFLOW_ADD, _OVERFLOW_SUB = "((a^z)&(b^z))>>31", "((a^b)&(a^z))>>31"
ARITHMETIC: dict[str, _Scalar] = {
    "add_u32": ("b32", "b32", "a+b", "z<a"),
    "add_co_u32": ("b32", "b32", "a+b", "z<a"),
    "sub_u32": ("b32", "b32", "a-b", "b>a"),
    "sub_co_u32": ("b32", "b32", "a-b", "b>a"),
    "add_i32": ("b32", "b32", "a+b", _OVERFLOW_ADD),
    "add_co_i32": ("b32", "b32", "a+b", _OVERFLOW_ADD),
    "sub_i32": ("b32", "b32", "a-b", _OVERFLOW_SUB),
    "sub_co_i32": ("b32", "b32", "a-b", _OVERFLOW_SUB),
    "addc_u32": ("b32", "b32", "a+b+w.scc", "((u64)a+b+w.scc)>>32"),
    "add_co_ci_u32": ("b32", "b32", "a+b+w.scc", "((u64)a+b+w.scc)>>32"),
    "subb_u32": ("b32", "b32", "a-b-w.scc", "((u64)b+w.scc)>a"),
    "sub_co_ci_u32": ("b32", "b32", "a-b-w.scc", "((u64)b+w.scc)>a"),
    "add_u64": ("b64", "b64", "a+b", ""),
    "add_nc_u64": ("b64", "b64", "a+b", ""),
    "sub_u64": ("b64", "b64", "a-b", ""),
    "sub_nc_u64": ("b64", "b64", "a-b", ""),
    "mul_u64": ("b64", "b64", "a*b", ""),
    "mul_i32": ("b32", "b32", "a*b", ""),
    "mul_u32": ("b32", "b32", "a*b", ""),
    "mul_hi_u32": ("b32", "b32", "(u32)((u64)a*b>>32)", ""),
    "mul_hi_i32": ("i32", "i32", "(u32)((i64)a*b>>32)", ""),
    "min_i32": ("i32", "i32", "(u32)std::min(a,b)", "a<b"),
    "max_i32": ("i32", "i32", "(u32)std::max(a,b)", "a>b"),
    "min_u32": ("b32", "b32", "std::min(a,b)", "a<b"),
    "max_u32": ("b32", "b32", "std::max(a,b)", "a>b"),
    "absdiff_i32": ("i32", "i32", "(u32)std::abs((i64)a-b)", "z!=0"),
    "abs_i32": ("i32", None, "(u32)std::abs((i64)a)", "z!=0"),
    "bfe_u32": ("b32", "b32", "extract64(a,b&31,b>>16)", "z!=0"),
    "bfe_i32": ("b32", "b32", "(b>>16&127)>=32?(u32)((i32)a>>(b&31)):extract_signed(a,b,b>>16)", "z!=0"),
    "bfe_u64": ("b64", "b32", "extract64(a,b,b>>16)", "z!=0"),
    "bfm_b32": ("b32", "b32", "((1u<<(a&31))-1)<<(b&31)", ""),
    "bfm_b64": ("b32", "b32", "((1ull<<(a&63))-1)<<(b&63)", ""),
    "brev_b32": ("b32", None, "reverse_bits(a)", ""),
    "brev_b64": ("b64", None, "(u64)reverse_bits((u32)a)<<32|reverse_bits((u32)(a>>32))", ""),
    "sext_i32_i8": ("b32", None, "(u32)(i32)(i8)a", ""),
    "sext_i32_i16": ("b32", None, "(u32)(i32)(i16)a", ""),
    "ff1_i32_b32": ("b32", None, "trailing_zeros(a)", ""),
    "ctz_i32_b32": ("b32", None, "trailing_zeros(a)", ""),
    "ff1_i32_b64": ("b64", None, "a?(u32)__builtin_ctzll(a):~0u", ""),
    "ctz_i32_b64": ("b64", None, "a?(u32)__builtin_ctzll(a):~0u", ""),
    "flbit_i32_b32": ("b32", None, "leading_zeros(a)", ""),
    "clz_i32_u32": ("b32", None, "leading_zeros(a)", ""),
    "flbit_i32_b64": ("b64", None, "a?(u32)__builtin_clzll(a):~0u", ""),
    "clz_i32_u64": ("b64", None, "a?(u32)__builtin_clzll(a):~0u", ""),
    "flbit_i32": ("b32", None, "leading_signs(a)", ""),
    "cls_i32": ("b32", None, "leading_signs(a)", ""),
    "bcnt1_i32_b32": ("b32", None, "(u32)__builtin_popcount(a)", "z!=0"),
    "bcnt1_i32_b64": ("b64", None, "(u32)__builtin_popcountll(a)", "z!=0"),
    "pack_ll_b32_b16": ("b32", "b32", "(a&0xffff)|b<<16", ""),
    "pack_lh_b32_b16": ("b32", "b32", "(a&0xffff)|(b&0xffff0000u)", ""),
    "pack_hh_b32_b16": ("b32", "b32", "a>>16|(b&0xffff0000u)", ""),
    "pack_hl_b32_b16": ("b32", "b32", "a>>16|b<<16", ""),
    "add_f32": ("f32", "f32", "bits(a+b)", ""),
    "sub_f32": ("f32", "f32", "bits(a-b)", ""),
    "mul_f32": ("f32", "f32", "bits(a*b)", ""),
    "min_f32": ("f32", "f32", "bits(min_num(a,b))", ""),
    "max_f32": ("f32", "f32", "bits(max_num(a,b))", ""),
    "min_num_f32": ("f32", "f32", "bits(min_num(a,b))", ""),
    "max_num_f32": ("f32", "f32", "bits(max_num(a,b))", ""),
    "cvt_f32_i32": ("i32", None, "bits((float)a)", ""),
    "cvt_f32_u32": ("b32", None, "bits((float)a)", ""),
    "cvt_i32_f32": ("f32", None, "(u32)to_int<i32>(a)", ""),
    "cvt_u32_f32": ("f32", None, "to_int<u32>(a)", ""),
    "cvt_f16_f32": ("f32", None, "(u32)half(a)", ""),
    "cvt_f32_f16": ("f16", None, "bits(a)", ""),
    "ceil_f32": ("f32", None, "bits(std::ceil(a))", ""),
    "floor_f32": ("f32", None, "bits(std::floor(a))", ""),
    "trunc_f32": ("f32", None, "bits(std::trunc(a))", ""),
    "rndne_f32": ("f32", None, "bits(std::nearbyint(a))", ""),
}
for _n in range(1, 5):
    ARITHMETIC[f"lshl{_n}_add_u32"] = ("b32", "b32", f"(a<<{_n})+b", f"(((u64)a<<{_n})+b)>>32")
for _size in (32, 64):
    for _name, _expression in _LOGIC.items():
        ARITHMETIC[f"{_name}_b{_size}"] = (f"b{_size}", f"b{_size}", _expression, "z!=0")
    ARITHMETIC[f"not_b{_size}"] = (f"b{_size}", None, "~a", "z!=0")
    ARITHMETIC[f"mov_b{_size}"] = (f"b{_size}", None, "a", "")
    ARITHMETIC[f"cselect_b{_size}"] = (f"b{_size}", f"b{_size}", "w.scc?a:b", "")
    ARITHMETIC[f"lshl_b{_size}"] = (f"b{_size}", "b32", f"a<<(b&{_size - 1})", "z!=0")
    ARITHMETIC[f"lshr_b{_size}"] = (f"b{_size}", "b32", f"a>>(b&{_size - 1})", "z!=0")
    ARITHMETIC[f"ashr_i{_size}"] = (f"i{_size}", "b32", f"a>>(b&{_size - 1})", "z!=0")


@rule("s_(" + "|".join(ARITHMETIC) + ")")
def _arithmetic(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    kind_a, kind_b, expression, scc = ARITHMETIC[match[1]]
    destination = instruction.operands[0]
    reg = register(destination)
    assert reg is not None
    # A name ends in the type of its result, except that conversions and counts of 64 bits have 32-bit results.
    narrow = re.match(r"(ff1|ctz|flbit|clz|bcnt1|cvt|sext)_", match[1])
    bits = 64 if match[1].endswith("64") and not narrow else 32
    body = f"const {CPP_TYPES[kind_a]} a={e.read(instruction.operands[1], kind_a)};"
    if kind_b:
        body += f"const {CPP_TYPES[kind_b]} b={e.read(instruction.operands[2], kind_b)};"
    body += f"const {'u64' if bits == 64 else 'u32'} z={expression};"
    if scc:
        body += f"const bool carry=({scc})!=0;"
    return f"{{{body}{e.write(destination, f'b{bits}', 'z')}{'w.scc=carry;' if scc else ''}}}"


@rule(r"s_cmov_b(32|64)")
def _conditional_move(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    value = e.raw(instruction.operands[1], int(match[1]))
    return f"if(w.scc){{{e.write(instruction.operands[0], f'b{match[1]}', value)}}}"


@rule(r"s_(movk|cmovk|addk|addk_co|mulk)_i32")
def _with_constant(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    constant = f"(u32){e.parameter(_sixteen_bits(instruction.operands[1], True))}"
    destination = instruction.operands[0]
    operation = match[1]
    if operation == "movk":
        return e.write(destination, "b32", constant)
    if operation == "cmovk":
        return f"if(w.scc){{{e.write(destination, 'b32', constant)}}}"
    old = e.raw(destination, 32)
    if operation == "mulk":
        return e.write(destination, "b32", f"{old}*{constant}")
    return f"{{const u32 a={old},b={constant},z=a+b;{e.write(destination, 'b32', 'z')}w.scc={_OVERFLOW_ADD};}}"


@rule(r"s_bitset([01])_b(32|64)")
def _set_bit(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    bits = int(match[2])
    old, position = e.raw(instruction.operands[0], bits), e.raw(instruction.operands[1], 32)
    bit = f"((u64)1<<({position}&{bits - 1}))"
    return e.write(instruction.operands[0], f"b{bits}", f"{old}|{bit}" if match[1] == "1" else f"{old}&~{bit}")


@rule(r"s_fmac_f32|s_fmaak_f32|s_fmamk_f32")
def _scalar_fma(e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    destination, *sources = instruction.operands
    values = [e.read(operand, "f32") for operand in sources]
    if instruction.name == "s_fmac_f32":
        values.append(e.read(destination, "f32"))
    return e.write(destination, "b32", f"bits(std::fmaf({','.join(values)}))")


_SHORT_TRANSCENDENTALS = {"exp": "exp2_flushed", "log": "log2_flushed", "rcp": "reciprocal", "rsq": "reciprocal_sqrt", "sqrt": "std::sqrt"}


@rule(r"v_s_(exp|log|rcp|rsq|sqrt)_f32")
def _scalar_transcendental(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    """gfx12's transcendental functions of a scalar register."""
    if any(key in instruction.modifiers for key in ("clamp", "mul", "div")):
        raise UnsupportedError(instruction.text)
    value = f"{_SHORT_TRANSCENDENTALS[match[1]]}({e.read(instruction.operands[1], 'f32')})"
    return e.write(instruction.operands[0], "b32", f"bits({value})")
