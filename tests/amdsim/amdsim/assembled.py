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
    names = list(kernels)
    lines = [kernels[name].strip().replace("\n", " ") + "\n" for name in names]
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
    command = [tools.clang, "-x", "hip", *flags, "-"]
    check = subprocess.run(command, input=first + "".join(lines), capture_output=True, text=True, check=False)
    refused = {int(line) - 2 for line in re.findall(r"<stdin>:(\d+):\d+: error:", check.stderr)}
    known = [name for i, name in enumerate(names) if i not in refused]
    text = first + "".join(line for i, line in enumerate(lines) if i not in refused)
    return Module(compile_text(text, target, ["-O1"], [header])), set(known)
