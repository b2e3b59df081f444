"""Vector instructions that compute each lane's result from its own sources: mnemonic -> (result type, source types, C++ expression).

Sources are a, b, c; the source type "D" stands for the old destination. Types are those of operands.CPP_TYPES.
"""

from __future__ import annotations

Operation = tuple[str, tuple[str, ...], str]
OPERATIONS: dict[str, Operation] = {}


def _define(names: str, result: str, sources: str, expression: str) -> None:
    for name in names.split():
        OPERATIONS["v_" + name] = (result, tuple(sources.split()), expression)


def _float_arithmetic() -> None:
    for kind in ("f16", "f32", "f64"):
        two = f"{kind} {kind}"
        for name, expression in (("add", "a+b"), ("mul", "a*b")):
            _define(f"{name}_{kind}", kind, two, expression)
        _define(f"max_{kind} max_num_{kind}", kind, two, "max_num(a,b)")
        _define(f"min_{kind} min_num_{kind}", kind, two, "min_num(a,b)")
        for name, function in (("rndne", "nearbyint"), ("floor", "floor"), ("ceil", "ceil"), ("trunc", "trunc")):
            _define(f"{name}_{kind}", kind, kind, f"std::{function}(a)")
        _define(f"fract_{kind}", kind, kind, "a-std::floor(a)")
    for kind in ("f16", "f32"):
        three = f"{kind} {kind} {kind}"
        _define(f"sub_{kind}", kind, f"{kind} {kind}", "a-b")
        _define(f"subrev_{kind}", kind, f"{kind} {kind}", "b-a")
        _define(f"max3_{kind} max3_num_{kind}", kind, three, "max_num(max_num(a,b),c)")
        _define(f"min3_{kind} min3_num_{kind}", kind, three, "min_num(min_num(a,b),c)")
        _define(f"med3_{kind} med3_num_{kind}", kind, three, "median(a,b,c)")
        _define(f"minmax_{kind} minmax_num_{kind}", kind, three, "max_num(min_num(a,b),c)")
        _define(f"maxmin_{kind} maxmin_num_{kind}", kind, three, "min_num(max_num(a,b),c)")
        _define(f"div_fixup_{kind}", kind, three, "div_fixup(a,b,c)")
    _define("mul_legacy_f32 mul_dx9_zero_f32", "f32", "f32 f32", "(a==0||b==0)?0.f:a*b")
    _define("fma_f32 fmaak_f32 fmamk_f32", "f32", "f32 f32 f32", "std::fmaf(a,b,c)")
    _define("fmac_f32", "f32", "f32 f32 D", "std::fmaf(a,b,c)")
    _define("mad_f32 madak_f32 madmk_f32", "f32", "f32 f32 f32", "a*b+c")
    _define("mac_f32", "f32", "f32 f32 D", "a*b+c")
    _define("fma_f16 fmaak_f16 fmamk_f16", "f16", "f16 f16 f16", "(double)a*(double)b+(double)c")
    _define("fmac_f16", "f16", "f16 f16 D", "(double)a*(double)b+(double)c")
    _define("fma_f64", "f64", "f64 f64 f64", "std::fma(a,b,c)")
    _define("fmac_f64", "f64", "f64 f64 D", "std::fma(a,b,c)")
    _define("ldexp_f32", "f32", "f32 i32", "std::ldexp(a,b)")
    _define("ldexp_f16", "f16", "f16 i16", "std::ldexp(a,b)")
    _define("ldexp_f64", "f64", "f64 i32", "std::ldexp(a,b)")
    _define("frexp_mant_f32", "f32", "f32", "mantissa_of(a)")
    _define("frexp_exp_i32_f32", "b32", "f32", "exponent_of(a)")


def _transcendentals() -> None:
    _define("rcp_f32 rcp_iflag_f32", "f32", "f32", "reciprocal(a)")
    _define("rsq_f32", "f32", "f32", "reciprocal_sqrt(a)")
    _define("sqrt_f32", "f32", "f32", "std::sqrt(a)")
    _define("exp_f32", "f32", "f32", "exp2_flushed(a)")
    _define("log_f32", "f32", "f32", "log2_flushed(a)")
    _define("sin_f32", "f32", "f32", "sin_turns(a)")
    _define("cos_f32", "f32", "f32", "cos_turns(a)")
    _define("rcp_f16", "f16", "f16", "1.0/a")
    _define("sqrt_f16", "f16", "f16", "std::sqrt((double)a)")
    _define("rsq_f16", "f16", "f16", "1.0/std::sqrt((double)a)")
    _define("exp_f16", "f16", "f16", "std::exp2((double)a)")
    _define("log_f16", "f16", "f16", "std::log2((double)a)")
    _define("rcp_f64", "f64", "f64", "1.0/a")
    _define("rsq_f64", "f64", "f64", "1.0/std::sqrt(a)")
    _define("sqrt_f64", "f64", "f64", "std::sqrt(a)")


def _integer_arithmetic() -> None:
    _define("add_u32 add_nc_u32 add_nc_i32 add_i32", "b32", "b32 b32", "a+b")
    _define("sub_u32 sub_nc_u32 sub_nc_i32 sub_i32", "b32", "b32 b32", "a-b")
    _define("subrev_u32 subrev_nc_u32", "b32", "b32 b32", "b-a")
    _define("add_u16 add_nc_u16 add_nc_i16 add_i16", "b16", "b16 b16", "a+b")
    _define("sub_u16 sub_nc_u16 sub_nc_i16 sub_i16", "b16", "b16 b16", "a-b")
    _define("subrev_u16", "b16", "b16 b16", "b-a")
    _define("mul_lo_u16", "b16", "b16 b16", "(u32)a*b")
    _define("mad_u16 mad_i16 mad_legacy_u16", "b16", "b16 b16 b16", "(u32)a*b+c")
    _define("mul_lo_u32", "b32", "b32 b32", "a*b")
    _define("mul_hi_u32", "b32", "b32 b32", "(u32)((u64)a*b>>32)")
    _define("mul_hi_i32", "b32", "i32 i32", "(u32)((i64)a*b>>32)")
    _define("mul_u32_u24", "b32", "b32 b32", "(a&0xffffff)*(b&0xffffff)")
    _define("mul_hi_u32_u24", "b32", "b32 b32", "(u32)((u64)(a&0xffffff)*(b&0xffffff)>>32)")
    _define("mul_i32_i24", "b32", "b32 b32", "(u32)((i32)(a<<8)>>8)*(u32)((i32)(b<<8)>>8)")
    _define("mad_u32_u24", "b32", "b32 b32 b32", "(a&0xffffff)*(b&0xffffff)+c")
    _define("mad_i32_i24", "b32", "b32 b32 b32", "(u32)((i32)(a<<8)>>8)*(u32)((i32)(b<<8)>>8)+c")
    _define("mad_u32_u16", "b32", "b16 b16 b32", "(u32)a*b+c")
    _define("mad_i32_i16", "b32", "i16 i16 b32", "(u32)((i32)a*b)+c")
    _define("sad_u32", "b32", "b32 b32 b32", "(a>b?a-b:b-a)+c")
    _define("add3_u32", "b32", "b32 b32 b32", "a+b+c")
    _define("lshl_add_u32", "b32", "b32 b32 b32", "(a<<(b&31))+c")
    _define("add_lshl_u32", "b32", "b32 b32 b32", "(a+b)<<(c&31)")
    _define("lshl_add_u64", "b64", "b64 b32 b64", "(a<<(b&63))+c")
    _define("xad_u32", "b32", "b32 b32 b32", "(a^b)+c")
    for suffix, kind, result in (("i32", "i32", "b32"), ("u32", "b32", "b32"), ("i16", "i16", "b16"), ("u16", "b16", "b16")):
        two, three = f"{kind} {kind}", f"{kind} {kind} {kind}"
        _define(f"max_{suffix}", result, two, "std::max(a,b)")
        _define(f"min_{suffix}", result, two, "std::min(a,b)")
        _define(f"max3_{suffix}", result, three, "std::max(std::max(a,b),c)")
        _define(f"min3_{suffix}", result, three, "std::min(std::min(a,b),c)")
        _define(f"med3_{suffix}", result, three, "median(a,b,c)")
        if kind in ("i32", "b32"):
            _define(f"minmax_{suffix}", result, three, "std::max(std::min(a,b),c)")
            _define(f"maxmin_{suffix}", result, three, "std::min(std::max(a,b),c)")


def _bits() -> None:
    for kind in ("b16", "b32"):
        two = f"{kind} {kind}"
        for name, expression in (("and", "a&b"), ("or", "a|b"), ("xor", "a^b")):
            _define(f"{name}_{kind}", kind, two, expression)
        _define(f"not_{kind}", kind, kind, "~a")
        _define(f"mov_{kind}", kind, kind, "a")
    _define("accvgpr_read_b32 accvgpr_write_b32 accvgpr_mov_b32", "b32", "b32", "a")
    _define("xnor_b32", "b32", "b32 b32", "~(a^b)")
    _define("mov_b64", "b64", "b64", "a")
    for size, count in ((16, "b16"), (32, "b32"), (64, "b32")):
        _define(f"lshlrev_b{size}", f"b{size}", f"{count} b{size}", f"b<<(a&{size - 1})")
        _define(f"lshrrev_b{size}", f"b{size}", f"{count} b{size}", f"b>>(a&{size - 1})")
        _define(f"ashrrev_i{size}", f"b{size}", f"{count} i{size}", f"b>>(a&{size - 1})")
    _define("lshl_or_b32", "b32", "b32 b32 b32", "(a<<(b&31))|c")
    _define("and_or_b32", "b32", "b32 b32 b32", "(a&b)|c")
    _define("or3_b32", "b32", "b32 b32 b32", "a|b|c")
    _define("xor3_b32", "b32", "b32 b32 b32", "a^b^c")
    _define("bfe_u32", "b32", "b32 b32 b32", "extract(a,b,c)")
    _define("bfe_i32", "b32", "b32 b32 b32", "extract_signed(a,b,c)")
    _define("bfi_b32", "b32", "b32 b32 b32", "(a&b)|(~a&c)")
    _define("bfm_b32", "b32", "b32 b32", "((1u<<(a&31))-1)<<(b&31)")
    _define("bfrev_b32", "b32", "b32", "reverse_bits(a)")
    _define("perm_b32", "b32", "b32 b32 b32", "permute_bytes(a,b,c)")
    _define("alignbit_b32", "b32", "b32 b32 b32", "(u32)(((u64)a<<32|b)>>(c&31))")
    _define("alignbyte_b32", "b32", "b32 b32 b32", "(u32)(((u64)a<<32|b)>>8*(c&3))")
    _define("bcnt_u32_b32", "b32", "b32 b32", "(u32)__builtin_popcount(a)+b")
    _define("ffbh_u32 clz_i32_u32", "b32", "b32", "leading_zeros(a)")
    _define("ffbl_b32 ctz_i32_b32", "b32", "b32", "trailing_zeros(a)")
    _define("ffbh_i32 cls_i32", "b32", "b32", "leading_signs(a)")
    _define("mbcnt_lo_u32_b32", "b32", "b32 b32", "(u32)__builtin_popcount(a&(l>=32?~0u:(1u<<(l&31))-1))+b")
    _define("mbcnt_hi_u32_b32", "b32", "b32 b32", "(l<32?0u:(u32)__builtin_popcount(a&((1u<<(l&31))-1)))+b")


def _conversions() -> None:
    _define("cvt_f32_f16", "f32", "f16", "a")
    _define("cvt_f16_f32", "f16", "f32", "a")
    _define("cvt_f32_bf16", "f32", "b16", "bf16(a)")
    for integer, kind, name in (("u32", "b32", "u32"), ("i32", "i32", "i32")):
        _define(f"cvt_f32_{integer}", "f32", kind, "(float)a")
        _define(f"cvt_f64_{integer}", "f64", kind, "(double)a")
        _define(f"cvt_{integer}_f32", "b32", "f32", f"(u32)to_int<{name}>(a)")
        _define(f"cvt_{integer}_f64", "b32", "f64", f"(u32)to_int<{name}>(a)")
    for integer, kind in (("u16", "b16"), ("i16", "i16")):
        _define(f"cvt_f16_{integer}", "f16", kind, "(float)a")
        _define(f"cvt_{integer}_f16", "b16", "f16", f"(u16)to_int<{integer}>(a)")
    _define("cvt_rpi_i32_f32 cvt_nearest_i32_f32", "b32", "f32", "(u32)to_int<i32>(std::floor(a+0.5f))")
    _define("cvt_flr_i32_f32 cvt_floor_i32_f32", "b32", "f32", "(u32)to_int<i32>(std::floor(a))")
    _define("cvt_i32_i16", "b32", "i16", "(u32)(i32)a")
    _define("cvt_u32_u16", "b32", "b16", "(u32)a")
    _define("cvt_f64_f32", "f64", "f32", "(double)a")
    _define("cvt_f32_f64", "f32", "f64", "(float)a")
    for byte in range(4):
        _define(f"cvt_f32_ubyte{byte}", "f32", "b32", f"(float)(i32)(a>>{8 * byte}&255)")
    _define("cvt_pkrtz_f16_f32 cvt_pk_rtz_f16_f32", "b32", "f32 f32", "(u32)half_toward_zero(a)|(u32)half_toward_zero(b)<<16")
    _define("cvt_pk_f16_f32", "b32", "f32 f32", "(u32)half(a)|(u32)half(b)<<16")
    _define("cvt_pk_bf16_f32", "b32", "f32 f32", "(u32)bfloat(a)|(u32)bfloat(b)<<16")
    _define("pack_b32_f16", "b32", "b16 b16", "(u32)a|(u32)b<<16")
    _define("cvt_pk_u16_u32", "b32", "b32 b32", "std::min(a,65535u)|std::min(b,65535u)<<16")
    _define("cvt_pk_i16_i32", "b32", "i32 i32", "(u32)(u16)std::clamp(a,-32768,32767)|(u32)(u16)std::clamp(b,-32768,32767)<<16")
    _define("cvt_pk_u8_f32", "b32", "f32 b32 b32", "(c&~(255u<<8*(b&3)))|std::min(255u,to_int<u32>(std::nearbyint(a)))<<8*(b&3)")


def _dot_products() -> None:
    half_pairs = "(float)((double)f16(a)*f16(b)+(double)f16(a>>16)*f16(b>>16)+c)"
    _define("dot2_f32_f16", "f32", "b32 b32 f32", half_pairs)
    _define("dot2c_f32_f16 dot2acc_f32_f16", "f32", "b32 b32 D", half_pairs)
    _define("dot2_f32_bf16", "f32", "b32 b32 f32", "(float)((double)bf16(a)*bf16(b)+(double)bf16(a>>16)*bf16(b>>16)+c)")


_float_arithmetic()
_transcendentals()
_integer_arithmetic()
_bits()
_conversions()
_dot_products()

# Comparisons of v_cmp and s_cmp.
COMPARISONS = {
    "lt": "a<b",
    "eq": "a==b",
    "le": "a<=b",
    "gt": "a>b",
    "lg": "(a<b||a>b)",
    "ne": "a!=b",
    "ge": "a>=b",
    "o": "(a==a&&b==b)",
    "u": "(a!=a||b!=b)",
    "nge": "!(a>=b)",
    "nlg": "!(a<b||a>b)",
    "ngt": "!(a>b)",
    "nle": "!(a<=b)",
    "neq": "!(a==b)",
    "nlt": "!(a<b)",
    "f": "false",
    "t": "true",
    "tru": "true",
}
