"""For tests of single instructions: keeps of many small kernels those that a target's assembler accepts."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from .build import cache_directory, write_atomically
from .module import Module
from .testing import compile_text, require_target


def assemble(target: str, header: Path, kernels: Mapping[str, str]) -> tuple[Module, set[str]]:
    """Compiles one-line kernels by name. Returns the module and the names that the target has."""
    tools = require_target(target)
    first = f'#include "{header}"\n'
    lines = {name: kernel.strip().replace("\n", " ") + "\n" for name, kernel in kernels.items()}
    key = hashlib.sha256("".join([tools.clang, target, header.read_text(), first, *lines.values()]).encode()).hexdigest()[:16]
    accepted = cache_directory() / f"{key}.accepted"
    if not accepted.exists():
        write_atomically(accepted, " ".join(_accepted(tools.clang, target, first, lines)).encode())
    names = accepted.read_text().split()
    text = first + "".join(lines[name] for name in names)
    return Module(compile_text(text, target, ["-O1"], [header])), set(names)


def _accepted(clang: str, target: str, first: str, lines: Mapping[str, str]) -> list[str]:
    """The names of the kernels that compile. The compiler reports what its assembler refuses only after everything else is right."""
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
    names = list(lines)
    while True:
        text = first + "".join(lines[name] for name in names)
        check = subprocess.run([clang, "-x", "hip", *flags, "-"], input=text, capture_output=True, text=True, check=False)
        refused = {int(line) - 2 for line in re.findall(r"<stdin>:(\d+):\d+: error:", check.stderr)}
        if not refused:
            return names
        names = [name for i, name in enumerate(names) if i not in refused]
