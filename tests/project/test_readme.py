"""The README's examples run as they are printed, and its sizes are the library's."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from project_files import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_block(language: str, containing: str) -> str:
    blocks = [block for block in re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL) if containing in block]
    assert len(blocks) == 1, f"expected one {language} example with {containing!r}, got {len(blocks)}"
    return blocks[0]


@pytest.fixture(scope="module")
def library() -> Path:
    build = os.environ.get("KVARN_CMAKE_BUILD_DIR")
    folder = Path(build or ".") / "lib"
    if not (folder / "libkvarn.so").exists():
        pytest.skip("KVARN_CMAKE_BUILD_DIR names no build with libkvarn.so")
    return folder


def compile_and_run(source: Path, compiler: str, arguments: list[str], library: Path) -> str:
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    program = source.with_suffix("")
    link = [f"-L{library}", "-lkvarn", f"-Wl,-rpath,{library}"]
    subprocess.run(
        [compiler, *arguments, "-Wall", "-Wextra", f"-I{ROOT / 'cpp/include'}", str(source), "-o", str(program), *link], check=True
    )
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("containing", ["kvarn.BlockPool", "kvarn.Cache"])
def test_python_example(containing, tmp_path):
    pytest.importorskip("kvarn")
    script = tmp_path / "example.py"
    script.write_text(code_block("python", containing) + "\nassert np.isfinite(out).all() and out.shape == (1, 8, 128)\n")
    subprocess.run([sys.executable, str(script)], check=True, cwd=tmp_path)


def test_c_example(library, tmp_path):
    source = tmp_path / "example.c"
    source.write_text(code_block("c", "int main"))
    output = compile_and_run(source, os.environ.get("CC", "cc"), ["-std=c11"], library)
    assert re.search(r"13824 bytes for 32768 values, K\[0\] = -1, decoded -\d", output)


def test_cpp_example(library, tmp_path):
    source = tmp_path / "example.cpp"
    source.write_text(code_block("cpp", "int main"))
    compile_and_run(source, os.environ.get("CXX", "c++"), ["-std=c++20"], library)


def test_format_table():
    kvarn = pytest.importorskip("kvarn")
    rows = re.findall(r"^\| `(k\d\S+)` \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) x \|$", README, re.MULTILINE)
    assert len(rows) > 5
    for name, record_bytes, *bits, ratio in rows:
        fmt = kvarn.Format(name)
        assert int(record_bytes.replace(",", "")) == fmt.record_bytes(128)
        # the table has three decimals of bits and two of the ratio
        assert [float(text) for text in bits] == pytest.approx([fmt.bits_per_element(dim) for dim in (64, 128, 256)], abs=5.1e-4)
        assert float(ratio) == pytest.approx(16 / fmt.bits_per_element(128), abs=5.1e-3)


def test_the_two_commands_are_shown():
    assert "make demo" in README
    assert "make test" in README
