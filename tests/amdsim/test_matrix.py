"""Matrix instructions in the fragment layouts that AMD publishes (data/convert_layouts.py says where the tables are from)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from amdsim import Module
from amdsim.testing import compile_text

_HERE = Path(__file__).parent
_TABLES = np.load(_HERE / "data" / "matrix_layouts.npz")
_CASES = sorted({key.rsplit("/", 1)[0] for key in _TABLES})


def _element_kinds(instruction: str) -> tuple[str, str]:
    """(type of A and B, type of C and D) from the mnemonic."""
    total = re.match(r"v_[a-z]+_(f32|i32|f16|bf16)_", instruction)
    match = re.search(r"x\d+_?(f16|bf16|i8|iu8|iu4|f32|fp8)", instruction.split("_", 3)[3])
    assert total
    assert match
    return match[1], total[1]


def _random_bits(kind: str, shape: tuple[int, int], target: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random matrix elements: (their bits, their values as doubles)."""
    if kind == "f32":
        values = rng.standard_normal(shape).astype(np.float32)
        return values.view(np.uint32), values.astype(np.float64)
    if kind == "f16":
        values = rng.standard_normal(shape).astype(np.float16)
        return values.view(np.uint16).astype(np.uint32), values.astype(np.float64)
    if kind == "bf16":
        bits = rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> np.uint32(16)
        return bits, (bits << np.uint32(16)).view(np.float32).astype(np.float64)
    if kind == "i32":
        integers = rng.integers(-1000, 1000, shape)
        return integers.astype(np.int32).view(np.uint32), integers.astype(np.float64)
    if kind == "fp8":
        bits = rng.integers(0, 120, shape).astype(np.uint32) | (rng.integers(0, 2, shape).astype(np.uint32) << np.uint32(7))
        bits[bits == 128] = 0  # not a number in gfx94x's format
        exponent, mantissa = (bits >> np.uint32(3)) & np.uint32(15), bits & np.uint32(7)
        bias = 8 if target.startswith("gfx94") else 7
        size = np.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent.astype(np.int64) - bias), mantissa / 8 * 2.0 ** (1 - bias))
        return bits, np.where(bits >> np.uint32(7), -size, size)
    width = int(kind.lstrip("iu"))
    integers = rng.integers(-(1 << (width - 1)), 1 << (width - 1), shape)
    return (integers & ((1 << width) - 1)).astype(np.uint32), integers.astype(np.float64)


def _spread(bits: np.ndarray, table: np.ndarray, registers: int, wave: int) -> np.ndarray:
    """Register contents [registers, wave] from a matrix's bits, by the table of where its elements are."""
    words = np.zeros((registers, wave), np.uint32)
    for (row, column), value in np.ndenumerate(bits):
        for register, lane, shift in table[row, column]:
            words[register, lane] |= np.uint32(value) << np.uint32(shift)
    return words


def _source(instruction: str, sizes: tuple[int, int, int]) -> str:
    """A kernel that loads A, B and C from memory [register][lane], runs the instruction, and stores D."""
    signed = " neg_lo:[1,1,0]" if "_iu" in instruction else ""
    types = "".join(
        f"typedef u32 {name} __attribute__((ext_vector_type({size})));\n" if size > 1 else f"typedef u32 {name};\n"
        for name, size in zip(("VA", "VB", "VD"), sizes, strict=True)
    )

    def load(kind: str, name: str, size: int) -> str:
        if size == 1:
            return f"{kind} {name} = {name}s[l]; "
        return f"{kind} {name};\n#pragma unroll\n  for (int r = 0; r < {size}; ++r) {name}[r] = {name}s[r * W + l]; "

    store = "ds[l] = d;" if sizes[2] == 1 else f"\n#pragma unroll\n  for (int r = 0; r < {sizes[2]}; ++r) ds[r * W + l] = d[r];"
    return f"""#include "{_HERE / "kernels" / "device.h"}"
constexpr int W = __AMDGCN_WAVEFRONT_SIZE;
{types}
KERNEL(run)(const u32* as, const u32* bs, const u32* cs, u32* ds) {{
  const u32 l = thread();
  {load("VA", "a", sizes[0])}{load("VB", "b", sizes[1])}{load("VD", "c", sizes[2])}
  VD d = c;
  asm volatile("s_nop 7\\n{instruction} %0, %1, %2, %0{signed}\\ns_nop 15" : "+v"(d) : "v"(a), "v"(b));
  {store}
}}
"""


@pytest.mark.parametrize("case", _CASES)
def test_layouts_match_the_published_tables(case: str, rng: np.random.Generator) -> None:
    target, instruction = case.split("/")
    tables = {matrix: _TABLES[f"{case}/{matrix}"] for matrix in ("A", "B", "D")}
    sizes = tuple(int(tables[matrix][..., 0].max()) + 1 for matrix in ("A", "B", "D"))
    module = Module(compile_text(_source(instruction, sizes), target, [], [_HERE / "kernels" / "device.h"]))
    wave = module.kernels["run"].wave
    kind, total = _element_kinds(instruction)
    rows, columns = tables["D"].shape[:2]
    a_bits, a = _random_bits(kind, tables["A"].shape[:2], target, rng)
    b_bits, b = _random_bits(kind, tables["B"].shape[:2], target, rng)
    c_bits, c = _random_bits(total, (rows, columns), target, rng)
    registers = [
        _spread(bits, tables[m], size, wave) for bits, m, size in zip((a_bits, b_bits, c_bits), ("A", "B", "D"), sizes, strict=True)
    ]
    d = np.zeros((sizes[2], wave), np.uint32)
    module.launch("run", (1, 1, 1), (wave, 1, 1), [*registers, d])
    register, lane, shift = np.moveaxis(tables["D"][:, :, 0, :].astype(np.int64), -1, 0)
    result = d[register, lane] >> shift.astype(np.uint32)
    exact = a @ b + c
    if total == "i32":
        np.testing.assert_array_equal(result.view(np.int32), exact.astype(np.int64))
        return
    # Products and their sum are exact in double up to 2^-53 of the terms' size; one rounding to the result follows.
    if total == "f32":
        expected = exact.astype(np.float32)
        tolerance = np.abs(a) @ np.abs(b) * 2.0**-50
        assert (np.abs(result.view(np.float32).astype(np.float64) - exact) <= np.spacing(np.abs(expected)) / 2 + tolerance).all()
    elif total == "f16":
        np.testing.assert_array_equal((result & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16), exact.astype(np.float16))
    else:
        # Rounded to float, then to bfloat16: half of a unit in the last place, which is 2^-7 for values from 1 to 2.
        value = ((result & np.uint32(0xFFFF)) << np.uint32(16)).view(np.float32).astype(np.float64)
        assert (np.abs(value - exact) <= np.abs(exact) * (2.0**-8 + 2.0**-24)).all()


def test_the_tables_cover_every_target_with_matrix_instructions() -> None:
    assert {case.split("/")[0] for case in _CASES} == {"gfx90a", "gfx942", "gfx1100", "gfx1200"}
    assert len(_CASES) == 32


@pytest.mark.parametrize("shift", [-2, 2])
@pytest.mark.parametrize(
    ("target", "instruction", "operand_registers"),
    [
        ("gfx90a", "v_mfma_f32_16x16x16f16", 2),
        ("gfx942", "v_mfma_f32_16x16x16_f16", 2),
        ("gfx1100", "v_wmma_f32_16x16x16_f16", 8),
        ("gfx1200", "v_wmma_f32_16x16x16_f16", 4),
    ],
)
def test_result_may_overlap_the_accumulator(target: str, instruction: str, operand_registers: int, shift: int) -> None:
    """D from v40 on, C two registers above or below it: with A and B zero, D is C."""
    wave = 64 if target.startswith("gfx9") else 32
    count, start = 256 // wave, 40 + shift
    zeros = "".join(f"v_mov_b32 v{60 + r}, 0\\n" for r in range(operand_registers))
    loads = "".join(f"v_mov_b32 v{start + r}, %{count + r}\\n" for r in range(count))
    stores = "".join(f"v_mov_b32 %{r}, v{40 + r}\\n" for r in range(count))
    zero = f"v[60:{59 + operand_registers}]"
    product = f"{instruction} v[40:{39 + count}], {zero}, {zero}, v[{start}:{start + count - 1}]"
    clobbers = ", ".join(f'"v{r}"' for r in range(38, 60 + operand_registers))
    source = f"""#include "{_HERE / "kernels" / "device.h"}"
KERNEL(run)(const u32* in, u32* out) {{
  const u32 l = thread();
  u32 {", ".join(f"d{r}" for r in range(count))};
  asm volatile("{zeros}{loads}s_nop 7\\n{product}\\ns_nop 15\\n{stores}"
      : {", ".join(f'"=&v"(d{r})' for r in range(count))}
      : {", ".join(f'"v"(in[l + {wave * r}])' for r in range(count))}
      : {clobbers});
  {" ".join(f"out[l + {wave * r}] = d{r};" for r in range(count))}
}}
"""
    module = Module(compile_text(source, target, [], [_HERE / "kernels" / "device.h"]))
    x, out = np.arange(256, dtype=np.float32), np.zeros(256, np.float32)
    module.launch("run", (1, 1, 1), (wave, 1, 1), [x, out])
    np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize(
    ("target", "instruction", "element_bits", "flushed"),
    [
        ("gfx90a", "v_mfma_f32_16x16x16f16", 16, True),
        ("gfx90a", "v_mfma_f32_16x16x16bf16_1k", 16, True),
        ("gfx90a", "v_mfma_f32_16x16x4f32", 32, False),
        ("gfx942", "v_mfma_f32_16x16x16_f16", 16, False),
    ],
)
def test_cdna2_takes_subnormal_operands_of_16_bits_for_zero(target: str, instruction: str, element_bits: int, flushed: bool) -> None:
    """A is the subnormal number with the bits 0x10, B one near the largest: their product is a normal fp32 number."""
    registers = 32 // element_bits
    module = Module(compile_text(_source(instruction, (registers, registers, 4)), target, [], [_HERE / "kernels" / "device.h"]))
    element = {16: 0x0010_0010, 32: 0x0000_0010}[element_bits], {16: 0x7000_7000, 32: 0x7000_0000}[element_bits]
    operands = [np.full((registers, 64), bits, np.uint32) for bits in element]
    d = np.zeros((4, 64), np.float32)
    module.launch("run", (1, 1, 1), (64, 1, 1), [*operands, np.zeros((4, 64), np.float32), d])
    assert (d == 0).all() if flushed else (d > 0).all()
