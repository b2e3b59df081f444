"""Sequences on disk: one safetensors file per sequence, readable by every backend.

Tensors, for L layers, Hkv KV heads, tiles of G tokens:

- ``table`` int8 [tiles]: 1 where a tile is encoded, 0 where it is in full precision;
- ``records`` uint8 [L, encoded tiles, Hkv, record_bytes];
- ``staging`` [L, other tiles, 2 (K, V), Hkv, G, D], rotated, in the cache's dtype (bfloat16 as its uint16 bits);
- ``checksums`` uint32 [tiles]: CRC-32 of each tile's bytes, over all layers.

The metadata names the format and the shape (see `describe`). How the tiles were rounded is named too, but a reader need not know it.
"""

from __future__ import annotations

import os
import warnings
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvarn import ops
from kvarn._errors import CorruptError, InvalidArgumentError

if TYPE_CHECKING:
    from kvarn.cache import Cache, CacheSequence

VERSION = "1"


def describe(path: str | os.PathLike[str]) -> dict[str, str]:
    """Metadata of a saved sequence: version, format, dtype, num_layers, num_kv_heads, head_dim, num_tokens, num_committed, sink_tokens,
    recent_tokens, normalisation, rounding, moments (all as strings).

    Raises:
        CorruptError: not a file that `Cache.save` wrote.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            metadata: dict[str, str] | None = file.metadata()
    except SafetensorError as error:
        raise CorruptError(f"[kvarn.load] {os.fspath(path)}: expected a safetensors file, got one that does not open ({error})") from None
    if metadata is None or metadata.get("kvarn") != VERSION:
        raise CorruptError(f"[kvarn.load] {os.fspath(path)}: expected a kvarn sequence of version {VERSION}, got metadata {metadata}")
    return metadata


def read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """Metadata and tensors of a saved sequence, after every checksum was checked.

    Raises:
        CorruptError: the file or one of its tiles is damaged.
    """
    from safetensors.numpy import load_file

    metadata = describe(path)
    tensors = load_file(os.fspath(path))
    want = tensors["checksums"]
    got = _checksums(tensors["table"], tensors["records"], tensors["staging"])
    if not np.array_equal(want, got):
        tile = int(np.flatnonzero(want != got)[0])
        raise CorruptError(f"[kvarn.load] tile {tile}: expected checksum {want[tile]:08x}, got {got[tile]:08x}")
    return metadata, tensors


def _checksums(table: NDArray[np.int8], records: NDArray[Any], staging: NDArray[Any]) -> NDArray[np.uint32]:
    sums = np.zeros(len(table), np.uint32)
    seen = [0, 0]
    for tile, encoded in enumerate(table):
        source = records if encoded else staging
        for layer in range(source.shape[0]):
            sums[tile] = zlib.crc32(source[layer, seen[int(encoded)]].tobytes(), int(sums[tile]))
        seen[int(encoded)] += 1
    return sums


def _shape_metadata(cache: Cache) -> dict[str, str]:
    return {
        "format": str(cache.format),
        "dtype": cache.memory.dtype_name,
        "num_layers": str(cache.num_layers),
        "num_kv_heads": str(cache.num_kv_heads),
        "head_dim": str(cache.head_dim),
    }


def _moments_hash(cache: Cache) -> str:
    return "none" if cache.moments is None else cache.moments.hash


def save_sequence(cache: Cache, sequence: CacheSequence, path: str | os.PathLike[str]) -> None:
    """Writes `sequence` to `path`; see `Cache.save`."""
    from safetensors.numpy import save_file

    table, memory = sequence.table(), cache.memory
    encoded = (table >= 0).astype(np.int8)
    blocks = [int(entry) for entry in table[table >= 0]]
    slots = [int(~entry) for entry in table[table < 0]]
    records = np.ascontiguousarray(memory.to_host(cache.records[:, memory.index(blocks)]))
    staging = np.ascontiguousarray(memory.to_host(cache.staging[:, memory.index(slots)]))
    metadata = _shape_metadata(cache) | {
        "kvarn": VERSION,
        "num_tokens": str(sequence.num_tokens),
        "num_committed": str(sequence.num_committed),
        "sink_tokens": str(cache.sink_tokens),
        "recent_tokens": str(cache.recent_tokens),
        "normalisation": cache.normalisation,
        "rounding": cache.rounding,
        "moments": _moments_hash(cache),
    }
    tensors = {"table": encoded, "records": records, "staging": staging, "checksums": _checksums(encoded, records, staging)}
    save_file(tensors, os.fspath(path), metadata=metadata)


def load_sequence(cache: Cache, path: str | os.PathLike[str]) -> CacheSequence:
    """Reads a sequence into `cache`; see `Cache.load`."""
    metadata, tensors = read(path)
    for name, expected in _shape_metadata(cache).items():
        if metadata.get(name) != expected:
            raise InvalidArgumentError(f"[kvarn.load] {name}: expected {expected}, as this cache has it, got {metadata.get(name)}")
    made_with = metadata.get("moments", "none")
    if made_with != _moments_hash(cache):
        warnings.warn(
            f"[kvarn.load] moments: tiles of this file were rounded with moments {made_with}, those of this cache are with "
            f"{_moments_hash(cache)}; both are read the same way",
            stacklevel=3,
        )
    tokens, committed = int(metadata["num_tokens"]), int(metadata["num_committed"])
    sequence = cache.sequence()
    # The pool places every tile as it would for any other sequence; nothing is written through the step itself.
    cache.begin([sequence], [tokens], keep=tokens - committed)
    memory = cache.memory
    seen = [0, 0]
    for index, (entry, encoded) in enumerate(zip(sequence.table(), tensors["table"], strict=True)):
        source = tensors["records" if encoded else "staging"][:, seen[int(encoded)]]
        seen[int(encoded)] += 1
        data = memory.from_host(np.ascontiguousarray(source))
        if encoded and entry >= 0:
            cache.records[:, int(entry)] = data
        elif not encoded and entry < 0:
            cache.staging[:, int(~entry)] = data
        elif encoded:  # this cache keeps more tokens in full precision
            first = memory.put(np.zeros(1, np.int32))
            for layer in range(cache.num_layers):
                k, v = ops.decode(cache._plan, data[layer : layer + 1], first, rotated=True)
                assert k is not None
                assert v is not None
                cache.staging[layer, int(~entry), 0], cache.staging[layer, int(~entry), 1] = k[0], v[0]
        else:  # this cache keeps fewer
            options = cache._encode_options(cache._bucket(index * cache.format.tile_tokens))
            ops.encode(cache._plan, data[:, None], cache.records, *memory.pairs([(0, int(entry))]), **options)
    return sequence
