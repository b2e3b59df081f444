"""Writes the C++ of one handler.

Register numbers and constants become parameters of the instruction, so that all instructions of one shape share a handler: a kernel of
thousands of instructions needs some hundred handlers, and kernels of one family share most of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .disassembly import Instruction
from .operands import CPP_TYPES, EXEC, VCC, Register, UnsupportedError, constant, register, source, width

# Lane from which lane l of a DPP instruction reads, and when that lane exists.
_DPP_FIXED = {
    "row_mirror": ("(l^15)", "true"),
    "row_half_mirror": ("(l^7)", "true"),
    "wave_shr": ("(l-1)", "(l>=1)"),
    "wave_shl": ("(l+1)", "(l<kWave-1)"),
    "wave_ror": ("((l-1)&(kWave-1))", "true"),
    "wave_rol": ("((l+1)&(kWave-1))", "true"),
}
_DPP_BY_NUMBER = {
    "row_shl": ("(l+{n})", "((l&15)+{n}<16)"),
    "row_shr": ("(l-{n})", "((l&15)>={n})"),
    "row_ror": ("((l&~15)|((l-{n})&15))", "true"),
    "row_xmask": ("(l^{n})", "true"),
    "row_share": ("((l&~15)|{n})", "true"),
    "row_newbcast": ("((l&~15)|{n})", "true"),
}
_DPP_BROADCAST = {"15": ("((l&~15)-1)", "(l>=16)"), "31": ("31", "(l>=32)")}
_SDWA_FIELDS = {
    "BYTE_0": (0, 8),
    "BYTE_1": (8, 8),
    "BYTE_2": (16, 8),
    "BYTE_3": (24, 8),
    "WORD_0": (0, 16),
    "WORD_1": (16, 16),
    "DWORD": (0, 32),
}


def dpp_source(instruction: Instruction) -> tuple[str, str] | None:
    """(lane expression, validity expression) of a DPP instruction; None for others."""
    modifiers = instruction.modifiers
    if "dpp8" in modifiers:
        selectors = sum(lane << 3 * i for i, lane in enumerate(instruction.flags("dpp8", 8, 0)))
        return f"((l&~7)|({selectors}u>>3*(l&7)&7))", "true"
    if "quad_perm" in modifiers:
        selectors = sum(lane << 2 * i for i, lane in enumerate(instruction.flags("quad_perm", 4, 0)))
        return f"((l&~3)|({selectors}>>2*(l&3)&3))", "true"
    for key, (lane, valid) in _DPP_BY_NUMBER.items():
        if key in modifiers:
            return lane.format(n=int(modifiers[key])), valid.format(n=int(modifiers[key]))
    for key, fixed in _DPP_FIXED.items():
        if key in modifiers:
            return fixed
    if "row_bcast" in modifiers:
        return _DPP_BROADCAST[modifiers["row_bcast"]]
    return None


class Emitter:
    """Collects the setup and the parameters of one handler.

    Attributes:
        gfx: major version of the target, 9 to 12.
        target: such as gfx90a.
        wave: lanes per wave.
        index: number of the instruction in its program; branches are relative to it.
    """

    def __init__(self, target: str, wave: int) -> None:
        self.target, self.wave = target, wave
        match = re.match(r"gfx(9|1\d)", target)
        if not match:
            raise UnsupportedError(f"target {target}")
        self.gfx = int(match[1])
        self.parameters: list[int] = []
        self.setup: list[str] = []

    # ---- parameters ----

    def parameter(self, value: int) -> str:
        self.parameters.append(value & 0xFFFFFFFFFFFFFFFF)
        return f"i->p[{len(self.parameters) - 1}]"

    def let(self, kind: str, expression: str) -> str:
        """A constant of the handler, computed before its lanes run."""
        name = f"x{len(self.setup)}"
        self.setup.append(f"{kind} {name}={expression};")
        return name

    def vector(self, operand: str | Register) -> str:
        """Pointer to the lanes of a vector register; register r + 1 is kWave further."""
        reg = register(operand) if isinstance(operand, str) else operand
        if reg is None or reg.bank != "v":
            raise UnsupportedError(f"expected a vector register, got {operand}")
        return self.let("u32*const", f"w.v[{self.parameter(reg.index)}]")

    def vector_index(self, operand: str) -> str:
        reg = register(operand)
        if reg is None or reg.bank != "v":
            raise UnsupportedError(f"expected a vector register, got {operand}")
        return self.let("const u64", self.parameter(reg.index))

    def scalar_index(self, operand: str) -> str:
        reg = register(operand)
        if reg is None or reg.bank != "s":
            raise UnsupportedError(f"expected a scalar register, got {operand}")
        return self.let("const u64", self.parameter(reg.index))

    # ---- reading ----

    def raw(self, operand: str, bits: int, lanes: str | None = None) -> str:
        """Unsigned bits of a source without modifiers: 32 or 64; `lanes` replaces the pointer to a vector register's lanes."""
        reg = register(operand)
        kind = "u64" if bits == 64 else "u32"
        if reg is None:
            return self.let(f"const {kind}", self.parameter(constant(operand, f"b{bits}")))
        if reg.bank == "-":
            # As 64 bits an aperture is the high half of an address.
            aperture = operand.endswith("_base")
            return f"(({kind})({reg.expression}){'<<32' if bits == 64 and aperture else ''})"
        if reg.bank == "s":
            index = self.parameter(reg.index)
            return self.let(f"const {kind}", f"w.s64({index})" if bits == 64 else f"w.s[{index}]")
        row = lanes or self.vector(reg)
        return f"((u64){row}[l]|(u64){row}[l+kWave]<<32)" if bits == 64 else f"{row}[l]"

    def read(self, text: str, kind: str = "b32", half: int = 0, lanes: str | None = None) -> str:
        """A source with its modifiers as a C++ expression of a type; `half` selects the upper 16 bits for 16-bit types."""
        src = source(text)
        bits = width(kind)
        reg = register(src.operand)
        if reg is None:
            value = self.let(f"const {'u64' if bits == 64 else 'u32'}", self.parameter(constant(src.operand, kind)))
        else:
            value = self.raw(src.operand, max(bits, 32), lanes)
        if bits == 16:
            upper = half if src.half is None else src.half
            value = f"(u16)({value}>>16)" if upper and reg is not None else f"(u16)({value})"
        return self.modified(value, kind, src.negate, src.absolute)

    @staticmethod
    def modified(value: str, kind: str, negate: bool, absolute: bool) -> str:
        bits = width(kind)
        if kind[0] == "f":
            value = {16: "f16({})", 32: "f32({})", 64: "f64({})"}[bits].format(value)
            if absolute:
                value = f"std::fabs({value})"
            return f"(-{value})" if negate else f"({value})"
        sign = {16: "0x8000u", 32: "0x80000000u", 64: "0x8000000000000000ull"}[bits]
        if absolute:
            value = f"({value}&~{sign})"
        if negate:
            value = f"({value}^{sign})"
        return f"(({CPP_TYPES[kind]}){value})"

    def mask(self, operand: str) -> str:
        """A lane mask, read before the lanes run."""
        reg = register(operand)
        if reg is None:
            return self.let("const u64", self.parameter(constant(operand, "b64")))
        if reg.bank != "s":
            raise UnsupportedError(f"expected a lane mask, got {operand}")
        return self.let("const u64", f"w.mask({self.parameter(reg.index)})")

    def vcc(self) -> str:
        return self.let("const u64", f"w.mask({VCC})")

    # ---- writing ----

    def set_mask(self, operand: str, expression: str) -> str:
        reg = register(operand)
        if reg is not None and reg.bank == "-":
            return ""
        return f"w.set_mask({self.scalar_index(operand)},{expression});"

    @staticmethod
    def set_exec(expression: str) -> str:
        return f"w.set_mask({EXEC},{expression});"

    def write(self, text: str, kind: str, expression: str, half: int = 0, keep: bool | None = None) -> str:
        """Assigns to a register. A 16-bit result keeps the other half from gfx10 on, and clears it before; `keep` overrides that."""
        dst = source(text)
        if dst.half is not None:
            half, keep = dst.half, True
        reg = register(dst.operand)
        if reg is None:
            raise UnsupportedError(f"destination {text}")
        if reg.bank == "-":
            return ""
        if kind[0] == "f":
            expression = {16: "half({})", 32: "bits({})", 64: "bits64({})"}[width(kind)].format(expression)
        bits = width(kind)
        if reg.bank == "s":
            index = self.scalar_index(dst.operand)
            return f"w.set_s64({index},{expression});" if bits == 64 else f"w.s[{index}]={expression};"
        row = self.vector(reg)
        if bits == 64:
            return f"{{const u64 z_={expression};{row}[l]=(u32)z_;{row}[l+kWave]=(u32)(z_>>32);}}"
        if bits == 16:
            if half:
                kept = keep is not False
                return f"{row}[l]={f'({row}[l]&0xffffu)|' if kept else ''}(u32)(u16)({expression})<<16;"
            kept = self.gfx >= 10 if keep is None else keep
            return f"{row}[l]={f'({row}[l]&0xffff0000u)|' if kept else ''}(u32)(u16)({expression});"
        return f"{row}[l]={expression};"

    # ---- lanes ----

    @staticmethod
    def lanes(body: str, before: str = "") -> str:
        """Runs `body` for every active lane l. Lanes are independent, so that the loop over all of them may be vectorised."""
        loop = f"for(int l=0;l<kWave;++l){{{body}}}"
        return (
            f"{{const u64 ex=w.exec();{before}"
            f"if(ex==kAllLanes){{\n#pragma GCC ivdep\n{loop}}}else for(int l=0;l<kWave;++l)if(ex>>l&1){{{body}}}}}"
        )

    def sources(self, instruction: Instruction, operands: Sequence[str], kinds: Sequence[str], halves: Sequence[int]) -> tuple[str, str]:
        """Declares a, b, c from source operands, with DPP and SDWA applied.

        Returns:
            (statements before the lanes run, statements of each lane).
        """
        before, body = "", ""
        dpp = dpp_source(instruction)
        for i, (operand, kind) in enumerate(zip(operands, kinds, strict=True)):
            lanes = None
            if i == 0 and dpp:
                first = source(operand)
                before += f"u32 t0[2*kWave];memcpy(t0,{self.vector(first.operand)},sizeof t0/{1 if width(kind) == 64 else 2});"
                body += self._dpp_lane(instruction, *dpp)
                value = (
                    self.read(operand, kind, halves[i], "t0")
                    .replace("t0[l]", "(ok?t0[q]:0u)")
                    .replace("t0[l+kWave]", "(ok?t0[q+kWave]:0u)")
                )
            elif f"src{i}_sel" in instruction.modifiers:
                value = self._sdwa(instruction.modifiers[f"src{i}_sel"], operand, kind)
            else:
                value = self.read(operand, kind, halves[i], lanes)
            body += f"const {CPP_TYPES[kind]} {'abc'[i]}={value};"
        return before, body

    @staticmethod
    def _dpp_lane(instruction: Instruction, lane: str, valid: str) -> str:
        rows, banks = (int(instruction.modifiers.get(key, "0xf"), 0) for key in ("row_mask", "bank_mask"))
        zero_when_invalid = instruction.modifiers.get("bound_ctrl") in ("0", "1")
        fetch_inactive = instruction.modifiers.get("fi") == "1"
        body = ""
        if rows != 0xF or banks != 0xF:
            body += f"if(!({rows}>>(l/16&3)&1)||!({banks}>>(l%16/4)&1))continue;"
        active = "" if fetch_inactive else "&&(ex>>(q0&(kWave-1))&1)"
        body += f"const int q0={lane};const bool ok={valid}&&q0>=0&&q0<kWave{active};const int q=q0&(kWave-1);"
        return body if zero_when_invalid else body + "if(!ok)continue;"

    def _sdwa(self, selection: str, operand: str, kind: str) -> str:
        first, bits = _SDWA_FIELDS[selection]
        src = source(operand)
        value = self.raw(src.operand, 32)
        if bits < 32:
            value = f"((u32)({f'(i32)(i{bits})' if src.sign_extend else f'(u{bits})'}({value}>>{first})))"
        return self.modified(value, kind, src.negate, src.absolute)

    def write_sdwa(self, instruction: Instruction, operand: str, kind: str, expression: str) -> str:
        """Assigns to the part of a register that dst_sel names."""
        first, bits = _SDWA_FIELDS[instruction.modifiers["dst_sel"]]
        unused = instruction.modifiers.get("dst_unused", "UNUSED_PAD")
        if unused == "UNUSED_SEXT":
            raise UnsupportedError(instruction.text)
        if kind[0] == "f":
            expression = {16: "(u32)half({})", 32: "bits({})"}[width(kind)].format(expression)
        row = self.vector(operand)
        field = ((1 << bits) - 1) << first
        kept = f"({row}[l]&~{field}u)|" if unused == "UNUSED_PRESERVE" else ""
        return f"{row}[l]={kept}((u32)({expression})<<{first}&{field}u);"
