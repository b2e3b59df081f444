"""One layer's memory with a ragged batch of random sequences, on the CPU and on a GPU, for the tests marked gpu."""

from __future__ import annotations

from typing import Any

import numpy as np

import kvarn
import support
from kvarn import ops

# Units in the last place of a result: half of one, relative to the value.
ROUNDING = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}
# The budget of attend: relative L2 error of a row against float64 arithmetic on the same records and staging values.
ATTEND_ERROR = 5e-4


def attend_tolerance(dtype: str) -> float:
    """The kernels' budget, and the rounding of the outputs to the plan's dtype."""
    return ATTEND_ERROR + ROUNDING[dtype]


class Batch:
    """Sequence i holds `contexts[i]` tokens, of which the last `q_lens[i]` ask. Its first tile and an unfinished last one are in staging,
    the others are records; blocks and slots are handed out in random order."""

    def __init__(
        self,
        rng: np.random.Generator,
        contexts: tuple[int, ...],
        q_lens: tuple[int, ...],
        *,
        format: str = "k4v2_g128",
        head_dim: int = 128,
        kv_heads: int = 2,
        group: int = 4,
        dtype: str = "float16",
        batch_invariant: bool = False,
    ) -> None:
        import torch

        self.contexts, self.q_lens, self.dtype = contexts, q_lens, dtype
        self.q_heads = kv_heads * group
        tile = kvarn.Format(format).tile_tokens
        columns = max(-(-context // tile) for context in contexts)
        common = {"head_dim": head_dim, "num_kv_heads": kv_heads, "num_q_heads": self.q_heads, "dtype": dtype}
        limits = {"max_num_seqs": len(contexts), "max_q_tokens": max(1, sum(q_lens)), "max_tiles": columns}
        self.plans = {
            "cpu": kvarn.Plan(format, **common, **limits),
            "cuda": kvarn.Plan(format, **common, **limits, backend="cuda", batch_invariant=batch_invariant),
        }
        plan = self.plans["cpu"]
        tiles = [(sequence, t) for sequence, context in enumerate(contexts) for t in range(-(-context // tile))]
        staged = [t == 0 or (t + 1) * tile > contexts[sequence] for sequence, t in tiles]
        slots, blocks = rng.permutation(max(1, sum(staged))), rng.permutation(max(1, len(tiles) - sum(staged)))
        table = np.zeros((len(contexts), columns), np.int32)
        counts = [0, 0]
        for (sequence, t), is_staged in zip(tiles, staged, strict=True):
            table[sequence, t] = ~slots[counts[1]] if is_staged else blocks[counts[0]]
            counts[is_staged] += 1
        kind = getattr(torch, dtype)
        shape = (2, kv_heads, tile, head_dim)
        staging = torch.from_numpy(rng.standard_normal((len(slots), *shape)).astype(np.float32)).to(kind)
        source = torch.from_numpy(rng.standard_normal((len(blocks), *shape)).astype(np.float32)).to(kind)
        records = torch.zeros(len(blocks), kv_heads, plan.record_bytes, dtype=torch.uint8)
        index = torch.arange(len(blocks), dtype=torch.int32)
        ops.encode(plan, source, records, index, index)
        q = torch.from_numpy(rng.standard_normal((sum(q_lens), self.q_heads, head_dim)).astype(np.float32)).to(kind)
        self.cpu: dict[str, Any] = {
            "q": q,
            "records": records,
            "staging": staging,
            "block_table": torch.from_numpy(table),
            "seq_lens": torch.tensor(contexts, dtype=torch.int32),
            "cu_q_lens": torch.tensor(np.concatenate([[0], np.cumsum(q_lens)]), dtype=torch.int32),
        }
        self.cuda = {name: value.cuda() for name, value in self.cpu.items()}

    def attend(self, device: str = "cuda", **options: Any) -> Any:
        return ops.attend(self.plans[device], **{**getattr(self, device), **options})

    def values(self, sequence: int) -> tuple[np.ndarray, np.ndarray]:
        """K and V of one sequence, float32 [tokens, KV heads, D] in the model's frame, as attention sees them."""
        plan, entries = self.plans["cpu"], self.cpu["block_table"][sequence].numpy()
        context = self.contexts[sequence]
        tiles = np.zeros((2, -(-context // plan.tile_tokens), *self.cpu["staging"].shape[2:]), np.float32)
        for i in range(tiles.shape[1]):
            if entries[i] >= 0:
                ops.decode(plan, self.cpu["records"].numpy(), entries[i : i + 1], k=tiles[0, i : i + 1], v=tiles[1, i : i + 1])
            else:
                tiles[:, i] = ops.hadamard(plan, self.cpu["staging"][~entries[i]].float().numpy(), inverse=True)
        k, v = tiles.transpose(0, 1, 3, 2, 4).reshape(2, -1, *tiles.shape[2:3], tiles.shape[4])[:, :context]
        return k, v

    def expected(self, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """Output and lse in float64."""
        q = self.cpu["q"].double().numpy()
        outs, sums, start = [], [], 0
        for sequence, count in enumerate(self.q_lens):
            out, lse = support.attend(q[start : start + count], *self.values(sequence), **options)
            outs.append(out)
            sums.append(lse)
            start += count
        return np.concatenate(outs), np.concatenate(sums)

    def check(self, **options: Any) -> None:
        """Compares attention on the GPU with float64."""
        reference = dict(options)
        if "logits_soft_cap" in reference:
            reference["soft_cap"] = reference.pop("logits_soft_cap")
        reference = {name: value.cpu().numpy() if hasattr(value, "cpu") else value for name, value in reference.items()}
        expected, expected_lse = self.expected(**reference)
        out, lse = self.attend(**options, return_lse=True)
        out, lse = out.double().cpu().numpy(), lse.double().cpu().numpy()
        # A row that sees nothing is zero on both sides.
        empty = ~np.isfinite(expected_lse)
        np.testing.assert_array_equal(out[empty], 0)
        np.testing.assert_array_equal(lse[empty], expected_lse[empty])
        error = support.relative_error(out[~empty], expected[~empty])
        assert error < attend_tolerance(self.dtype), error
        # An error in a score is an error in its logarithm; scores here are of the size of one.
        np.testing.assert_allclose(lse[~empty], expected_lse[~empty], atol=ATTEND_ERROR * np.abs(expected_lse[~empty]).max())
