"""attend on an AMD device against float64 arithmetic on the same records and staging values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import kvarn
from support import attend, relative_error, sylvester

# The contract of attend is 5e-4 per row; its output is then rounded to fp16 (2^-11 of each value) or bf16 (2^-8).
TOLERANCE = {"float32": 5e-4, "float16": 5e-4 + 2**-11, "bfloat16": 5e-4 + 2**-8}
# A score is a sum of head_dim products of fp32 operands to 2^-20; the values here keep scores below 50.
LSE_TOLERANCE = 2e-4


@dataclass
class Case:
    """One batch. lengths: tokens of each sequence; q_lens: its queries."""

    name: str
    head_dim: int
    kv_heads: int
    q_heads: int
    lengths: tuple[int, ...]
    q_lens: tuple[int, ...]
    dtype: str = "float16"
    options: dict[str, Any] = field(default_factory=dict)
    batch_invariant: bool = False
    scale: float = 1.0  # of K and V

    def __str__(self) -> str:
        options = "_".join(self.options) + ("_invariant" if self.batch_invariant else "") + (f"_{self.scale:g}" if self.scale != 1 else "")
        return f"{self.name}_d{self.head_dim}_{self.q_heads}over{self.kv_heads}_{self.dtype}_{options}_{max(self.lengths)}"


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


def rotated_back(x: np.ndarray, plan: kvarn.Plan) -> np.ndarray:
    """Rows in the rotated frame [..., head_dim] to the model's, in float64."""
    dim = x.shape[-1]
    if dim & (dim - 1) == 0:
        return x.astype(np.float64) @ sylvester(dim)
    out = np.zeros(x.shape, np.float32)
    kvarn.ops.hadamard(plan, np.ascontiguousarray(x, np.float32), out=out, inverse=True)
    return out.astype(np.float64)


class Batch:
    """The arrays of a case: all tiles but each sequence's first and last are records."""

    def __init__(self, case: Case, rng: np.random.Generator) -> None:
        self.case = case
        limits = {"max_num_seqs": len(case.lengths), "max_q_tokens": sum(case.q_lens) + 4, "max_tiles": 40}
        self.config = {"head_dim": case.head_dim, "num_kv_heads": case.kv_heads, "num_q_heads": case.q_heads, "dtype": case.dtype, **limits}
        self.cpu = kvarn.Plan(case.name, **self.config)
        tokens = self.cpu.format.tile_tokens
        tiles = [-(-length // tokens) for length in case.lengths]
        self.table = np.full((len(tiles), max(tiles)), 2**31 - 1, np.int32)
        order = rng.permutation(sum(tiles))  # slots, all tiles staged at first
        blocks, slots, self.k, self.v, at = [], [], [], [], 0
        staging = np.full((sum(tiles) + 1, 2, case.kv_heads, tokens, case.head_dim), np.nan, np.float32)
        for s, count in enumerate(tiles):
            for t in range(count):
                slot, used = order[at], min(tokens, case.lengths[s] - t * tokens)
                staging[slot, :, :, :used] = rng.standard_normal((2, case.kv_heads, used, case.head_dim)) * case.scale
                at += 1
                if 0 < t < count - 1 or (t == 0 and count > 2):
                    self.table[s, t] = len(blocks)
                    blocks.append(len(blocks))
                    slots.append(slot)
                else:
                    self.table[s, t] = ~slot
        self.staging = self.rounded(staging)
        self.records = np.zeros((len(blocks) + 1, case.kv_heads, self.cpu.record_bytes), np.uint8)
        if blocks:
            kvarn.ops.encode(self.cpu, self.as_host(self.staging), self.records, np.array(slots, np.int32), np.array(blocks, np.int32))
        decoded = np.zeros((2, len(blocks) + 1, case.kv_heads, tokens, case.head_dim), np.float32)
        if blocks:
            kvarn.ops.decode(
                self.cpu,
                self.records,
                np.array(blocks, np.int32),
                k=decoded[0],
                v=decoded[1],
                rotated=True,
                destinations=np.array(blocks, np.int32),
            )
        exact = self.as_host(self.staging).astype(np.float32)
        for s, count in enumerate(tiles):
            parts = [decoded[:, e] if e >= 0 else exact[~e] for e in self.table[s, :count]]
            both = (
                np.concatenate(parts, axis=2)[:, :, : case.lengths[s]].transpose(0, 2, 1, 3)
                if parts
                else np.zeros((2, 0, case.kv_heads, case.head_dim))
            )
            self.k.append(rotated_back(both[0], self.cpu))
            self.v.append(rotated_back(both[1], self.cpu))
        self.q = self.rounded(rng.standard_normal((sum(case.q_lens), case.q_heads, case.head_dim)).astype(np.float32))
        self.cu_q_lens = np.cumsum([0, *case.q_lens]).astype(np.int32)
        self.seq_lens = np.array(case.lengths, np.int32)

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """fp32 in the case's dtype; bfloat16 as its bits."""
        if self.case.dtype == "bfloat16":
            return (x.view(np.uint32) >> 16).astype(np.uint16)
        return x.astype(self.case.dtype)

    def as_host(self, x: np.ndarray) -> np.ndarray:
        return x.view(pytest.importorskip("ml_dtypes").bfloat16) if self.case.dtype == "bfloat16" else x

    def expected(self, slopes: np.ndarray, sinks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        options = dict(self.case.options)
        scale = options.pop("softmax_scale", self.case.head_dim**-0.5)
        named = {"causal": options.get("causal", True), "window": options.get("window", 0), "soft_cap": options.get("logits_soft_cap", 0.0)}
        if "alibi" in options:
            named["alibi_slopes"] = slopes
        if "sinks" in options:
            named["sinks"] = sinks
        q = self.as_host(self.q).astype(np.float64) * scale * self.case.head_dim**0.5
        results = [attend(q[b:e], k, v, **named) for b, e, k, v in zip(self.cu_q_lens, self.cu_q_lens[1:], self.k, self.v, strict=False)]
        return np.concatenate([r[0] for r in results]), np.concatenate([r[1] for r in results])


def run(batch: Batch, to_device, slopes: np.ndarray, sinks: np.ndarray, *, calls: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) of each call, which are equal: the order in which parts of the work arrive does not show."""
    case, bits = batch.case, batch.case.dtype == "bfloat16"
    plan = kvarn.Plan(case.name, backend="hip", batch_invariant=case.batch_invariant, **batch.config)
    matrix = case.name.endswith("_g128") and case.name[1] in "2348" and case.name[3] in "2348" and case.dtype != "float32"
    dims = (64, 128) if "gfx1" in plan.describe else (64, 128, 256)
    assert ("matrix cores" in plan.describe) == (matrix and case.head_dim in dims)
    options = dict(case.options)
    arrays = {}
    if options.pop("alibi", False):
        arrays["alibi_slopes"] = to_device(slopes)
    if options.pop("sinks", False):
        arrays["sinks"] = to_device(sinks)
    out, lse = to_device(np.zeros_like(batch.q), bits), to_device(np.zeros(batch.q.shape[:2], np.float32))
    results = []
    for _ in range(calls):
        kvarn.ops.attend(
            plan,
            to_device(batch.q, bits),
            records=to_device(batch.records),
            staging=to_device(batch.staging, bits),
            block_table=to_device(batch.table),
            seq_lens=to_device(batch.seq_lens),
            cu_q_lens=to_device(batch.cu_q_lens),
            out=out,
            lse=lse,
            workspace=to_device(np.full(plan.workspace_bytes, 0xFF, np.uint8)),  # NaN
            **arrays,
            **options,
        )
        results.append((out.numpy(), lse.numpy()))
    for other in results[1:]:
        np.testing.assert_array_equal(other[0], results[0][0])
        np.testing.assert_array_equal(other[1], results[0][1])
    return batch.as_host(results[0][0]).astype(np.float64), results[0][1]


@pytest.mark.parametrize("case", MATRIX + GENERIC, ids=str)
def test_attend_agrees_with_float64(to_device, rng, case):
    batch = Batch(case, rng)
    slopes = (0.5 ** np.arange(1, case.q_heads + 1)).astype(np.float32)
    sinks = rng.standard_normal(case.q_heads).astype(np.float32)
    expected, expected_lse = batch.expected(slopes, sinks)
    got, lse = run(batch, to_device, slopes, sinks)
    assert relative_error(got, expected) <= TOLERANCE[case.dtype]
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=LSE_TOLERANCE)


@pytest.mark.parametrize("case", [Case("k4v2_g128", 64, 1, 4, (1500,), (1,)), Case("k4v2_g32", 64, 1, 2, (300,), (1,))], ids=str)
def test_parts_of_a_sequence_may_arrive_in_any_order(to_device, rng, case):
    batch = Batch(case, rng)
    slopes = sinks = np.zeros(case.q_heads, np.float32)
    expected, _ = batch.expected(slopes, sinks)
    got, _ = run(batch, to_device, slopes, sinks, calls=12)
    assert relative_error(got, expected) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", [MATRIX[0], GENERIC[0]], ids=str)
def test_a_table_entry_outside_the_pool_is_nan_for_its_sequence_alone(to_device, rng, case):
    batch = Batch(case, rng)
    slopes = sinks = np.zeros(case.q_heads, np.float32)
    expected, _ = batch.expected(slopes, sinks)
    batch.table[1, 0] = 1000
    got, lse = run(batch, to_device, slopes, sinks)
    begin, end = batch.cu_q_lens[1:3]
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
    slopes = sinks = np.zeros(case.q_heads, np.float32)
    expected, _ = batch.expected(slopes, sinks)
    entry = batch.table[0, 0]
    if entry >= 0:
        batch.records[entry] = 0x7E  # codes of some value, metadata of NaN
    else:
        batch.staging[~entry] = np.nan
    assert (entry >= 0) == (tokens == 400)
    got, lse = run(batch, to_device, slopes, sinks)
    assert np.isnan(got[0]).all()
    assert np.isnan(lse[0]).all()
    assert relative_error(got[1:], expected[1:]) <= TOLERANCE[case.dtype]
    assert np.isfinite(lse[1]).all()
