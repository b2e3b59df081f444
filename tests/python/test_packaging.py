"""The installed package: what it contains, what it needs, and that every place agrees on the version."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvarn
from kvarn import _core

ROOT = Path(__file__).parents[2]
INSTALLED = Path(str(_core.__file__)).parent


def run(code: str, **variables: str) -> str:
    """Standard output of Python code in a fresh process, away from the source tree."""
    environment = {**os.environ, **variables}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_one_version() -> None:
    declared = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert kvarn.__version__ == declared[1]
    assert _core.version() == declared[1]
    assert importlib.metadata.version("kvarn") == declared[1]
    assert f'set(PACKAGE_VERSION "{declared[1]}")' in (INSTALLED / "lib/cmake/kvarn/kvarnConfigVersion.cmake").read_text()
    assert f"Version: {declared[1]}\n" in (INSTALLED / "lib/pkgconfig/kvarn.pc").read_text()


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "rich", "typer", "ml_dtypes", "safetensors"}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Block())
"""


def test_import_needs_neither_torch_nor_a_gpu() -> None:
    code = BLOCK + (
        "import kvarn, numpy as np\n"
        "plan = kvarn.Plan('k4v2_g32', head_dim=64, num_kv_heads=1)\n"
        "x = kvarn.ops.hadamard(plan, np.ones((1, 64), np.float32))\n"
        "kvarn.BlockPool(1, 1, 32, sink_tokens=0)\n"
        "kvarn.backends()\n"
        "print(x[0, 0])\n"
    )
    assert run(code, CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="") == "8.0\n"


def test_import_does_not_import_torch() -> None:
    assert run("import sys, kvarn; print([m for m in ('torch', 'transformers', 'rich', 'typer') if m in sys.modules])") == "[]\n"


def test_the_command_line_without_its_packages() -> None:
    code = BLOCK + "sys.argv = ['kvarn', 'demo']\nfrom kvarn.__main__ import main\nprint(main())"
    assert run(code).strip().endswith("1")
    code = BLOCK + "sys.argv = ['kvarn']\nfrom kvarn.__main__ import main\nprint(main())"
    assert run(code).startswith(f"kvarn {kvarn.__version__}\n")


def test_contents() -> None:
    files = {str(path.relative_to(INSTALLED)) for path in INSTALLED.rglob("*") if path.is_file()}
    for name in ("_core.abi3.so", "_core.pyi", "py.typed", "lib/libkvarn.so", "include/kvarn/kvarn.h", "lib/cmake/kvarn/kvarnConfig.cmake"):
        assert name in files, sorted(files)
    # Wheels have no symbolic links: a versioned library would be there twice.
    assert [name for name in files if "libkvarn.so." in name] == []
    links = [path for path in INSTALLED.rglob("*") if path.is_symlink()]
    assert links == []


def test_the_stub_is_the_one_in_the_source_tree() -> None:
    # The tree has a copy so that type checkers work without a build. After a change of the bindings: copy the new one.
    assert (INSTALLED / "_core.pyi").read_text() == (ROOT / "python/kvarn/_core.pyi").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="ELF")
def test_the_extension_finds_the_library_beside_it() -> None:
    assert kvarn.library_path().resolve() == (INSTALLED / "lib/libkvarn.so").resolve()
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf")
    dynamic = subprocess.run([readelf, "-d", INSTALLED / "_core.abi3.so"], capture_output=True, text=True, check=True).stdout
    assert re.search(r"R(UN)?PATH.*\[\$ORIGIN/lib\]", dynamic), dynamic
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert "libkvarn.so" in needed
    assert not [name for name in needed if re.match(r"libpython|libcuda|libtorch|libnanobind", name)], needed


@pytest.mark.skipif(sys.platform != "linux", reason="ELF")
def test_only_the_c_abi_is_exported() -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    lines = subprocess.run([nm, "-D", "--defined-only", INSTALLED / "lib/libkvarn.so"], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].split("@")[0] for line in lines.splitlines()}
    assert names - {"KVARN_0"}
    assert [name for name in names - {"KVARN_0"} if not name.startswith("kvarn_")] == []


def test_a_c_program_builds_against_the_package(tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if cmake is None:
        pytest.skip("no cmake")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(consumer LANGUAGES C CXX)\nfind_package(kvarn 0.1 CONFIG REQUIRED)\n"
        "add_executable(consumer main.c)\ntarget_link_libraries(consumer PRIVATE kvarn::kvarn)\n"
    )
    (tmp_path / "main.c").write_text(
        '#include <kvarn/kvarn.h>\n#include <stdio.h>\nint main(void) {\n  printf("%s", kvarn_version());\n  return 0;\n}\n'
    )
    build = tmp_path / "build"
    subprocess.run([cmake, "-S", tmp_path, "-B", build, f"-Dkvarn_DIR={kvarn.cmake_dir()}"], check=True, capture_output=True)
    subprocess.run([cmake, "--build", build], check=True, capture_output=True)
    assert subprocess.run([build / "consumer"], check=True, capture_output=True, text=True).stdout == kvarn.__version__


def test_requirements() -> None:
    requirements = importlib.metadata.requires("kvarn") or []
    always = {re.match(r"[\w-]+", text)[0] for text in requirements if "extra ==" not in text}  # type: ignore[index]
    assert always == {"numpy", "nanobind-backend"}, "torch must never be pulled by kvarn itself"
    assert not [text for text in requirements if re.match(r"(torch|nanobind-backend)\b.*(<|==)", text.partition(";")[0])]
    assert set(importlib.metadata.metadata("kvarn").get_all("Provides-Extra") or []) >= {"cuda", "cli", "transformers", "demo", "test"}
