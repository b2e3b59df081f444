"""What this machine can run on, and the environment report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import kvarn


def test_backends() -> None:
    infos = kvarn.backends()
    assert [info.name for info in infos] == ["cpu", "cuda", "hip"]
    cpu = infos[0]
    assert cpu.available
    assert cpu.num_threads >= 1
    assert kvarn.cpu_isas()[0] in cpu.detail
    for info in infos:
        assert info.detail, "available: the device; otherwise the reason why not"
        if not info.available:
            assert info.num_devices == 0


def test_instruction_sets() -> None:
    isas = kvarn.cpu_isas()
    assert isas[-1] == "generic"
    assert set(isas) <= {"avx512_vnni", "avx512", "avx2", "generic"}


def test_threads_of_the_environment() -> None:
    code = "import kvarn; print(kvarn.Plan('k4v2_g32', head_dim=64, num_kv_heads=1).describe)"
    environment = {**os.environ, "KVARN_NUM_THREADS": "1"}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert output.strip().endswith(", 1 thread")
    plan = kvarn.Plan("k4v2_g32", head_dim=64, num_kv_heads=1, num_threads=3)
    assert "3 threads" in plan.describe


def test_paths() -> None:
    assert kvarn.library_path().is_file()
    assert kvarn.library_path().name.startswith("libkvarn")
    assert (kvarn.include_dir() / "kvarn" / "kvarn.h").is_file()
    assert (kvarn.cmake_dir() / "kvarnConfig.cmake").is_file()


def report(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-m", "kvarn", *arguments], env=environment, capture_output=True, text=True, cwd="/")


def test_environment_report() -> None:
    result = report(KVARN_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    text = result.stdout
    assert text.startswith(f"kvarn {kvarn.__version__}\n")
    for info in kvarn.backends():
        assert info.name in text
        if not info.available:
            assert info.detail in text
    assert ", ".join(kvarn.cpu_isas()) in text
    assert str(kvarn.library_path()) in text
    assert "KVARN_NUM_THREADS=1" in text
    assert "torch" in text
    assert "transformers" in text


def test_other_arguments() -> None:
    assert report("--version").stdout.strip() == kvarn.__version__
    assert Path(report("--cmake-dir").stdout.strip()) == kvarn.cmake_dir()
    assert Path(report("--include-dir").stdout.strip()) == kvarn.include_dir()
