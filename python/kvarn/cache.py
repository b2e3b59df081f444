"""`kvarn.Cache`: a multi-layer, multi-sequence KV cache for people.

The engine-facing pieces (`kvarn.BlockPool`, `kvarn.Plan`, `kvarn.ops`) leave memory to the caller; a `Cache` owns it:

- ``records`` uint8 ``[num_layers, num_blocks, num_kv_heads, record_bytes]``: encoded tiles;
- ``staging`` ``[num_layers, num_slots, 2, num_kv_heads, tile_tokens, head_dim]``: rotated K and V of the attention sinks, of the last tile
  of each sequence and of whatever is not committed.

A decoding loop, with K, V and q flattened over the sequences of the step (``[tokens, heads, head_dim]``)::

    cache = kvarn.Cache("k4v2_g128", num_layers=32, num_kv_heads=8, num_q_heads=32, head_dim=128)
    sequence = cache.sequence()
    step = cache.begin([sequence], [num_new_tokens])
    for layer in range(32):
        q, k, v = ...
        cache.write(step, layer, k, v)
        out = cache.attend(step, layer, q)
    cache.commit(step)
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvarn import ops
from kvarn._errors import ArgumentTypeError, InvalidArgumentError, OutOfBlocksError, StaleHandleError
from kvarn._formats import Format
from kvarn._memory import Array, Memory
from kvarn._moments import Moments
from kvarn._plan import Plan
from kvarn._pool import BlockPool
from kvarn._pool import Sequence as PoolSequence
from kvarn._schedule import Demand, Encode, Schedule, demand, encodes_of, make_schedule
from kvarn._sequence import CacheMemory, CacheSequence

__all__ = ["Cache", "CacheMemory", "CacheSequence", "Step"]

# Blocks and slots that the pool of a growing cache may hand out; memory is allocated only as far as they are in use.
_ROOM_BLOCKS = 1 << 18
_ROOM_SLOTS = 1 << 16
# Full tiles of a prompt that go through the scratch buffer at once.
_DIRECT_TILES = 8


class Step:
    """New tokens of some sequences, on their way into every layer. Made by `Cache.begin`."""

    def __init__(self, cache: Cache, sequences: list[CacheSequence], counts: list[int], schedule: Schedule) -> None:
        self.cache = cache
        self.sequences = sequences
        self.counts = counts
        self.num_tokens = schedule.num_tokens
        self._open = True
        self._unwritten = set(range(cache.num_layers))
        memory = cache.memory
        tile = cache.format.tile_tokens
        self._early = None if schedule.early is None else memory.put(schedule.early)
        self._late = None if schedule.late is None else memory.put(schedule.late)
        self._early_encodes = cache._grouped(schedule.early_encodes)
        # (first token, end token, slot mapping into the scratch buffer, scratch slots, blocks, bucket) of at most _DIRECT_TILES tiles each
        self._direct: list[tuple[int, int, Array, Array, Array, int]] = []
        for run in schedule.direct:
            buckets = [cache._bucket(run.position + i * tile) for i in range(len(run.blocks))]
            at = 0
            while at < len(run.blocks):
                count = min(_DIRECT_TILES, buckets[at:].count(buckets[at]))
                blocks, first = run.blocks[at : at + count], run.start + at * tile
                mapping = memory.put(np.arange(count * tile, dtype=np.int64))
                slots = memory.put(np.arange(count, dtype=np.int32))
                put = memory.put(np.array(blocks, np.int32))
                self._direct.append((first, first + count * tile, mapping, slots, put, buckets[at]))
                at += count
        self._view = cache._attend_view(sequences, counts)


@dataclass
class _AttendView:
    """Arguments of attend that are the same in every layer."""

    num_q_tokens: int
    max_tiles: int
    block_table: Array  # int32 [sequences, max_tiles]
    seq_lens: Array  # int32 [sequences]
    cu_q_lens: Array  # int32 [sequences + 1]


class Cache:
    """A KV cache in one record format, for all layers of a model and any number of sequences.

    Args:
        format: name of the record format ("k4v2_g128"), or a `kvarn.Format`.
        num_layers, num_kv_heads, head_dim: shape of the model's K and V.
        num_q_heads: query heads, for `attend`; a multiple of `num_kv_heads`. 0: the cache does not attend.
        max_tokens: tokens, of all sequences together, that memory is allocated for at once.
        max_sequences: sequences that staging is allocated for at once.
        fixed: never allocate more than that; a step that does not fit raises `kvarn.OutOfBlocksError` and changes nothing. Otherwise the
            arrays grow by half when they are full (their contents move: take views of `records` and `staging` anew after every `begin`).
        dtype: of K, V, q and staging: a torch dtype makes the arrays torch tensors; "float16" or "float32" makes them numpy arrays on the
            CPU.
        device: "cpu", "cuda", "cuda:N" or "hip".
        sink_tokens: the first tokens of each sequence stay in full precision: a multiple of the tile; None: the fewest tiles with 128
            tokens.
        recent_tokens: the last committed tokens that stay in full precision at least.
        normalisation: "scale_invariant" or "published".
        rounding: "auto", "minmax" or "unbiased".
        moments: of the model (`kvarn.prepare`): tiles are then rounded with feedback, errors weighed by what the model's predictions owe
            to K and V.
        num_threads: of the CPU backend; 0: KVARN_NUM_THREADS, or else as many as this process may use, and no more than torch uses
            (``torch.get_num_threads()`` when the cache is made) where the arrays are torch tensors.

    Raises:
        ValueError: a value outside its range.
        TypeError: a value of another type.
    """

    def __init__(
        self,
        format: str | Format = "k4v2_g128",
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_q_heads: int = 0,
        max_tokens: int = 0,
        max_sequences: int = 1,
        fixed: bool = False,
        dtype: Any = "float16",
        device: Any = "cpu",
        sink_tokens: int | None = None,
        recent_tokens: int = 0,
        normalisation: str = "scale_invariant",
        rounding: str = "auto",
        moments: Moments | None = None,
        num_threads: int = 0,
    ) -> None:
        self.format = Format(format)
        tile = self.format.tile_tokens
        for name, value, least in (
            ("num_layers", num_layers, 1),
            ("max_tokens", max_tokens, 1 if fixed else 0),
            ("max_sequences", max_sequences, 1),
            ("recent_tokens", recent_tokens, 0),
        ):
            if not isinstance(value, int | np.integer):
                raise ArgumentTypeError(f"[kvarn.Cache] {name}: expected an integer, got {type(value).__name__}")
            if value < least:
                raise InvalidArgumentError(f"[kvarn.Cache] {name}: expected at least {least}, got {value}")
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.num_q_heads = num_q_heads
        self.head_dim = head_dim
        self.fixed = fixed
        self.sink_tokens = -(-128 // tile) * tile if sink_tokens is None else sink_tokens
        self.recent_tokens = recent_tokens
        self.normalisation = normalisation
        self.rounding = rounding
        self.moments = moments
        self.memory = Memory(dtype, device)
        # float32 [num_layers, num_kv_heads, head_dim, head_dim]: K's by bucket of positions, made when they are first needed, and V's.
        self._k_factors: dict[int, Array] = {}
        self._v_factors: Array = None
        if moments is not None:
            moments.check(num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim)
            self._v_factors = self.memory.put(moments.v_factors(self.format.k_bits))
        self.num_threads = num_threads or self.memory.num_threads()
        self._plan = self._make_plan(1, tile, 1)
        self._limits: tuple[int, ...] = (1, tile, 1)
        self._workspace: Array = None
        per_sequence = self.sink_tokens // tile + -(-recent_tokens // tile) + 2
        blocks, slots = max_tokens // tile, max_sequences * per_sequence
        self.pool = BlockPool(
            blocks if fixed else _ROOM_BLOCKS,
            slots if fixed else _ROOM_SLOTS,
            tile,
            sink_tokens=self.sink_tokens,
            recent_tokens=recent_tokens,
        )
        self.record_bytes = self.format.record_bytes(head_dim)
        #: uint8 [num_layers, num_blocks, num_kv_heads, record_bytes]
        self.records = self.memory.zeros("records", (num_layers, max(1, blocks), num_kv_heads, self.record_bytes), as_bytes=True)
        #: [num_layers, num_slots, 2, num_kv_heads, tile_tokens, head_dim], rotated
        self.staging = self.memory.zeros("staging", (num_layers, slots, 2, num_kv_heads, tile, head_dim))
        self._layers = self._layer_views()
        self._scratch: Array = None
        # Weak: a cycle would keep the memory of a dropped cache until the garbage collector comes by.
        self._step: weakref.ref[Step] | None = None
        self._sequences: weakref.WeakSet[CacheSequence] = weakref.WeakSet()

    def __repr__(self) -> str:
        where = self.memory.torch_device if self.memory.torch is not None else "numpy"
        return (
            f'Cache("{self.format}", num_layers={self.num_layers}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, '
            f"{self.memory.dtype_name} on {where}, {len(self._sequences)} sequences)"
        )

    # ---- sequences ----------------------------------------------------------------------------------------------------------------

    def sequence(self) -> CacheSequence:
        """A new, empty sequence."""
        return self._adopt(self.pool.sequence())

    def _adopt(self, handle: PoolSequence) -> CacheSequence:
        sequence = CacheSequence(self, handle)
        self._sequences.add(sequence)
        return sequence

    def _check(self, sequences: AbstractSequence[CacheSequence]) -> list[CacheSequence]:
        for sequence in sequences:
            if getattr(sequence, "_cache", None) is not self:
                raise InvalidArgumentError(f"[kvarn.Cache] sequences: expected sequences of this cache, got {sequence!r}")
        if len({id(sequence) for sequence in sequences}) != len(sequences):
            raise InvalidArgumentError("[kvarn.Cache] sequences: expected each sequence once, got a repeated one")
        return list(sequences)

    def _truncate(self, sequence: CacheSequence, num_tokens: int) -> None:
        self._close_step()
        handle, tile = sequence._pool_sequence, self.format.tile_tokens
        if 0 <= num_tokens < handle.num_tokens and num_tokens % tile and handle.table()[num_tokens // tile] >= 0:
            self._make_room(Demand(0, 1))
        work = handle.truncate(num_tokens)
        self._run_copies([(int(a), int(b)) for a, b in work.copies])
        if len(work.decodes):
            blocks = self.memory.put(np.ascontiguousarray(work.decodes[:, 0], np.int32))
            slots = self.memory.index([int(slot) for slot in work.decodes[:, 1]])
            for layer in range(self.num_layers):
                k, v = ops.decode(self._plan, self.records[layer], blocks, rotated=True)
                self.staging[layer][slots, 0] = k
                self.staging[layer][slots, 1] = v

    # ---- a step --------------------------------------------------------------------------------------------------------------------

    def begin(self, sequences: AbstractSequence[CacheSequence], counts: AbstractSequence[int], *, keep: int | None = None) -> Step:
        """Makes room for `counts[i]` new tokens at the end of `sequences[i]` in every layer.

        One step is open at a time: the next `begin`, `commit`, `rollback` or `truncate` closes it. Tokens can be taken back exactly until
        they are committed. Only the last `keep` tokens of each run wait for `commit` (None: one tile); those before them are committed
        here and encoded by `write`, so that a prompt of any length needs no more staging than a decode step.

        Args:
            sequences: sequences of this cache, each at most once.
            counts: new tokens of each; 0 is allowed.
            keep: tokens at the end of each run that stay uncommitted.

        Raises:
            OutOfBlocksError: a fixed cache has too little room; everything is as it was.
            OutOfMemoryError: the arrays of a growing cache cannot grow; likewise.
            ValueError: a foreign or repeated sequence, a negative count.
            StaleHandleError: a sequence that was freed.
        """
        self._close_step()
        held = self._check(sequences)
        counts = [int(count) for count in counts]
        keep = self.format.tile_tokens if keep is None else keep
        if len(counts) != len(held) or any(count < 0 for count in counts) or keep < 0:
            raise InvalidArgumentError(
                f"[kvarn.Cache.begin] counts: expected {len(held)} numbers >= 0 and keep >= 0, got {counts} and {keep}"
            )
        handles = [sequence._pool_sequence for sequence in held]
        self._reserve(handles, counts, keep)
        tile = self.format.tile_tokens
        # A tile is direct when it is opened in this step and all of it is committed early.
        direct = any(count - -handle.num_tokens % tile - keep >= tile for handle, count in zip(handles, counts, strict=True))
        if direct and self._scratch is None:
            self._scratch = self.memory.zeros("scratch", (_DIRECT_TILES, *self.staging.shape[2:]))
        schedule = make_schedule(handles, counts, tile, keep, self.sink_tokens)
        self._run_copies(schedule.copies)
        step = Step(self, held, counts, schedule)
        self._step = weakref.ref(step)
        return step

    def write(self, step: Step, layer: int, k: Array, v: Array) -> None:
        """Writes the step's K and V into one layer. Every layer must be written, in any order, before the step is committed.

        Args:
            step: the open step.
            layer: its index.
            k, v: ``[tokens of the step, num_kv_heads, head_dim]``, sequence after sequence, in the cache's dtype and on its device,
                channels contiguous; K after the rotary embedding.
        """
        self._check_open(step, "write")
        self._check_layer("write", layer)
        expected = [step.num_tokens, self.num_kv_heads, self.head_dim]
        for name, value in (("k", k), ("v", v)):
            if (shape := _shape("write", name, value)) != expected:
                raise InvalidArgumentError(f"[kvarn.Cache.write] {name}: expected {expected}, got {shape}")
        records, staging = self._layers[layer]
        if step._early is not None:
            ops.append(self._plan, k, v, step._early, staging)
        for bucket, pairs in step._early_encodes:
            ops.encode(self._plan, staging, records, *pairs, **self._encode_options(bucket, layer))
        for start, end, mapping, slots, blocks, bucket in step._direct:
            ops.append(self._plan, k[start:end], v[start:end], mapping, self._scratch)
            ops.encode(self._plan, self._scratch, records, slots, blocks, **self._encode_options(bucket, layer))
        if step._late is not None:
            ops.append(self._plan, k, v, step._late, staging)
        step._unwritten.discard(layer)

    def attend(
        self,
        where: Step | CacheSequence,
        layer: int,
        q: Array,
        *,
        softmax_scale: float | None = None,
        causal: bool = True,
        window: int = 0,
        logits_soft_cap: float = 0.0,
        alibi_slopes: Array | None = None,
        sinks: Array | None = None,
        out: Array | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Softmax attention of q against everything that the sequences hold in one layer.

        Args:
            where: the open step, after its `write` of this layer: q belongs to the step's tokens. Or one sequence: q belongs to its last
                tokens.
            layer: index of the layer.
            q: ``[tokens, num_q_heads, head_dim]``, cache dtype.
            softmax_scale: None: ``1 / sqrt(head_dim)``.
            causal: a query sees positions up to its own; otherwise all.
            window: > 0: only the last `window` positions up to its own.
            logits_soft_cap: > 0: scores become ``cap * tanh(score / cap)``.
            alibi_slopes, sinks: float32 ``[num_q_heads]``: a bias per distance, a logit that joins the softmax without a value.
            out: like q, written.
            return_lse: also return float32 ``[tokens, num_q_heads]``, the log-sum-exp of the scores.

        Returns:
            The output like q, or ``(output, lse)``.

        Tiles that `begin` committed early are seen as their records hold them.
        """
        self._check_layer("attend", layer)
        if isinstance(where, Step):
            self._check_open(where, "attend")
            view = where._view
        else:
            view = self._attend_view(self._check([where]), _shape("attend", "q", q)[:1] or [0])
        plan = self._plan_for(int(view.seq_lens.shape[0]), view.num_q_tokens, view.max_tiles)
        records, staging = self._layers[layer]
        return ops.attend(
            plan,
            q,
            records=records,
            staging=staging,
            block_table=view.block_table,
            seq_lens=view.seq_lens,
            cu_q_lens=view.cu_q_lens,
            softmax_scale=softmax_scale,
            causal=causal,
            window=window,
            logits_soft_cap=logits_soft_cap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            out=out,
            return_lse=return_lse,
            workspace=self._workspace,
        )

    def commit(self, what: Step | AbstractSequence[CacheSequence], accepted: AbstractSequence[int] | None = None) -> None:
        """Makes tokens permanent, and encodes every tile that is now complete, past the sinks and older than `recent_tokens`.

        Args:
            what: the open step, or any sequences.
            accepted: of each sequence, how many of its uncommitted tokens to keep; the others are dropped (speculative decoding). None:
                all.

        Raises:
            OutOfBlocksError: a fixed cache has too few blocks; nothing has changed. Cannot happen for a step, because `begin` checks for
                it.
        """
        if isinstance(what, Step):
            self._check_open(what, "commit")
            sequences = what.sequences
        else:
            sequences = self._check(what)
        handles = [sequence._pool_sequence for sequence in sequences]
        pending = [handle.num_tokens - handle.num_committed for handle in handles]
        taken = pending if accepted is None else [int(count) for count in accepted]
        if len(taken) != len(pending) or any(not 0 <= a <= b for a, b in zip(taken, pending, strict=True)):
            raise InvalidArgumentError(f"[kvarn.Cache.commit] accepted: expected one number per sequence, at most {pending}, got {taken}")
        if isinstance(what, Step) and what._unwritten and what.num_tokens:
            raise InvalidArgumentError(
                f"[kvarn.Cache.commit] step: expected every layer to be written, got none for layers {sorted(what._unwritten)}"
            )
        self._reserve(handles, [0] * len(handles), 0)
        self._close_step()
        encodes: list[Encode] = []
        for handle, count, uncommitted in zip(handles, taken, pending, strict=True):
            if count:
                encodes += encodes_of(handle, count, self.format.tile_tokens, self.sink_tokens)
            if count < uncommitted:
                handle.rollback(uncommitted - count)
        for bucket, pairs in self._grouped(encodes):
            ops.encode(self._plan, self.staging, self.records, *pairs, **self._encode_options(bucket))

    def rollback(self, step: Step) -> None:
        """Drops the step's tokens, as if it had not begun. Exact.

        Raises:
            ValueError: a run of the step was longer than its `keep`, so that its first tokens are committed (use `CacheSequence.truncate`).
        """
        self._check_open(step, "rollback")
        handles = [sequence._pool_sequence for sequence in step.sequences]
        for handle, count in zip(handles, step.counts, strict=True):
            pending = handle.num_tokens - handle.num_committed
            if count > pending:
                raise InvalidArgumentError(f"[kvarn.Cache.rollback] step: expected uncommitted tokens, got {count} of which {pending} are")
        self._close_step()
        for handle, count in zip(handles, step.counts, strict=True):
            if count:
                handle.rollback(count)

    # ---- the simple path -----------------------------------------------------------------------------------------------------------

    def append(self, sequence: CacheSequence, k: Array, v: Array) -> None:
        """Adds tokens to one sequence in all layers at once and commits them.

        Args:
            sequence: of this cache.
            k, v: ``[num_layers, tokens, num_kv_heads, head_dim]``, cache dtype and device; copied where their channels are not contiguous.

        Raises:
            ValueError: another shape, dtype or device; nothing has changed.
            TypeError: no array; nothing has changed.
            OutOfBlocksError: a fixed cache has too little room; nothing has changed.
        """
        tokens = _shape("append", "k", k)[1:2] or [-1]
        shape = [self.num_layers, *tokens, self.num_kv_heads, self.head_dim]
        where = getattr(self.staging, "device", None)
        for name, value in (("k", k), ("v", v)):
            given = _shape("append", name, value)
            if given != shape or value.dtype != self.staging.dtype or getattr(value, "device", None) != where:
                raise InvalidArgumentError(
                    f"[kvarn.Cache.append] {name}: expected {self.staging.dtype} [{self.num_layers}, tokens, {self.num_kv_heads}, "
                    f"{self.head_dim}] on {where}, got {value.dtype} {given} on {getattr(value, 'device', None)}"
                )
        k, v = self.memory.contiguous(k), self.memory.contiguous(v)
        step = self.begin([sequence], tokens)
        for layer in range(self.num_layers):
            self.write(step, layer, k[layer], v[layer])
        self.commit(step)

    def dequantise(self, sequence: CacheSequence, layer: int) -> tuple[Array, Array]:
        """K and V of one sequence and layer as `attend` sees them, in the model's frame and the cache's dtype.

        Returns:
            k, v: ``[tokens, num_kv_heads, head_dim]``.
        """
        self._check_layer("dequantise", layer)
        return self._dequantise(self._check([sequence])[0].table(), sequence.num_tokens, layer)

    def _dequantise(self, table: NDArray[np.int32], tokens: int, layer: int) -> tuple[Array, Array]:
        tile = self.format.tile_tokens
        shape = (max(1, len(table)), self.num_kv_heads, tile, self.head_dim)
        k, v = self.memory.zeros("k", shape), self.memory.zeros("v", shape)
        encoded, staged = np.flatnonzero(table >= 0), np.flatnonzero(table < 0)
        if len(encoded):
            blocks, places = self.memory.put(table[encoded]), self.memory.put(encoded.astype(np.int32))
            ops.decode(self._plan, self.records[layer], blocks, k=k, v=v, destinations=places)
        if len(staged):
            tiles = self.staging[layer][self.memory.index([int(~slot) for slot in table[staged]])]
            tiles = ops.hadamard(self._plan, self.memory.contiguous(tiles), inverse=True)
            places = self.memory.index([int(place) for place in staged])
            k[places], v[places] = tiles[:, 0], tiles[:, 1]
        flat = (shape[0] * tile, self.num_kv_heads, self.head_dim)
        return k.swapaxes(1, 2).reshape(flat)[:tokens], v.swapaxes(1, 2).reshape(flat)[:tokens]

    def usage(self) -> CacheMemory:
        """Bytes in use and allocated, and the compression that comes of them."""
        blocks: set[int] = set()
        slots: set[int] = set()
        tokens = 0
        for sequence in list(self._sequences):
            if sequence._handle is None:
                continue
            table = sequence.table()
            tokens += sequence.num_tokens
            blocks.update(int(entry) for entry in table[table >= 0])
            slots.update(int(~entry) for entry in table[table < 0])
        elements_per_token = self.num_layers * 2 * self.num_kv_heads * self.head_dim
        slot_bytes = elements_per_token * self.format.tile_tokens * self.memory.item_bytes
        return CacheMemory(
            tokens=tokens,
            records_used=len(blocks) * self.num_layers * self.num_kv_heads * self.record_bytes,
            staging_used=len(slots) * slot_bytes,
            records_allocated=int(self.records.nbytes),
            staging_allocated=int(self.staging.nbytes),
            scratch_allocated=0 if self._scratch is None else int(self._scratch.nbytes),
            full_precision=tokens * elements_per_token * self.memory.item_bytes,
            full_precision_bits=8 * self.memory.item_bytes,
        )

    def save(self, sequence: CacheSequence, path: str | os.PathLike[str]) -> None:
        """Writes one sequence to a safetensors file, with a checksum per tile. Every backend can `load` it, byte for byte."""
        from kvarn._sequence_file import save_sequence

        save_sequence(self, self._check([sequence])[0], path)

    def load(self, path: str | os.PathLike[str]) -> CacheSequence:
        """Reads a sequence that `save` wrote.

        Raises:
            ValueError: the file is for another format, head_dim, number of layers or heads, or dtype.
            CorruptError: a checksum does not match; the message names the tile.
            OutOfBlocksError: a fixed cache has too little room; everything is as it was.
        """
        from kvarn._sequence_file import load_sequence

        return load_sequence(self, path)

    # ---- memory --------------------------------------------------------------------------------------------------------------------

    def _bucket(self, position: int) -> int:
        return 0 if self.moments is None else self.moments.bucket(position)

    def _grouped(self, encodes: list[Encode]) -> list[tuple[int, tuple[Array, Array]]]:
        """Slots and blocks by bucket of positions."""
        groups: dict[int, list[tuple[int, int]]] = {}
        for slot, block, position in encodes:
            groups.setdefault(self._bucket(position), []).append((slot, block))
        return [(bucket, self.memory.pairs(pairs)) for bucket, pairs in groups.items()]

    def _encode_options(self, bucket: int, layer: int | None = None) -> dict[str, Any]:
        options: dict[str, Any] = {"normalisation": self.normalisation, "rounding": self.rounding}
        if self.moments is not None:
            if bucket not in self._k_factors:
                self._k_factors[bucket] = self.memory.put(self.moments.k_factors(bucket, self.format.k_bits))
            k, v = self._k_factors[bucket], self._v_factors
            options |= {"k_feedback": k if layer is None else k[layer], "v_feedback": v if layer is None else v[layer]}
        return options

    def _make_plan(self, max_num_seqs: int, max_q_tokens: int, max_tiles: int) -> Plan:
        attends = self.num_q_heads > 0
        return Plan(
            self.format,
            head_dim=self.head_dim,
            num_kv_heads=self.num_kv_heads,
            dtype=self.memory.dtype_name,
            num_q_heads=self.num_q_heads,
            backend=self.memory.backend,
            device=self.memory.device_index,
            num_threads=self.num_threads,
            max_num_seqs=max_num_seqs if attends else 0,
            max_q_tokens=max_q_tokens if attends else 0,
            max_tiles=max_tiles if attends else 0,
        )

    def _plan_for(self, num_seqs: int, num_q_tokens: int, max_tiles: int) -> Plan:
        """The plan, made anew with twice the room when an attend is larger than it allows; its workspace exists as well."""
        if not self.num_q_heads:
            raise InvalidArgumentError("[kvarn.Cache.attend] num_q_heads: expected a cache that was made with query heads, got 0")
        needed = (num_seqs, num_q_tokens, max_tiles)
        if any(a > b for a, b in zip(needed, self._limits, strict=True)):
            limits = tuple(b if a <= b else 2 * a for a, b in zip(needed, self._limits, strict=True))
            self._plan = self._make_plan(*limits)
            self._limits = limits
            self._workspace = None
        if self._workspace is None and self.memory.backend != "cpu":
            self._workspace = self.memory.zeros("workspace", (self._plan.workspace_bytes,), as_bytes=True)
        return self._plan

    def _attend_view(self, sequences: list[CacheSequence], counts: list[int]) -> _AttendView:
        tables = [sequence.table() for sequence in sequences]
        columns = max(1, max((len(table) for table in tables), default=1))
        block_table = np.zeros((max(1, len(tables)), columns), np.int32)
        for row, table in zip(block_table, tables, strict=False):
            row[: len(table)] = table
        put = self.memory.put
        return _AttendView(
            sum(counts),
            columns,
            put(block_table),
            put(np.array([sequence.num_tokens for sequence in sequences], np.int32)),
            put(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)),
        )

    def _reserve(self, handles: list[PoolSequence], counts: list[int], keep: int) -> None:
        """Makes sure that the pool and the arrays have room for `counts` more tokens and the commit of everything.

        Raises:
            OutOfBlocksError: the pool has less.
            OutOfMemoryError: the arrays cannot grow.
        """
        rules = (self.format.tile_tokens, self.sink_tokens, self.recent_tokens)
        needs = [demand(handle, count, keep, *rules) for handle, count in zip(handles, counts, strict=True)]
        need = Demand(sum(n.blocks for n in needs), sum(n.slots for n in needs))
        info = self.pool.info
        if need.blocks > info.free_blocks or need.slots > info.free_slots:
            raise OutOfBlocksError(
                f"[kvarn.Cache] expected room for {need.blocks} more blocks and {need.slots} more staging slots, "
                f"got {info.free_blocks} and {info.free_slots}"
            )
        self._make_room(need)

    def _make_room(self, need: Demand) -> None:
        """Grows the arrays for what the pool may hand out next. It hands out a number that was never in use only when all others are, so
        that none passes the arrays' ends. The arrays of a fixed cache have the pool's size."""
        if self.fixed:
            return
        info = self.pool.info
        blocks = info.num_blocks - info.free_blocks + need.blocks
        slots = info.num_slots - info.free_slots + need.slots
        records, staging = self.records, self.staging
        if blocks > records.shape[1]:
            records = self.memory.grown("records", records, max(blocks, records.shape[1] * 3 // 2))
        if slots > staging.shape[1]:
            staging = self.memory.grown("staging", staging, max(slots, staging.shape[1] * 3 // 2))
        if records is not self.records or staging is not self.staging:
            self.records, self.staging = records, staging
            self._layers = self._layer_views()

    def _layer_views(self) -> list[tuple[Array, Array]]:
        """(records, staging) of every layer: taking a view costs as much as a call."""
        return [(self.records[layer], self.staging[layer]) for layer in range(self.num_layers)]

    def _run_copies(self, copies: list[tuple[int, int]]) -> None:
        if copies:
            sources, destinations = (self.memory.index([pair[side] for pair in copies]) for side in (0, 1))
            self.staging[:, destinations] = self.staging[:, sources]

    def _check_layer(self, operation: str, layer: int) -> None:
        if not 0 <= layer < self.num_layers:
            raise InvalidArgumentError(f"[kvarn.Cache.{operation}] layer: expected 0 to {self.num_layers - 1}, got {layer}")

    def _check_open(self, step: Step, operation: str) -> None:
        if step.cache is not self or not step._open:
            raise StaleHandleError(
                f"[kvarn.Cache.{operation}] step: expected this cache's open step, got one that is closed or another cache's"
            )

    def _close_step(self) -> None:
        step = self._step() if self._step is not None else None
        if step is not None:
            step._open = False
        self._step = None


def _shape(operation: str, argument: str, value: Array) -> list[int]:
    """The shape of an array argument."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise ArgumentTypeError(f"[kvarn.Cache.{operation}] {argument}: expected a numpy array or torch tensor, got {type(value).__name__}")
    return [int(size) for size in value.shape]
