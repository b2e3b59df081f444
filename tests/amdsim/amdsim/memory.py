"""Memory instructions: LDS, global, flat, scratch and buffer."""

from __future__ import annotations

import re

from .disassembly import Instruction
from .emitter import Emitter
from .operands import UnsupportedError, register
from .rules import rule

# gfx9 and gfx10 names of what later targets name by bits.
_OLD_TYPES = {
    "ubyte": "u8",
    "sbyte": "i8",
    "ushort": "u16",
    "sshort": "i16",
    "byte": "b8",
    "short": "b16",
    "dword": "b32",
    "dwordx2": "b64",
    "dwordx3": "b96",
    "dwordx4": "b128",
    "ubyte_d16": "d16_u8",
    "ubyte_d16_hi": "d16_hi_u8",
    "sbyte_d16": "d16_i8",
    "sbyte_d16_hi": "d16_hi_i8",
    "short_d16": "d16_b16",
    "short_d16_hi": "d16_hi_b16",
    "byte_d16_hi": "d16_hi_b8",
    # LDS loads put the part of the register last on every target.
    "u8_d16": "d16_u8",
    "u8_d16_hi": "d16_hi_u8",
    "i8_d16": "d16_i8",
    "i8_d16_hi": "d16_hi_i8",
    "u16_d16": "d16_b16",
    "u16_d16_hi": "d16_hi_b16",
    "b8_d16_hi": "d16_hi_b8",
    "b16_d16_hi": "d16_hi_b16",
}


def _is_shared(e: Emitter, instruction: Instruction) -> bool:
    """Whether a load passes the caches that workgroups do not share: what LLVM's memory model asks for of an atomic load at agent scope."""
    modifiers = instruction.modifiers
    if e.gfx == 12:
        return modifiers.get("scope") in ("SCOPE_DEV", "SCOPE_SYS")
    if e.target.startswith(("gfx94", "gfx95")):
        return "sc1" in modifiers
    return "glc" in modifiers and (e.gfx != 10 or "dlc" in modifiers)


def _load(e: Emitter, instruction: Instruction, kind: str, destination: str, pointer: str) -> str:
    """Lane statements that load a type; `pointer` has {bytes} and {access} to be filled in. A null pointer reads as zero."""
    kind = _OLD_TYPES.get(kind, kind)
    match = re.fullmatch(r"(?:d16_(hi_)?)?([uib])(\d+)", kind)
    if not match:
        raise UnsupportedError(instruction.text)
    bits = int(match[3])
    access = "Access::kSharedRead" if _is_shared(e, instruction) else "Access::kRead"
    at = f"const u8*const q={pointer.format(bytes=bits // 8, access=access)};"
    if kind.startswith("d16"):
        # With error-correcting memory the other half of the register is lost.
        keep = e.gfx >= 10
        cpp = f"{'i' if match[2] == 'i' else 'u'}{bits}"
        return at + e.write(destination, "b16", f"(u16)(i16)(q?load<{cpp}>(q):0)", int(bool(match[1])), keep)
    row = e.vector(destination)
    if bits < 32:
        return f"{at}{row}[l]=(u32)(i32)(q?load<{match[2]}{bits}>(q):0);"
    words = bits // 32
    values = "".join(f"{row}[l+{j}*kWave]=t[{j}];" for j in range(words))
    return f"{at}u32 t[{words}]={{}};if(q)memcpy(t,q,{bits // 8});{values}"


def _store(e: Emitter, instruction: Instruction, kind: str, value: str, pointer: str) -> str:
    kind = _OLD_TYPES.get(kind, kind)
    match = re.fullmatch(r"(d16_hi_)?b(\d+)", kind)
    if not match:
        raise UnsupportedError(instruction.text)
    bits = int(match[2])
    row = e.vector(value)
    at = f"u8*const q={pointer.format(bytes=bits // 8, access='Access::kWrite')};"
    if bits < 32:
        return f"{at}if(q)store<u{bits}>(q,(u{bits})({row}[l]>>{16 if match[1] else 0}));"
    stores = "".join(f"t[{j}]={row}[l+{j}*kWave];" for j in range(bits // 32))
    return f"{at}u32 t[{bits // 32}];{stores}if(q)memcpy(q,t,{bits // 8});"


_ATOMIC_TYPES = {
    "u32": "u32",
    "i32": "i32",
    "b32": "u32",
    "f32": "float",
    "u64": "u64",
    "i64": "i64",
    "b64": "u64",
    "f64": "double",
    "": "u32",
}
_ATOMICS = {
    "add": "o+y",
    "sub": "o-y",
    "rsub": "y-o",
    "min": "std::min(o,y)",
    "max": "std::max(o,y)",
    "min_num": "min_num(o,y)",
    "max_num": "max_num(o,y)",
    "and": "o&y",
    "or": "o|y",
    "xor": "o^y",
    "swap": "y",
    "wrxchg": "y",
    "inc": "o>=y?0:o+1",
    "dec": "o==0||o>y?y:o-1",
}


def _atomic(e: Emitter, instruction: Instruction, operation: str, kind: str, value: str, destination: str | None, pointer: str) -> str:
    """A read-modify-write of a lane. Lanes follow one another, which is one of the orders that the hardware may take."""
    cpp = _ATOMIC_TYPES.get(kind)
    if cpp is None or (operation not in _ATOMICS and operation != "cmpswap"):
        raise UnsupportedError(instruction.text)
    if cpp in ("float", "double") and operation in ("min", "max"):
        operation += "_num"
    wide = cpp in ("u64", "i64", "double")
    size, row = 8 if wide else 4, e.vector(value)

    def operand(first: int) -> str:
        if wide:
            return f"bit_cast<{cpp}>((u64){row}[l+{first}*kWave]|(u64){row}[l+{first + 1}*kWave]<<32)"
        return f"bit_cast<{cpp}>({row}[l+{first}*kWave])"

    body = f"u8*const q={pointer.format(bytes=size, access='Access::kAtomic')};const {cpp} o=load<{cpp}>(q),y={operand(0)};"
    if operation == "cmpswap":  # the new value, then the one to compare with
        body += f"if(o=={operand(2 if wide else 1)})store<{cpp}>(q,y);"
    else:
        body += f"store<{cpp}>(q,{_ATOMICS[operation]});"
    if destination is None:
        return body
    d = e.vector(destination)
    if wide:
        return body + f"const u64 ob=bit_cast<u64>(o);{d}[l]=(u32)ob;{d}[l+kWave]=(u32)(ob>>32);"
    return body + f"{d}[l]=bit_cast<u32>(o);"


# ---- LDS ---------------------------------------------------------------------------------------------------------------


def _lds_pointer(address: str, offset: str) -> str:
    return f"c.local({address}[l]+(u32){offset},{{bytes}},{{access}},w)"


@rule(r"ds_swizzle_b32")
def _swizzle(e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    pattern = instruction.words[0] & 0xFFFF
    lane = (
        f"((l&~3)|({pattern & 255}>>2*(l&3)&3))"
        if pattern & 0x8000
        else f"((l&~31)|((((l&31)&{pattern & 31})|{pattern >> 5 & 31})^{pattern >> 10 & 31}))"
    )
    before = f"u32 t0[kWave];memcpy(t0,{e.vector(instruction.operands[1])},sizeof t0);"
    return e.lanes(f"const int q={lane};{e.vector(instruction.operands[0])}[l]=ex>>q&1?t0[q]:0;", before)


@rule(r"ds_bpermute_b32")
def _backward_permute(e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    destination, address, data = (e.vector(operand) for operand in instruction.operands)
    offset = e.let("const u32", f"(u32){e.parameter(instruction.offset())}")
    before = f"u32 t0[kWave];memcpy(t0,{data},sizeof t0);"
    return e.lanes(f"const u32 q=({address}[l]+{offset})/4&(kWave-1);{destination}[l]=ex>>q&1?t0[q]:0;", before)


@rule(r"ds_permute_b32")
def _forward_permute(e: Emitter, instruction: Instruction, _match: re.Match[str]) -> str:
    destination, address, data = (e.vector(operand) for operand in instruction.operands)
    offset = e.let("const u32", f"(u32){e.parameter(instruction.offset())}")
    scatter = e.lanes(f"t0[({address}[l]+{offset})/4&(kWave-1)]={data}[l];")
    return f"{{u32 t0[kWave]={{}};{scatter}{e.lanes(f'{destination}[l]=t0[l];')}}}"


@rule(r"ds_(?:read|load)_?2(?:addr)?(_?st(?:ride)?64)?_b(32|64)")
def _load_pair(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    words = int(match[2]) // 32
    unit = (64 if match[1] else 1) * 4 * words
    row, address = e.vector(instruction.operands[0]), e.vector(instruction.operands[1])
    body = f"u32 t[{2 * words}];"
    for n, key in enumerate(("offset0", "offset1")):
        offset = e.let("const u32", f"(u32){e.parameter(unit * instruction.offset(key))}")
        pointer = _lds_pointer(address, offset).format(bytes=4 * words, access="Access::kRead")
        body += f"memcpy(t+{n * words},{pointer},{4 * words});"
    return e.lanes(body + "".join(f"{row}[l+{j}*kWave]=t[{j}];" for j in range(2 * words)))


@rule(r"ds_(?:write|store)_?2(?:addr)?(_?st(?:ride)?64)?_b(32|64)")
def _store_pair(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    words = int(match[2]) // 32
    unit = (64 if match[1] else 1) * 4 * words
    address = e.vector(instruction.operands[0])
    body = ""
    for n, key in enumerate(("offset0", "offset1")):
        offset = e.let("const u32", f"(u32){e.parameter(unit * instruction.offset(key))}")
        row = e.vector(instruction.operands[1 + n])
        pointer = _lds_pointer(address, offset).format(bytes=4 * words, access="Access::kWrite")
        body += f"{{u8*const q={pointer};{''.join(f'store<u32>(q+{4 * j},{row}[l+{j}*kWave]);' for j in range(words))}}}"
    return e.lanes(body)


@rule(r"ds_(read|load|write|store)_(\w+)")
def _lds(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    offset = e.let("const u32", f"(u32){e.parameter(instruction.offset())}")
    if match[1] in ("read", "load"):
        pointer = _lds_pointer(e.vector(instruction.operands[1]), offset)
        return e.lanes(_load(e, instruction, match[2], instruction.operands[0], pointer))
    pointer = _lds_pointer(e.vector(instruction.operands[0]), offset)
    return e.lanes(_store(e, instruction, match[2], instruction.operands[1], pointer))


@rule(r"ds_(add|sub|rsub|min|max|min_num|max_num|and|or|xor|inc|dec|wrxchg)(?:_rtn|xchg_rtn)?_(u32|i32|b32|f32|u64|i64|b64|f64)")
def _lds_atomic(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    returns = "_rtn" in instruction.name
    address, value = instruction.operands[returns : 2 + returns]
    offset = e.let("const u32", f"(u32){e.parameter(instruction.offset())}")
    pointer = _lds_pointer(e.vector(address), offset)
    return e.lanes(_atomic(e, instruction, match[1], match[2], value, instruction.operands[0] if returns else None, pointer))


# ---- global, flat, scratch ---------------------------------------------------------------------------------------------


def _flat_pointer(e: Emitter, instruction: Instruction, space: str, address: str, base: str | None) -> str:
    offset = e.let("const i64", f"(i64){e.parameter(instruction.offset())}")
    if space == "scratch":
        vector = f"{e.vector(address)}[l]" if address != "off" else "0u"
        scalar = e.raw(base, 32) if base and base != "off" else "0u"
        return f"w.scratch_at((u32)({vector}+{scalar}+{offset}),l,{{bytes}})"
    row = e.vector(address)
    if base and base != "off":
        return f"c.global({e.raw(base, 64)}+{row}[l]+{offset},{{bytes}},{{access}})"
    whole = f"((u64){row}[l]|(u64){row}[l+kWave]<<32)+{offset}"
    return f"c.global({whole},{{bytes}},{{access}})" if space == "global" else f"c.flat({whole},{{bytes}},{{access}},w,l)"


@rule(r"(global|flat|scratch)_load_(\w+)")
def _flat_load(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    operands = instruction.operands
    pointer = _flat_pointer(e, instruction, match[1], operands[1], operands[2] if len(operands) > 2 else None)
    return e.lanes(_load(e, instruction, match[2], operands[0], pointer))


@rule(r"(global|flat|scratch)_store_(\w+)")
def _flat_store(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    operands = instruction.operands
    pointer = _flat_pointer(e, instruction, match[1], operands[0], operands[2] if len(operands) > 2 else None)
    pending = "" if match[1] == "scratch" else "w.stores_pending|=w.exec()!=0;"
    return e.lanes(_store(e, instruction, match[2], operands[1], pointer)) + pending


@rule(r"(global|flat)_atomic_(s|u)?(add|sub|min|max|min_num|max_num|and|or|xor|swap|inc|dec|cmpswap)(_x2)?(?:_([uibf]\d+))?")
def _flat_atomic(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    modifiers = instruction.modifiers
    returns = "glc" in modifiers or "sc0" in modifiers or modifiers.get("th", "").endswith("RETURN")
    operands = instruction.operands[int(returns) :]
    kind = match[5] or f"{'i' if match[2] == 's' else 'u'}{64 if match[4] else 32}"
    pointer = _flat_pointer(e, instruction, match[1], operands[0], operands[2] if len(operands) > 2 else None)
    body = _atomic(e, instruction, match[3], kind, operands[1], instruction.operands[0] if returns else None, pointer)
    return "c.publish();" + e.lanes(body)


# ---- buffers -----------------------------------------------------------------------------------------------------------


def _buffer_pointer(e: Emitter, instruction: Instruction) -> str:
    """Raw buffers, and the scratch of targets that reach it through a buffer resource."""
    _, address, resource, scalar = instruction.operands
    if "idxen" in instruction.modifiers or "lds" in instruction.modifiers:
        raise UnsupportedError(instruction.text)
    offset = e.let("const u32", f"(u32){e.parameter(instruction.offset())}")
    if "offen" in instruction.modifiers:
        offset = f"({e.vector(address)}[l]+{offset})"
    reg = register(scalar)
    base = e.raw(scalar, 32) if reg is None or reg.bank == "s" else "0u"
    r = e.scalar_index(resource)
    scratch = e.let("const bool", f"w.s[{r}+3]==kScratchResource")
    return f"({scratch}?w.scratch_at({offset}+{base},l,{{bytes}}):c.buffer(w,{r},{offset},{base},{{bytes}},{{access}}))"


@rule(r"buffer_(load|store)_(\w+)")
def _buffer(e: Emitter, instruction: Instruction, match: re.Match[str]) -> str:
    if "format" in match[2]:
        raise UnsupportedError(instruction.text)
    pointer = _buffer_pointer(e, instruction)
    move = _load if match[1] == "load" else _store
    return e.lanes(move(e, instruction, match[2], instruction.operands[0], pointer))
