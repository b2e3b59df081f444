"""BlockPool and Sequence, as Python sees them; the rules themselves are tested in C++."""

from __future__ import annotations

import numpy as np
import pytest

import kvarn

TILE = 32


@pytest.fixture
def pool() -> kvarn.BlockPool:
    return kvarn.BlockPool(8, 8, TILE, sink_tokens=TILE)


def test_append_and_commit(pool: kvarn.BlockPool) -> None:
    sequence = pool.sequence()
    work = sequence.append(3 * TILE + 5)
    assert work.slot_mapping.dtype == np.int64
    assert work.copies.shape == work.decodes.shape == work.encodes.shape == (0, 2)
    table = sequence.table()
    assert table.dtype == np.int32
    assert len(table) == sequence.num_tiles == 4
    # Every token sits where its tile's slot says.
    tokens = np.arange(3 * TILE + 5)
    np.testing.assert_array_equal(work.slot_mapping, ~table[tokens // TILE].astype(np.int64) * TILE + tokens % TILE)
    assert (sequence.num_tokens, sequence.num_committed) == (3 * TILE + 5, 0)

    before = table
    work = sequence.commit()
    after = sequence.table()
    assert sequence.num_committed == 3 * TILE + 5
    assert after[0] == before[0] < 0, "the sink tile stays in staging"
    assert after[3] == before[3] < 0, "the unfinished tile stays in staging"
    np.testing.assert_array_equal(work.encodes, np.stack([~before[1:3], after[1:3]], axis=1))
    assert (sequence.num_blocks, sequence.num_slots) == (2, 2)
    assert work.encodes[:, 0].flags.c_contiguous
    assert work.encodes[:, 1].flags.c_contiguous


def test_commit_of_a_part_and_rollback(pool: kvarn.BlockPool) -> None:
    sequence = pool.sequence()
    sequence.append(10)
    sequence.commit(4)
    sequence.rollback(3)
    assert (sequence.num_tokens, sequence.num_committed) == (7, 4)
    with pytest.raises(ValueError, match=r"\[kvarn\.sequence_rollback\] .*, got 4"):
        sequence.rollback(4)
    assert (sequence.num_tokens, sequence.num_committed) == (7, 4)
    with pytest.raises(ValueError, match=r"\[kvarn\.sequence_commit\]"):
        sequence.commit(4)


def test_fork_copies_on_write(pool: kvarn.BlockPool) -> None:
    first = pool.sequence()
    first.append(TILE + 5)
    first.commit()
    second = first.fork()
    np.testing.assert_array_equal(first.table(), second.table())
    assert pool.free_slots == 6
    work = second.append(1)
    assert work.copies.shape == (1, 2)
    assert work.copies[0, 0] == ~first.table()[1]
    assert work.copies[0, 1] == ~second.table()[1]
    assert first.table()[0] == second.table()[0]


def test_share_prefix_and_truncate(pool: kvarn.BlockPool) -> None:
    first = pool.sequence()
    first.append(4 * TILE)
    first.commit()
    second = first.share_prefix(2 * TILE)
    np.testing.assert_array_equal(second.table(), first.table()[:2])
    with pytest.raises(ValueError, match=r"\[kvarn\.sequence_share_prefix\]"):
        first.share_prefix(2 * TILE + 1)
    work = first.truncate(3 * TILE + 1)
    assert work.decodes.shape == (1, 2)
    assert work.decodes[0, 1] == ~first.table()[3]
    assert first.num_tokens == 3 * TILE + 1


def test_exhaustion_changes_nothing(pool: kvarn.BlockPool) -> None:
    sequence = pool.sequence()
    sequence.append(5)
    sequence.commit()
    table, info = sequence.table(), pool.info
    with pytest.raises(kvarn.OutOfBlocksError) as caught:
        sequence.append(9 * TILE)
    assert isinstance(caught.value, MemoryError)
    np.testing.assert_array_equal(sequence.table(), table)
    assert pool.info == info
    assert sequence.num_tokens == 5


def test_freed_sequences_are_stale(pool: kvarn.BlockPool) -> None:
    sequence = pool.sequence()
    sequence.append(5)
    sequence.free()
    other = pool.sequence()
    other.append(5)
    for use in (
        sequence.free,
        sequence.table,
        sequence.fork,
        sequence.commit,
        lambda: sequence.append(1),
        lambda: sequence.rollback(1),
        lambda: sequence.truncate(0),
        lambda: sequence.share_prefix(0),
        lambda: sequence.num_tokens,
    ):
        with pytest.raises(kvarn.StaleHandleError) as caught:
            use()
        assert isinstance(caught.value, RuntimeError)
    assert repr(sequence) == "<kvarn.Sequence, freed>"
    assert other.num_tokens == 5


def test_with_block_frees(pool: kvarn.BlockPool) -> None:
    with pool.sequence() as sequence:
        sequence.append(TILE)
        assert pool.free_slots == 7
        assert pool.num_sequences == 1
    assert pool.free_slots == 8
    assert pool.num_sequences == 0


def test_work_outlives_the_pool() -> None:
    pool = kvarn.BlockPool(8, 8, TILE, sink_tokens=0)
    sequence = pool.sequence()
    first = sequence.append(2 * TILE)
    mapping = first.slot_mapping.copy()
    encodes = sequence.commit().encodes
    expected = encodes.copy()
    sequence.append(TILE)
    del pool, sequence
    np.testing.assert_array_equal(first.slot_mapping, mapping)
    np.testing.assert_array_equal(encodes, expected)


@pytest.mark.parametrize(
    ("values", "text"),
    [((-1, 8, TILE), "num_blocks"), ((8, -1, TILE), "num_slots"), ((8, 8, 33), "tile_tokens")],
)
def test_bad_pools(values: tuple[int, int, int], text: str) -> None:
    with pytest.raises(ValueError, match=rf"\[kvarn.pool_create\] {text}: expected .*, got "):
        kvarn.BlockPool(*values)
    with pytest.raises(ValueError, match=r"\[kvarn.pool_create\] sink_tokens: expected .*, got 33"):
        kvarn.BlockPool(8, 8, TILE, sink_tokens=33)


def test_negative_counts(pool: kvarn.BlockPool) -> None:
    sequence = pool.sequence()
    for call in (sequence.append, sequence.commit, sequence.rollback, sequence.truncate, sequence.share_prefix):
        with pytest.raises(ValueError, match="got -1"):
            call(-1)
