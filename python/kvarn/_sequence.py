"""The sequences of a `kvarn.Cache`, and the account of its memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvarn._errors import StaleHandleError
from kvarn._pool import Sequence as PoolSequence

if TYPE_CHECKING:
    from kvarn.cache import Cache


@dataclass(frozen=True)
class CacheMemory:
    """Bytes of a cache, and what they hold. Of shared blocks and slots (forks, prefixes) each is counted once."""

    tokens: int  #: of all sequences, shared ones counted in each
    records_used: int  #: bytes of blocks in use
    staging_used: int  #: bytes of staging slots in use
    records_allocated: int
    staging_allocated: int
    scratch_allocated: int  #: buffer through which prompts are encoded
    full_precision: int  #: bytes of the same tokens in the cache's dtype, without a cache format
    full_precision_bits: int  #: bits per element of that dtype

    @property
    def used(self) -> int:
        """Bytes of records and staging in use."""
        return self.records_used + self.staging_used

    @property
    def allocated(self) -> int:
        """Bytes of all arrays."""
        return self.records_allocated + self.staging_allocated + self.scratch_allocated

    @property
    def bits_per_element(self) -> float:
        """Bits in use per element of K and V; 0 when the cache is empty."""
        elements = self.full_precision * 8 // self.full_precision_bits
        return 8 * self.used / elements if elements else 0.0

    @property
    def compression(self) -> float:
        """Bytes in full precision over bytes in use; 0 when the cache is empty."""
        return self.full_precision / self.used if self.used else 0.0


class CacheSequence:
    """One sequence of a `Cache`. Make it with `Cache.sequence`; a sequence that nobody holds gives its memory back."""

    def __init__(self, cache: Cache, handle: PoolSequence) -> None:
        self._cache = cache
        self._handle: PoolSequence | None = handle

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.free()

    def __repr__(self) -> str:
        return f"CacheSequence({len(self)} tokens)" if self._handle is not None else "CacheSequence(freed)"

    def __len__(self) -> int:
        return self.num_tokens

    @property
    def cache(self) -> Cache:
        """The cache it belongs to."""
        return self._cache

    @property
    def num_tokens(self) -> int:
        """Tokens, committed or not."""
        return int(self._pool_sequence.num_tokens)

    @property
    def num_committed(self) -> int:
        """Tokens that are permanent; only their tiles are ever encoded."""
        return int(self._pool_sequence.num_committed)

    @property
    def _pool_sequence(self) -> PoolSequence:
        if self._handle is None:
            raise StaleHandleError("[kvarn.Cache] sequence: expected a live sequence, got one that was freed")
        return self._handle

    def table(self) -> NDArray[np.int32]:
        """int32 [tiles]: block of each tile, or ``~slot`` of a tile in staging."""
        return self._pool_sequence.table()

    def fork(self) -> CacheSequence:
        """A second sequence with the same tokens. Memory is shared until one of the two writes (copy-on-write by tile)."""
        return self._cache._adopt(self._pool_sequence.fork())

    def share_prefix(self, num_tokens: int) -> CacheSequence:
        """A new sequence that starts with this one's first `num_tokens` committed tokens, in the same memory.

        Raises:
            ValueError: more than the committed tokens, or a cut inside an encoded tile.
        """
        return self._cache._adopt(self._pool_sequence.share_prefix(num_tokens))

    def truncate(self, num_tokens: int) -> None:
        """Keeps the first `num_tokens` tokens.

        Exact as long as the cut is not inside an encoded tile; there the tile is decoded back into staging, and its tokens keep the values
        that the record had.

        Raises:
            ValueError: negative, or more than there are.
            OutOfBlocksError: the cut needs a staging slot and a fixed cache has none; the sequence is as it was.
        """
        self._cache._truncate(self, num_tokens)

    def free(self) -> None:
        """Gives the memory back now. The sequence cannot be used any more; a second call does nothing."""
        if self._handle is not None:
            self._handle.free()
            self._handle = None
