"""kvarn.Cache on a device beside one on the CPU: chunks of a prompt, steps, a rejected step, a fork, and a cache that is full."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from kvarn._devices import Device
from kvarn._doctor.report import Finding
from kvarn._errors import OutOfBlocksError, UnavailableError
from kvarn._sequence import CacheSequence
from kvarn.cache import Cache

_LAYERS, _HEADS, _Q_HEADS, _DIM, _TILE = 2, 2, 4, 64, 32
#: Both sides are within 5e-4 of float64 arithmetic, and rounded to fp16.
_ATTEND_ERROR = 2 * (5e-4 + 2.0**-11)


def opened(device: Device, **options: Any) -> Cache:
    """A cache on the device.

    Raises:
        UnavailableError: no torch allocates there.
    """
    name = device.backend if device.backend == "cpu" else f"{device.backend}:{device.index}"
    shape: dict[str, Any] = {"num_layers": _LAYERS, "num_kv_heads": _HEADS, "num_q_heads": _Q_HEADS, "head_dim": _DIM}
    return Cache("k4v2_g32", **shape, sink_tokens=_TILE, device=name, **options)


def check_contents(device: Device, reference: Device) -> Iterator[Finding]:
    """Records byte for byte and attention of the same tokens in both caches."""
    rng = np.random.default_rng(59)
    caches = [opened(reference), opened(device)]
    sequences = [cache.sequence() for cache in caches]
    # A prompt, a chunk, a step of three speculated tokens of which one is kept, and single steps.
    for tokens, accepted in ((4 * _TILE + 5, None), (_TILE - 6, None), (3, [1]), (1, None), (1, None)):
        k, v = rng.standard_normal((2, _LAYERS, tokens, _HEADS, _DIM)).astype(np.float16)
        for cache, sequence in zip(caches, sequences, strict=True):
            step = cache.begin([sequence], [tokens])
            for layer in range(_LAYERS):
                cache.write(step, layer, cache.memory.from_host(k[layer].copy()), cache.memory.from_host(v[layer].copy()))
            cache.commit(step, accepted)
    forks = [sequence.fork() for sequence in sequences]
    for cache, fork in zip(caches, forks, strict=True):
        cache.append(fork, *(cache.memory.from_host(x) for x in np.ones((2, _LAYERS, 2 * _TILE, _HEADS, _DIM), np.float16)))
    for name, pair in (("the sequence", sequences), ("its fork", forks)):
        yield from _compare(name, caches, pair, rng)


def _compare(name: str, caches: list[Cache], sequences: list[CacheSequence], rng: np.random.Generator) -> Iterator[Finding]:
    tables = [sequence.table() for sequence in sequences]
    yield Finding(f"block table entries that differ, {name}", int((tables[0] != tables[1]).sum()), 0)
    blocks = tables[0][tables[0] >= 0]
    records = [cache.memory.to_host(cache.records)[:, blocks] for cache in caches]
    yield Finding(f"bytes that differ, records of {name}", int((records[0] != records[1]).sum()), 0)
    q = rng.standard_normal((1, _Q_HEADS, _DIM)).astype(np.float16)
    for layer in range(_LAYERS):
        expected, got = (
            cache.memory.to_host(cache.attend(sequence, layer, cache.memory.from_host(q))).astype(np.float64)
            for cache, sequence in zip(caches, sequences, strict=True)
        )
        error = np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        yield Finding(f"relative error of a row, {name}", float(error.max()), _ATTEND_ERROR)


def check_full(device: Device) -> Iterator[Finding]:
    """A step that does not fit is refused and leaves the cache as it was."""
    cache = opened(device, max_tokens=6 * _TILE, fixed=True)
    sequence = cache.sequence()
    values = np.random.default_rng(61).standard_normal((2, _LAYERS, 5 * _TILE + 3, _HEADS, _DIM)).astype(np.float16)
    cache.append(sequence, *(cache.memory.from_host(x) for x in values))

    def state() -> list[bytes]:
        arrays = (cache.memory.to_host(cache.records), cache.memory.to_host(cache.staging), sequence.table())
        return [array.tobytes() for array in arrays] + [str(sequence.num_tokens).encode()]

    before, refused = state(), 0
    try:
        cache.append(sequence, *(cache.memory.from_host(x) for x in np.ones((2, _LAYERS, 40 * _TILE, _HEADS, _DIM), np.float16)))
    except OutOfBlocksError:
        refused = 1
    yield Finding("calls that were not refused", 1 - refused, 0)
    parts = ("records", "staging", "block table", "length")
    for name, old, new in zip(parts, before, state(), strict=True):
        yield Finding(f"changes, {name}", int(old != new), 0)


def unavailable(device: Device) -> str:
    """Why there is no cache on a device; empty where there is."""
    try:
        opened(device)
    except UnavailableError as error:
        return str(error)
    return ""
