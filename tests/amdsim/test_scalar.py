"""Every scalar instruction of the table, and every comparison, executed from assembly, against Python integers and numpy."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from amdsim.assembled import assemble
from amdsim.operands import width
from amdsim.scalar import ARITHMETIC
from amdsim.vector_table import COMPARISONS

_HEADER = Path(__file__).parent / "kernels" / "device.h"
_CASES = 64
M32 = (1 << 32) - 1
# (result, SCC or None where the instruction leaves it alone); `s` is SCC before, which the kernels set to a's lowest bit.
Reference = Callable[[int, int, int], tuple[int, int | None]]


def _signed(value: int, bits: int = 32) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _nonzero(function: Callable[[int, int], int], bits: int = 32) -> Reference:
    def reference(a: int, b: int, s: int) -> tuple[int, int]:
        z = function(a, b) & ((1 << bits) - 1)
        return z, int(z != 0)

    return reference


def _plain(function: Callable[[int, int, int], int]) -> Reference:
    return lambda a, b, s: (function(a, b, s), None)


def _overflow(sign: int) -> Reference:
    def reference(a: int, b: int, s: int) -> tuple[int, int]:
        exact = _signed(a) + sign * _signed(b)
        return exact, int(exact != _signed(exact))

    return reference


def _leading_signs(a: int) -> int:
    return -1 if a in (0, M32) else 32 - (a ^ (M32 if a >> 31 else 0)).bit_length()


def _field(a: int, b: int, bits: int) -> int:
    count = b >> 16 & 127
    return a >> (b & (bits - 1)) & ((1 << min(count, bits)) - 1)


def _signed_field(a: int, b: int) -> int:
    count = min(b >> 16 & 127, 32 - (b & 31))
    return _signed(_field(a, b, 32), count) if count else 0


REFERENCES: dict[str, Reference] = {
    "add_u32": lambda a, b, s: (a + b, (a + b) >> 32),
    "sub_u32": lambda a, b, s: (a - b, int(b > a)),
    "add_i32": _overflow(1),
    "sub_i32": _overflow(-1),
    "addc_u32": lambda a, b, s: (a + b + s, (a + b + s) >> 32),
    "subb_u32": lambda a, b, s: (a - b - s, int(b + s > a)),
    "add_u64": _plain(lambda a, b, s: a + b),
    "sub_u64": _plain(lambda a, b, s: a - b),
    "mul_u64": _plain(lambda a, b, s: a * b),
    "mul_i32": _plain(lambda a, b, s: a * b),
    "mul_hi_u32": _plain(lambda a, b, s: a * b >> 32),
    "mul_hi_i32": _plain(lambda a, b, s: _signed(a) * _signed(b) >> 32),
    "min_i32": lambda a, b, s: (min(_signed(a), _signed(b)), int(_signed(a) < _signed(b))),
    "max_i32": lambda a, b, s: (max(_signed(a), _signed(b)), int(_signed(a) > _signed(b))),
    "min_u32": lambda a, b, s: (min(a, b), int(a < b)),
    "max_u32": lambda a, b, s: (max(a, b), int(a > b)),
    "absdiff_i32": _nonzero(lambda a, b: abs(_signed(a) - _signed(b))),
    "abs_i32": _nonzero(lambda a, b: abs(_signed(a))),
    "bfe_u32": _nonzero(lambda a, b: _field(a, b, 32)),
    "bfe_i32": _nonzero(_signed_field),
    "bfe_u64": _nonzero(lambda a, b: _field(a, b, 64), 64),
    "bfm_b32": _plain(lambda a, b, s: ((1 << (a & 31)) - 1) << (b & 31)),
    "bfm_b64": _plain(lambda a, b, s: ((1 << (a & 63)) - 1) << (b & 63)),
    "brev_b32": _plain(lambda a, b, s: int(f"{a:032b}"[::-1], 2)),
    "brev_b64": _plain(lambda a, b, s: int(f"{a:064b}"[::-1], 2)),
    "sext_i32_i8": _plain(lambda a, b, s: _signed(a, 8)),
    "sext_i32_i16": _plain(lambda a, b, s: _signed(a, 16)),
    "ff1_i32_b32": _plain(lambda a, b, s: (a & -a).bit_length() - 1),
    "ff1_i32_b64": _plain(lambda a, b, s: (a & -a).bit_length() - 1),
    "flbit_i32_b32": _plain(lambda a, b, s: 32 - a.bit_length() if a else -1),
    "flbit_i32_b64": _plain(lambda a, b, s: 64 - a.bit_length() if a else -1),
    "flbit_i32": _plain(lambda a, b, s: _leading_signs(a)),
    "bcnt1_i32_b32": _nonzero(lambda a, b: a.bit_count()),
    "bcnt1_i32_b64": _nonzero(lambda a, b: a.bit_count()),
    "pack_ll_b32_b16": _plain(lambda a, b, s: (a & 0xFFFF) | b << 16),
    "pack_lh_b32_b16": _plain(lambda a, b, s: (a & 0xFFFF) | (b & 0xFFFF0000)),
    "pack_hh_b32_b16": _plain(lambda a, b, s: a >> 16 | (b & 0xFFFF0000)),
    "pack_hl_b32_b16": _plain(lambda a, b, s: a >> 16 | b << 16),
    **{f"lshl{n}_add_u32": (lambda a, b, s, n=n: ((a << n) + b, ((a << n) + b) >> 32 != 0)) for n in range(1, 5)},
}
for _bits in (32, 64):
    _mask = (1 << _bits) - 1
    REFERENCES |= {
        f"and_b{_bits}": _nonzero(lambda a, b: a & b, _bits),
        f"or_b{_bits}": _nonzero(lambda a, b: a | b, _bits),
        f"xor_b{_bits}": _nonzero(lambda a, b: a ^ b, _bits),
        f"andn2_b{_bits}": _nonzero(lambda a, b: a & ~b, _bits),
        f"orn2_b{_bits}": _nonzero(lambda a, b: a | ~b, _bits),
        f"nand_b{_bits}": _nonzero(lambda a, b: ~(a & b), _bits),
        f"nor_b{_bits}": _nonzero(lambda a, b: ~(a | b), _bits),
        f"xnor_b{_bits}": _nonzero(lambda a, b: ~(a ^ b), _bits),
        f"not_b{_bits}": _nonzero(lambda a, b: ~a, _bits),
        f"mov_b{_bits}": _plain(lambda a, b, s: a),
        f"cselect_b{_bits}": _plain(lambda a, b, s: a if s else b),
        f"lshl_b{_bits}": _nonzero(lambda a, b, n=_bits: a << (b & (n - 1)), _bits),
        f"lshr_b{_bits}": _nonzero(lambda a, b, n=_bits: a >> (b & (n - 1)), _bits),
        f"ashr_i{_bits}": _nonzero(lambda a, b, n=_bits: _signed(a, n) >> (b & (n - 1)), _bits),
    }


def _float_reference(function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Reference:
    def reference(a: int, b: int, s: int) -> tuple[int, None]:
        x, y = (np.array([value], np.uint32).view(np.float32) for value in (a, b))
        with np.errstate(all="ignore"):
            return int(np.asarray(function(x, y)).astype(np.float32).view(np.uint32)[0]), None

    return reference


REFERENCES |= {
    "add_f32": _float_reference(lambda x, y: x + y),
    "sub_f32": _float_reference(lambda x, y: x - y),
    "mul_f32": _float_reference(lambda x, y: x * y),
    "min_num_f32": _float_reference(np.fmin),
    "max_num_f32": _float_reference(np.fmax),
    "ceil_f32": _float_reference(lambda x, y: np.ceil(x)),
    "floor_f32": _float_reference(lambda x, y: np.floor(x)),
    "trunc_f32": _float_reference(lambda x, y: np.trunc(x)),
    "rndne_f32": _float_reference(lambda x, y: np.rint(x)),
    "cvt_f32_i32": _float_reference(lambda x, y: x.view(np.int32)),
    "cvt_f32_u32": _float_reference(lambda x, y: x.view(np.uint32)),
}
# Under their other names in the table: of gfx12, or of gfx9 to gfx11.
_ALIASES = {
    "add_co_u32": "add_u32",
    "sub_co_u32": "sub_u32",
    "add_co_i32": "add_i32",
    "sub_co_i32": "sub_i32",
    "add_co_ci_u32": "addc_u32",
    "sub_co_ci_u32": "subb_u32",
    "add_nc_u64": "add_u64",
    "sub_nc_u64": "sub_u64",
    "ctz_i32_b32": "ff1_i32_b32",
    "ctz_i32_b64": "ff1_i32_b64",
    "clz_i32_u32": "flbit_i32_b32",
    "clz_i32_u64": "flbit_i32_b64",
    "cls_i32": "flbit_i32",
    **{f"{new}_b{n}": f"{old}_b{n}" for new, old in (("and_not1", "andn2"), ("or_not1", "orn2")) for n in (32, 64)},
}
REFERENCES |= {alias: REFERENCES[name] for alias, name in _ALIASES.items()}


def _result_bits(name: str) -> int:
    """Conversions and counts of 64 bits have 32-bit results."""
    return 64 if name.endswith("64") and not name.startswith(("ff1", "ctz", "flbit", "clz", "bcnt1")) else 32


def _kernel(name: str) -> str:
    """A kernel of one lane whose workgroup number selects the operands; SCC starts as a's lowest bit and is stored beside the result."""
    kind_a, kind_b, _, _ = ARITHMETIC[name]
    result = f"u{_result_bits(name)}"
    types = ["u64" if width(kind) == 64 else "u32" for kind in (kind_a, kind_b) if kind]
    loads = "".join(f"const {kind} {letter} = ({kind}){letter}s[g]; " for kind, letter in zip(types, "ab", strict=False))
    operands = ", ".join(f"%{i + 2}" for i in range(len(types)))
    inputs = ", ".join(f'"s"({letter})' for letter in "ab"[: len(types)])
    assembly = f"s_bitcmp1_b32 %{2 + len(types)}, 0\\ns_{name} %0, {operands}\\ns_cselect_b32 %1, 1, 0"
    return (
        f"KERNEL(k_{name})(const u64* as, const u64* bs, u64* zs, u32* sccs) {{ const u32 g = __builtin_amdgcn_workgroup_id_x(); {loads}"
        f'{result} z; u32 scc; asm volatile("{assembly}" : "=&s"(z), "=&s"(scc) : {inputs}, "s"((u32)as[g]) : "scc"); '
        "zs[g] = z; sccs[g] = scc; }"
    )


def _operands(kind: str, rng: np.random.Generator) -> np.ndarray:
    if kind[0] == "f":
        return (rng.standard_normal(_CASES) * 100).astype(np.float32).view(np.uint32).astype(np.uint64)
    words = np.concatenate([rng.integers(0, 2**64 - 1, _CASES // 2, np.uint64), rng.integers(0, 40, _CASES // 2, np.uint64)])
    words[:6] = [0, 2**64 - 1, 1 << 31, (1 << 31) - 1, 1 << 63, 5 << 16 | 3]
    return rng.permutation(words) & np.uint64((1 << width(kind)) - 1)


def test_each_scalar_instruction_matches_its_reference(target: str, rng: np.random.Generator) -> None:
    module, names = assemble(target, _HEADER, {name: _kernel(name) for name in ARITHMETIC})
    # Rare ones are left to kernels that hold them.
    names = {name for name in names if name in REFERENCES}
    assert len(names) > 60
    module.prepare([f"k_{name}" for name in sorted(names)])
    for name in sorted(names):
        kind_a, kind_b, _, _ = ARITHMETIC[name]
        a, b = _operands(kind_a, rng), _operands(kind_b or "b32", rng)
        z, scc = np.zeros(_CASES, np.uint64), np.zeros(_CASES, np.uint32)
        module.launch(f"k_{name}", (_CASES, 1, 1), (1, 1, 1), [a, b, z, scc])
        for i in range(_CASES):
            before = int(a[i]) & 1
            expected, carry = REFERENCES[name](int(a[i]), int(b[i]), before)
            mask = (1 << _result_bits(name)) - 1
            found = (int(z[i]), int(scc[i]))
            assert found == (expected & mask, before if carry is None else int(carry)), (
                f"{target} s_{name} of {int(a[i]):#x}, {int(b[i]):#x}"
            )


_DTYPES = {"u16": np.uint16, "i16": np.int16, "u32": np.uint32, "i32": np.int32, "u64": np.uint64, "i64": np.int64}
_DTYPES |= {"f16": np.float16, "f32": np.float32, "f64": np.float64}
_FUNCTIONS = {"lt": np.less, "eq": np.equal, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "ne": np.not_equal}


def _compared(comparison: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    unordered = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(a.shape, bool)
    if comparison in ("o", "u"):
        return unordered == (comparison == "u")
    if comparison == "lg":
        return (a != b) & ~unordered
    if comparison in ("f", "t", "tru"):
        return np.full(a.shape, comparison != "f")
    if comparison.startswith("n") and comparison != "ne":
        return ~_compared({"neq": "eq"}.get(comparison, comparison[1:]), a, b)
    return _FUNCTIONS[comparison](a, b)


def test_each_comparison_matches_numpy(target: str, rng: np.random.Generator) -> None:
    wave = 64 if target.startswith("gfx9") else 32
    mask = "u64 m" if wave == 64 else "u32 m"
    sources = {}
    for kind in _DTYPES:
        size = "u64" if kind.endswith("64") else "u32"
        for comparison in COMPARISONS:
            name = f"{comparison}_{kind}"
            sources[name] = (
                f"KERNEL(k_{name})(const u64* as, const u64* bs, u32* out) {{ const u32 t = thread(); "
                f"const {size} a = ({size})as[t], b = ({size})bs[t]; {mask}; "
                f'asm volatile("v_cmp_{name} %0, %1, %2" : "=s"(m) : "v"(a), "v"(b)); out[t] = (u32)(m >> t & 1); }}'
            )
    module, names = assemble(target, _HEADER, sources)
    assert len(names) >= 6 * 9
    module.prepare()
    for name in sorted(names):
        comparison, kind = name.split("_")
        dtype = _DTYPES[kind]
        values = np.array([0, 1, 2, 3, 250], np.int64).astype(dtype)
        if kind[0] == "f":
            values = np.array([0.0, -0.0, 1.0, -2.0, np.inf, np.nan], dtype)
        elif kind[0] == "i":
            values = np.array([0, 1, -1, 100, -100], dtype)
        a, b = rng.choice(values, wave), rng.choice(values, wave)
        words = [v.view(f"u{v.itemsize}").astype(np.uint64) for v in (a, b)]
        out = np.zeros(wave, np.uint32)
        module.launch(f"k_{name}", (1, 1, 1), (wave, 1, 1), [*words, out])
        np.testing.assert_array_equal(out, _compared(comparison, a, b), err_msg=f"{target} v_cmp_{name}")


@pytest.mark.parametrize("bits", [0x001, 0x002, 0x004, 0x008, 0x010, 0x020, 0x040, 0x080, 0x100, 0x200])
def test_class_of_a_float(target: str, bits: int) -> None:
    source = (
        "KERNEL(k)(const u32* in, u32* out, u32 mask) { const u32 t = thread(), a = in[t]; u32 r; "
        'asm volatile("v_cmp_class_f32 vcc, %1, %2\\nv_cndmask_b32 %0, 0, 1, vcc" : "=v"(r) : "v"(a), "v"(mask) : "vcc"); out[t] = r; }'
    )
    if not target.startswith("gfx9"):
        source = source.replace("vcc,", "vcc_lo,").replace(", vcc\\", ", vcc_lo\\").replace('1, vcc"', '1, vcc_lo"')
    module, _ = assemble(target, _HEADER, {"k": source})
    denormal = struct.unpack("<f", struct.pack("<I", 5))[0]
    # In the order of the bits, of which the first two, signalling and quiet NaN, are not told apart.
    classes = [np.nan, np.nan, -np.inf, -1.0, -denormal, -0.0, 0.0, denormal, 1.0, np.inf]
    x, out = np.array(classes, np.float32), np.zeros(10, np.uint32)
    module.launch("k", (1, 1, 1), (10, 1, 1), [x, out, bits])
    expected = [bool(bits & 3) if i < 2 else bool(bits >> i & 1) for i in range(10)]
    np.testing.assert_array_equal(out, expected)
