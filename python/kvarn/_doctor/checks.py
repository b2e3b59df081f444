"""The checks of ``kvarn doctor``: a device's results beside the generic CPU kernels' bytes and beside float64 arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvarn import ops
from kvarn._devices import Device, HostDevice, to_bits, to_float
from kvarn._doctor import whole_cache
from kvarn._doctor.batch import Batch, Case, rotated
from kvarn._doctor.cases import (
    ATTENTIONS,
    BUSY,
    DTYPES,
    ENCODINGS,
    HEAD_DIMS,
    INVARIANT,
    LONG,
    NUM_QUICK_ATTENTIONS,
    QUICK_ENCODINGS,
    Encoding,
)
from kvarn._doctor.report import Finding
from kvarn._errors import KvarnError
from kvarn._plan import Plan

#: attend's contract is 5e-4 per row against float64 (docs/DESIGN.md, error budget); a 16-bit output adds half a unit of its last place.
ATTEND_ERROR = 5e-4
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
#: A weight off by ATTEND_ERROR of itself is a score off by as much, absolutely, and so is the logarithm of their sum; fp32 adds 2^-24 of it
#: in each of some ten operations.
LSE_ERROR, LSE_RELATIVE = ATTEND_ERROR, 1e-6


class SkippedError(Exception):
    """Why a check cannot be made here."""


@dataclass(frozen=True)
class Check:
    """One check. quick: of the small size too."""

    group: str
    name: str
    quick: bool
    run: Callable[[Device], Iterator[Finding]]


def all_checks() -> Iterator[Check]:
    """Every check, in the order in which a first fault tells most."""
    for dim in HEAD_DIMS:
        yield Check("hadamard", f"head_dim {dim}", dim in (64, 112), partial(_hadamard, dim))
    for dim in HEAD_DIMS:
        yield Check("append", f"head_dim {dim}", dim in (64, 112), partial(_append, dim))
    for encoding in ENCODINGS:
        yield Check("encode and decode", str(encoding), encoding in QUICK_ENCODINGS, partial(_encode, encoding))
    for number, case in enumerate(ATTENTIONS):
        yield Check("attend", str(case), number < NUM_QUICK_ATTENTIONS, partial(_attend, case))
    for case in BUSY:
        yield Check("many sequences", str(case), False, partial(_attend, case))
    yield Check("attend", "rotated query and output", True, _attend_rotated)
    yield Check("attend", "a block table entry outside the pool", True, _outside_entry)
    for case in INVARIANT:
        yield Check("alone and in a batch", str(case), False, partial(_invariant, case))
    yield Check("long context", str(LONG), False, partial(_long, LONG))
    yield Check("addresses", "records past 2^32 bytes", False, partial(_far, "records"))
    yield Check("addresses", "staging past 2^32 bytes", False, partial(_far, "staging"))
    yield Check("cache", "prompt, steps, a rejected step and a fork beside a cache on the CPU", True, _cache_contents)
    yield Check("cache", "a step that does not fit leaves the cache as it was", True, _full_cache)
    yield Check("graph", "append, encode and attend, replayed with other lengths", True, _graph)
    yield Check("refusals", "what is refused leaves every array as it was", True, _refusals)


def _plans(device: Device, name: str, *, batch_invariant: bool = False, **config: Any) -> tuple[Plan, Plan]:
    """The generic CPU plan and the device's."""
    own = Plan(name, backend=device.backend, device=device.index, batch_invariant=batch_invariant, **config)
    return Plan(name, cpu_isa="generic", **config), own


def _different(what: str, got: NDArray[Any], expected: NDArray[Any]) -> Finding:
    bytes_of = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (got, expected)]
    return Finding(f"bytes that differ, {what}", int((bytes_of[0] != bytes_of[1]).sum()), 0)


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Values with an outlying channel."""
    values = rng.standard_normal(shape, np.float32)
    values[..., 3] *= 16
    return to_bits(values, dtype)


def _hadamard(dim: int, device: Device) -> Iterator[Finding]:
    rng, host = np.random.default_rng(dim), HostDevice()
    reference, plan = _plans(device, "k4v2_g32", head_dim=dim, num_kv_heads=1)
    for dtype in DTYPES:
        x = _random(rng, (37, dim), dtype)
        for inverse in (False, True):
            expected, out = host.put(np.zeros_like(x), dtype), device.put(np.zeros_like(x), dtype)
            ops.hadamard(reference, host.put(x, dtype), out=expected, inverse=inverse)
            ops.hadamard(plan, device.put(x, dtype), out=out, inverse=inverse)
            yield _different(f"{dtype} {'inverse' if inverse else 'forward'}", device.get(out), host.get(expected))


def _append(dim: int, device: Device) -> Iterator[Finding]:
    rng, host = np.random.default_rng(dim), HostDevice()
    for dtype in DTYPES:
        reference, plan = _plans(device, "k4v2_g32", head_dim=dim, num_kv_heads=3, dtype=dtype)
        k, v = _random(rng, (2, 37, 3, dim), dtype)
        places = rng.permutation(96)[:37]
        places[5] = -1
        before = _random(rng, (3, 2, 3, 32, dim), dtype)
        for is_rotated in (False, True):
            expected, staging = host.put(before, dtype), device.put(before, dtype)
            ops.append(reference, host.put(k, dtype), host.put(v, dtype), places, expected, rotated=is_rotated)
            ops.append(plan, device.put(k, dtype), device.put(v, dtype), device.put(places), staging, rotated=is_rotated)
            yield _different(f"{dtype} {'rotated' if is_rotated else 'to rotate'}", device.get(staging), host.get(expected))


def _encode(encoding: Encoding, device: Device) -> Iterator[Finding]:
    rng, host = np.random.default_rng(17), HostDevice()
    layers, heads, dim, dtype = 2, 2, encoding.head_dim, encoding.dtype
    reference, plan = _plans(device, encoding.format, head_dim=dim, num_kv_heads=heads, dtype=dtype)
    tokens = plan.tile_tokens
    staging = _random(rng, (layers, 3, 2, heads, tokens, dim), dtype)
    staging[0, 1, 0, 0] = 0  # a tile of zeros
    staging[1, 2, 1, 1, :, 7] = to_bits(np.array(np.nan, np.float32), dtype)  # one that cannot be encoded
    slots, blocks = np.array([2, 0, 1], np.int32), np.array([0, 3, 2], np.int32)
    before = rng.integers(0, 256, (layers, 5, heads, plan.record_bytes), np.uint8)
    # Errors of a channel are spread with some tenths over those after it, in any order; what lies below the diagonal does not matter.
    factors = (rng.standard_normal((2, layers, heads, dim, dim)) * (2 / dim**0.5)).astype(np.float32)
    factors[..., np.tri(dim, dtype=bool)] = np.nan
    for factor in factors.reshape(-1, dim, dim):
        np.fill_diagonal(factor, rng.permutation(dim))
    named = {f"{operand}_feedback": factor for operand, factor in zip("kv", factors, strict=True) if operand in encoding.fed}
    options: dict[str, Any] = {"normalisation": encoding.normalisation, "rounding": encoding.rounding}
    expected, records = before.copy(), device.put(before)
    ops.encode(reference, host.put(staging, dtype), expected, slots, blocks, **options, **named)
    own_factors = {name: device.put(factor) for name, factor in named.items()}
    ops.encode(plan, device.put(staging, dtype), records, device.put(slots), device.put(blocks), **options, **own_factors)
    yield _different("records", device.get(records), expected)

    # What is decoded comes from the right records, so that an error above is not one here too.
    records, destinations = device.put(expected[1]), np.array([3, 0, 1], np.int32)
    for is_rotated, kind in ((False, "float16"), (True, "float32"), (False, "bfloat16")):
        both = _random(rng, (2, 4, heads, tokens, dim), kind)
        wanted, out = [host.put(x, kind) for x in both], [device.put(x, kind) for x in both]
        ops.decode(reference, expected[1], blocks, k=wanted[0], v=wanted[1], destinations=destinations, rotated=is_rotated)
        own = {"k": out[0], "v": out[1], "destinations": device.put(destinations)}
        ops.decode(plan, records, device.put(blocks), rotated=is_rotated, **own)
        for name, got, right in zip("kv", out, wanted, strict=True):
            got_bits, right_bits = device.get(got), host.get(right)
            # Which NaN comes out is not defined.
            both_nan = np.isnan(to_float(got_bits, kind)) & np.isnan(to_float(right_bits, kind))
            yield _different(f"{name} decoded to {kind}", np.where(both_nan, right_bits, got_bits), right_bits)


class _Call:
    """A case's arrays on a device, and calls of attend on them."""

    def __init__(self, case: Case, device: Device, batch: Batch) -> None:
        self.case, self.device, self.batch = case, device, batch
        self.plan = Plan(case.format, backend=device.backend, device=device.index, batch_invariant=case.batch_invariant, **batch.config)
        self.arrays = {name: device.put(array, batch.kinds.get(name, "")) for name, array in batch.arrays.items()}
        self.shape = batch.arrays["q"].shape
        if device.asynchronous:
            self.arrays["workspace"] = device.put(np.full(self.plan.workspace_bytes, 0xFF, np.uint8))  # NaN

    def __call__(self, **changes: Any) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """(out as its bits, lse). changes: host arrays in the place of the case's, or options."""
        arrays = dict(self.arrays)
        for name, value in changes.items():
            arrays[name] = self.device.put(value, self.batch.kinds.get(name, "")) if isinstance(value, np.ndarray) else value
        shape = changes["q"].shape if "q" in changes else self.shape
        out = self.device.put(np.zeros(shape, self.batch.arrays["q"].dtype), self.case.dtype)
        lse = self.device.put(np.zeros(shape[:2], np.float32))
        ops.attend(self.plan, arrays.pop("q"), out=out, lse=lse, **arrays, **self.batch.options)
        return self.device.get(out), self.device.get(lse)


def _errors(case: Case, got: tuple[NDArray[Any], NDArray[Any]], expected: tuple[NDArray[Any], NDArray[Any]]) -> Iterator[Finding]:
    """The largest relative error of a row, and of the log-sum-exp what it is off beside what it may be."""
    out, norm = to_float(got[0], case.dtype).astype(np.float64), np.linalg.norm(expected[0], axis=-1)
    error = np.linalg.norm(out - expected[0], axis=-1) / np.where(norm == 0, 1, norm)
    yield Finding("relative error of a row", float(error.max(initial=0)), ATTEND_ERROR + ROUNDING[case.dtype])
    finite = np.isfinite(expected[1])
    off = np.abs(got[1].astype(np.float64)[finite] - expected[1][finite]) / (LSE_ERROR + LSE_RELATIVE * np.abs(expected[1][finite]))
    yield Finding("error of the log-sum-exp over its bound", float(off.max(initial=0)), 1)
    yield _different("log-sum-exp of rows that see nothing", got[1][~finite], expected[1][~finite].astype(np.float32))


def _attend(case: Case, device: Device) -> Iterator[Finding]:
    batch = Batch(case, np.random.default_rng(23))
    call = _Call(case, device, batch)
    first, second = call(), call()
    yield from _errors(case, first, batch.expected())
    yield _different("the same call again", second[0], first[0])
    yield _different("log-sum-exp of the same call again", second[1], first[1])


def _attend_rotated(device: Device) -> Iterator[Finding]:
    case = Case("k4v2_g128", 128, 1, 4, (300,), (2,), dtype="float32")
    batch = Batch(case, np.random.default_rng(23))
    out, lse = batch.expected()
    q = rotated(batch.reference, batch.arrays["q"])
    expected = rotated(batch.reference, out.astype(np.float32)).astype(np.float64)
    yield from _errors(case, _Call(case, device, batch)(q=q, q_rotated=True, out_rotated=True), (expected, lse))


def _outside_entry(device: Device) -> Iterator[Finding]:
    """NaN for the sequence alone on a GPU; the CPU backend, which sees the table, refuses the call."""
    for name in ("k4v2_g128", "k4v2_g32"):
        case = Case(name, 128, 1, 4, (300, 200), (1, 1))
        batch = Batch(case, np.random.default_rng(23))
        table = batch.arrays["block_table"].copy()
        table[1, 0] = 1000
        try:
            out, lse = _Call(case, device, batch)(block_table=table)
        except KvarnError:
            if device.backend != "cpu":
                raise
            yield Finding("calls that were not refused", 0, 0)
            continue
        expected = batch.expected()
        yield from _errors(case, (out[:1], lse[:1]), (expected[0][:1], expected[1][:1]))
        yield Finding("numbers instead of NaN", int((~np.isnan(to_float(out[1:], case.dtype))).sum() + (~np.isnan(lse[1:])).sum()), 0)


def _invariant(case: Case, device: Device) -> Iterator[Finding]:
    batch = Batch(case, np.random.default_rng(29))
    call = _Call(case, device, batch)
    together = call()
    yield from _errors(case, together, batch.expected())
    bounds, arrays = batch.arrays["cu_q_lens"], batch.arrays
    for s in range(len(case.lengths)):
        rows = slice(bounds[s], bounds[s + 1])
        alone = call(
            q=arrays["q"][rows].copy(),
            block_table=arrays["block_table"][s : s + 1].copy(),
            seq_lens=arrays["seq_lens"][s : s + 1].copy(),
            cu_q_lens=np.array([0, case.q_lens[s]], np.int32),
        )
        yield _different(f"sequence {s} alone", alone[0], together[0][rows])
        yield _different(f"log-sum-exp of sequence {s} alone", alone[1], together[1][rows])


def _long(case: Case, device: Device) -> Iterator[Finding]:
    """Encodes on the device too."""
    batch = Batch(case, np.random.default_rng(31))
    call = _Call(case, device, batch)
    records = device.put(np.full_like(batch.arrays["records"], 0xFF))
    ops.encode(call.plan, call.arrays["staging"], records, *(device.put(x) for x in batch.sources))
    yield _different("records", device.get(records), batch.arrays["records"])
    call.arrays["records"] = records
    yield from _errors(case, call(), batch.expected())


def _far(which: str, device: Device) -> Iterator[Finding]:
    """The last block, or slot, of an array that is longer than 2^32 bytes."""
    case = Case("k4v2_g128", 128, 2, 8, (384,), (1,))
    batch = Batch(case, np.random.default_rng(37))
    call = _Call(case, device, batch)
    near = batch.arrays[which]
    row_bytes = near.nbytes // len(near)
    first = 2**32 // row_bytes + 1  # rows before those that are used
    needed = (first + len(near)) * row_bytes
    if device.free_bytes() < needed + 2**28:
        raise SkippedError(f"needs {needed:,} bytes of free memory, {device.free_bytes():,} are")
    far = device.empty((first + len(near), *near.shape[1:]), near.dtype, batch.kinds.get(which, ""))
    slots, blocks = batch.sources
    table = batch.arrays["block_table"]
    if which == "records":
        device.set_part(far, first, np.full_like(near, 0xFF))
        ops.encode(call.plan, call.arrays["staging"], far, device.put(slots), device.put(blocks + np.int32(first)))
        yield _different("records", device.part(far, first, len(near)), near)
        table = np.where(table >= 0, table + np.int32(first), table)
        decoded = [device.put(np.zeros((len(blocks), *near.shape[1:2], 128, 128), np.float32)) for _ in "kv"]
        wanted = [np.zeros(x.shape, np.float32) for x in decoded]
        ops.decode(batch.reference, near, blocks, k=wanted[0], v=wanted[1])
        ops.decode(call.plan, far, device.put(blocks + np.int32(first)), k=decoded[0], v=decoded[1])
        for name, got, right in zip("kv", decoded, wanted, strict=True):
            yield _different(f"{name} decoded", device.get(got), right)
    else:
        device.set_part(far, first, near)
        records = device.put(np.full_like(batch.arrays["records"], 0xFF))
        ops.encode(call.plan, far, records, device.put(slots + np.int32(first)), device.put(blocks))
        yield _different("records", device.get(records), batch.arrays["records"])
        table = np.where(table < 0, ~(~table + np.int32(first)), table)
        k = _random(np.random.default_rng(41), (3, 2, 128), "float16")
        places = np.array([5, 6, 7])
        wanted_slot = near[-1:].copy()
        ops.append(batch.reference, k, k, places, wanted_slot)
        ops.append(call.plan, device.put(k), device.put(k), device.put(places + (first + len(near) - 1) * 128), far)
        yield _different("appended", device.part(far, first + len(near) - 1, 1), wanted_slot)
    call.arrays[which] = far
    yield from _errors(case, call(block_table=table), batch.expected())


def _graph(device: Device) -> Iterator[Finding]:
    """A decode step as a graph: what it reads on the device, it reads anew at every replay."""
    case = Case("k4v2_g128", 64, 1, 4, (300, 300), (1, 1))
    batch = Batch(case, np.random.default_rng(43))
    call = _Call(case, device, batch)
    arrays, heads = call.arrays, case.kv_heads
    k, v = _random(np.random.default_rng(47), (2, 1, heads, 64), "float16")
    # The new token goes to a slot, and that slot to a record, neither of which attention reads.
    places = np.array([(len(batch.arrays["staging"]) - 1) * 128 + 9])
    own_k, own_v, own_places = device.put(k), device.put(v), device.put(places)
    slot, block = (device.put(np.array([len(x) - 1], np.int32)) for x in (batch.arrays["staging"], batch.arrays["records"]))
    out, lse = device.put(np.zeros_like(batch.arrays["q"])), device.put(np.zeros(call.shape[:2], np.float32))

    def work() -> None:
        ops.append(call.plan, own_k, own_v, own_places, arrays["staging"])
        ops.encode(call.plan, arrays["staging"], arrays["records"], slot, block)
        ops.attend(call.plan, out=out, lse=lse, **arrays)

    replay = device.capture(work)
    if replay is None:
        raise SkippedError(f"backend {device.backend} has no graphs")
    for lengths in ((300, 300), (270, 40)):
        shorter = Case("k4v2_g128", 64, 1, 4, lengths, (1, 1))
        device.set_part(arrays["seq_lens"], 0, np.array(lengths, np.int32))
        replay()
        batch.case = shorter
        yield from _errors(case, (device.get(out), device.get(lse)), batch.expected())
    expected = batch.arrays["staging"].copy()
    ops.append(batch.reference, k, v, places, expected)
    yield _different("appended", device.get(arrays["staging"]), expected)


def _cache_contents(device: Device) -> Iterator[Finding]:
    if reason := whole_cache.unavailable(device):
        raise SkippedError(reason)
    yield from whole_cache.check_contents(device, HostDevice())


def _full_cache(device: Device) -> Iterator[Finding]:
    if reason := whole_cache.unavailable(device):
        raise SkippedError(reason)
    yield from whole_cache.check_full(device)


def _refusals(device: Device) -> Iterator[Finding]:
    case = Case("k4v2_g32", 64, 2, 4, (100, 33), (1, 1))
    batch = Batch(case, np.random.default_rng(53))
    call = _Call(case, device, batch)
    a, plan = call.arrays, call.plan
    out = device.put(np.full_like(batch.arrays["q"], 3))
    slots, blocks = (device.put(x) for x in batch.sources)
    wide = device.put(batch.arrays["q"].astype(np.float32))
    short = device.put(batch.arrays["records"][..., :-16].copy())
    k = device.put(np.zeros((2, 2, 64), np.float16))
    places, narrow = device.put(np.zeros(2, np.int64)), device.put(np.zeros(2, np.int32))

    def attend(**changes: Any) -> None:
        ops.attend(plan, **{**a, "out": out, **changes})

    refused: dict[str, Callable[[], Any]] = {
        "q of another element type": lambda: attend(q=wide),
        "records of another size": lambda: attend(records=short),
        "a table of more tiles than the plan's": lambda: attend(block_table=device.put(np.zeros((2, 9), np.int32))),
        "lengths of another count": lambda: attend(seq_lens=device.put(np.ones(3, np.int32))),
        "a negative window": lambda: attend(window=-1),
        "a soft cap that is not finite": lambda: attend(logits_soft_cap=float("nan")),
        "an output that is the query": lambda: attend(out=a["q"]),
        "encoding into records of another size": lambda: ops.encode(plan, a["staging"], short, slots, blocks),
        "a rounding of no name": lambda: ops.encode(plan, a["staging"], a["records"], slots, blocks, rounding="none"),
        "factors of another shape": lambda: ops.encode(plan, a["staging"], a["records"], slots, blocks, k_feedback=wide),
        "places of 32 bits": lambda: ops.append(plan, k, k, narrow, a["staging"]),
        "k and v of different lengths": lambda: ops.append(plan, k, device.put(np.zeros((1, 2, 64), np.float16)), places, a["staging"]),
        "decoding into another shape": lambda: ops.decode(plan, a["records"], blocks, k=k, v=k),
        "head_dim 63": lambda: Plan("k4v2_g32", head_dim=63, num_kv_heads=1, backend=device.backend, device=device.index),
        "a device that does not exist": lambda: Plan("k4v2_g32", head_dim=64, num_kv_heads=1, backend=device.backend, device=999),
    }
    if device.backend != "cpu":
        refused["host memory"] = lambda: attend(staging=batch.arrays["staging"])
    accepted = []
    for name, refuse in refused.items():
        try:
            refuse()
        except KvarnError:
            continue
        accepted.append(name)
    yield Finding("calls that were not refused" + "".join(f", {name}" for name in accepted), len(accepted), 0)
    for name in ("q", "records", "staging", "block_table", "seq_lens", "cu_q_lens"):
        yield _different(name, device.get(a[name]), batch.arrays[name])
    yield _different("out", device.get(out), np.full_like(batch.arrays["q"], 3))
