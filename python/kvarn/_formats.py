"""Record formats: how many bits K and V have, and where every byte of an encoded tile lives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvarn import _core


@dataclass(frozen=True)
class RecordLayout:
    """Offsets of one record in bytes, as docs/FORMAT.md defines them. A plane of 0 bytes does not exist.

    ``metadata_offset`` and ``metadata_count`` (values, not bytes) are in the order k_scale, k_zero, k_token_scale, v_channel_scale,
    v_scale, v_zero.
    """

    record_bytes: int
    k_low_offset: int
    k_low_bytes: int
    k_high_offset: int
    k_high_bytes: int
    v_low_offset: int
    v_low_bytes: int
    v_high_offset: int
    v_high_bytes: int
    metadata_offset: tuple[int, ...]
    metadata_count: tuple[int, ...]
    metadata_range_offset: int


@dataclass(frozen=True, init=False)
class Format:
    """A record format, made from its name: ``k<bits>v<bits>_g<tokens>``, with ``_m8`` appended for 8-bit metadata.

    ``Format("k4v2_g128")`` has 4-bit K, 2-bit V and tiles of 128 tokens. Widths are 2, 3, 4, 5, 6 or 8 bits, tiles 32, 64, 128 or 256
    tokens. ``str()`` gives the name. Raises InvalidArgumentError (a ValueError) for any other name.
    """

    k_bits: int
    v_bits: int
    tile_tokens: int
    metadata_bits: int

    def __init__(self, name: str | Format) -> None:
        numbers = name.numbers if isinstance(name, Format) else _core.format_parse(name)
        for field, value in zip(("k_bits", "v_bits", "tile_tokens", "metadata_bits"), numbers, strict=True):
            object.__setattr__(self, field, value)

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """(k_bits, v_bits, tile_tokens, metadata_bits)."""
        return (self.k_bits, self.v_bits, self.tile_tokens, self.metadata_bits)

    @property
    def name(self) -> str:
        """The name: "k4v2_g128"."""
        return _core.format_name(self.numbers)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"Format({self.name!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (Format, (self.name,))

    def layout(self, head_dim: int) -> RecordLayout:
        """Offsets of one record for heads of ``head_dim`` channels. Raises InvalidArgumentError for a head_dim that is not supported."""
        return RecordLayout(**_core.record_layout(self.numbers, head_dim))

    def record_bytes(self, head_dim: int) -> int:
        """Bytes of one record: ``tile_tokens`` tokens of one KV head, K and V."""
        return self.layout(head_dim).record_bytes

    def bits_per_element(self, head_dim: int) -> float:
        """Bits of a record per value of K and V, metadata and padding included (16 for a float16 cache)."""
        return 8 * self.record_bytes(head_dim) / (2 * self.tile_tokens * head_dim)

    def published_bytes(self, head_dim: int) -> int:
        """Bytes of one record in the layout of the method's authors. Raises UnsupportedError where that layout does not exist."""
        return _core.published_bytes(self.numbers, head_dim)

    def import_published(self, head_dim: int, published: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The record, uint8 [record_bytes], of ``published``, uint8 [published_bytes], in the authors' layout. Lossless."""
        return _core.import_published(self.numbers, head_dim, published)

    def export_published(self, head_dim: int, record: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The authors' layout, uint8 [published_bytes], of ``record``, uint8 [record_bytes]. Lossless."""
        return _core.export_published(self.numbers, head_dim, record)
