"""The paged cache's bookkeeping: which block or staging slot holds which tile of which sequence. Touches no K or V."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt

from kvarn import _core
from kvarn._errors import StaleHandleError


@dataclass(frozen=True)
class Work:
    """What the caller must now run on every layer's memory, in this order: copies, decodes, append, encodes.

    Slots that a call released may be handed out by the next call: run the work before it. The two columns of the [n, 2] arrays are each
    contiguous, so that ``encodes[:, 0]`` and ``encodes[:, 1]`` go to kvarn.ops.encode as they are.
    """

    copies: npt.NDArray[np.int32]
    """[n, 2] source slot, destination slot: copy whole slots, K and V."""
    decodes: npt.NDArray[np.int32]
    """[n, 2] source block, destination slot: decode, rotated, into the slot."""
    encodes: npt.NDArray[np.int32]
    """[n, 2] source slot, destination block."""
    slot_mapping: npt.NDArray[np.int64]
    """[num_tokens] for kvarn.ops.append: slot * tile_tokens + position in the tile."""


@dataclass(frozen=True)
class PoolInfo:
    """Room of a pool."""

    num_blocks: int
    free_blocks: int
    num_slots: int
    free_slots: int
    num_sequences: int


class BlockPool:
    """Hands out blocks and staging slots to sequences, by reference count.

    Args:
        num_blocks: Blocks, each the records of one tile for all KV heads of a layer.
        num_slots: Staging slots, each one tile in full precision for all KV heads of a layer.
        tile_tokens: Tokens of one tile, as in the format.
        sink_tokens: The first tokens of a sequence that stay in staging for good; a multiple of tile_tokens.
        recent_tokens: The last committed tokens that stay in staging at least; 0 keeps only the unfinished tile.

    Raises InvalidArgumentError for values outside their ranges. One thread at a time may use a pool and its sequences.
    """

    def __init__(self, num_blocks: int, num_slots: int, tile_tokens: int, *, sink_tokens: int = 128, recent_tokens: int = 0) -> None:
        self._core = _core.Pool(num_blocks, num_slots, tile_tokens, sink_tokens, recent_tokens)
        self.tile_tokens = tile_tokens
        self.sink_tokens = sink_tokens
        self.recent_tokens = recent_tokens

    def sequence(self) -> Sequence:
        """A new, empty sequence."""
        return Sequence(self, self._core.sequence_create())

    @property
    def info(self) -> PoolInfo:
        """How many blocks, slots and sequences there are and how many are free."""
        return PoolInfo(*self._core.info())

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return self.info.num_blocks

    @property
    def num_slots(self) -> int:
        """Staging slots of the pool."""
        return self.info.num_slots

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence names."""
        return self.info.free_blocks

    @property
    def free_slots(self) -> int:
        """Slots that no sequence names."""
        return self.info.free_slots

    @property
    def num_sequences(self) -> int:
        """Sequences that are alive."""
        return self.info.num_sequences

    def __repr__(self) -> str:
        info = self.info
        blocks, slots = info.num_blocks - info.free_blocks, info.num_slots - info.free_slots
        return f"<kvarn.BlockPool {blocks}/{info.num_blocks} blocks, {slots}/{info.num_slots} slots, {info.num_sequences} sequences>"


class Sequence:
    """The tokens of one sequence in a pool, made by BlockPool.sequence(), fork() or share_prefix().

    It keeps its blocks and slots until free() (or the end of a ``with`` block). After that every call raises StaleHandleError.
    A call that raises OutOfBlocksError has changed nothing.
    """

    def __init__(self, pool: BlockPool, handle: int) -> None:
        self.pool = pool
        self._handle = handle
        self._core = pool._core

    def append(self, num_tokens: int) -> Work:
        """Room for ``num_tokens`` uncommitted tokens: copies of shared slots, and the slot mapping [num_tokens]."""
        return Work(*self._core.sequence_append(self._handle, num_tokens))

    def commit(self, num_tokens: int | None = None) -> Work:
        """The first ``num_tokens`` uncommitted tokens, or all of them, become permanent: encodes of every tile that is now complete, past
        the sinks and older than recent_tokens."""
        if num_tokens is None:
            num_tokens = self.num_tokens - self.num_committed
        return Work(*self._core.sequence_commit(self._handle, num_tokens))

    def rollback(self, num_tokens: int) -> None:
        """Drops the last ``num_tokens`` uncommitted tokens."""
        self._core.sequence_rollback(self._handle, num_tokens)

    def truncate(self, num_tokens: int) -> Work:
        """Keeps the first ``num_tokens`` tokens. A cut inside an encoded tile decodes it into a slot, with the values its record had."""
        return Work(*self._core.sequence_truncate(self._handle, num_tokens))

    def fork(self) -> Sequence:
        """A second sequence with the same tokens; blocks and slots are shared until one of the two writes."""
        return Sequence(self.pool, self._core.sequence_fork(self._handle))

    def share_prefix(self, num_tokens: int) -> Sequence:
        """A new sequence that shares the first ``num_tokens`` committed tokens. A cut inside an encoded tile is an InvalidArgumentError."""
        return Sequence(self.pool, self._core.sequence_share_prefix(self._handle, num_tokens))

    def free(self) -> None:
        """Gives every block and slot back to the pool."""
        self._core.sequence_free(self._handle)

    def table(self) -> npt.NDArray[np.int32]:
        """int32 [num_tiles], one row of a block table: a block where >= 0, staging slot ``~entry`` where < 0."""
        return self._core.sequence_table(self._handle)

    @property
    def num_tokens(self) -> int:
        """Tokens, committed and not."""
        return self._core.sequence_info(self._handle)[0]

    @property
    def num_committed(self) -> int:
        """Tokens that are permanent."""
        return self._core.sequence_info(self._handle)[1]

    @property
    def num_tiles(self) -> int:
        """Entries of the block table."""
        return self._core.sequence_info(self._handle)[2]

    @property
    def num_blocks(self) -> int:
        """Blocks that the table names, shared ones included."""
        return self._core.sequence_info(self._handle)[3]

    @property
    def num_slots(self) -> int:
        """Slots that the table names, shared ones included."""
        return self._core.sequence_info(self._handle)[4]

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.free()

    def __repr__(self) -> str:
        try:
            tokens, committed, tiles, *_ = self._core.sequence_info(self._handle)
        except StaleHandleError:
            return "<kvarn.Sequence, freed>"
        return f"<kvarn.Sequence {tokens} tokens, {committed} committed, {tiles} tiles>"
