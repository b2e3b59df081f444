"""What one step writes where: turns the pool's answers into lists that are replayed on every layer's memory.

A step gives each of its sequences some new tokens. A short run of tokens goes through staging slots. Of a long run (a prompt) every tile
that becomes complete and old enough is *direct*: it is encoded from a scratch buffer that all layers share, so that a prompt needs no more
staging than a decode step. The order on each layer's memory is

    copies (all layers at once), `early` tokens, `early_encodes`, direct tiles, `late` tokens

Slots that the early encodes release may be handed out again for late tokens; that is why there are two appends. Each list may be empty.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvarn._pool import Sequence as PoolSequence

Pair = tuple[int, int]
#: Slot, block, position of the tile's first token in its sequence.
Encode = tuple[int, int, int]


@dataclass
class DirectRun:
    """Tiles of one sequence whose tokens follow one another: tokens [start, start + len(blocks) * G) of the step, whose positions in the
    sequence begin at `position`, become the records `blocks`."""

    start: int
    position: int
    blocks: list[int]


@dataclass
class Schedule:
    """Token indices run over the step's tokens, sequence after sequence."""

    num_tokens: int
    copies: list[Pair] = field(default_factory=list)  # slot -> slot
    early: NDArray[np.int64] | None = None  # [num_tokens] slot * G + position, -1: not now
    early_encodes: list[Encode] = field(default_factory=list)
    direct: list[DirectRun] = field(default_factory=list)
    late: NDArray[np.int64] | None = None  # as `early`


def encodable_tiles(committed: int, tile_tokens: int, sink_tokens: int, recent_tokens: int) -> int:
    """Tiles of a sequence with `committed` committed tokens that live in blocks; the others live in staging slots."""
    return max(0, (committed - recent_tokens) // tile_tokens - sink_tokens // tile_tokens)


def slots_needed(total: int, committed: int, tile_tokens: int, sink_tokens: int, recent_tokens: int) -> int:
    """Staging slots of a sequence with `total` tokens."""
    return -(-total // tile_tokens) - encodable_tiles(committed, tile_tokens, sink_tokens, recent_tokens)


@dataclass
class Demand:
    """Most blocks and slots that a step may take from the pool, were nothing given back meanwhile."""

    blocks: int
    slots: int


def demand(sequence: PoolSequence, count: int, keep: int, tile_tokens: int, sink_tokens: int, recent_tokens: int) -> Demand:
    """What `count` more tokens may take, the commit of all of them included; `keep` as in `make_schedule`.

    `sequence` offers num_tokens, num_committed, num_blocks and num_slots. Conservative by one slot (copy-on-write) per sequence.
    """
    rules = (tile_tokens, sink_tokens, recent_tokens)
    total = sequence.num_tokens + count
    blocks = max(0, encodable_tiles(total, *rules) - sequence.num_blocks)
    early = max(sequence.num_committed, total - keep)
    peak = slots_needed(total, min(early, total), *rules)
    boundary = -(-sequence.num_tokens // tile_tokens) * tile_tokens
    while boundary < total:  # slots just after each tile was opened
        boundary = min(boundary + tile_tokens, total)
        committed = max(sequence.num_committed, min(boundary - tile_tokens, early))
        peak = max(peak, slots_needed(boundary, committed, *rules))
    opens_shared = count > 0 and sequence.num_tokens % tile_tokens != 0
    return Demand(blocks, max(0, peak - sequence.num_slots) + int(opens_shared))


def encodes_of(sequence: PoolSequence, count: int, tile_tokens: int, sink_tokens: int) -> list[Encode]:
    """Commits `count` tokens and says which tiles are to be encoded."""
    first = sink_tokens + sequence.num_blocks * tile_tokens
    return [(int(slot), int(block), first + i * tile_tokens) for i, (slot, block) in enumerate(sequence.commit(count).encodes)]


def make_schedule(
    sequences: AbstractSequence[PoolSequence], counts: AbstractSequence[int], tile_tokens: int, keep: int, sink_tokens: int
) -> Schedule:
    """Appends `counts[i]` tokens to pool sequence i and commits early all but each sequence's last `keep` tokens.

    The caller has made sure that the pool has room for all of it (`demand`).
    """
    total = sum(counts)
    schedule = Schedule(total)
    early = np.full(total, -1, np.int64)
    late = np.full(total, -1, np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    done = [0] * len(sequences)
    # First every token that lands in a tile that exists, and all of the short runs. This releases no slot, so the copies can go first.
    for i, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
        first = count if count <= keep else min(count, -sequence.num_tokens % tile_tokens)
        if first == 0:
            continue
        work = sequence.append(first)
        schedule.copies += [(int(a), int(b)) for a, b in work.copies]
        early[starts[i] : starts[i] + first] = work.slot_mapping
        done[i] = first
    # Then the long runs, tile by tile, each tile committed before the next is opened.
    for i, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
        if count <= keep:
            continue
        final = sequence.num_tokens + count - done[i]
        opened: dict[int, tuple[int, NDArray[np.int64]]] = {}  # slot -> first token of the step in it, its slot mapping
        while True:
            ready = min(sequence.num_tokens, final - keep) - sequence.num_committed
            if ready > 0:
                for slot, block, position in encodes_of(sequence, ready, tile_tokens, sink_tokens):
                    tile = opened.pop(slot, None)
                    if tile is None:
                        schedule.early_encodes.append((slot, block, position))
                    else:
                        _add_direct(schedule.direct, DirectRun(tile[0], position, [block]), tile_tokens)
            remaining = count - done[i]
            if remaining == 0:
                break
            step = min(tile_tokens, remaining)
            mapping = np.array(sequence.append(step).slot_mapping, np.int64)
            opened[int(mapping[0]) // tile_tokens] = (int(starts[i]) + done[i], mapping)
            done[i] += step
        for start, mapping in opened.values():
            late[start : start + len(mapping)] = mapping
    if (early >= 0).any():
        schedule.early = early
    if (late >= 0).any():
        schedule.late = late
    return schedule


def _add_direct(runs: list[DirectRun], tile: DirectRun, tile_tokens: int) -> None:
    length = len(runs[-1].blocks) * tile_tokens if runs else 0
    if runs and (runs[-1].start + length, runs[-1].position + length) == (tile.start, tile.position):
        runs[-1].blocks += tile.blocks
    else:
        runs.append(tile)
