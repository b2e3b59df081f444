"""The command line: kvarn inspect, kvarn bench, and how errors look."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kvarn

pytest.importorskip("typer")
pytest.importorskip("rich")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m kvarn``, 200 columns wide."""
    environment = {"COLUMNS": "200", "PATH": "", "KVARN_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "kvarn", *arguments], capture_output=True, text=True, env=environment, timeout=120, check=False
    )


@pytest.mark.parametrize(("name", "head_dim"), [("k4v2_g128", 128), ("k3v5_g64_m8", 80)])
def test_inspect_a_format(name: str, head_dim: int) -> None:
    run = command("inspect", name, "--head-dim", str(head_dim))
    assert run.returncode == 0, run.stderr
    format = kvarn.Format(name)
    layout = format.layout(head_dim)
    assert f"{layout.record_bytes:,} bytes" in run.stdout
    assert f"{format.bits_per_element(head_dim):.3f} bits per value" in run.stdout
    # The parts follow one another without a gap, and add up.
    rows = [line.split("│")[1:3] for line in run.stdout.splitlines() if line.startswith("│")]
    end = 0
    for offset, size in ((int(cell.replace(",", "")) for cell in row) for row in rows):
        assert offset == end
        end += size
    assert end == layout.record_bytes


def test_inspect_a_saved_sequence(tmp_path: Path) -> None:
    cache = kvarn.Cache("k4v2_g32", num_layers=2, num_kv_heads=2, head_dim=64, dtype="float16", sink_tokens=32)
    sequence = cache.sequence()
    values = np.random.default_rng(0).standard_normal((2, 200, 2, 64)).astype(np.float16)
    cache.append(sequence, values, values)
    path = tmp_path / "saved.safetensors"
    cache.save(sequence, path)
    run = command("inspect", str(path))
    assert run.returncode == 0, run.stderr
    assert "7 tiles, every checksum right" in run.stdout
    assert f"{5 * 2 * 2 * cache.record_bytes:,}" in run.stdout
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    run = command("inspect", str(path))
    assert run.returncode == 1
    assert "checksum" in run.stderr
    assert "Traceback" not in run.stderr


def test_bench_prints_a_table() -> None:
    run = command(
        "bench", "--tokens", "512", "--seconds", "0.05", "--q-heads", "4", "--kv-heads", "2", "--head-dim", "64", "--threads", "1"
    )
    assert run.returncode == 0, run.stderr
    assert "attend, k4v2_g128" in run.stdout
    assert "plain read" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "k9v9_g128"), "k_bits"),
        (("inspect", "k4v2_g128", "--head-dim", "63"), "head_dim"),
        (("bench", "--device", "cuda:99"), "[kvarn.bench]"),
        (("bench", "--device", "cpu:x"), 'expected "cpu", "cuda"'),
        (("bench", "--device", "tpu"), "expected one of cpu, cuda, hip"),
        (("bench", "--dtype", "int8"), "expected one of float16, bfloat16, float32, got int8"),
        (("doctor", "--backend", "tpu", "--output", "/dev/null"), "expected one of cpu, cuda, hip"),
        (("demo", "--model", "/nowhere"), "model.safetensors"),
        (("demo", "--problems", "0"), "problems"),
        (("nonsense",), "nonsense"),
    ],
)
def test_errors_are_one_line_and_a_status(arguments: tuple[str, ...], message: str) -> None:
    run = command(*arguments)
    assert run.returncode != 0
    assert message in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_bench_needs_no_torch(dtype: str) -> None:
    code = "import sys; sys.modules['torch'] = None; from kvarn.__main__ import main; sys.exit(main())"
    arguments = ("bench", "--dtype", dtype, "--tokens", "256", "--seconds", "0.05", "--q-heads", "2", "--kv-heads", "1", "--head-dim", "64")
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env={"COLUMNS": "200"})
    assert run.returncode == 0, run.stderr
    assert "no comparison with PyTorch's attention: it is not installed" in run.stdout
    assert "attend, k4v2_g128" in run.stdout


def test_help_names_every_command() -> None:
    run = command("--help")
    assert run.returncode == 0
    for name in ("demo", "inspect", "bench"):
        assert name in run.stdout
