"""Formats and plans."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

import kvarn

WIDTHS = (2, 3, 4, 5, 6, 8)


@pytest.mark.parametrize("metadata", ["", "_m8"])
@pytest.mark.parametrize("tile_tokens", [32, 64, 128, 256])
def test_format_names(tile_tokens: int, metadata: str) -> None:
    for k_bits in WIDTHS:
        for v_bits in WIDTHS:
            name = f"k{k_bits}v{v_bits}_g{tile_tokens}{metadata}"
            format = kvarn.Format(name)
            assert (format.k_bits, format.v_bits, format.tile_tokens) == (k_bits, v_bits, tile_tokens)
            assert format.metadata_bits == (8 if metadata else 16)
            assert str(format) == format.name == name
            assert repr(format) == f"Format('{name}')"


@pytest.mark.parametrize(
    "name", ["", "k4v2", "k4v2_g100", "k7v2_g128", "K4V2_G128", "k4v2_g128_m4", "k4v2_g128 ", " k4v2_g128", "k4v2_g0128"]
)
def test_bad_format_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"\[kvarn.format_parse\] [\w.]+: expected .*, got ") as caught:
        kvarn.Format(name)
    assert isinstance(caught.value, kvarn.InvalidArgumentError)


def test_formats_are_values() -> None:
    format = kvarn.Format("k4v2_g128")
    assert format == kvarn.Format(format)
    assert format != kvarn.Format("k4v2_g128_m8")
    assert hash(format) == hash(kvarn.Format("k4v2_g128"))
    assert pickle.loads(pickle.dumps(format)) == format
    assert copy.deepcopy(format) == format
    with pytest.raises(AttributeError):
        format.k_bits = 8  # type: ignore[misc]


def test_sizes_of_records() -> None:
    # docs/FORMAT.md's examples: codes, then fp16 vectors of 2D + G and D + 2G values.
    for name, head_dim, expected in (
        ("k4v2_g128", 128, 8192 + 4096 + 2 * (3 * 128 + 3 * 128)),
        ("k4v4_g128", 128, 8192 + 8192 + 1536),
        ("k2v2_g128", 128, 4096 + 4096 + 1536),
        ("k4v2_g128", 256, 16384 + 8192 + 2 * (3 * 256 + 3 * 128)),
        ("k4v2_g128_m8", 128, 12288 + 768 + 24 + 8),
    ):
        format = kvarn.Format(name)
        assert format.record_bytes(head_dim) == expected
        assert format.bits_per_element(head_dim) == 8 * expected / (2 * 128 * head_dim)
    assert kvarn.Format("k4v2_g128").bits_per_element(128) == 3.375


def test_layout_covers_the_record_without_gaps() -> None:
    for name in ("k4v2_g128", "k3v5_g32", "k6v8_g64_m8"):
        for head_dim in (64, 80, 112, 512):
            layout = kvarn.Format(name).layout(head_dim)
            value_bytes = 1 if name.endswith("_m8") else 2
            parts = [
                (layout.k_low_offset, layout.k_low_bytes),
                (layout.k_high_offset, layout.k_high_bytes),
                (layout.v_low_offset, layout.v_low_bytes),
                (layout.v_high_offset, layout.v_high_bytes),
                *((o, c * value_bytes) for o, c in zip(layout.metadata_offset, layout.metadata_count, strict=True)),
                (layout.metadata_range_offset, 24 if value_bytes == 1 else 0),
            ]
            end = 0
            for offset, size in parts:
                assert offset == end
                end += size
            assert end <= layout.record_bytes < end + 16
            assert layout.record_bytes % 16 == 0
    with pytest.raises(ValueError, match=r"head_dim: expected .*, got 100"):
        kvarn.Format("k4v2_g128").layout(100)


def test_published_layout_round_trips(rng: np.random.Generator) -> None:
    format = kvarn.Format("k4v2_g128")
    published = rng.integers(0, 256, format.published_bytes(128), np.uint8)
    record = format.import_published(128, published)
    assert record.shape == (format.record_bytes(128),)
    np.testing.assert_array_equal(format.export_published(128, record), published)
    with pytest.raises(ValueError, match=r"\[kvarn.import_published\]"):
        format.import_published(128, published[:-1])
    with pytest.raises(TypeError, match=r"\[kvarn.import_published\] published: expected contiguous uint8 \[N\] on cpu, got float64"):
        format.import_published(128, published.astype(float))
    with pytest.raises(kvarn.UnsupportedError):
        kvarn.Format("k3v2_g128").published_bytes(128)


def test_properties_of_a_plan() -> None:
    plan = kvarn.Plan("k4v2_g128", head_dim=128, num_kv_heads=2, dtype="bfloat16", num_threads=1)
    assert (plan.head_dim, plan.num_kv_heads, plan.num_q_heads, plan.tile_tokens, plan.dtype) == (128, 2, 0, 128, "bfloat16")
    assert plan.format == kvarn.Format("k4v2_g128")
    assert plan.record_bytes == 13824
    assert plan.backend == "cpu"
    assert plan.describe.startswith("cpu/")
    assert "1 thread" in plan.describe
    assert "k4v2_g128" in repr(plan)


def test_dtypes_of_other_libraries() -> None:
    for dtype in (np.float32, np.dtype("float32"), "float32"):
        assert kvarn.Plan("k4v2_g32", head_dim=64, num_kv_heads=1, dtype=dtype).dtype == "float32"
    torch = pytest.importorskip("torch")
    assert kvarn.Plan("k4v2_g32", head_dim=64, num_kv_heads=1, dtype=torch.bfloat16).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"head_dim": 100}, "head_dim: expected "),
        ({"num_kv_heads": 0}, "num_kv_heads: expected 1 to 1024, got 0"),
        ({"dtype": "float64"}, "dtype: expected float16, bfloat16 or float32, got float64"),
        ({"num_q_heads": 3}, "num_q_heads: expected a multiple of num_kv_heads = 2, got 3"),
        ({"num_q_heads": 4, "max_num_seqs": 0}, "max_num_seqs: expected at least 1, got 0"),
        ({"backend": "abacus"}, 'backend: expected cpu, cuda or hip, got "abacus"'),
        ({"cpu_isa": "sse"}, "expected "),
        ({"num_threads": -1}, "num_threads: expected 0 to 1024, got -1"),
        ({"device": 1}, "device: expected 0"),
    ],
)
def test_bad_plans(change: dict[str, object], text: str) -> None:
    values: dict[str, object] = {"head_dim": 64, "num_kv_heads": 2, "max_q_tokens": 1, "max_tiles": 1, **change}
    with pytest.raises(ValueError, match=r"\[kvarn.plan_create\] ") as caught:
        kvarn.Plan("k4v2_g32", **values)  # type: ignore[arg-type]
    assert text in str(caught.value)


def test_plans_live_as_long_as_they_are_held() -> None:
    from kvarn._plan import plan_of

    plan = kvarn.Plan("k4v2_g32", head_dim=64, num_kv_heads=1)
    handle = plan.handle
    assert plan_of(handle) is plan
    assert kvarn.Plan("k4v2_g32", head_dim=64, num_kv_heads=1).handle != handle
    del plan
    gc.collect()
    with pytest.raises(ValueError, match=f"expected the handle of a living kvarn.Plan, got {handle}"):
        plan_of(handle)


def in_environment(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True)


MAKE = "import kvarn; print(kvarn.Plan('k4v2_g32', head_dim=64, num_kv_heads=1).describe)"


@pytest.mark.parametrize("isa", kvarn.cpu_isas())
def test_forced_instruction_set(isa: str) -> None:
    assert kvarn.Plan("k4v2_g32", head_dim=64, num_kv_heads=1, cpu_isa=isa).describe.startswith(f"cpu/{isa},")
    result = in_environment(MAKE, KVARN_CPU_ISA=isa)
    assert result.stdout.startswith(f"cpu/{isa},"), result


@pytest.mark.parametrize(("variable", "choices"), [("KVARN_CPU_ISA", "generic"), ("KVARN_BACKEND", "cpu"), ("KVARN_NUM_THREADS", "")])
def test_unknown_choices_in_the_environment_are_errors(variable: str, choices: str) -> None:
    result = in_environment(MAKE, **{variable: "nonsense"})
    assert result.returncode != 0
    assert "InvalidArgumentError" in result.stderr
    assert variable in result.stderr
    assert choices in result.stderr


def test_backend_of_the_environment() -> None:
    code = "import kvarn; print(kvarn.Plan('k4v2_g32', head_dim=64, num_kv_heads=1).backend)"
    assert in_environment(code, KVARN_BACKEND="cpu").stdout.strip() == "cpu"
    unavailable = [info for info in kvarn.backends() if not info.available]
    for info in unavailable:
        result = in_environment(code, KVARN_BACKEND=info.name)
        assert "UnavailableError" in result.stderr
        assert info.detail in result.stderr
