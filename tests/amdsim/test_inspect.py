"""Resource reports, the reader of code objects, and the parser of disassembly."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from amdsim import Module
from amdsim.disassembly import parse
from amdsim.inspect import problems, resources
from amdsim.operands import UnsupportedError, constant, register, source
from amdsim.testing import compile_text

Kernels = Callable[[str, str], Module]


def test_report_of_a_plain_kernel(target: str, kernels: Kernels) -> None:
    report = resources(kernels("memory", target), "lds_wide")
    assert (report.target, report.kernel) == (target, "lds_wide")
    assert report.wave == (64 if target.startswith("gfx9") else 32)
    assert report.lds == 256 * 16
    assert (report.scratch, report.vgpr_spills, report.sgpr_spills, report.calls) == (0, 0, 0, False)
    assert report.max_threads == 256
    assert 0 < report.vgprs <= 32
    assert report.count(r"ds_(write|store)_b128") == 1
    assert report.count(r"ds_(read|load)_b128") == 1
    # 64 KiB hold 16 workgroups of 4 KiB; registers allow the most.
    limit = 8 if target.startswith("gfx9") else 16
    assert report.waves_by_registers == limit
    assert report.waves_by_lds() == limit
    assert problems(report, needs=[r"s_barrier"], max_vgprs=32, max_lds=4096, min_waves=limit) == []


def test_problems_are_named(target: str, kernels: Kernels) -> None:
    module = kernels("memory", target)
    where = f"{target} scratch"
    found = problems(resources(module, "scratch"), needs=[r"v_(mfma|wmma)_"], max_vgprs=1, max_lds=0)
    assert any(line.startswith(where) and line.endswith("bytes of scratch") for line in found)
    assert f"{where}: no instruction matches v_(mfma|wmma)_" in found
    assert any("vector registers, expected at most 1" in line for line in found)
    assert f"{target} call: calls a function" in problems(resources(module, "call"))
    lds = problems(resources(module, "lds_wide"), max_lds=4095, min_waves=17)
    assert f"{target} lds_wide: 4096 bytes of LDS, expected at most 4095" in lds
    assert any("waves per SIMD, expected at least 17" in line for line in lds)


def test_occupancy_follows_registers_and_lds(target: str) -> None:
    text = """
extern "C" __attribute__((global, amdgpu_flat_work_group_size(64, 64))) void k(float* p) {
  __attribute__((shared)) static float s[8192];
  float a[100];
#pragma unroll
  for (int i = 0; i < 100; ++i) a[i] = p[i * 64 + __builtin_amdgcn_workitem_id_x()];
  asm volatile("" ::: "memory");
#pragma unroll
  for (int i = 0; i < 100; ++i) s[i * 64 + __builtin_amdgcn_workitem_id_x()] = a[99 - i];
  __builtin_amdgcn_s_barrier();
  p[__builtin_amdgcn_workitem_id_x()] = s[(int)p[0]];
}"""
    report = resources(Module(compile_text(text, target)), "k")
    assert report.vgprs >= 100
    total, unit = {"gfx9": (512, 8), "gfx10": (1024, 16)}.get(target[: 4 if target[3] == "9" else 5], (1536, 24))
    assert report.waves_by_registers == total // (-(-report.vgprs // unit) * unit)
    assert report.lds == 8192 * 4
    # A compute unit holds two workgroups of 64 threads, which are two waves of 64 on four SIMDs; a pair of compute units four of two waves
    # of 32 on its four SIMDs. gfx950 has room for five workgroups.
    expected = 2.0 if not target.startswith("gfx9") else 1.25 if target == "gfx950" else 0.5
    assert (report.paired, report.simds) == (not target.startswith("gfx9"), 4)
    assert report.waves_by_lds() == expected


@pytest.mark.parametrize(
    ("text", "operands", "modifiers"),
    [
        ("v_add_f32_e32 v1, s2, v3", ["v1", "s2", "v3"], {}),
        ("global_load_dwordx4 v[0:3], v4, s[2:3] offset:-16", ["v[0:3]", "v4", "s[2:3]"], {"offset": "-16"}),
        (
            "v_pk_fma_f16 v0, v1, v2, v3 op_sel:[0,1,0] op_sel_hi:[1,0,1]",
            ["v0", "v1", "v2", "v3"],
            {"op_sel": "[0,1,0]", "op_sel_hi": "[1,0,1]"},
        ),
        (
            "v_mov_b32_dpp v1, v2 quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf",
            ["v1", "v2"],
            {"quad_perm": "[1,0,3,2]", "row_mask": "0xf", "bank_mask": "0xf"},
        ),
        ("buffer_load_dword v0, v1, s[0:3], 0 offen offset:4", ["v0", "v1", "s[0:3]", "0"], {"offen": "1", "offset": "4"}),
        ("v_mov_b32_e32 v3, src_scc", ["v3", "src_scc"], {}),
        ("s_setreg_imm32_b32 hwreg(HW_REG_MODE, 4, 2), 3", ["hwreg(HW_REG_MODE, 4, 2)", "3"], {}),
    ],
)
def test_parser(text: str, operands: list[str], modifiers: dict[str, str]) -> None:
    instruction = parse(text)
    assert instruction.operands == operands
    assert instruction.modifiers == modifiers


def test_names_lose_their_encoding() -> None:
    assert parse("v_add_f32_e64_dpp v0, v1, v2 row_ror:1").name == "v_add_f32"
    assert parse("v_cvt_f32_f16_sdwa v0, v1 src0_sel:WORD_1").name == "v_cvt_f32_f16"
    assert parse("v_mov_b32_e32 v0, v1").name == "v_mov_b32"


def test_operands() -> None:
    a = register("a[4:7]")
    assert a is not None
    assert (a.bank, a.index, a.count) == ("v", 260, 4)
    assert register("-1.0") is None
    assert register("0x10") is None
    assert constant("1.0", "f16") == 0x3C00
    assert constant("-4.0", "f32") == 0xC0800000
    assert constant("0x40080000", "f64") == 0x4008000000000000
    assert constant("-1", "b32") == 0xFFFFFFFF
    assert constant("0.15915494", "f32") == 0x3E22F983
    with pytest.raises(UnsupportedError):
        constant("label", "b32")
    negated = source("-|v5.h|")
    assert (negated.operand, negated.negate, negated.absolute, negated.half) == ("v5", True, True, 1)
    assert source("-1").negate is False
    assert source("sext(v3)").sign_extend
