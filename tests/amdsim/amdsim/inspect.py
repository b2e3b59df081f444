"""What the compiler made of a kernel: registers, spills, scratch, LDS, occupancy, and the instructions it uses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .disassembly import parse
from .module import Module
from .translate import kernel_code

# Architecture constants of LLVM's AMDGPU back end: vector registers per SIMD and lane, the unit of their allocation, waves per SIMD.
_CDNA = (512, 8, 8)
_RDNA2 = {32: (1024, 16, 16), 64: (512, 8, 16)}
_RDNA3 = {32: (1536, 24, 16), 64: (768, 12, 16)}
# Bytes of LDS: of a compute unit (gfx950 has more), and of the two of a workgroup processor; granule of their allocation.
_LDS_BYTES, _LDS_BYTES_GFX950, _LDS_BYTES_PAIR, _LDS_GRANULE = 64 << 10, 160 << 10, 128 << 10, 1 << 10


@dataclass(frozen=True)
class Resources:
    """Resources of one kernel, from the notes of its code object and from its disassembly. Sizes in bytes."""

    target: str
    kernel: str
    wave: int
    vgprs: int  # with accumulation registers
    agprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch: int
    lds: int
    max_threads: int  # per workgroup, from __launch_bounds__
    instructions: Counter[str] = field(repr=False)  # by name without encoding suffix
    calls: bool = False
    paired: bool = False  # RDNA: a workgroup has both compute units of a workgroup processor, and their LDS

    @property
    def num_instructions(self) -> int:
        return self.instructions.total()

    @property
    def waves_by_registers(self) -> int:
        """Waves that fit in one SIMD by their vector registers."""
        gfx = self.target
        if gfx.startswith("gfx9"):
            total, unit, limit = _CDNA
        else:
            total, unit, limit = (_RDNA2 if gfx.startswith("gfx10") else _RDNA3)[self.wave]
        return min(limit, total // (-(-max(self.vgprs, 1) // unit) * unit))

    @property
    def simds(self) -> int:
        """SIMDs that a workgroup's waves are spread over: those of a compute unit, RDNA: of two when it is paired."""
        return 4 if self.paired or self.target.startswith("gfx9") else 2

    def groups_by_lds(self, dynamic_lds: int = 0) -> int:
        """Full workgroups whose LDS fits side by side."""
        available = _LDS_BYTES_GFX950 if self.target == "gfx950" else _LDS_BYTES_PAIR if self.paired else _LDS_BYTES
        return available // (-(-max(self.lds + dynamic_lds, 1) // _LDS_GRANULE) * _LDS_GRANULE)

    def waves_by_lds(self, dynamic_lds: int = 0) -> float:
        """Waves per SIMD, on average, of as many full workgroups as LDS allows."""
        waves = -(-self.max_threads // self.wave)
        limit = 8 if self.target.startswith("gfx9") else 16
        return min(limit, self.groups_by_lds(dynamic_lds) * waves / self.simds)

    def count(self, pattern: str) -> int:
        """How many instructions have a name that matches a pattern, as in count(r"v_(mfma|wmma)_")."""
        return sum(count for name, count in self.instructions.items() if re.match(pattern, name))


def resources(module: Module, kernel: str) -> Resources:
    k = module.kernels[kernel]
    m = k.metadata
    names = Counter(part for i in kernel_code(module.code_object, k) for part in instruction_names(i.text))
    return Resources(
        target=module.target,
        kernel=kernel,
        wave=k.wave,
        vgprs=m[".vgpr_count"],
        agprs=m.get(".agpr_count", 0),
        sgprs=m[".sgpr_count"],
        vgpr_spills=m[".vgpr_spill_count"],
        sgpr_spills=m[".sgpr_spill_count"],
        scratch=m[".private_segment_fixed_size"],
        lds=m[".group_segment_fixed_size"],
        max_threads=m[".max_flat_workgroup_size"],
        instructions=names,
        calls=bool(names["s_swappc_b64"]) or bool(m.get(".uses_dynamic_stack", False)),
        paired=bool(m.get(".workgroup_processor_mode", 0)),
    )


def instruction_names(text: str) -> list[str]:
    """The name of an instruction without encoding suffix, or the two of a dual-issue pair."""
    return [parse(half.strip()).name.replace("v_dual_", "v_") for half in text.split(" :: ")]


def problems(
    report: Resources,
    *,
    needs: Sequence[str] = (),
    max_vgprs: int | None = None,
    max_lds: int | None = None,
    min_waves: int | None = None,
) -> list[str]:
    """What a kernel that must be fast must not have: spills, scratch, calls; and the given bounds. Empty when all is well.

    Args:
        needs: patterns of instruction names that must occur, as r"v_mfma_f32_16x16x16".
        min_waves: per SIMD, by registers and by LDS.
    """
    where = f"{report.target} {report.kernel}"
    found = []
    if report.vgpr_spills or report.sgpr_spills:
        found.append(f"{where}: {report.vgpr_spills} vector and {report.sgpr_spills} scalar registers are spilled")
    if report.scratch:
        found.append(f"{where}: {report.scratch} bytes of scratch")
    if report.calls:
        found.append(f"{where}: calls a function")
    found += [f"{where}: no instruction matches {pattern}" for pattern in needs if not report.count(pattern)]
    if max_vgprs is not None and report.vgprs > max_vgprs:
        found.append(f"{where}: {report.vgprs} vector registers, expected at most {max_vgprs}")
    if max_lds is not None and report.lds > max_lds:
        found.append(f"{where}: {report.lds} bytes of LDS, expected at most {max_lds}")
    waves = min(report.waves_by_registers, report.waves_by_lds())
    if min_waves is not None and waves < min_waves:
        found.append(f"{where}: {waves} waves per SIMD, expected at least {min_waves}")
    return found
