"""Every vector instruction of the table, executed from assembly, against numpy."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from amdsim import Module
from amdsim.assembled import assemble
from amdsim.operands import width
from amdsim.testing import compile_text, require_target
from amdsim.vector import bit_function
from amdsim.vector_table import OPERATIONS
from vector_references import REFERENCES

_HEADER = Path(__file__).parent / "kernels" / "device.h"
_LITERAL = 0x40490FDB  # of the instructions that take a constant: pi as a float, 2.142 as the half in its low part
_LANES = 64


def _kernel(name: str) -> str:
    """A kernel that reads a, b, c, d as 64-bit words per lane and writes d."""
    result, kinds, _ = OPERATIONS[name]
    explicit = [kind for kind in kinds if kind != "D"]
    types = ["u64" if width(kind) == 64 else "u32" for kind in explicit]
    result_type = "u64" if width(result) == 64 else "u32"
    loads = "".join(f"const {kind} {letter} = ({kind}){letter}s[t]; " for kind, letter in zip(types, "abc", strict=False))
    operands = [f"%{i + 1}" for i in range(len(explicit))]
    if re.match(r"v_(fma|mad)ak_", name):
        operands[2] = f"{_LITERAL & 0xFFFF if result == 'f16' else _LITERAL:#x}"
    elif re.match(r"v_(fma|mad)mk_", name):
        operands = [operands[0], f"{_LITERAL & 0xFFFF if result == 'f16' else _LITERAL:#x}", operands[1]]
        explicit = explicit[:2]
    accumulator = {"v_accvgpr_write_b32": ("a", "v"), "v_accvgpr_read_b32": ("v", "a"), "v_accvgpr_mov_b32": ("a", "a")}
    target, source = accumulator.get(name, ("v", "v"))
    inputs = ", ".join(f'"{source}"({letter})' for letter in "abc"[: len(explicit)])
    assembly = f'asm volatile("{name} %0, {", ".join(operands)}" : "+{target}"(d) : {inputs});'
    return (
        f"KERNEL(k_{name})(const u64* as, const u64* bs, const u64* cs, u64* ds) {{ const u32 t = thread(); {loads}"
        f"{result_type} d = ({result_type})ds[t]; {assembly} ds[t] = d; }}\n"
    )


def _assemble(target: str) -> tuple[Module, set[str]]:
    """All instructions of the table that the target has, and their names."""
    module, names = assemble(target, _HEADER, {name: _kernel(name) for name in sorted(OPERATIONS)})
    assert len(names) > 100
    return module, names


def _inputs(kind: str, rng: np.random.Generator) -> np.ndarray:
    """64 values of a type as unsigned 64-bit words, with noise above narrow ones: special values first, then random ones."""
    bits = width(kind)
    if kind[0] == "f":
        dtype = {16: np.float16, 32: np.float32, 64: np.float64}[bits]
        tiny = float(np.finfo(dtype).tiny)
        special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.5, 0.5, 2.5, tiny, tiny / 4, -tiny / 4, float(np.finfo(dtype).max), 3.0]
        values = np.concatenate([special, rng.standard_normal(_LANES - len(special)) * 8]).astype(dtype)
        rng.shuffle(values)
        words = values.view(f"u{bits // 8}").astype(np.uint64)
    else:
        small = rng.integers(0, 64, _LANES // 2, dtype=np.uint64)
        words = np.concatenate([small, rng.integers(0, 2**64 - 1, _LANES - len(small), dtype=np.uint64)])
        words[:4] = [0, 1, 2**64 - 1, 1 << (bits - 1)]
        rng.shuffle(words)
        words &= np.uint64((1 << bits) - 1)
    noise = rng.integers(0, 2**32, _LANES, dtype=np.uint64) << np.uint64(16) if bits == 16 else np.uint64(0)
    return words | (noise & np.uint64(0xFFFFFFFF))


def _typed(words: np.ndarray, kind: str) -> np.ndarray:
    bits = width(kind)
    narrow = np.ascontiguousarray(words.astype(f"u{bits // 8}"))
    return narrow.view({"b": f"u{bits // 8}", "i": f"i{bits // 8}", "f": f"f{bits // 8}"}[kind[0]])


def _expected(name: str, words: dict[str, np.ndarray], wave: int) -> np.ndarray:
    """The reference's result as unsigned words of the result's width."""
    result, kinds, _ = OPERATIONS[name]
    values = [
        _typed(words["d" if kind == "D" else letter], result if kind == "D" else kind) for letter, kind in zip("abc", kinds, strict=False)
    ]
    if match := re.match(r"v_(?:fma|mad)(ak|mk)_", name):  # a * b + constant, a * constant + b
        constant = np.full_like(values[0], _typed(np.array([_LITERAL]), kinds[0])[0])
        values = [*values[:2], constant] if match[1] == "ak" else [values[0], constant, values[1]]
    with np.errstate(all="ignore"):
        computed = REFERENCES[name](*[value[:wave] for value in values])
    unsigned = f"u{width(result) // 8}"
    if result[0] == "f":
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(computed).astype(f"f{width(result) // 8}").view(unsigned)
    return np.asarray(computed).astype(np.int64 if np.asarray(computed).dtype.kind == "i" else np.uint64).astype(unsigned)


def _same(actual: np.ndarray, expected: np.ndarray, result: str) -> np.ndarray:
    """Bitwise, except that every NaN equals every other."""
    equal = actual == expected
    if result[0] == "f":
        floats = f"f{width(result) // 8}"
        equal |= np.isnan(actual.view(floats)) & np.isnan(expected.view(floats))
    return equal


def _keeps_upper_half(name: str, target: str) -> bool:
    """Whether a 16-bit result leaves the upper half of its register alone: always from gfx10 on, rarely on gfx9."""
    return not target.startswith("gfx9") or name in ("v_fma_f16", "v_mad_u16", "v_mad_i16", "v_div_fixup_f16")


def test_each_instruction_matches_numpy(target: str, rng: np.random.Generator) -> None:
    module, names = _assemble(target)
    module.prepare()
    for name in sorted(names):
        kernel = f"k_{name}"
        made = {step.instruction.name for step in module.program(kernel).steps}
        # Assemblers take some names as aliases of others.
        assert any(OPERATIONS.get(other) == OPERATIONS[name] for other in made), f"{target} {name}: the assembler made {sorted(made)}"
        result, kinds, _ = OPERATIONS[name]
        wave = module.kernels[kernel].wave
        sources = [result if kind == "D" else kind for kind in kinds]
        words = {letter: _inputs(kind, rng) for letter, kind in zip("abc", [*sources, "b32", "b32"], strict=False)}
        words["d"] = _inputs(result, rng)
        d = words["d"].copy()
        module.launch(kernel, (1, 1, 1), (wave, 1, 1), [words["a"], words["b"], words["c"], d])
        actual = np.ascontiguousarray(d[:wave].astype(f"u{width(result) // 8}"))
        expected = _expected(name, words, wave)
        same = _same(actual, expected, result)
        lane = int(np.argmin(same))
        inputs = {letter: hex(words[letter][lane]) for letter in "abcd"}
        assert same.all(), f"{target} {name} lane {lane}: {actual[lane]:#x}, expected {expected[lane]:#x} of {inputs}"
        if width(result) == 16:
            upper = words["d"][:wave] >> np.uint64(16) & np.uint64(0xFFFF)
            kept = upper if _keeps_upper_half(name, target) else np.zeros_like(upper)
            np.testing.assert_array_equal(d[:wave] >> np.uint64(16) & np.uint64(0xFFFF), kept, err_msg=f"{target} {name}: upper half")


def test_every_instruction_of_the_table_has_a_reference() -> None:
    assert set(OPERATIONS) == set(REFERENCES)


def test_functions_of_three_bits_are_their_tables() -> None:
    """v_bitop3 of gfx950, which the table above leaves out: its function is an operand."""
    a, b, c = 0xF0, 0xCC, 0xAA  # all combinations of three bits
    for table in range(256):
        assert eval(bit_function(table).replace("0u", "0"), {}, {"a": a, "b": b, "c": c}) & 0xFF == table


def test_v_bitop3_matches_its_table(target: str, rng: np.random.Generator) -> None:
    if target != "gfx950":
        pytest.skip("an instruction of gfx950")
    kernel = "KERNEL(k)(const u32* a, const u32* b, u32* d) {{ const u32 t = thread(); u32 x = d[t]; {asm} d[t] = x; }}\n"
    a, b, c = rng.integers(0, 2**32, (3, _LANES), dtype=np.uint32)
    for bits, table in ((32, 0x6C), (32, 0xCA), (16, 0xC8)):
        made = kernel.format(asm=f'asm volatile("v_bitop3_b{bits} %0, %1, %2, %0 bitop3:{table:#x}" : "+v"(x) : "v"(a[t]), "v"(b[t]));')
        module = Module(compile_text(f'#include "{_HEADER}"\n{made}', target))
        d = c.copy()
        module.launch("k", (1, 1, 1), (_LANES, 1, 1), [a, b, d])
        expected = np.zeros_like(c)
        for number in range(8):
            if table >> number & 1:
                expected |= (a if number & 4 else ~a) & (b if number & 2 else ~b) & (c if number & 1 else ~c)
        mask = np.uint32((1 << bits) - 1)
        np.testing.assert_array_equal(d & mask, expected & mask)


# gfx950's and the 16-bit registers of RDNA 3 need clang 20.
_NEED_NEWER_CLANG = {"v_cvt_f32_bf16", "v_cvt_pk_bf16_f32", "v_cvt_pk_f16_f32", "v_mov_b16"}


def test_every_instruction_of_the_table_exists_on_some_target() -> None:
    tools = require_target("gfx90a")
    assembled: set[str] = set()
    for target in tools.targets:
        assembled |= _assemble(target)[1]
    assert set(OPERATIONS) - assembled <= _NEED_NEWER_CLANG
