"""What each vector instruction of the table computes, in numpy: a function of its source arrays, in the table's types."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Reference = Callable[..., np.ndarray]
REFERENCES: dict[str, Reference] = {}
U16, U32, U64, I16, I32, I64 = np.uint16, np.uint32, np.uint64, np.int16, np.int32, np.int64
F16, F32, F64 = np.float16, np.float32, np.float64


def _add(names: str, function: Reference) -> None:
    for name in names.split():
        REFERENCES["v_" + name] = function


def _wide(*values: np.ndarray) -> list[np.ndarray]:
    """Integers as 64 bits, with their sign; halves and floats as doubles."""
    return [v.astype(F64) if v.dtype.kind == "f" else v.astype(I64 if v.dtype.kind == "i" else U64) for v in values]


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c with one rounding. The product of two floats is exact in double; the sum is rounded to odd, and then to the type."""
    x, y = a.astype(F64) * b.astype(F64), c.astype(F64)
    total = x + y
    error = (x - (total - (total - x))) + (y - (total - x))
    inexact = np.isfinite(total) & (error != 0) & ((total.view(U64) & U64(1)) == 0)
    return np.where(inexact, np.nextafter(total, np.copysign(np.inf, error)), total).astype(a.dtype)


def _fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """As _fma for doubles, exact in fractions."""
    from fractions import Fraction

    def one(x: float, y: float, z: float) -> float:
        if not (np.isfinite(x) and np.isfinite(y) and np.isfinite(z)):
            return x * y + z
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        if exact == 0:
            return x * y + z
        try:
            return float(exact)
        except OverflowError:
            return np.inf if exact > 0 else -np.inf

    return np.array([one(float(x), float(y), float(z)) for x, y, z in zip(a, b, c, strict=True)])


def _minimum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    zero = (a == 0) & (b == 0)
    return np.where(zero, np.where(np.signbit(a), a, b), np.fmin(a, b))


def _maximum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    zero = (a == 0) & (b == 0)
    return np.where(zero, np.where(np.signbit(a), b, a), np.fmax(a, b))


def _median(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    if a.dtype.kind != "f":
        return np.sort(np.stack([a, b, c]), axis=0)[1]
    has_nan = np.isnan(a) | np.isnan(b) | np.isnan(c)
    middle = _maximum(_minimum(a, b), _minimum(_maximum(a, b), c))
    return np.where(has_nan, _minimum(_minimum(a, b), c), middle)


def _div_fixup(q: np.ndarray, d: np.ndarray, n: np.ndarray) -> np.ndarray:
    sign = np.where(np.signbit(d) != np.signbit(n), -1.0, 1.0)
    huge = np.isnan(q) & (np.frexp(n)[1] - np.frexp(d)[1] >= 96)  # has overflowed in the steps before
    result = np.where(huge, np.inf, np.abs(q)) * sign
    result = np.where((n == 0) | np.isinf(d), sign * 0.0, result)
    result = np.where((d == 0) | np.isinf(n), sign * np.inf, result)
    result = np.where(((n == 0) & (d == 0)) | (np.isinf(n) & np.isinf(d)), np.nan, result)
    return np.where(np.isnan(d) | np.isnan(n), np.nan, result).astype(q.dtype)


for _kind in ("f16", "f32", "f64"):
    _add(f"add_{_kind}", lambda a, b: a + b)
    _add(f"mul_{_kind}", lambda a, b: a * b)
    _add(f"max_{_kind} max_num_{_kind}", _maximum)
    _add(f"min_{_kind} min_num_{_kind}", _minimum)
    _add(f"rndne_{_kind}", np.rint)
    _add(f"floor_{_kind}", np.floor)
    _add(f"ceil_{_kind}", np.ceil)
    _add(f"trunc_{_kind}", np.trunc)
    _add(f"fract_{_kind}", lambda a: a - np.floor(a))
for _kind in ("f16", "f32"):
    _add(f"sub_{_kind}", lambda a, b: a - b)
    _add(f"subrev_{_kind}", lambda a, b: b - a)
    _add(f"max3_{_kind} max3_num_{_kind}", lambda a, b, c: _maximum(_maximum(a, b), c))
    _add(f"min3_{_kind} min3_num_{_kind}", lambda a, b, c: _minimum(_minimum(a, b), c))
    _add(f"med3_{_kind} med3_num_{_kind}", _median)
    _add(f"minmax_{_kind} minmax_num_{_kind}", lambda a, b, c: _maximum(_minimum(a, b), c))
    _add(f"maxmin_{_kind} maxmin_num_{_kind}", lambda a, b, c: _minimum(_maximum(a, b), c))
    _add(f"div_fixup_{_kind}", _div_fixup)
    _add(f"fma_{_kind} fmaak_{_kind} fmamk_{_kind} fmac_{_kind}", _fma)
_add("fma_f64 fmac_f64", _fma64)
_add("mad_f32 madak_f32 madmk_f32 mac_f32", lambda a, b, c: a * b + c)
_add("mul_legacy_f32 mul_dx9_zero_f32", lambda a, b: np.where((a == 0) | (b == 0), F32(0), a * b))
_add("ldexp_f16 ldexp_f32 ldexp_f64", lambda a, b: np.ldexp(a.astype(F64), np.clip(b, -4000, 4000).astype(I32)).astype(a.dtype))
_add("frexp_mant_f32", lambda a: np.where(np.isfinite(a), np.frexp(a)[0], a))
_add("frexp_exp_i32_f32", lambda a: np.where(np.isfinite(a), np.frexp(a)[1], 0).astype(I32))


def _flush(a: np.ndarray) -> np.ndarray:
    return np.where(np.abs(a) < np.finfo(F32).tiny, np.copysign(0, a), a).astype(F32)


# One rounding from double: what the emulator promises for functions whose last bit the hardware leaves open.
_add("rcp_f32 rcp_iflag_f32 rcp_f16", lambda a: (1 / a.astype(F64)).astype(a.dtype))
_add("rcp_f64", lambda a: 1 / a)
_add("rsq_f32 rsq_f16 rsq_f64", lambda a: (1 / np.sqrt(a.astype(F64))).astype(a.dtype))
_add("sqrt_f16 sqrt_f32 sqrt_f64", lambda a: np.sqrt(a.astype(F64)).astype(a.dtype))
_add("exp_f32", lambda a: _flush(np.exp2(a.astype(F64)).astype(F32)))
_add("exp_f16", lambda a: np.exp2(a.astype(F64)).astype(F16))
_add("log_f32", lambda a: np.log2(_flush(a).astype(F64)).astype(F32))
_add("log_f16", lambda a: np.log2(a.astype(F64)).astype(F16))
_add("sin_f32", lambda a: np.sin(2 * np.pi * a.astype(F64)).astype(F32))
_add("cos_f32", lambda a: np.cos(2 * np.pi * a.astype(F64)).astype(F32))

# ---- integers: the caller cuts results to the width of the type ------------------------------------------------------------

_add("add_u32 add_nc_u32 add_nc_i32 add_i32 add_u16 add_nc_u16 add_nc_i16 add_i16", lambda a, b: a + b)
_add("sub_u32 sub_nc_u32 sub_nc_i32 sub_i32 sub_u16 sub_nc_u16 sub_nc_i16 sub_i16", lambda a, b: a - b)
_add("subrev_u32 subrev_nc_u32 subrev_u16", lambda a, b: b - a)
_add("mul_lo_u16 mul_lo_u32", lambda a, b: a * b)
_add("mad_u16 mad_i16 mad_legacy_u16", lambda a, b, c: a * b + c)
_add("mul_hi_u32 mul_hi_i32", lambda a, b: np.multiply(*_wide(a, b)) >> (I64(32) if a.dtype.kind == "i" else U64(32)))
_add("mul_u32_u24", lambda a, b: (a & U32(0xFFFFFF)) * (b & U32(0xFFFFFF)))
_add("mul_hi_u32_u24", lambda a, b: (a.astype(U64) & U64(0xFFFFFF)) * (b.astype(U64) & U64(0xFFFFFF)) >> U64(32))
_add("mad_u32_u24", lambda a, b, c: (a & U32(0xFFFFFF)) * (b & U32(0xFFFFFF)) + c)


def _signed24(a: np.ndarray) -> np.ndarray:
    low = (a & U32(0xFFFFFF)).astype(I64)
    return np.where(low >> 23, low - (1 << 24), low)


_add("mul_i32_i24", lambda a, b: _signed24(a) * _signed24(b))
_add("mad_i32_i24", lambda a, b, c: _signed24(a) * _signed24(b) + c.astype(I64))
_add("mad_u32_u16 mad_i32_i16", lambda a, b, c: a.astype(I64) * b.astype(I64) + c.astype(I64))
_add("sad_u32", lambda a, b, c: np.abs(a.astype(I64) - b.astype(I64)) + c.astype(I64))
_add("add3_u32", lambda a, b, c: a + b + c)
_add("lshl_add_u32", lambda a, b, c: (a << (b & U32(31))) + c)
_add("add_lshl_u32", lambda a, b, c: (a + b) << (c & U32(31)))
_add("lshl_add_u64", lambda a, b, c: (a << (b.astype(U64) & U64(63))) + c)
_add("xad_u32", lambda a, b, c: (a ^ b) + c)
for _kind in ("i32", "u32", "i16", "u16"):
    _add(f"max_{_kind}", np.maximum)
    _add(f"min_{_kind}", np.minimum)
    _add(f"max3_{_kind}", lambda a, b, c: np.maximum(np.maximum(a, b), c))
    _add(f"min3_{_kind}", lambda a, b, c: np.minimum(np.minimum(a, b), c))
    _add(f"med3_{_kind}", _median)
_add("minmax_i32 minmax_u32", lambda a, b, c: np.maximum(np.minimum(a, b), c))
_add("maxmin_i32 maxmin_u32", lambda a, b, c: np.minimum(np.maximum(a, b), c))
for _kind in ("b16", "b32"):
    _add(f"and_{_kind}", np.bitwise_and)
    _add(f"or_{_kind}", np.bitwise_or)
    _add(f"xor_{_kind}", np.bitwise_xor)
    _add(f"not_{_kind}", np.invert)
    _add(f"mov_{_kind}", lambda a: a)
_add("xnor_b32", lambda a, b: ~(a ^ b))
_add("mov_b64 accvgpr_read_b32 accvgpr_write_b32 accvgpr_mov_b32", lambda a: a)


def _shift(function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Reference:
    return lambda a, b: function(b, (a & a.dtype.type(8 * b.itemsize - 1)).astype(b.dtype))


for _size in (16, 32, 64):
    _add(f"lshlrev_b{_size}", _shift(np.left_shift))
    _add(f"lshrrev_b{_size} ashrrev_i{_size}", _shift(np.right_shift))
_add("lshl_or_b32", lambda a, b, c: (a << (b & U32(31))) | c)
_add("and_or_b32", lambda a, b, c: (a & b) | c)
_add("or3_b32", lambda a, b, c: a | b | c)
_add("xor3_b32", lambda a, b, c: a ^ b ^ c)
_add("bfi_b32", lambda a, b, c: (a & b) | (~a & c))


def _each(function: Callable[..., int]) -> Reference:
    """From a function of Python integers; the result is cut to 32 bits."""
    return lambda *arrays: np.array([function(*map(int, lane)) & 0xFFFFFFFF for lane in zip(*arrays, strict=True)], U32)


def _field(a: int, offset: int, bits: int) -> int:
    return a >> (offset & 31) & ((1 << (bits & 31)) - 1)


def _signed_field(a: int, offset: int, bits: int) -> int:
    offset, bits = offset & 31, bits & 31
    if bits == 0:
        return 0
    bits = min(bits, 32 - offset)
    value = _field(a, offset, bits) if bits < 32 else a
    return value - (1 << bits) if value >> (bits - 1) else value


def _permute(a: int, b: int, selectors: int) -> int:
    data = (a << 32 | b).to_bytes(8, "little")
    signs = [0xFF if data[i] & 0x80 else 0 for i in (1, 3, 5, 7)]
    table = [*data, *signs, 0x00, *[0xFF] * 243]
    return int.from_bytes(bytes(table[s] for s in selectors.to_bytes(4, "little")), "little")


_add("bfe_u32", _each(_field))
_add("bfe_i32", _each(_signed_field))
_add("bfm_b32", _each(lambda a, b: ((1 << (a & 31)) - 1) << (b & 31)))
_add("bfrev_b32", _each(lambda a: int(f"{a:032b}"[::-1], 2)))
_add("perm_b32", _each(_permute))
_add("alignbit_b32", _each(lambda a, b, c: (a << 32 | b) >> (c & 31)))
_add("alignbyte_b32", _each(lambda a, b, c: (a << 32 | b) >> 8 * (c & 3)))
_add("bcnt_u32_b32", _each(lambda a, b: a.bit_count() + b))
_add("ffbh_u32 clz_i32_u32", _each(lambda a: 32 - a.bit_length() if a else -1))
_add("ffbl_b32 ctz_i32_b32", _each(lambda a: (a & -a).bit_length() - 1))
_add("ffbh_i32 cls_i32", _each(lambda a: -1 if a in (0, 0xFFFFFFFF) else 32 - (a if a >> 31 == 0 else ~a & 0xFFFFFFFF).bit_length()))


def _count_below(mask: np.ndarray, b: np.ndarray, first: int) -> np.ndarray:
    counts = [(int(m) & ((1 << max(0, min(32, lane - first))) - 1)).bit_count() for lane, m in enumerate(mask)]
    return np.array(counts, U32) + b


_add("mbcnt_lo_u32_b32", lambda a, b: _count_below(a, b, 0))
_add("mbcnt_hi_u32_b32", lambda a, b: _count_below(a, b, 32))

# ---- conversions -----------------------------------------------------------------------------------------------------------


def _truncate(low: int, high: int) -> Reference:
    """Toward zero, saturating, NaN to 0."""
    return lambda a: np.clip(np.trunc(np.nan_to_num(a.astype(F64), nan=0.0, posinf=2.0**40, neginf=-(2.0**40))), low, high).astype(I64)


def _rounded(function: Callable[[np.ndarray], np.ndarray]) -> Reference:
    return lambda a: _truncate(-(2**31), 2**31 - 1)(function(a))


def _half_toward_zero(a: np.ndarray) -> np.ndarray:
    near = a.astype(F16)
    back, value = near.astype(F64), a.astype(F64)
    over = np.abs(back) > np.abs(value)
    return np.where(over, near.view(U16) - U16(1), near.view(U16)).astype(U32)


def _bfloat(a: np.ndarray) -> np.ndarray:
    word = a.view(U32)
    rounded = (word.astype(U64) + U64(0x7FFF) + (word >> U32(16) & U32(1)).astype(U64)) >> U64(16)
    return np.where(np.isnan(a), word >> U32(16) | U32(0x40), rounded.astype(U32)).astype(U32)


_add("cvt_f32_f16 cvt_f16_f32 cvt_f64_f32 cvt_f32_f64", lambda a: a)
_add("cvt_f32_bf16", lambda a: (a.astype(U32) << U32(16)).view(F32))
_add("cvt_f32_u32 cvt_f32_i32 cvt_f64_u32 cvt_f64_i32 cvt_f16_u16 cvt_f16_i16", lambda a: a)
_add("cvt_u32_f32 cvt_u32_f64", _truncate(0, 2**32 - 1))
_add("cvt_i32_f32 cvt_i32_f64", _truncate(-(2**31), 2**31 - 1))
_add("cvt_u16_f16", _truncate(0, 65535))
_add("cvt_i16_f16", _truncate(-32768, 32767))
_add("cvt_rpi_i32_f32 cvt_nearest_i32_f32", _rounded(lambda a: np.floor(a + F32(0.5))))
_add("cvt_flr_i32_f32 cvt_floor_i32_f32", _rounded(np.floor))
_add("cvt_i32_i16 cvt_u32_u16", lambda a: a)
for _byte in range(4):
    _add(f"cvt_f32_ubyte{_byte}", lambda a, shift=8 * _byte: (a >> U32(shift) & U32(255)).astype(F32))
_add("cvt_pkrtz_f16_f32 cvt_pk_rtz_f16_f32", lambda a, b: _half_toward_zero(a) | _half_toward_zero(b) << U32(16))
_add("cvt_pk_f16_f32", lambda a, b: a.astype(F16).view(U16).astype(U32) | b.astype(F16).view(U16).astype(U32) << U32(16))
_add("cvt_pk_bf16_f32", lambda a, b: _bfloat(a) | _bfloat(b) << U32(16))
_add("pack_b32_f16", lambda a, b: a.astype(U32) | b.astype(U32) << U32(16))
_add("cvt_pk_u16_u32", lambda a, b: np.minimum(a, 65535) | np.minimum(b, 65535) << U32(16))
_add(
    "cvt_pk_i16_i32",
    lambda a, b: np.clip(a, -32768, 32767).astype(U16).astype(U32) | np.clip(b, -32768, 32767).astype(U16).astype(U32) << U32(16),
)


def _pack_byte(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    byte = np.clip(np.rint(np.nan_to_num(a.astype(F64), nan=0.0, posinf=1e9, neginf=-1e9)), 0, 255).astype(U32)
    shift = U32(8) * (b & U32(3))
    return (c & ~(U32(255) << shift)) | byte << shift


_add("cvt_pk_u8_f32", _pack_byte)

# ---- dot products ----------------------------------------------------------------------------------------------------------


def _halves(a: np.ndarray) -> np.ndarray:
    return a.view(F16).reshape(-1, 2).astype(F64)


def _bfloats(a: np.ndarray) -> np.ndarray:
    return (a.view(U16).astype(U32) << U32(16)).view(F32).reshape(-1, 2).astype(F64)


_add("dot2_f32_f16 dot2c_f32_f16 dot2acc_f32_f16", lambda a, b, c: (_halves(a) * _halves(b)).sum(1) + c)
_add("dot2_f32_bf16", lambda a, b, c: (_bfloats(a) * _bfloats(b)).sum(1) + c)
