"""The attention engines of bench_attend_gpu.py: kvarn on records, torch and FlashInfer on fp16 and fp8 caches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_measure import COLD_BYTES

import kvarn
from kvarn import ops

TILE = 128


@dataclass
class Shape:
    """One row of the table."""

    name: str
    contexts: list[int]  # tokens of each sequence
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    q_len: int = 1
    format: str = "k4v2_g128"
    staged: bool = False  # the first tile and the unfinished one in fp16, as a cache has them; else whole tiles, all encoded
    rotations: bool = True
    groups: set[str] = field(default_factory=set)  # tables that the row belongs to

    @property
    def tokens(self) -> int:
        return sum(self.contexts)

    @property
    def fp16_bytes(self) -> int:
        return self.tokens * self.kv_heads * self.head_dim * 4


class Kvarn:
    """One call to attend, over copies of the batch that lie in different blocks and slots."""

    def __init__(self, shape: Shape) -> None:
        s = self.shape = shape
        tiles = [-(-context // TILE) for context in s.contexts]
        columns, sequences = max(tiles), len(tiles)
        self.plan = kvarn.Plan(
            s.format,
            head_dim=s.head_dim,
            num_kv_heads=s.kv_heads,
            num_q_heads=s.q_heads,
            max_num_seqs=sequences,
            max_q_tokens=sequences * s.q_len,
            max_tiles=columns,
            backend="cuda",
        )
        block_bytes = s.kv_heads * self.plan.record_bytes
        slot_bytes = 2 * s.kv_heads * TILE * s.head_dim * 2
        staged = [
            [s.staged and (t == 0 or (t + 1) * TILE > context) for t in range(count)]
            for context, count in zip(s.contexts, tiles, strict=True)
        ]
        self.slots = sum(map(sum, staged))
        self.blocks = sum(tiles) - self.slots
        staged_tokens = sum(
            min(TILE, context - t * TILE)
            for context, row in zip(s.contexts, staged, strict=True)
            for t, is_staged in enumerate(row)
            if is_staged
        )
        #: bytes that one call must read
        self.bytes = self.blocks * block_bytes + staged_tokens * slot_bytes // TILE
        self.copies = max(1, min(64, -(-COLD_BYTES // self.bytes)))
        # Real records, of Gaussian K and V; the same 64 tiles over and over, which is of no use to a cache that is cold.
        few = min(64, max(1, self.blocks))
        source = torch.randn(few, 2, s.kv_heads, TILE, s.head_dim, device="cuda").half()
        index = torch.arange(few, dtype=torch.int32, device="cuda")
        encoded = torch.zeros(few, s.kv_heads, self.plan.record_bytes, dtype=torch.uint8, device="cuda")
        ops.encode(self.plan, source, encoded, index, index)
        blocks, slots = max(1, self.copies * self.blocks), max(1, self.copies * self.slots)
        self.records = torch.empty(blocks, *encoded.shape[1:], dtype=torch.uint8, device="cuda")
        self.staging = torch.empty(slots, *source.shape[1:], dtype=torch.float16, device="cuda")
        for start in range(0, blocks, few):
            self.records[start : start + few] = encoded[: blocks - start]
        for start in range(0, slots, few):
            self.staging[start : start + few] = source[: slots - start]
        # Blocks of a copy in random order, as a pool that has been in use hands them out.
        self.tables = []
        for copy in range(self.copies):
            order = (torch.randperm(max(1, self.blocks)) + copy * self.blocks).tolist()
            block, slot = 0, copy * self.slots
            table = torch.zeros(sequences, columns, dtype=torch.int32)
            for row, flags in enumerate(staged):
                for t, is_staged in enumerate(flags):
                    table[row, t] = ~slot if is_staged else order[block]
                    slot, block = slot + is_staged, block + (not is_staged)
            self.tables.append(table.cuda())
        self.lens = torch.tensor(s.contexts, dtype=torch.int32, device="cuda")
        self.starts = torch.arange(sequences + 1, dtype=torch.int32, device="cuda") * s.q_len
        self.q = torch.randn(sequences * s.q_len, s.q_heads, s.head_dim, device="cuda").half()
        self.out = torch.empty_like(self.q)
        self.workspace = torch.empty(self.plan.workspace_bytes, dtype=torch.uint8, device="cuda")

    def __call__(self, index: int) -> None:
        ops.attend(
            self.plan,
            self.q,
            records=self.records,
            staging=self.staging,
            block_table=self.tables[index % self.copies],
            seq_lens=self.lens,
            cu_q_lens=self.starts,
            out=self.out,
            workspace=self.workspace,
            q_rotated=not self.shape.rotations,
            out_rotated=not self.shape.rotations,
        )

    def error(self) -> float:
        """Largest relative error of a row of the first sequence, against float64 on the same records."""
        self(0)
        s, context = self.shape, self.shape.contexts[0]
        table = self.tables[0][0, : -(-context // TILE)]
        k, v = torch.zeros(2, len(table), s.kv_heads, TILE, s.head_dim, device="cuda")
        encoded, staged = (table >= 0).nonzero()[:, 0], (table < 0).nonzero()[:, 0]
        if len(encoded):
            ops.decode(self.plan, self.records, table[encoded], k=k, v=v, destinations=encoded.int())
        if len(staged):
            tiles = ops.hadamard(self.plan, self.staging[(~table[staged]).long()].float(), inverse=True)
            k[staged], v[staged] = tiles[:, 0], tiles[:, 1]
        if not s.rotations:
            k, v = (ops.hadamard(self.plan, x) for x in (k, v))
        k, v = (x.transpose(1, 2).reshape(-1, s.kv_heads, s.head_dim)[:context].double() for x in (k, v))
        group, worst = s.q_heads // s.kv_heads, 0.0
        for i in range(s.q_len):
            visible = context - s.q_len + i + 1
            q = self.q[i].double().view(s.kv_heads, group, s.head_dim)
            weights = (torch.einsum("hgd,thd->hgt", q, k[:visible]) / math.sqrt(s.head_dim)).softmax(-1)
            expected = torch.einsum("hgt,thd->hgd", weights, v[:visible]).flatten(0, 1)
            worst = max(worst, float(((self.out[i].double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max()))
        return worst


def torch_calls(shape: Shape) -> dict[str, Callable[[int], object]]:
    """scaled_dot_product_attention on dense fp16 K and V, by backend. Batches of equal contexts only. No mask: with several queries each
    sees all positions, which reads as much as the causal form."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    s = shape
    if len(set(s.contexts)) != 1:
        return {}
    batch, context = len(s.contexts), s.contexts[0]
    copies = max(1, min(64, -(-COLD_BYTES // s.fp16_bytes)))
    k, v = (torch.randn(copies, batch, s.kv_heads, context, s.head_dim, device="cuda", dtype=torch.float16) for _ in range(2))
    q = torch.randn(batch, s.q_heads, s.q_len, s.head_dim, device="cuda", dtype=torch.float16)
    gqa = s.q_heads != s.kv_heads

    def call(backend: Any) -> Callable[[int], object]:
        def run(index: int) -> None:
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(q, k[index % copies], v[index % copies], enable_gqa=gqa)

        run.copies = copies  # type: ignore[attr-defined]
        return run

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    return {f"torch {name}": call(backend) for name, backend in backends.items()}


def flashinfer_calls(shape: Shape) -> dict[str, Callable[[int], object]]:
    """FlashInfer's paged decode on fp16 and fp8 caches, with its tensor-core kernels; one query per sequence. ImportError without."""
    import flashinfer

    s, page = shape, 16
    if s.q_len != 1:
        return {}
    pages = [-(-context // page) for context in s.contexts]
    total = sum(pages)
    starts = torch.tensor([0, *torch.tensor(pages).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    last = torch.tensor([(context - 1) % page + 1 for context in s.contexts], dtype=torch.int32, device="cuda")
    q = torch.randn(len(s.contexts), s.q_heads, s.head_dim, device="cuda", dtype=torch.float16)
    made: dict[str, Callable[[int], object]] = {}
    for name, kind in (("fp16", torch.float16), ("fp8", torch.float8_e4m3fn)):
        copies = max(1, min(64, -(-COLD_BYTES // (s.fp16_bytes * kind.itemsize // 2))))
        cache = torch.randn(copies * total, 2, page, s.kv_heads, s.head_dim, device="cuda", dtype=torch.float16).to(kind)
        indices = torch.randperm(total, device="cuda").int()
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), kv_layout="NHD", use_tensor_cores=True
        )
        wrapper.plan(starts, indices, last, s.q_heads, s.kv_heads, s.head_dim, page, q_data_type=torch.float16, kv_data_type=kind)

        def run(index: int, wrapper: Any = wrapper, cache: Any = cache, copies: int = copies) -> None:
            at = index % copies * total
            wrapper.run(q, cache[at : at + total])

        run.copies = copies  # type: ignore[attr-defined]
        made[f"flashinfer {name}"] = run
    return made
