"""Writes matrix_layouts.npz from AMD's matrix instruction calculator 1.3.2 (https://github.com/ROCm/amd_matrix_instruction_calculator).

    python convert_layouts.py PATH_TO/matrix_calculator.py

Per target, instruction and matrix (A, B, D) an array [rows, columns, copies, 3] of register, lane and first bit: where the calculator says
an element is. RDNA 3 keeps two copies of each element of A and B.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

_WMMA = [
    "v_wmma_f32_16x16x16_f16",
    "v_wmma_f32_16x16x16_bf16",
    "v_wmma_f16_16x16x16_f16",
    "v_wmma_bf16_16x16x16_bf16",
    "v_wmma_i32_16x16x16_iu8",
    "v_wmma_i32_16x16x16_iu4",
]
INSTRUCTIONS = {
    "gfx90a": [
        "v_mfma_f32_16x16x16f16",
        "v_mfma_f32_32x32x8f16",
        "v_mfma_f32_16x16x16bf16_1k",
        "v_mfma_f32_32x32x8bf16_1k",
        "v_mfma_i32_16x16x16i8",
        "v_mfma_i32_32x32x8i8",
        "v_mfma_f32_16x16x4f32",
        "v_mfma_f32_32x32x2f32",
    ],
    "gfx942": [
        "v_mfma_f32_16x16x16_f16",
        "v_mfma_f32_32x32x8_f16",
        "v_mfma_f32_16x16x16_bf16",
        "v_mfma_f32_32x32x8_bf16",
        "v_mfma_i32_16x16x32_i8",
        "v_mfma_i32_32x32x16_i8",
        "v_mfma_f32_16x16x32_fp8_fp8",
        "v_mfma_f32_32x32x16_fp8_fp8",
        "v_mfma_f32_16x16x4_f32",
        "v_mfma_f32_32x32x2_f32",
    ],
    "gfx1100": _WMMA,
    "gfx1200": [*_WMMA, "v_wmma_i32_16x16x32_iu4", "v_wmma_f32_16x16x16_fp8_fp8"],
}
_ENTRY = re.compile(r"[va](\d+)\{(\d+)\}(?:\.\[(?:\d+:)?(\d+)\])?")


def layout(calculator: Path, target: str, instruction: str, matrix: str) -> np.ndarray:
    wave = "64" if target.startswith("gfx9") else "32"
    command = [sys.executable, str(calculator), "-a", target, "-i", instruction, "-R", f"-{matrix}", "-c", "-w", wave]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [row for row in csv.reader(text.splitlines()) if row and row[0].isdigit()]
    entries = [[[tuple(int(x or 0) for x in found) for found in _ENTRY.findall(cell)] for cell in row[1:] if cell] for row in rows]
    return np.array(entries, np.uint8)


def main() -> None:
    calculator = Path(sys.argv[1])
    arrays = {
        f"{target}/{instruction}/{matrix}": layout(calculator, target, instruction, matrix)
        for target, instructions in INSTRUCTIONS.items()
        for instruction in instructions
        for matrix in ("A", "B", "D")
    }
    np.savez_compressed(Path(__file__).parent / "matrix_layouts.npz", **arrays)


if __name__ == "__main__":
    main()
