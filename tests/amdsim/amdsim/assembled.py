"""For tests of single instructions: keeps of many small kernels those that a target's assembler accepts."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from .module import Module
from .testing import compile_text, require_target


def assemble(target: str, header: Path, kernels: Mapping[str, str]) -> tuple[Module, set[str]]:
    """Compiles one-line kernels by name. Returns the module and the names that the target has."""
    tools = require_target(target)
    first = f'#include "{header}"\n'
    lines = {name: kernel.strip().replace("\n", " ") + "\n" for name, kernel in kernels.items()}
    flags = [
        f"--offload-arch={target}",
        "--offload-device-only",
        "-nogpulib",
        "-nogpuinc",
        "-O1",
        "-ferror-limit=0",
        "-c",
        "-o",
        "/dev/null",
    ]
    # The compiler reports what its assembler refuses only after everything else is right.
    while True:
        text = first + "".join(lines.values())
        check = subprocess.run([tools.clang, "-x", "hip", *flags, "-"], input=text, capture_output=True, text=True, check=False)
        refused = {int(line) - 2 for line in re.findall(r"<stdin>:(\d+):\d+: error:", check.stderr)}
        if not refused:
            break
        lines = {name: line for i, (name, line) in enumerate(lines.items()) if i not in refused}
    return Module(compile_text(text, target, ["-O1"], [header])), set(lines)
