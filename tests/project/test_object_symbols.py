"""Objects compiled for one instruction set export only kvarn's own symbols.

A weak definition (an inline function or template of the standard library) that was compiled with wider instructions may be the
copy that the linker keeps for the whole program; it then faults on machines without them.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

BUILD = os.environ.get("KVARN_CMAKE_BUILD_DIR")
ISA_OBJECT = re.compile(r"(avx2|avx512\w*)\.cpp\.o$")


def isa_objects() -> list[Path]:
    if not BUILD:
        pytest.skip("KVARN_CMAKE_BUILD_DIR is not set")
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    objects = [path for path in (Path(BUILD) / "CMakeFiles").rglob("*.o") if ISA_OBJECT.search(path.name)]
    if not objects:
        pytest.skip("the C++ build has no instruction-set objects")
    return objects


def weak_symbols(path: Path) -> list[str]:
    lines = subprocess.run(["nm", "-C", "--defined-only", str(path)], check=True, capture_output=True, text=True).stdout.splitlines()
    # "address type name"; W, V, u: weak function, weak object, unique global
    found = [line.split(maxsplit=2) for line in lines]
    return [name for _, kind, name in (row for row in found if len(row) == 3) if kind in "WVu"]


def test_isa_objects_have_no_weak_symbols_of_others():
    bad = {}
    for path in isa_objects():
        # kvarn's own templates may be weak only where the instruction set is part of their name.
        foreign = [name for name in weak_symbols(path) if not re.search(r"\bkvarn::[\w:]*(avx2|avx512)", name)]
        if foreign:
            bad[path.name] = foreign[:10]
    assert not bad
