"""Packed and mixed arithmetic, dot products, carries, sub-dword operands, division and 8-bit floats, against numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from amdsim.assembled import assemble

_HEADER = Path(__file__).parent / "kernels" / "device.h"
U16, U32, U64, I16, I32, I64, F16, F32, F64 = (
    np.uint16,
    np.uint32,
    np.uint64,
    np.int16,
    np.int32,
    np.int64,
    np.float16,
    np.float32,
    np.float64,
)
N = 32  # lanes that take part: half of a wave of 64
Reference = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]

# name: (assembly with d, a, b, c as %0 to %3, what the inputs are, reference of the arrays a, b, c and the old d).
CASES: dict[str, tuple[str, str, Reference]] = {}


def _halves(x: np.ndarray) -> np.ndarray:
    """[lane, part] as doubles."""
    return x.astype(U32).view(F16).reshape(-1, 2).astype(F64)


def _word(halves: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(halves.astype(F16)).view(U32)[:, 0]


def _shorts(x: np.ndarray, kind: type = U16) -> np.ndarray:
    return x.astype(U32).view(kind).reshape(-1, 2).astype(I64)


def _short_word(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray((values & 0xFFFF).astype(U16)).view(U32)[:, 0]


def _packed_half(name: str, operation: Callable[..., np.ndarray], count: int = 2) -> None:
    operands = ", ".join(f"%{i + 1}" for i in range(count))
    CASES[f"pk_{name}_f16"] = (
        f"v_pk_{name}_f16 %0, {operands}",
        "f16",
        lambda a, b, c, d: _word(operation(*map(_halves, (a, b, c)[:count]))),
    )
    # Low results from the high halves of b, high ones from its low halves; the low half of a and the high half of b are negated.
    CASES[f"pk_{name}_f16_swapped"] = (
        f"v_pk_{name}_f16 %0, {operands} op_sel:[{','.join('010'[:count])}] op_sel_hi:[{','.join('101'[:count])}] "
        f"neg_lo:[{','.join('100'[:count])}] neg_hi:[{','.join('010'[:count])}]",
        "f16",
        lambda a, b, c, d: _word(operation(_halves(a) * [-1, 1], _halves(b)[:, ::-1] * [1, -1], *[_halves(c)] * (count - 2))),
    )


_packed_half("add", lambda a, b: a + b)
_packed_half("mul", lambda a, b: a * b)
_packed_half("fma", lambda a, b, c: a * b + c, 3)
_packed_half("max", np.maximum)
_packed_half("min", np.minimum)
CASES["pk_add_f16_constant"] = ("v_pk_add_f16 %0, %1, 1.0 op_sel_hi:[1,0]", "f16", lambda a, b, c, d: _word(_halves(a) + 1))
CASES["pk_fma_f16_clamp"] = (
    "v_pk_fma_f16 %0, %1, %2, %3 clamp",
    "f16",
    lambda a, b, c, d: _word(np.clip(_halves(a) * _halves(b) + _halves(c), 0, 1)),
)


def _packed_short(name: str, kind: type, operation: Callable[..., np.ndarray], count: int = 2) -> None:
    operands = ", ".join(f"%{i + 1}" for i in range(count))
    CASES[f"pk_{name}"] = (
        f"v_pk_{name} %0, {operands}",
        "b32",
        lambda a, b, c, d: _short_word(operation(*[_shorts(v, kind) for v in (a, b, c)[:count]])),
    )


_packed_short("add_u16", U16, np.add)
_packed_short("sub_i16", I16, np.subtract)
_packed_short("mul_lo_u16", U16, np.multiply)
_packed_short("mad_i16", I16, lambda a, b, c: a * b + c, 3)
_packed_short("max_i16", I16, np.maximum)
_packed_short("min_u16", U16, np.minimum)
_packed_short("lshlrev_b16", U16, lambda a, b: b << (a & 15))
_packed_short("lshrrev_b16", U16, lambda a, b: b >> (a & 15))
_packed_short("ashrrev_i16", I16, lambda a, b: b >> (a & 15))


def _floats(x: np.ndarray) -> np.ndarray:
    return x.view(F32).reshape(-1, 2).astype(F64)


def _float_pair(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.astype(F32)).view(U64)[:, 0]


# 64-bit operands; a product of two floats is exact in double, so that one rounding follows.
CASES["pk_mul_f32"] = ("v_pk_mul_f32 %0, %1, %2", "f32x2", lambda a, b, c, d: _float_pair(_floats(a) * _floats(b)))
CASES["pk_add_f32_swapped"] = (
    "v_pk_add_f32 %0, %1, %2 op_sel:[0,1] op_sel_hi:[1,0]",
    "f32x2",
    lambda a, b, c, d: _float_pair(_floats(a) + _floats(b)[:, ::-1]),
)
CASES["pk_mov_b32"] = (
    "v_pk_mov_b32 %0, %1, %2 op_sel:[1,0]",
    "f32x2",
    lambda a, b, c, d: (a >> U64(32)) | (b & U64(0xFFFFFFFF00000000)),
)


def _f32(x: np.ndarray) -> np.ndarray:
    return x.astype(U32).view(F32).astype(F64)


def _bits32(x: np.ndarray) -> np.ndarray:
    return x.astype(F32).view(U32)


# A half times a half plus a float.
_MIXED = "op_sel:[1,0,0] op_sel_hi:[1,1,0]"
CASES["fma_mix_f32"] = (
    f"v_fma_mix_f32 %0, %1, %2, %3 {_MIXED}",
    "f16",
    lambda a, b, c, d: _bits32(_halves(a)[:, 1] * _halves(b)[:, 0] + _f32(c)),
)
CASES["fma_mix_negated"] = (
    f"v_fma_mix_f32 %0, -%1, |%2|, %3 {_MIXED}",
    "f16",
    lambda a, b, c, d: _bits32(-_halves(a)[:, 1] * np.abs(_halves(b)[:, 0]) + _f32(c)),
)


def _fused_half(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Rounded to float, then to half."""
    with np.errstate(over="ignore"):
        return (_halves(a)[:, 0] * _halves(b)[:, 0] + _halves(c)[:, 0]).astype(F32).astype(F16).view(U16).astype(U32)


CASES["fma_mixlo_f16"] = (
    "v_fma_mixlo_f16 %0, %1, %2, %3 op_sel_hi:[1,1,1]",
    "f16",
    lambda a, b, c, d: (d.astype(U32) & U32(0xFFFF0000)) | _fused_half(a, b, c),
)
CASES["fma_mixhi_f16"] = (
    "v_fma_mixhi_f16 %0, %1, %2, %3 op_sel_hi:[1,1,1]",
    "f16",
    lambda a, b, c, d: (d.astype(U32) & U32(0xFFFF)) | _fused_half(a, b, c) << U32(16),
)


def _elements(x: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    values = (x.astype(U64)[:, None] >> np.arange(0, 32, bits, dtype=U64)) & U64((1 << bits) - 1)
    integers = values.astype(I64)
    return np.where(integers >> (bits - 1) != 0, integers - (1 << bits), integers) if signed else integers


def _dot(name: str, bits: int, left: bool, right: bool, suffix: str = "") -> None:
    def reference(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
        start = d if name.startswith("dot4c") else c
        total = (_elements(a, bits, left) * _elements(b, bits, right)).sum(1) + start.astype(U32).view(
            I32 if "i32" in name else U32
        ).astype(I64)
        if suffix == "clamp":
            total = np.clip(total, -(2**31), 2**31 - 1) if "i32" in name else np.clip(total, 0, 2**32 - 1)
        return total.astype(U32)

    operands = "%0, %1, %2" if name.startswith("dot4c") else "%0, %1, %2, %3"
    CASES[f"{name}_{suffix}" if suffix.isalpha() else name] = (f"v_{name} {operands} {suffix}", "b32", reference)


_dot("dot2_i32_i16", 16, True, True)
_dot("dot2_u32_u16", 16, False, False)
_dot("dot4_i32_i8", 8, True, True)
_dot("dot4_i32_i8", 8, True, True, "clamp")
_dot("dot4_u32_u8", 8, False, False)
_dot("dot4_u32_u8", 8, False, False, "clamp")
_dot("dot8_i32_i4", 4, True, True)
_dot("dot8_u32_u4", 4, False, False)
_dot("dot4c_i32_i8", 8, True, True)
_dot("dot4_i32_iu8", 8, True, False, "neg_lo:[1,0,0]")
_dot("dot8_i32_iu4", 4, False, True, "neg_lo:[0,1,0]")

# Additions and subtractions with carry: the carry of the low words, through VCC, into the high ones.
for _operation, _function in (("add", np.add), ("sub", np.subtract)):
    _with_carry = {"add": "addc", "sub": "subb"}[_operation]
    CASES[f"{_operation}_carry_gfx9"] = (
        f"v_{_operation}_co_u32 %L0, vcc, %L1, %L2\nv_{_with_carry}_co_u32 %H0, vcc, %H1, %H2, vcc",
        "b64",
        lambda a, b, c, d, f=_function: f(a, b),
    )
    CASES[f"{_operation}_carry"] = (
        f"v_{_operation}_co_u32 %L0, vcc_lo, %L1, %L2\nv_{_operation}_co_ci_u32 %H0, vcc_lo, %H1, %H2, vcc_lo",
        "b64",
        lambda a, b, c, d, f=_function: f(a, b),
    )
for _name, _mask in (("v_mad_u64_u32", "vcc"), ("v_mad_co_u64_u32", "vcc_lo"), ("v_mad_u64_u32", "vcc_lo")):
    CASES[f"{_name}_{_mask}"] = (
        f"{_name} %0, {_mask}, %L1, %L2, %3",
        "b64",
        lambda a, b, c, d: (a & U64(0xFFFFFFFF)) * (b & U64(0xFFFFFFFF)) + c,
    )
CASES["v_mad_i64_i32"] = (
    "v_mad_i64_i32 %0, vcc, %L1, %L2, %3",
    "b64",
    lambda a, b, c, d: (a.astype(U32).view(I32).astype(I64) * b.astype(U32).view(I32).astype(I64)).view(U64) + c,
)

# Parts of registers as operands.
CASES["sdwa_bytes"] = (
    "v_add_u32_sdwa %0, %1, sext(%2) dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:BYTE_2 src1_sel:BYTE_1",
    "b32",
    lambda a, b, c, d: ((a >> U64(16) & U64(255)).astype(I64) + _elements(b, 8, True)[:, 1]).astype(U32),
)
CASES["sdwa_preserve"] = (
    "v_or_b32_sdwa %0, %1, %2 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:WORD_0 src1_sel:WORD_1",
    "b32",
    lambda a, b, c, d: (d.astype(U32) & U32(0xFFFF)) | ((a & U64(0xFFFF)).astype(U32) | (b >> U64(16)).astype(U32)) << U32(16),
)
CASES["sdwa_half"] = (
    "v_mul_f16_sdwa %0, %1, -%2 dst_sel:WORD_0 dst_unused:UNUSED_PAD src0_sel:WORD_1 src1_sel:WORD_0",
    "f16",
    lambda a, b, c, d: (-_halves(a)[:, 1] * _halves(b)[:, 0]).astype(F16).view(U16).astype(U32),
)
CASES["op_sel_half"] = (
    "v_fma_f16 %0, %1, %2, %3 op_sel:[1,0,0,1]",
    "f16",
    lambda a, b, c, d: (
        (d.astype(U32) & U32(0xFFFF))
        | (_halves(a)[:, 1] * _halves(b)[:, 0] + _halves(c)[:, 0]).astype(F16).view(U16).astype(U32) << U32(16)
    ),
)
CASES["output_modifiers"] = ("v_mul_f32 %0, %1, -|%2| mul:2", "f32", lambda a, b, c, d: _bits32(-_f32(a) * np.abs(_f32(b)) * 2))
CASES["clamp"] = ("v_add_f32 %0, %1, %2 clamp", "f32", lambda a, b, c, d: _bits32(np.clip((_f32(a) + _f32(b)).astype(F32), 0, 1)))
CASES["saturating_add"] = (
    "v_add_nc_u32 %0, %1, %2 clamp",
    "b32",
    lambda a, b, c, d: np.minimum((a & U64(0xFFFFFFFF)) + (b & U64(0xFFFFFFFF)), 2**32 - 1),
)
CASES["saturating_add_gfx9"] = ("v_add_u32 %0, %1, %2 clamp", "b32", CASES["saturating_add"][2])


def _inputs(kind: str, rng: np.random.Generator) -> np.ndarray:
    if kind == "f16":
        return (rng.standard_normal((64, 2)) * 4).astype(F16).view(U32)[:, 0].astype(U64)
    if kind == "f32":
        return rng.standard_normal(64).astype(F32).view(U32).astype(U64)
    if kind == "f32x2":
        return rng.standard_normal((64, 2)).astype(F32).view(U64)[:, 0]
    return rng.integers(0, 2**64 - 1, 64, U64) & U64(2**32 - 1 if kind == "b32" else 2**64 - 1)


def _kernel(name: str) -> str:
    """Halves of a 64-bit register pair are named %L0 (low) and %H0 in the cases; they become operands of their own."""
    assembly, kind, _ = CASES[name]
    size = "u64" if kind in ("b64", "f32x2") else "u32"
    text = assembly.replace("\n", "\\n")
    if "%L" not in text:
        asm = f'asm volatile("{text}" : "+v"(d) : "v"(a), "v"(b), "v"(c) : "vcc");'
    elif "%H" not in text:
        for i in (1, 2):
            text = text.replace(f"%L{i}", f"%{i}")
        asm = f'asm volatile("{text}" : "=&v"(d) : "v"((u32)a), "v"((u32)b), "v"(c) : "vcc");'
    else:
        for i in range(3):
            text = text.replace(f"%L{i}", f"%{2 * i}").replace(f"%H{i}", f"%{2 * i + 1}")
        asm = (
            "u32 l, h; "
            + f'asm volatile("{text}" : "=&v"(l), "=&v"(h) : "v"((u32)a), "v"((u32)(a >> 32)), "v"((u32)b), "v"((u32)(b >> 32)) : "vcc"); '
        )
        asm += "d = (u64)h << 32 | l;"
    loads = " ".join(f"{'' if x == 'd' else 'const '}{size} {x} = ({size}){x}s[t];" for x in "abcd")
    return f"KERNEL(k_{name})(const u64* as, const u64* bs, const u64* cs, u64* ds) {{ const u32 t = thread(); {loads} {asm} ds[t] = d; }}"


def test_each_case_matches_numpy(target: str, rng: np.random.Generator) -> None:
    module, names = assemble(target, _HEADER, {name: _kernel(name) for name in CASES})
    assert len(names) > 30, sorted(set(CASES) - names)
    module.prepare()
    for name in sorted(names):
        _, kind, reference = CASES[name]
        a, b, c, d = (_inputs(kind, rng) for _ in range(4))
        with np.errstate(all="ignore"):
            expected = reference(a[:N], b[:N], c[:N], d[:N])
        old = d.copy()
        module.launch(f"k_{name}", (1, 1, 1), (N, 1, 1), [a, b, c, d])
        actual = d[:N].astype(expected.dtype if expected.dtype.itemsize == 8 else U32)
        np.testing.assert_array_equal(actual, expected.astype(actual.dtype), err_msg=f"{target} {CASES[name][0]}")
        np.testing.assert_array_equal(d[N:], old[N:])


def test_every_case_exists_on_some_target() -> None:
    found: set[str] = set()
    for target in ("gfx90a", "gfx942", "gfx1030", "gfx1100", "gfx1200"):
        found |= assemble(target, _HEADER, {name: _kernel(name) for name in CASES})[1]
    assert set(CASES) == found


def test_division_is_correctly_rounded(target: str, rng: np.random.Generator) -> None:
    kernel = """KERNEL(k)(const float* a, const float* b, float* q, double* r) {
const u32 t = thread(); q[t] = a[t] / b[t]; r[t] = (double)a[t] * b[t] - a[t]; }"""
    module, _ = assemble(target, _HEADER, {"k": kernel})
    special = np.array([0, -0.0, 1, -3, np.inf, np.nan, 1e-40, 3e38, 1e-30, 2.0**-126], F32)
    a = np.concatenate([np.repeat(special, 10), rng.standard_normal(156).astype(F32) * F32(1e19)])
    b = np.concatenate([np.tile(special, 10), rng.standard_normal(156).astype(F32) * F32(1e-15)])
    q, r = np.zeros(256, F32), np.zeros(256, F64)
    module.launch("k", (1, 1, 1), (256, 1, 1), [a, b, q, r])
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(q, a / b)
        np.testing.assert_array_equal(r, a.astype(F64) * b.astype(F64) - a.astype(F64))


def test_modes_round_and_flush(target: str) -> None:
    """s_setreg on the float mode: rounding toward zero and back, and denormals flushed."""
    kernel = """KERNEL(k)(const float* a, float* out) { const u32 t = thread(); float x = a[t], y = a[t + 64], up, zero, flushed;
asm volatile("s_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 2), 1\\ns_nop 4\\nv_add_f32 %0, %3, %4\\n"
"s_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 2), 3\\ns_nop 4\\nv_add_f32 %1, %3, %4\\ns_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 2), 0\\n"
"s_setreg_imm32_b32 hwreg(HW_REG_MODE, 4, 2), 0\\ns_nop 4\\nv_mul_f32 %2, %5, %6\\ns_setreg_imm32_b32 hwreg(HW_REG_MODE, 4, 2), 3"
: "=&v"(up), "=&v"(zero), "=&v"(flushed) : "v"(x), "v"(y), "v"(0x1p-100f), "v"(0x1p-30f));
out[t] = up; out[t + 64] = zero; out[t + 128] = flushed; out[t + 192] = x + y; }"""
    module, _ = assemble(target, _HEADER, {"k": kernel})
    a, out = np.ones(256, F32), np.zeros(256, F32)
    a[64:] = 1e-10
    module.launch("k", (1, 1, 1), (N, 1, 1), [a, out])
    assert (out[:N] == np.nextafter(F32(1), F32(2))).all()
    assert (out[64 : 64 + N] == 1).all()
    assert (out[128 : 128 + N] == 0).all()
    assert (out[192 : 192 + N] == 1).all()


def test_eight_bit_floats(target: str) -> None:
    kernel = """KERNEL(k)(const float* a, u32* packed, float* back) { const u32 t = thread(); u32 p = 0; float f; float2 g;
asm volatile("v_cvt_pk_fp8_f32 %0, %1, %2" : "+v"(p) : "v"(a[t]), "v"(a[t + 64]));
asm volatile("v_cvt_pk_f32_fp8 %0, %1" : "=v"(g) : "v"(p)); packed[t] = p; back[t] = g.x; back[t + 64] = g.y; }"""
    module, names = assemble(target, _HEADER, {"k": kernel})
    assert bool(names) == (target in ("gfx942", "gfx950", "gfx1200"))
    if not names:
        return
    bias, largest = (8, 240.0) if target == "gfx942" else (7, 448.0)
    codes = np.arange(128 if target == "gfx942" else 127)  # the last code of the OCP format is not a number
    table = np.where(codes >> 3 > 0, (1 + (codes & 7) / 8) * 2.0 ** ((codes >> 3) - bias), (codes & 7) / 8 * 2.0 ** (1 - bias))
    values = np.concatenate([[0.0, 1.0, -1.0, 0.3, -0.7, 1e-3, 17.0, 1e6, -1e6], np.linspace(-300, 300, 119)]).astype(F32)
    packed, back = np.zeros(64, U32), np.zeros(128, F32)
    module.launch("k", (1, 1, 1), (N, 1, 1), [values, packed, back])
    table = table[table <= largest]
    for offset in (0, 64):
        x = values[offset : offset + N].astype(F64)
        nearest = np.abs(np.abs(np.clip(x, -largest, largest))[:, None] - table).min(1)
        np.testing.assert_allclose(np.abs(back[offset : offset + N] - np.clip(x, -largest, largest)), nearest, rtol=0, atol=1e-12)
        assert (np.sign(back[offset : offset + N]) == np.sign(np.where(np.abs(x) < 1e-4, 0, x))).all()
