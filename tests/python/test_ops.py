"""The operations through Python against float64 references. Bit-exactness and the full grid of shapes are tested in C++."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvarn
import support
from kvarn import ops

# KVarN adds its own error, which no reference here predicts; what is compared is attention over the same records.
ATTEND_ERROR = support.ATTEND_ERROR


class Cached:
    """One layer's memory with one sequence of random K and V, tiles of 32 tokens, the first of them a sink."""

    def __init__(self, rng: np.random.Generator, tokens: int, *, dtype: str = "float32", heads: int = 2, dim: int = 64) -> None:
        self.plan = kvarn.Plan(
            "k4v2_g32",
            head_dim=dim,
            num_kv_heads=heads,
            num_q_heads=4 * heads,
            dtype=dtype,
            max_num_seqs=4,
            max_q_tokens=64,
            max_tiles=8,
            num_threads=2,
        )
        self.pool = kvarn.BlockPool(16, 16, 32, sink_tokens=32)
        self.staging = np.zeros((16, 2, heads, 32, dim), dtype)
        self.records = np.zeros((16, heads, self.plan.record_bytes), np.uint8)
        self.sequence = self.pool.sequence()
        self.k, self.v = rng.standard_normal((2, tokens, heads, dim)).astype(dtype)
        ops.append(self.plan, self.k, self.v, self.sequence.append(tokens).slot_mapping, self.staging)
        work = self.sequence.commit()
        ops.encode(self.plan, self.staging, self.records, work.encodes[:, 0], work.encodes[:, 1])

    def table(self) -> np.ndarray:
        table = np.zeros((1, 8), np.int32)
        entries = self.sequence.table()
        table[0, : len(entries)] = entries
        return table

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """K and V, [T, Hkv, D] in the model's frame, as attention sees them."""
        entries = self.sequence.table()
        tokens = self.sequence.num_tokens
        tiles = np.zeros((2, len(entries), *self.staging.shape[2:]), np.float32)
        for i, entry in enumerate(entries):
            if entry >= 0:
                ops.decode(self.plan, self.records, np.array([entry], np.int32), k=tiles[0, i : i + 1], v=tiles[1, i : i + 1])
            else:
                tiles[:, i] = ops.hadamard(self.plan, self.staging[~entry], inverse=True)
        k, v = tiles.transpose(0, 1, 3, 2, 4).reshape(2, -1, *self.k.shape[1:])[:, :tokens]
        return k, v

    def attend(self, q: np.ndarray, **options: Any) -> Any:
        return ops.attend(
            self.plan,
            q,
            records=self.records,
            staging=self.staging,
            block_table=self.table(),
            seq_lens=np.array([self.sequence.num_tokens], np.int32),
            cu_q_lens=np.array([0, len(q)], np.int32),
            **options,
        )


@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_hadamard_is_the_sylvester_matrix(head_dim: int, rng: np.random.Generator, to_library: Any) -> None:
    plan = kvarn.Plan("k4v2_g32", head_dim=head_dim, num_kv_heads=1)
    x = rng.standard_normal((3, 5, head_dim)).astype(np.float32)
    # log2(D) additions and one product, each within half an ulp of values that grow at most to the row's L1 norm; relative to the row's L2
    # norm that is far below (log2(D) + 1) * 2^-24 * sqrt(D).
    error = (np.log2(head_dim) + 1) * 2**-24 * np.sqrt(head_dim)
    expected = x.astype(np.float64) @ support.sylvester(head_dim)
    out = np.asarray(ops.hadamard(plan, to_library(x)))
    assert support.relative_error(out, expected) < error
    in_place = x.copy()
    ops.hadamard(plan, to_library(in_place), out=to_library(in_place))
    np.testing.assert_array_equal(in_place, out)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 160, 192, 256, 512])
def test_hadamard_inverse(head_dim: int, rng: np.random.Generator) -> None:
    plan = kvarn.Plan("k4v2_g32", head_dim=head_dim, num_kv_heads=1)
    x = rng.standard_normal((4, head_dim)).astype(np.float32)
    rotated = ops.hadamard(plan, x)
    # A rotation is a chain of orthogonal steps: additions in at most 9 levels, or 28 in sequence where D has an odd factor, and a product.
    # Each rounds every value by half a unit in its last place, which is 2^-24 of the row's norm.
    error = (9 + 28 + 1) * 2**-24
    np.testing.assert_allclose(*(np.linalg.norm(row.astype(np.float64), axis=1) for row in (rotated, x)), rtol=error)
    assert support.relative_error(ops.hadamard(plan, rotated, inverse=True), x) < 2 * error


def test_append_writes_rotated_rows_where_the_mapping_says(plan: kvarn.Plan, rng: np.random.Generator, to_library: Any) -> None:
    # K and V as slices of one projection: [tokens, K and V heads, D].
    packed = rng.standard_normal((6, 4, 64)).astype(np.float16)
    k, v = packed[:, :2], packed[:, 2:]
    mapping = np.array([3 * 32 + 31, 0, -1, 2 * 32 + 5, -7, 33], np.int64)
    staging = np.full((4, 2, 2, 32, 64), 7, np.float16)
    library = to_library(packed)
    ops.append(plan, library[:, :2], library[:, 2:], to_library(mapping), to_library(staging))
    expected = np.full_like(staging, 7)
    for row, entry in enumerate(mapping):
        if entry >= 0:
            for index, source in enumerate((k, v)):
                expected[entry // 32, index, :, entry % 32] = ops.hadamard(plan, np.ascontiguousarray(source[row]))
    np.testing.assert_array_equal(staging, expected)
    ops.append(plan, k, v, mapping, staging, rotated=True)
    np.testing.assert_array_equal(staging[3, 0, :, 31], k[0])
    np.testing.assert_array_equal(staging[1, 1, :, 1], v[5])


@pytest.mark.parametrize(("name", "error"), [("k8v8_g32", 0.01), ("k4v4_g32", 0.15), ("k2v2_g32", 0.6), ("k3v5_g64_m8", 0.3)])
def test_decode_comes_close_to_what_was_encoded(name: str, error: float, rng: np.random.Generator, to_library: Any) -> None:
    # The bounds are a little above the error of a uniform quantiser of unit Gaussians over +-3, 6 / (2^b - 1) / sqrt(12), at the narrower
    # width.
    plan = kvarn.Plan(name, head_dim=128, num_kv_heads=2, dtype="float32")
    staging = rng.standard_normal((3, 2, 2, plan.tile_tokens, 128)).astype(np.float32)
    records = np.full((5, 2, plan.record_bytes), 255, np.uint8)
    ops.encode(
        plan, to_library(staging), to_library(records), to_library(np.array([2, 0], np.int32)), to_library(np.array([1, 4], np.int32))
    )
    assert (records[[0, 2, 3]] == 255).all(), "only the destinations are written"
    k, v = ops.decode(plan, to_library(records), to_library(np.array([1, 4], np.int32)), rotated=True)
    for got, index in ((k, 0), (v, 1)):
        assert np.linalg.norm(np.asarray(got) - staging[[2, 0], index]) < error * np.linalg.norm(staging[[2, 0], index])
    # Without rotated, the inverse rotation of the same values: 7 levels of additions and a product, rounded on both sides.
    k_model, _ = ops.decode(plan, to_library(records), to_library(np.array([1, 4], np.int32)))
    assert support.relative_error(np.asarray(k_model), ops.hadamard(plan, np.asarray(k), inverse=True)) < 2 * 8 * 2**-24


def test_encode_layers_is_encode_of_each_layer(plan: kvarn.Plan, rng: np.random.Generator, to_library: Any) -> None:
    memory = rng.standard_normal((3, 5, 2, 2, 32, 64)).astype(np.float16)
    records = np.zeros((3, 6, 2, plan.record_bytes), np.uint8)
    slots, blocks = np.array([1, 3], np.int32), np.array([4, 0], np.int32)
    # Layers apart: four of the five slots of each.
    staging = to_library(memory)[:, :4]
    ops.encode(plan, staging, to_library(records), to_library(slots), to_library(blocks))
    for layer in range(3):
        alone = np.zeros((6, 2, plan.record_bytes), np.uint8)
        ops.encode(plan, memory[layer, :4], alone, slots, blocks)
        np.testing.assert_array_equal(records[layer], alone)
    with pytest.raises(ValueError, match=r"\[kvarn.encode\] records: expected uint8 \[3, num_blocks, 2, .* got uint8 \[2, 6, 2"):
        ops.encode(plan, staging, to_library(records)[:2], to_library(slots), to_library(blocks))
    with pytest.raises(ValueError, match=r"\[kvarn.encode\] records: expected uint8 \[num_blocks, 2, "):
        ops.encode(plan, staging[0], to_library(records), to_library(slots), to_library(blocks))


def test_encode_options(plan: kvarn.Plan, rng: np.random.Generator) -> None:
    staging = rng.standard_normal((1, 2, 2, 32, 64)).astype(np.float16)
    index = np.zeros(1, np.int32)

    def record(**options: str) -> bytes:
        records = np.zeros((1, 2, plan.record_bytes), np.uint8)
        ops.encode(plan, staging, records, index, index, **options)
        return records.tobytes()

    assert record() == record(normalisation="scale_invariant", rounding="auto")
    assert record(rounding="minmax") != record(rounding="unbiased")
    assert record() != record(rounding="minmax"), "V has 2 bits, which auto rounds without bias"
    assert record(normalisation="published") != record()


def test_decode_into_staging(rng: np.random.Generator, to_library: Any) -> None:
    cached = Cached(rng, 96)
    staging = np.full((4, 2, 2, 32, 64), 7, np.float32)
    library = to_library(staging)
    block = np.array([cached.sequence.table()[1]], np.int32)
    ops.decode(
        cached.plan,
        to_library(cached.records),
        to_library(block),
        k=library[:, 0],
        v=library[:, 1],
        destinations=to_library(np.array([2], np.int32)),
        rotated=True,
    )
    k, v = ops.decode(cached.plan, cached.records, block, rotated=True)
    np.testing.assert_array_equal(staging[2, 0], k[0])
    np.testing.assert_array_equal(staging[2, 1], v[0])
    assert (staging[[0, 1, 3]] == 7).all()
    only = np.zeros((1, 2, 32, 64), np.float16)
    k, v = ops.decode(cached.plan, cached.records, block, v=only)
    assert k is None
    assert v is only
    assert only.any()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"window": 40},
        {"logits_soft_cap": 5.0},
        {"alibi_slopes": np.linspace(0.01, 0.3, 8, dtype=np.float32)},
        {"sinks": np.linspace(-1, 3, 8, dtype=np.float32)},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.parametrize("q_tokens", [1, 7])
def test_attend(options: dict[str, Any], q_tokens: int, rng: np.random.Generator) -> None:
    cached = Cached(rng, 150)
    q = rng.standard_normal((q_tokens, 8, 64)).astype(np.float32)
    out, lse = cached.attend(q, **options, return_lse=True)
    reference = {"soft_cap" if name == "logits_soft_cap" else name: value for name, value in options.items()}
    expected, expected_lse = support.attend(q, *cached.values(), **reference)
    assert support.relative_error(out, expected) < ATTEND_ERROR
    support.assert_lse(lse, expected_lse)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 255),
    q_tokens=st.integers(1, 9),
    causal=st.booleans(),
    window=st.sampled_from([0, 1, 2, 31, 32, 33, 100, 1000]),
    soft_cap=st.sampled_from([0.0, 2.0, 30.0]),
    biased=st.booleans(),
    sinks=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_attend_of_anything_allowed(
    tokens: int, q_tokens: int, causal: bool, window: int, soft_cap: float, biased: bool, sinks: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    cached = Cached(rng, tokens)
    q = rng.standard_normal((min(q_tokens, tokens), 8, 64)).astype(np.float32) * np.float32(2.0 ** rng.integers(-4, 3))
    heads = {
        "alibi_slopes": rng.uniform(0, 0.5, 8).astype(np.float32) if biased else None,
        "sinks": rng.standard_normal(8).astype(np.float32) if sinks else None,
    }
    out, lse = cached.attend(q, causal=causal, window=window, logits_soft_cap=soft_cap, return_lse=True, **heads)
    expected, expected_lse = support.attend(q, *cached.values(), causal=causal, window=window, soft_cap=soft_cap, **heads)
    assert support.relative_error(out, expected) < ATTEND_ERROR
    support.assert_lse(lse, expected_lse)


@settings(deadline=None, max_examples=60)
@given(
    name=st.builds(
        "k{}v{}_g{}{}".format, *[st.sampled_from([2, 3, 4, 5, 6, 8])] * 2, st.sampled_from([32, 64]), st.sampled_from(["", "_m8"])
    ),
    dim=st.sampled_from([64, 80, 96, 112, 128]),
    exponent=st.integers(-30, 20),
    special=st.lists(st.sampled_from([0.0, -0.0, 1e-45, 1e30, 2.0**30, -(2.0**31), np.inf, -np.inf, np.nan]), max_size=3),
    options=st.fixed_dictionaries(
        {"rounding": st.sampled_from(["auto", "minmax", "unbiased"]), "normalisation": st.sampled_from(["scale_invariant", "published"])}
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_records_of_anything(name: str, dim: int, exponent: int, special: list[float], options: dict[str, Any], seed: int) -> None:
    """An operand of finite values up to 2^30 decodes to numbers, any other to NaN alone, and K and V do not know of each other."""
    rng = np.random.default_rng(seed)
    plan = kvarn.Plan(name, head_dim=dim, num_kv_heads=1, dtype="float32", num_threads=1)
    tile = (rng.standard_normal((plan.tile_tokens, dim)) * 2.0**exponent).astype(np.float32)
    odd = tile.copy()
    odd.flat[rng.integers(0, tile.size, len(special))] = special
    index = np.arange(3, dtype=np.int32)
    staging = np.stack([np.stack([tile, tile]), np.stack([odd, tile]), np.stack([tile, odd])])[:, :, None]
    records = np.zeros((3, 1, plan.record_bytes), np.uint8)
    ops.encode(plan, staging, records, index, index, **options)
    k, v = ops.decode(plan, records, index, rotated=True)
    representable = bool((np.abs(odd) <= 2.0**30).all())
    for got in (k[1], v[2]):
        assert np.isfinite(got).all() if representable else np.isnan(got).all()
    np.testing.assert_array_equal(v[1], v[0])
    np.testing.assert_array_equal(k[2], k[0])


def test_attend_in_the_rotated_frame(rng: np.random.Generator) -> None:
    cached = Cached(rng, 100)
    q = rng.standard_normal((3, 8, 64)).astype(np.float32)
    expected = cached.attend(q)
    out = cached.attend(ops.hadamard(cached.plan, q), q_rotated=True, out_rotated=True)
    assert support.relative_error(ops.hadamard(cached.plan, out, inverse=True), expected) < ATTEND_ERROR
    scaled = cached.attend(q, softmax_scale=1 / 8)
    np.testing.assert_array_equal(scaled, expected)
    assert support.relative_error(cached.attend(q, softmax_scale=0.01), expected) > 0.01


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_attend_of_torch_in_half_precision(dtype: str, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    plan = kvarn.Plan("k4v2_g32", head_dim=64, num_kv_heads=2, num_q_heads=8, dtype=kind, max_num_seqs=1, max_q_tokens=4, max_tiles=4)
    staging = torch.zeros(4, 2, 2, 32, 64, dtype=kind)
    records = torch.zeros(4, 2, plan.record_bytes, dtype=torch.uint8)
    # q, K and V out of one projection, as a model has them: heads and tokens are strided.
    tokens = 100
    qkv = torch.from_numpy(rng.standard_normal((tokens, 12, 64)).astype(np.float32)).to(kind)
    k, v = qkv[:, 8:10], qkv[:, 10:]
    ops.append(plan, k, v, torch.arange(tokens), staging)
    q = qkv[-4:, :8]
    out = torch.full((4, 16, 64), 7, dtype=kind)
    ops.attend(
        plan,
        q,
        records=records,
        staging=staging,
        block_table=torch.tensor([[~0, ~1, ~2, ~3]], dtype=torch.int32),
        seq_lens=torch.tensor([tokens], dtype=torch.int32),
        cu_q_lens=torch.tensor([0, 4], dtype=torch.int32),
        out=out[:, ::2],
    )
    expected, _ = support.attend(q.double().numpy(), k.double().numpy(), v.double().numpy())
    # Rotating K and V to staging rounds each value once: half an ulp, 2^-9 or 2^-12, of independent sign; scores of size 1 move the weights
    # by as much again. The output rounds once more. Four such terms bound the error of a row.
    assert support.relative_error(out[:, ::2].double().numpy(), expected) < 4 * (2**-9 if dtype == "bfloat16" else 2**-12) + ATTEND_ERROR
    assert (out[:, 1::2] == 7).all(), "between the heads of a strided output nothing is written"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("operand", [0, 1], ids=["K", "V"])
def test_what_is_not_finite_stays_in_its_sequence(bad: float, operand: int, rng: np.random.Generator) -> None:
    cached = Cached(rng, 100)
    other = cached.pool.sequence()
    k = rng.standard_normal((70, 2, 64)).astype(np.float32)
    ops.append(cached.plan, k, k, other.append(70).slot_mapping, cached.staging)
    work = other.commit()
    table = np.zeros((2, 8), np.int32)
    for row, sequence in enumerate((cached.sequence, other)):
        table[row, : sequence.num_tiles] = sequence.table()
    q = rng.standard_normal((3, 8, 64)).astype(np.float32)

    def attend() -> np.ndarray:
        ops.encode(cached.plan, cached.staging, cached.records, work.encodes[:, 0], work.encodes[:, 1])
        return np.asarray(
            ops.attend(
                cached.plan,
                q,
                records=cached.records,
                staging=cached.staging,
                block_table=table,
                seq_lens=np.array([100, 70], np.int32),
                cu_q_lens=np.array([0, 1, 3], np.int32),
            )
        )

    clean = attend()
    assert np.isfinite(clean).all()
    cached.staging[work.encodes[0, 0], operand, 1, 5, 9] = bad
    dirty = attend()
    np.testing.assert_array_equal(dirty[0], clean[0])
    assert np.isnan(dirty[1:, 4:]).all(), "the query heads of the KV head that holds it"
    np.testing.assert_array_equal(dirty[1:, :4], clean[1:, :4])


def test_batch_invariance(rng: np.random.Generator) -> None:
    plan = kvarn.Plan(
        "k4v2_g32",
        head_dim=64,
        num_kv_heads=2,
        num_q_heads=8,
        dtype="float32",
        max_num_seqs=3,
        max_q_tokens=8,
        max_tiles=8,
        batch_invariant=True,
        num_threads=2,
    )
    staging = rng.standard_normal((16, 2, 2, 32, 64)).astype(np.float32)
    records = np.zeros((16, 2, plan.record_bytes), np.uint8)
    index = np.arange(16, dtype=np.int32)
    ops.encode(plan, staging, records, index, index)
    table = rng.permutation(16).astype(np.int32)[None].repeat(3, 0)[:, :8].copy()
    table[:, -1] = ~table[:, -1]
    q = rng.standard_normal((6, 8, 64)).astype(np.float32)
    lengths = np.array([250, 17, 256], np.int32)

    def attend(rows: list[int]) -> np.ndarray:
        return np.asarray(
            ops.attend(
                plan,
                np.concatenate([q[2 * row : 2 * row + 2] for row in rows]),
                records=records,
                staging=staging,
                block_table=table[rows],
                seq_lens=lengths[rows],
                cu_q_lens=np.arange(len(rows) + 1, dtype=np.int32) * 2,
            )
        )

    together = attend([0, 1, 2])
    for row in range(3):
        np.testing.assert_array_equal(attend([row]), together[2 * row : 2 * row + 2])
    np.testing.assert_array_equal(attend([2, 0]), together[[4, 5, 0, 1]])


def test_results_do_not_depend_on_the_workspace(rng: np.random.Generator) -> None:
    cached = Cached(rng, 150)
    q = rng.standard_normal((2, 8, 64)).astype(np.float32)
    expected = cached.attend(q)
    memory = np.full(cached.plan.workspace_bytes + 256, 255, np.uint8)
    start = -memory.ctypes.data % 256
    np.testing.assert_array_equal(cached.attend(q, workspace=memory[start:]), expected)
    if cached.plan.workspace_bytes:
        with pytest.raises(ValueError, match=r"\[kvarn.attend\] workspace: expected at least \d+ bytes, 256-byte aligned, got "):
            cached.attend(q, workspace=memory[start + 1 :])


def test_the_readme_example_runs() -> None:
    readme = Path(__file__).parents[2] / "README.md"
    blocks = [block.split("```")[0] for block in readme.read_text().split("```python\n")[1:]]
    (example,) = [block for block in blocks if "kvarn.Plan(" in block]
    names: dict[str, Any] = {}
    exec(compile(example, str(readme), "exec"), names)
    assert names["out"].shape == (1, 8, 128)
    assert np.isfinite(names["out"]).all()
