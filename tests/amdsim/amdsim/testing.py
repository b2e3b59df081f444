"""For pytest: skips or fails where the tools are missing, and compiles test kernels once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from .build import cache_directory, write_atomically
from .module import Module
from .toolchain import MissingToolError, Toolchain, toolchain


def require_toolchain() -> Toolchain:
    """The tools; without them the test is skipped, or fails when KVARN_REQUIRE_AMDGPU is 1."""
    try:
        return toolchain()
    except MissingToolError as error:
        if os.environ.get("KVARN_REQUIRE_AMDGPU") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))


def require_target(target: str) -> Toolchain:
    """As require_toolchain; a target that the compiler does not know skips the test, unless clang 19 knows it."""
    tools = require_toolchain()
    if target not in tools.targets:
        if target != "gfx950":
            pytest.fail(f"{tools.clang} does not know {target}")
        pytest.skip(f"{tools.clang} does not know {target}")
    return tools


def compile_text(source: str, target: str, flags: Sequence[str] = (), depends: Sequence[Path] = ()) -> Path:
    """Compiles a HIP source into the cache; `depends` are headers that it includes. Returns the code object."""
    tools = require_target(target)
    key = hashlib.sha256("\0".join([source, target, tools.clang, *flags]).encode())
    for header in depends:
        key.update(header.read_bytes())
    folder = cache_directory() / "kernels"
    folder.mkdir(exist_ok=True)
    output = folder / f"{key.hexdigest()[:16]}.{target}.co"
    if not output.exists():
        file = write_atomically(output.with_suffix(".hip"), source.encode())
        temporary = tools.compile(file, target, output.with_suffix(f".{os.getpid()}"), *flags)
        os.replace(temporary, output)
    return output


def load_kernels(path: Path, target: str, *flags: str) -> Module:
    """Compiles a HIP file, with the headers beside it, and loads it."""
    headers = sorted(path.parent.glob("*.h"))
    return Module(compile_text(path.read_text(), target, [f"-I{path.parent}", *flags], headers))
