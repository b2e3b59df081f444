"""attend on an AMD device against float64 arithmetic on the same records and staging values."""

from __future__ import annotations

import numpy as np
import pytest

import kvarn
from kvarn._devices import to_float
from kvarn._doctor.batch import Batch, Case
from support import attend, relative_error

# The contract of attend is 5e-4 per row; its output is then rounded to fp16 (2^-11 of each value) or bf16 (2^-8).
TOLERANCE = {"float32": 5e-4, "float16": 5e-4 + 2**-11, "bfloat16": 5e-4 + 2**-8}
# A score is a sum of head_dim products of fp32 operands to 2^-20; the values here keep scores below 50.
LSE_TOLERANCE = 2e-4

MATRIX = [
    Case("k4v2_g128", 128, 2, 8, (300, 129, 1), (1, 1, 1)),
    Case("k4v2_g128", 128, 1, 3, (128, 40, 700), (1, 0, 2), options={"window": 150}),
    Case("k2v4_g128", 128, 1, 5, (260,), (3,), dtype="bfloat16", options={"causal": False}),
    Case("k3v8_g128", 128, 1, 16, (400, 130), (1, 2), options={"logits_soft_cap": 20.0}),
    Case("k8v3_g128", 64, 2, 4, (200, 513), (2, 1), options={"alibi": True, "sinks": True}),
    Case("k4v4_g128", 64, 1, 24, (270,), (1,), dtype="bfloat16"),
    Case("k4v2_g128", 256, 1, 7, (300, 17), (1, 1)),
    Case("k4v2_g128", 128, 1, 4, (390,), (1,), dtype="bfloat16", scale=2.0**-12),
    Case("k4v2_g128", 128, 1, 4, (390,), (1,), scale=2.0**9, options={"softmax_scale": 2.0**-13}),
    Case("k4v2_g128", 128, 1, 4, (390, 140), (1, 1), options={"softmax_scale": -0.1, "sinks": True}),
    Case("k2v2_g128", 64, 1, 1, (4096,), (1,)),
    Case("k4v2_g128", 128, 1, 4, (4100, 1000), (1, 1)),
    Case("k4v2_g128", 128, 2, 8, (2500, 300), (1, 1), batch_invariant=True),
]
# Every width of every matrix kernel: 8 rows a block and 16, each head dimension, with and without what plain tiles lack.
MORE = {"logits_soft_cap": 15.0, "sinks": True}
MATRIX += [
    Case(name, head_dim, 1, q_heads, (390,), (1,), options=options)
    for head_dim, q_heads in ((64, 2), (64, 16), (128, 4), (128, 16), (256, 4))
    for name, options in (("k2v2_g128", MORE), ("k3v3_g128", {}), ("k4v4_g128", {}), ("k8v8_g128", MORE))
]
GENERIC = [
    Case("k4v2_g32", 64, 2, 4, (100, 33), (1, 2)),
    Case("k5v6_g64", 96, 1, 3, (190, 64), (1, 1), options={"window": 70}),
    Case("k4v2_g128_m8", 112, 1, 9, (300,), (2,), dtype="bfloat16", options={"logits_soft_cap": 10.0, "sinks": True}),
    Case("k8v8_g256", 512, 1, 2, (600,), (1,), dtype="float32"),
    Case("k3v2_g128", 160, 1, 12, (4100,), (1,), options={"alibi": True}),
    Case("k6v3_g128", 128, 2, 2, (900, 129), (1, 1), dtype="float32", batch_invariant=True),
    Case("k6v5_g128", 80, 1, 2, (270,), (1,)),
    Case("k2v6_g64", 192, 1, 3, (150,), (2,), dtype="bfloat16"),
    Case("k5v4_g128", 256, 1, 2, (270,), (1,), options={"softmax_scale": -0.05}),
]


def expected_of(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp in float64, by the tests' own reference."""
    options, case = dict(batch.options), batch.case
    scale = options.pop("softmax_scale", case.head_dim**-0.5) * case.head_dim**0.5
    named = {"causal": options.get("causal", True), "window": options.get("window", 0), "soft_cap": options.get("logits_soft_cap", 0.0)}
    named |= {name: batch.arrays[name] for name in ("alibi_slopes", "sinks") if name in batch.arrays}
    q, bounds = to_float(batch.arrays["q"], case.dtype).astype(np.float64) * scale, batch.arrays["cu_q_lens"]
    results = [attend(q[bounds[s] : bounds[s + 1]], *batch.values(s), **named) for s in range(len(case.lengths))]
    return np.concatenate([r[0] for r in results]), np.concatenate([r[1] for r in results])


def run(batch: Batch, to_device, *, calls: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) of each call, which are equal: the order in which parts of the work arrive does not show."""
    case, bits = batch.case, batch.case.dtype == "bfloat16"
    plan = kvarn.Plan(case.format, backend="hip", batch_invariant=case.batch_invariant, **batch.config)
    matrix = case.format.endswith("_g128") and case.format[1] in "2348" and case.format[3] in "2348" and case.dtype != "float32"
    dims = (64, 128) if "gfx1" in plan.describe else (64, 128, 256)
    assert ("matrix cores" in plan.describe) == (matrix and case.head_dim in dims)
    q = batch.arrays["q"]
    out, lse = to_device(np.zeros_like(q), bits), to_device(np.zeros(q.shape[:2], np.float32))
    results = []
    for _ in range(calls):
        arrays = {name: to_device(array, bits and name in batch.kinds) for name, array in batch.arrays.items()}
        arrays["workspace"] = to_device(np.full(plan.workspace_bytes, 0xFF, np.uint8))  # NaN
        kvarn.ops.attend(plan, out=out, lse=lse, **arrays, **batch.options)
        results.append((out.numpy(), lse.numpy()))
    for other in results[1:]:
        np.testing.assert_array_equal(other[0], results[0][0])
        np.testing.assert_array_equal(other[1], results[0][1])
    return to_float(results[0][0], case.dtype).astype(np.float64), results[0][1]


@pytest.mark.parametrize("case", MATRIX + GENERIC, ids=str)
def test_attend_agrees_with_float64(to_device, rng, case):
    batch = Batch(case, rng)
    expected, expected_lse = expected_of(batch)
    got, lse = run(batch, to_device)
    assert relative_error(got, expected) <= TOLERANCE[case.dtype]
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=LSE_TOLERANCE)


@pytest.mark.parametrize("case", [Case("k4v2_g128", 64, 1, 4, (1500,), (1,)), Case("k4v2_g32", 64, 1, 2, (300,), (1,))], ids=str)
def test_parts_of_a_sequence_may_arrive_in_any_order(to_device, rng, case):
    batch = Batch(case, rng)
    expected, _ = expected_of(batch)
    got, _ = run(batch, to_device, calls=12)
    assert relative_error(got, expected) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", [MATRIX[0], GENERIC[0]], ids=str)
def test_a_table_entry_outside_the_pool_is_nan_for_its_sequence_alone(to_device, rng, case):
    batch = Batch(case, rng)
    expected, _ = expected_of(batch)
    batch.arrays["block_table"][1, 0] = 1000
    got, lse = run(batch, to_device)
    begin, end = batch.arrays["cu_q_lens"][1:3]
    others = np.r_[0:begin, end : len(got)]
    assert np.isnan(got[begin:end]).all()
    assert np.isnan(lse[begin:end]).all()
    assert relative_error(got[others], expected[others]) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("name", ["k4v2_g128", "k5v2_g128"])
@pytest.mark.parametrize("tokens", [400, 200])
def test_nan_in_a_tile_shows_in_the_rows_that_see_it_alone(to_device, rng, name, tokens):
    """Rows of two positions share a block: the window of the first ends with the first tile, that of the second begins after it."""
    case = Case(name, 128, 1, 4, (tokens,), (2,), options={"window": tokens - 2 - 126})
    batch = Batch(case, rng)
    expected, _ = expected_of(batch)
    entry = batch.arrays["block_table"][0, 0]
    if entry >= 0:
        batch.arrays["records"][entry] = 0x7E  # codes of some value, metadata of NaN
    else:
        batch.arrays["staging"][~entry] = np.nan
    assert (entry >= 0) == (tokens == 400)
    got, lse = run(batch, to_device)
    assert np.isnan(got[0]).all()
    assert np.isnan(lse[0]).all()
    assert relative_error(got[1:], expected[1:]) <= TOLERANCE[case.dtype]
    assert np.isfinite(lse[1]).all()
