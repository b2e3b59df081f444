"""Ragged batches of random sequences as records and staging, and float64 attention over what they hold."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvarn import ops
from kvarn._devices import HostDevice, to_bits, to_float
from kvarn._plan import Plan

_HOST = HostDevice()
#: Neither a block nor a slot: no tile of the sequence is there.
_NO_TILE = 2**31 - 1


@dataclass(frozen=True)
class Case:
    """One call of attend. lengths: tokens of each sequence; q_lens: its queries; scale: of K and V; copies: the batch has each sequence so
    many times, with queries of its own and the same tiles."""

    format: str
    head_dim: int
    kv_heads: int
    q_heads: int
    lengths: tuple[int, ...]
    q_lens: tuple[int, ...]
    dtype: str = "float16"
    options: dict[str, Any] = field(default_factory=dict)
    batch_invariant: bool = False
    scale: float = 1.0
    copies: int = 1

    def __str__(self) -> str:
        parts = [f"{self.format} head_dim {self.head_dim} {self.dtype}", f"{self.q_heads} over {self.kv_heads} heads"]
        parts.append(f"lengths {' '.join(map(str, self.lengths))}, queries {' '.join(map(str, self.q_lens))}")
        parts += [f"{name} {value:g}" if value is not True else name for name, value in self.options.items()]
        parts += [f"each {self.copies} times"] * (self.copies > 1) + ["batch invariant"] * self.batch_invariant
        parts += [f"values times {self.scale:g}"] * (self.scale != 1)
        return ", ".join(parts)


class Batch:
    """The arrays of a case, on the host, made with the generic CPU kernels.

    The last tile of a sequence is in staging, of every other sequence the first one too, as sinks are; the others are records. Blocks and
    slots lie in random order, and what no sequence uses is NaN. bfloat16 values are held as their bits.

    Attributes:
        config: of a plan.
        reference: the generic CPU plan.
        arrays: q, records, staging, block_table, seq_lens and cu_q_lens of ops.attend, and alibi_slopes and sinks where the case has them.
        kinds: element types that numpy does not tell, by name.
        sources: (slots, blocks): which slots of `arrays["staging"]` the records were made from.
    """

    def __init__(self, case: Case, rng: np.random.Generator) -> None:
        self.case = case
        self.config: dict[str, Any] = {"head_dim": case.head_dim, "num_kv_heads": case.kv_heads, "num_q_heads": case.q_heads}
        queries = case.copies * sum(case.q_lens)
        self.config |= {"dtype": case.dtype, "max_num_seqs": case.copies * len(case.lengths), "max_q_tokens": max(1, queries)}
        plain = Plan(case.format, head_dim=case.head_dim, num_kv_heads=case.kv_heads, dtype=case.dtype, cpu_isa="generic")
        tokens = plain.tile_tokens
        tiles = [-(-length // tokens) for length in case.lengths]
        self.config["max_tiles"] = max(1, *tiles)
        self.reference = Plan(case.format, cpu_isa="generic", **self.config)
        table, slots, blocks = self._places(tiles, rng)
        shape = (sum(tiles) + 1, 2, case.kv_heads, tokens, case.head_dim)
        values = rng.standard_normal(shape, np.float32) * np.float32(case.scale)
        values[-1] = np.nan
        for sequence, length in enumerate(case.lengths):
            if length % tokens:
                values[~table[sequence, tiles[sequence] - 1], :, :, length % tokens :] = np.nan
        staging = to_bits(values, case.dtype)
        records = np.full((len(blocks) + 1, case.kv_heads, plain.record_bytes), 0xFF, np.uint8)
        self.sources = slots, blocks
        ops.encode(plain, _HOST.put(staging, case.dtype), records, slots, blocks)
        self._slot_values = to_float(staging, case.dtype)
        self.arrays: dict[str, NDArray[Any]] = {
            "q": to_bits(rng.standard_normal((queries, case.q_heads, case.head_dim), np.float32), case.dtype),
            "records": records,
            "staging": staging,
            "block_table": np.tile(table, (case.copies, 1)),
            "seq_lens": np.array(case.lengths * case.copies, np.int32),
            "cu_q_lens": np.cumsum([0, *case.q_lens * case.copies]).astype(np.int32),
        }
        self.options = dict(case.options)
        if self.options.pop("alibi", False):
            self.arrays["alibi_slopes"] = (0.5 ** np.arange(1, case.q_heads + 1)).astype(np.float32)
        if self.options.pop("sinks", False):
            self.arrays["sinks"] = rng.standard_normal(case.q_heads).astype(np.float32)
        self.kinds = dict.fromkeys(("q", "staging", "out"), case.dtype)

    def _places(self, tiles: list[int], rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """The block table, and the slots whose tiles are records with the blocks where they are."""
        table = np.full((len(tiles), max(1, *tiles)), _NO_TILE, np.int32)
        order = iter(rng.permutation(sum(tiles)).astype(np.int32))
        recorded = [(s, t) for s, count in enumerate(tiles) for t in range(count - 1) if t > 0 or (count > 2 and s % 2 == 0)]
        blocks = rng.permutation(len(recorded)).astype(np.int32)
        slots = np.zeros(len(recorded), np.int32)
        at = 0
        for s, count in enumerate(tiles):
            for t in range(count):
                slot = next(order)
                if at < len(recorded) and recorded[at] == (s, t):
                    table[s, t], slots[at] = blocks[at], slot
                    at += 1
                else:
                    table[s, t] = ~slot
        return table, slots, blocks

    def values(self, sequence: int) -> NDArray[np.float32]:
        """K and V of a sequence in the model's frame, [2, tokens, Hkv, D], as attention sees them."""
        case, entries = self.case, self.arrays["block_table"][sequence]
        count = -(-case.lengths[sequence] // self.reference.tile_tokens)
        both = np.zeros((2, count, case.kv_heads, self.reference.tile_tokens, case.head_dim), np.float32)
        recorded = np.flatnonzero(entries[:count] >= 0).astype(np.int32)
        if len(recorded):
            ops.decode(
                self.reference,
                self.arrays["records"],
                np.ascontiguousarray(entries[recorded]),
                k=both[0],
                v=both[1],
                destinations=recorded,
            )
        for tile in np.flatnonzero(entries[:count] < 0):
            both[:, tile] = rotated(self.reference, self._slot_values[~entries[tile]], inverse=True)
        flat: NDArray[np.float32] = both.transpose(0, 1, 3, 2, 4).reshape(2, -1, case.kv_heads, case.head_dim)[:, : case.lengths[sequence]]
        return flat

    def expected(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Output and log-sum-exp in float64."""
        options = self.options | {name: self.arrays[name] for name in ("alibi_slopes", "sinks") if name in self.arrays}
        q, bounds = to_float(self.arrays["q"], self.case.dtype), self.arrays["cu_q_lens"]
        held = [self.values(sequence) for sequence in range(len(self.case.lengths))]
        parts = [
            attention(q[begin:end], *held[sequence % len(held)], **options)
            for sequence, (begin, end) in enumerate(itertools.pairwise(bounds))
        ]
        return np.concatenate([out for out, _ in parts]), np.concatenate([lse for _, lse in parts])


def rotated(plan: Plan, values: NDArray[np.float32], inverse: bool = False) -> NDArray[np.float32]:
    """Rows of float32 rotated by the generic CPU kernels."""
    values = np.ascontiguousarray(values)
    return ops.hadamard(plan, values, out=np.empty_like(values), inverse=inverse)


def attention(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    logits_soft_cap: float = 0.0,
    alibi_slopes: NDArray[Any] | None = None,
    sinks: NDArray[Any] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One sequence in float64, from the definition. q [Tq, Hq, D], k and v [Tk, Hkv, D]; returns out [Tq, Hq, D] and lse [Tq, Hq]."""
    q_tokens, q_heads, dim = q.shape
    keys, values = (x.astype(np.float64).transpose(1, 0, 2) for x in (k, v))
    rows = q.astype(np.float64).reshape(q_tokens, len(keys), q_heads // len(keys), dim)
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    position = np.arange(len(k))
    out, lse = np.zeros((q_tokens, q_heads, dim)), np.full((q_tokens, q_heads), -np.inf)
    for i in range(q_tokens):
        own = len(k) - q_tokens + i
        last = own if causal or window else len(k) - 1
        first = max(0, own - window + 1) if window else 0
        scores = np.matmul(rows[i], keys[:, first : last + 1].transpose(0, 2, 1)).reshape(q_heads, -1) * scale
        if logits_soft_cap:
            scores = logits_soft_cap * np.tanh(scores / logits_soft_cap)
        if alibi_slopes is not None:
            scores += alibi_slopes[:, None] * (position[first : last + 1] - own)
        logits = scores if sinks is None else np.concatenate([scores, sinks[:, None].astype(np.float64)], axis=1)
        if logits.shape[1] == 0:
            continue
        most = logits.max(axis=1, keepdims=True)
        total = np.exp(logits - most).sum(axis=1, keepdims=True)
        lse[i] = (most + np.log(total))[:, 0]
        weights = (np.exp(scores - most) / total).reshape(len(keys), q_heads // len(keys), -1)
        out[i] = np.matmul(weights, values[:, first : last + 1]).reshape(q_heads, dim)
    return out, lse
