"""kvarn.Cache: what it holds, whatever the order in which it came."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvarn
import support
from kvarn import Cache, ops

LAYERS, HEADS, QUERY_HEADS, DIM, TILE = 2, 2, 4, 64, 32
FORMAT = "k4v2_g32"


def make(**options: Any) -> Cache:
    settings = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": DIM, "num_q_heads": QUERY_HEADS, "dtype": "float32"}
    settings |= {"sink_tokens": TILE, "num_threads": 1}
    return Cache(options.pop("format", FORMAT), **(settings | options))


def random_kv(tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (LAYERS, tokens, HEADS, DIM)
    return rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)


def contents(cache: Cache, sequence: kvarn.CacheSequence) -> list[bytes]:
    """The bytes of every tile in all layers: records, or staged values up to the sequence's end."""
    out = []
    for index, entry in enumerate(sequence.table()):
        if entry >= 0:
            out.append(np.asarray(cache.records)[:, entry].tobytes())
        else:
            rows = min(TILE, len(sequence) - index * TILE)
            out.append(np.asarray(cache.staging)[:, ~entry, :, :, :rows].tobytes())
    return out


def expected(
    k: np.ndarray, v: np.ndarray, committed: int, sinks: int = TILE, recent: int = 0, name: str = FORMAT
) -> tuple[np.ndarray, np.ndarray]:
    """What one layer's K and V [tokens, heads, D] should read back as, tile by tile through kvarn.ops and no paging at all."""
    plan = kvarn.Plan(name, head_dim=DIM, num_kv_heads=HEADS, dtype="float32", num_threads=1)
    k, v = k.copy(), v.copy()
    for first in range(sinks, committed - recent - TILE + 1, TILE):
        staging = np.zeros((1, 2, HEADS, TILE, DIM), np.float32)
        records = np.zeros((1, HEADS, plan.record_bytes), np.uint8)
        zero = np.zeros(1, np.int32)
        tile = slice(first, first + TILE)
        ops.append(plan, k[tile], v[tile], np.arange(TILE), staging)
        ops.encode(plan, staging, records, zero, zero)
        dk, dv = ops.decode(plan, records, zero)
        k[tile], v[tile] = dk[0].swapaxes(0, 1), dv[0].swapaxes(0, 1)
    return k, v


# A row of 64 values, rotated to staging and back: 2 x 7 roundings of 2^-24 of its norm, which is below 12 for these normal values (five
# standard deviations above its mean of 8).
ROTATION_ERROR = 14 * 2**-24 * 12


def assert_holds(cache: Cache, sequence: kvarn.CacheSequence, k: np.ndarray, v: np.ndarray, recent: int = 0) -> None:
    """The sequence reads back as `expected` of k, v [layers, tokens, heads, D]."""
    for layer in range(LAYERS):
        want = expected(k[layer], v[layer], sequence.num_committed, recent=recent)
        for got, target in zip(cache.dequantise(sequence, layer), want, strict=True):
            np.testing.assert_allclose(got, target, rtol=0, atol=ROTATION_ERROR)


@pytest.mark.parametrize("recent", [0, 1, TILE, 3 * TILE + 5])
@pytest.mark.parametrize("chunks", [[400], [1] * 400, [33] * 12 + [4], [31, 1, 1, 367], [200, 200], [64, 336], [0, 400]], ids=str)
def test_any_chunking_gives_the_same_bytes(chunks: list[int], recent: int) -> None:
    k, v = random_kv(400)
    whole, parts = make(recent_tokens=recent), make(recent_tokens=recent)
    reference, sequence = whole.sequence(), parts.sequence()
    whole.append(reference, k, v)
    at = 0
    for count in chunks:
        parts.append(sequence, k[:, at : at + count], v[:, at : at + count])
        at += count
    assert contents(parts, sequence) == contents(whole, reference)
    assert (sequence.table() >= 0).tolist() == (reference.table() >= 0).tolist()
    assert_holds(parts, sequence, k, v, recent)


def test_the_format_decides_what_is_encoded() -> None:
    cache = make(recent_tokens=40)
    sequence = cache.sequence()
    cache.append(sequence, *random_kv(400))
    # 12 complete tiles and 16 tokens; tile 0 is sinks, tiles that end after 400 - 40 = 360 are recent.
    assert (sequence.table() >= 0).tolist() == [False, *[True] * 10, False, False]


def test_staging_does_not_grow_with_the_prompt() -> None:
    cache = make(max_sequences=1)
    slots = cache.staging.shape[1]
    sequence = cache.sequence()
    cache.append(sequence, *random_kv(40 * TILE + 7))
    assert cache.staging.shape[1] == slots == 3
    assert cache.usage().staging_used == 2 * cache.staging.nbytes // slots  # sinks and the last tile


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_attend_is_softmax_over_what_dequantise_returns(kind: str) -> None:
    dtype: Any = "float32"
    convert: Any = np.asarray
    if kind == "torch":
        torch = pytest.importorskip("torch")
        dtype, convert = torch.float32, torch.from_numpy
    cache = make(dtype=dtype)
    lengths, new = [300, 1, 77], [3, 1, 40]
    held = [cache.sequence() for _ in lengths]
    for i, (sequence, length, count) in enumerate(zip(held, lengths, new, strict=True)):
        k, v = random_kv(length - count + 1, i)
        cache.append(sequence, convert(k[:, 1:]), convert(v[:, 1:]))
    step = cache.begin(held, new, keep=64)
    k, v = random_kv(sum(new), 9)
    q = np.random.default_rng(3).standard_normal((sum(new), QUERY_HEADS, DIM), np.float32)
    for layer in range(LAYERS):
        cache.write(step, layer, convert(k[layer]), convert(v[layer]))
        out, lse = cache.attend(step, layer, convert(q), return_lse=True)
        at = 0
        for sequence, count in zip(held, new, strict=True):
            rows = slice(at, at + count)
            want, want_lse = support.attend(q[rows], *(np.asarray(x) for x in cache.dequantise(sequence, layer)))
            # The error of decoding to float32 is far below the budget of attend.
            assert support.relative_error(np.asarray(out)[rows], want) <= support.ATTEND_ERROR
            support.assert_lse(np.asarray(lse)[rows], want_lse)
            at += count
    cache.commit(step)
    assert [s.num_committed for s in held] == lengths


def test_a_torch_cache_takes_no_more_threads_than_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.delenv("KVARN_NUM_THREADS", raising=False)
    (available,) = (info.num_threads for info in kvarn.backends() if info.name == "cpu")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, available + 1):
            torch.set_num_threads(threads)
            assert make(dtype=torch.float32, num_threads=0).num_threads == min(threads, available)
        assert make(dtype=torch.float32, num_threads=3).num_threads == 3
        assert make(num_threads=0).num_threads == 0  # numpy: the plan's own default
        monkeypatch.setenv("KVARN_NUM_THREADS", "5")
        assert "5 threads" in make(dtype=torch.float32, num_threads=0)._plan.describe
    finally:
        torch.set_num_threads(before)


def test_attend_to_one_sequence_outside_a_step() -> None:
    cache = make()
    sequence = cache.sequence()
    cache.append(sequence, *random_kv(100))
    q = np.random.default_rng(1).standard_normal((5, QUERY_HEADS, DIM), np.float32)
    alone = cache.attend(sequence, 1, q[4:])
    together = cache.attend(sequence, 1, q)
    # The last query sees the same either way and is rounded to the same integers in every tile; only the float32 sums across the 4 tiles
    # may be taken in another order: a rounding per tile for the weights, their sum and the output.
    assert support.relative_error(together[4:], alone) < 3 * 4 * 2**-24


def test_speculated_tokens_are_taken_back_exactly() -> None:
    k, v = random_kv(200)
    wrong = random_kv(20, 5)
    cache = make()
    plain, sequence = cache.sequence(), cache.sequence()
    cache.append(plain, k, v)
    at = 0
    for count, accepted in [(90, 90), (20, 3), (20, 0), (5, 5), (102, 102)]:
        step = cache.begin([sequence], [count])
        for layer in range(LAYERS):
            nk, nv = (
                np.concatenate([x[layer, at : at + accepted], w[layer, : count - accepted]]) for x, w in zip((k, v), wrong, strict=True)
            )
            cache.write(step, layer, nk, nv)
        pending = sequence.num_tokens - sequence.num_committed
        cache.commit(step, [pending - (count - accepted)])
        at += accepted
    assert contents(cache, sequence) == contents(cache, plain)


def test_rollback_and_an_abandoned_step() -> None:
    cache = make()
    sequence = cache.sequence()
    k, v = random_kv(70)
    cache.append(sequence, k, v)
    before = contents(cache, sequence)
    step = cache.begin([sequence], [10])
    cache.write(step, 0, k[0, :10], v[0, :10])
    cache.rollback(step)
    assert contents(cache, sequence) == before
    with pytest.raises(kvarn.StaleHandleError, match="open step"):
        cache.write(step, 1, k[1, :10], v[1, :10])
    long = cache.begin([sequence], [100])
    with pytest.raises(ValueError, match="uncommitted"):
        cache.rollback(long)


def test_forks_share_memory_until_they_write() -> None:
    cache = make()
    k, v = random_kv(150)
    sequence = cache.sequence()
    cache.append(sequence, k, v)
    used, before = cache.usage().used, contents(cache, sequence)
    fork, prefix = sequence.fork(), sequence.share_prefix(64)
    assert cache.usage().used == used
    assert cache.usage().tokens == 150 + 150 + 64
    more = random_kv(50, 3)
    cache.append(fork, *more)
    cache.append(prefix, *more)
    assert contents(cache, sequence) == before
    for held, head in ((fork, 150), (prefix, 64)):
        both = [np.concatenate([old[:, :head], new], 1) for old, new in zip((k, v), more, strict=True)]
        assert_holds(cache, held, *both)
    with pytest.raises(ValueError, match="inside"):
        sequence.share_prefix(70)


def test_truncate_is_exact_outside_records_and_lossy_once_inside() -> None:
    cache = make()
    k, v = random_kv(150)
    sequence = cache.sequence()
    cache.append(sequence, k, v)
    sequence.truncate(140)  # inside the open tile
    assert_holds(cache, sequence, k[:, :140], v[:, :140])
    inside = [cache.dequantise(sequence, layer) for layer in range(LAYERS)]
    sequence.truncate(50)  # inside an encoded tile
    for layer in range(LAYERS):
        for got, want in zip(cache.dequantise(sequence, layer), inside[layer], strict=True):
            np.testing.assert_allclose(got, want[:50], rtol=0, atol=ROTATION_ERROR)
    cache.append(sequence, k[:, 50:], v[:, 50:])
    assert len(sequence) == 150
    with pytest.raises(ValueError, match="num_tokens"):
        sequence.truncate(151)


def test_memory_comes_back() -> None:
    cache = make(fixed=True, max_tokens=512, max_sequences=2)
    free = cache.pool.info.free_blocks, cache.pool.info.free_slots
    first, second = cache.sequence(), cache.sequence()
    cache.append(first, *random_kv(100))
    cache.append(second, *random_kv(100))
    first.free()
    first.free()
    with pytest.raises(kvarn.StaleHandleError, match="freed"):
        first.table()
    del second
    gc.collect()
    assert (cache.pool.info.free_blocks, cache.pool.info.free_slots) == free
    assert cache.usage().used == 0
    assert cache.usage().compression == 0


def test_a_dropped_cache_is_gone_at_once() -> None:
    cache = make()
    sequence = cache.sequence()
    cache.write(cache.begin([sequence], [3]), 0, *(x[0] for x in random_kv(3)))
    gone = weakref.ref(cache)
    gc.disable()
    try:
        del cache, sequence
        assert gone() is None
    finally:
        gc.enable()


def test_a_fixed_cache_that_is_full_changes_nothing() -> None:
    cache = make(fixed=True, max_tokens=8 * TILE, max_sequences=2)
    first, second = cache.sequence(), cache.sequence()
    k, v = random_kv(9 * TILE)
    cache.append(first, k[:, : 6 * TILE], v[:, : 6 * TILE])
    cache.append(second, k[:, : 3 * TILE + 2], v[:, : 3 * TILE + 2])
    before = contents(cache, first), contents(cache, second), cache.pool.info, len(second)
    with pytest.raises(kvarn.OutOfBlocksError, match="room for"):
        cache.begin([first, second], [4, 4 * TILE])
    assert (contents(cache, first), contents(cache, second), cache.pool.info, len(second)) == before
    first.free()
    cache.append(second, k[:, : 4 * TILE], v[:, : 4 * TILE])
    assert len(second) == 7 * TILE + 2


def test_what_fits_a_fixed_cache_can_be_used_to_the_last_token() -> None:
    cache = make(fixed=True, max_tokens=10 * TILE, max_sequences=2, recent_tokens=TILE)
    k, v = random_kv(7 * TILE)
    held = [cache.sequence(), cache.sequence()]
    for sequence in held:  # 5 blocks each: 7 tiles, of which one is sinks and one recent
        cache.append(sequence, k, v)
    assert cache.pool.info.free_blocks == 0
    for sequence in held:
        assert_holds(cache, sequence, k, v, recent=TILE)


def test_growth_moves_the_contents() -> None:
    cache = make()
    k, v = random_kv(300)
    held = [cache.sequence() for _ in range(5)]
    sizes = set()
    for at in range(0, 300, 30):
        for sequence in held:
            cache.append(sequence, k[:, at : at + 30], v[:, at : at + 30])
        sizes.add(cache.records.shape[1])
    assert len(sizes) > 2
    for sequence in held:
        assert_holds(cache, sequence, k, v)


@pytest.mark.parametrize("array", ["records", "staging", "scratch"])
def test_a_cache_without_memory_to_grow_changes_nothing(array: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make()
    sequence = cache.sequence()
    k, v = random_kv(40)
    cache.append(sequence, k, v)
    table, before = sequence.table(), contents(cache, sequence)
    zeros, addresses = cache.memory.zeros, (cache.records.ctypes.data, cache.staging.ctypes.data)

    def no_zeros(name: str, *arguments: Any, **options: Any) -> Any:
        if name == array:
            raise kvarn.OutOfMemoryError(f"[kvarn.Cache] {name}: expected room, got out of memory")
        return zeros(name, *arguments, **options)

    monkeypatch.setattr(cache.memory, "zeros", no_zeros)
    others = [cache.sequence() for _ in range(8)]  # the sinks of so many do not fit into the staging there is
    with pytest.raises(MemoryError, match=rf"\[kvarn.Cache\] {array}: "):
        cache.begin([sequence, *others], [1000] * 9)
    assert [len(held) for held in (sequence, *others)] == [40] + [0] * 8
    np.testing.assert_array_equal(sequence.table(), table)
    assert contents(cache, sequence) == before
    if array != "scratch":
        assert addresses == (cache.records.ctypes.data, cache.staging.ctypes.data), "neither moved"
    monkeypatch.undo()
    cache.append(sequence, *random_kv(100, 1))
    assert_holds(cache, sequence, *(np.concatenate(pair, 1) for pair in zip((k, v), random_kv(100, 1), strict=True)))


def test_memory_that_is_not_there_is_named() -> None:
    with pytest.raises(kvarn.OutOfMemoryError, match=r"\[kvarn.Cache\] records: expected [\d,]+ bytes on cpu, got out of memory"):
        make(max_tokens=1 << 41)
    torch = pytest.importorskip("torch")
    with pytest.raises(kvarn.OutOfMemoryError, match=r"\[kvarn.Cache\] records: expected [\d,]+ bytes on cpu, got out of memory"):
        make(max_tokens=1 << 41, dtype=torch.float32)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_what_is_not_finite_stays_in_its_sequence(bad: float) -> None:
    cache = make()
    k, v = random_kv(100)
    clean, dirty = cache.sequence(), cache.sequence()
    cache.append(clean, k, v)
    q = np.random.default_rng(1).standard_normal((2, QUERY_HEADS, DIM), np.float32)

    def attend(poison: float) -> np.ndarray:
        other = k.copy()
        other[:, 40] = poison
        dirty.truncate(0)
        cache.append(dirty, other, v)
        step = cache.begin([clean, dirty], [1, 1])
        cache.write(step, 0, k[0, :2], v[0, :2])
        out: np.ndarray = cache.attend(step, 0, q)
        cache.rollback(step)
        return out

    good, poisoned = attend(1.0), attend(bad)
    assert good[0].tobytes() == poisoned[0].tobytes()
    assert np.isfinite(good).all()
    assert np.isnan(poisoned[1]).all()


@pytest.mark.parametrize(("recent", "kind"), [(0, "numpy"), (2 * TILE, "numpy"), (0, "torch")])
def test_a_saved_sequence_opens_elsewhere(tmp_path: Path, recent: int, kind: str) -> None:
    cache = make(recent_tokens=TILE)
    k, v = random_kv(205)
    sequence = cache.sequence()
    cache.append(sequence, k[:, :200], v[:, :200])
    step = cache.begin([sequence], [5])
    for layer in range(LAYERS):
        cache.write(step, layer, k[layer, 200:], v[layer, 200:])
    path = tmp_path / "sequence.safetensors"
    cache.save(sequence, path)
    same = cache.load(path)
    assert contents(cache, same) == contents(cache, sequence)
    assert (same.num_tokens, same.num_committed) == (205, 200)
    dtype: Any = "float32"
    if kind == "torch":
        dtype = pytest.importorskip("torch").float32
    other = make(recent_tokens=recent, dtype=dtype)
    opened = other.load(path)
    for layer in range(LAYERS):
        want = [np.asarray(x) for x in cache.dequantise(sequence, layer)]
        got = [np.asarray(x) for x in other.dequantise(opened, layer)]
        if recent < TILE:  # the tile that the first cache kept in full precision is encoded here
            want = list(expected(k[layer], v[layer], 200))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=ROTATION_ERROR)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    cache = make()
    sequence = cache.sequence()
    cache.append(sequence, *random_kv(100))
    path = tmp_path / "sequence.safetensors"
    cache.save(sequence, path)
    with pytest.raises(ValueError, match="format: expected k2v2_g32"):
        make(format="k2v2_g32").load(path)
    with pytest.raises(ValueError, match="num_layers"):
        make(num_layers=3).load(path)
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(kvarn.CorruptError, match="tile"):
        cache.load(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(kvarn.CorruptError, match="safetensors"):
        cache.load(path)


def test_wrong_arguments_are_named() -> None:
    cache, k = make(), random_kv(4)[0]
    sequence, foreign = cache.sequence(), make().sequence()
    with pytest.raises(ValueError, match="sequences of this cache"):
        cache.begin([foreign], [1])
    with pytest.raises(ValueError, match="each sequence once"):
        cache.begin([sequence, sequence], [1, 1])
    with pytest.raises(ValueError, match="counts"):
        cache.begin([sequence], [-1])
    step = cache.begin([sequence], [4])
    with pytest.raises(ValueError, match=r"expected \[4, 2, 64\], got \[3, 2, 64\]"):
        cache.write(step, 0, k[0, :3], k[0, :3])
    with pytest.raises(TypeError, match="float32"):
        cache.write(step, 0, k[0].astype(np.float64), k[0].astype(np.float64))
    with pytest.raises(ValueError, match="accepted"):
        cache.commit(step, [5])
    none = make(num_q_heads=0)
    with pytest.raises(ValueError, match="num_q_heads"):
        none.attend(none.sequence(), 0, np.zeros((0, 0, DIM), np.float32))
    for wrong, message in (({"dtype": "int8"}, "dtype"), ({"dtype": "bfloat16"}, "torch.bfloat16"), ({"device": "tpu"}, "device")):
        with pytest.raises(ValueError, match=message):
            make(**wrong)
    with pytest.raises(ValueError, match="num_layers"):
        make(num_layers=0)
    with pytest.raises(TypeError, match=r"\[kvarn.Cache\] max_tokens: expected an integer, got str"):
        make(max_tokens="many")
    with pytest.raises(TypeError, match=r"\[kvarn.plan_create\] head_dim: expected an integer, got float"):
        make(head_dim=64.0)
    with pytest.raises(ValueError, match="multiple"):
        make(sink_tokens=5)


def test_usage_counts_bytes() -> None:
    cache = make(format="k4v4_g32", dtype="float16")
    sequence = cache.sequence()
    k, v = (x.astype(np.float16) for x in random_kv(10 * TILE))
    cache.append(sequence, k, v)
    usage = cache.usage()
    assert usage.records_used == 9 * LAYERS * HEADS * cache.format.record_bytes(DIM)
    assert usage.staging_used == LAYERS * 2 * HEADS * TILE * DIM * 2
    assert usage.full_precision == k.nbytes + v.nbytes
    assert usage.bits_per_element == pytest.approx(16 / usage.compression)
    assert usage.allocated >= usage.used


operation = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 3), st.integers(1, 90)),
    st.tuples(st.just("speculate"), st.integers(0, 3), st.integers(1, 40)),
    st.tuples(st.just("fork"), st.integers(0, 3), st.just(0)),
    st.tuples(st.just("back"), st.integers(0, 3), st.integers(1, 200)),
    st.tuples(st.just("free"), st.integers(0, 3), st.just(0)),
)


@settings(deadline=None, max_examples=40)
@given(st.lists(operation, max_size=14))
def test_sequences_never_disturb_one_another(operations: list[tuple[str, int, int]]) -> None:
    """Any mixture of appends, forks, cuts and drops leaves every sequence with its own tokens.

    The model keeps, per sequence, the tokens as they were written. A cut inside an encoded tile fixes that tile's values, so the model cuts
    at tile boundaries, where nothing is lost.
    """
    cache = make(num_layers=LAYERS)
    held: list[tuple[kvarn.CacheSequence, np.ndarray, np.ndarray]] = []
    for number, (kind, which, amount) in enumerate(operations):
        if not held or (kind == "append" and len(held) < 3):
            held.append((cache.sequence(), *random_kv(0)))
        sequence, k, v = held[which % len(held)]
        if kind == "append":
            nk, nv = random_kv(amount, number)
            cache.append(sequence, nk, nv)
            held[which % len(held)] = (sequence, np.concatenate([k, nk], 1), np.concatenate([v, nv], 1))
        elif kind == "speculate":
            step = cache.begin([sequence], [amount], keep=amount)
            nk, nv = random_kv(amount, number)
            for layer in range(LAYERS):
                cache.write(step, layer, nk[layer], nv[layer])
            cache.rollback(step)
        elif kind == "fork":
            held.append((sequence.fork(), k, v))
        elif kind == "back":
            cut = max(0, len(sequence) - amount) // TILE * TILE
            sequence.truncate(cut)
            held[which % len(held)] = (sequence, k[:, :cut], v[:, :cut])
        else:
            sequence.free()
            del held[which % len(held)]
        for other, ok, ov in held:
            assert len(other) == ok.shape[1]
            assert_holds(cache, other, ok, ov)


def test_a_closed_or_foreign_step_is_refused() -> None:
    cache, other = (kvarn.Cache("k4v2_g32", num_layers=1, num_kv_heads=1, head_dim=64) for _ in range(2))
    sequence, foreign = cache.sequence(), other.sequence()
    closed = cache.begin([sequence], [3])
    cache.begin([sequence], [4])
    for step in (closed, other.begin([foreign], [5])):
        for finish in (cache.commit, cache.rollback):
            with pytest.raises(kvarn.StaleHandleError, match="expected this cache's open step"):
                finish(step)
    assert (sequence.num_tokens, foreign.num_tokens) == (7, 5)


def test_append_checks_k_and_v_before_anything_changes() -> None:
    cache = make(num_layers=2, dtype="float16")
    sequence = cache.sequence()
    good = np.zeros((2, 3, cache.num_kv_heads, cache.head_dim), np.float16)
    for k, v in ((good, good[:1]), (good[:, :2], good), (good.astype(np.float32), good), (good[0], good[0])):
        with pytest.raises(ValueError, match=r"\[kvarn.Cache.append\] [kv]: expected float16"):
            cache.append(sequence, k, v)
    for bad in ([1.0], None, 3):
        with pytest.raises(TypeError, match=r"\[kvarn.Cache.append\] v: expected a numpy array or torch tensor, got"):
            cache.append(sequence, good, bad)
        step = cache.begin([sequence], [3])
        with pytest.raises(TypeError, match=r"\[kvarn.Cache.write\] k: expected a numpy array or torch tensor, got"):
            cache.write(step, 0, bad, good[0])
        cache.rollback(step)
    assert sequence.num_tokens == 0
    cache.append(sequence, good, good)
    assert sequence.num_committed == 3


def test_a_layer_outside_the_cache_is_refused() -> None:
    cache = make(num_layers=2, dtype="float16")
    step = cache.begin([cache.sequence()], [1])
    k = np.zeros((1, cache.num_kv_heads, cache.head_dim), np.float16)
    for layer in (-1, 2):
        with pytest.raises(ValueError, match=f"layer: expected 0 to 1, got {layer}"):
            cache.write(step, layer, k, k)


def test_a_step_is_committed_only_with_every_layer_written() -> None:
    cache = make(num_layers=2, dtype="float16")
    sequence = cache.sequence()
    step = cache.begin([sequence], [1])
    k = np.zeros((1, cache.num_kv_heads, cache.head_dim), np.float16)
    cache.write(step, 0, k, k)
    with pytest.raises(ValueError, match=r"expected every layer to be written, got none for layers \[1\]"):
        cache.commit(step)
    cache.write(step, 1, k, k)
    cache.commit(step)
    assert sequence.num_committed == 1
