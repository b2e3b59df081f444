"""One call of attend on the HIP backend: 4 query rows over records of k4v2_g128 and head_dim 128 alone, for roofline.py to count.

``attend_tiles.py TILES``
"""

from __future__ import annotations

import sys

import numpy as np

import kvarn
from kvarn._hip_memory import HipArray, HipRuntime

FORMAT, HEAD_DIM, TOKENS, ROWS = "k4v2_g128", 128, 128, 4


def main(tiles: int) -> None:
    rng = np.random.default_rng(7)
    config = {"head_dim": HEAD_DIM, "num_kv_heads": 1, "num_q_heads": ROWS, "max_num_seqs": 1, "max_q_tokens": 1, "max_tiles": tiles}
    cpu, plan = kvarn.Plan(FORMAT, **config), kvarn.Plan(FORMAT, backend="hip", **config)
    staging = rng.standard_normal((tiles, 2, 1, TOKENS, HEAD_DIM)).astype(np.float16)
    records, numbers = np.zeros((tiles, 1, cpu.record_bytes), np.uint8), np.arange(tiles, dtype=np.int32)
    kvarn.ops.encode(cpu, staging, records, numbers, numbers)
    arrays = {
        "q": rng.standard_normal((1, ROWS, HEAD_DIM)).astype(np.float16),
        "records": records,
        "staging": staging[:1],
        "block_table": numbers[None],
        "seq_lens": np.array([TOKENS * tiles], np.int32),
        "cu_q_lens": np.array([0, 1], np.int32),
        "out": np.zeros((1, ROWS, HEAD_DIM), np.float16),
        "workspace": np.zeros(plan.workspace_bytes, np.uint8),
    }
    runtime = HipRuntime()
    device = {name: HipArray(runtime, array) for name, array in arrays.items()}
    kvarn.ops.attend(plan, device.pop("q"), **device)


if __name__ == "__main__":
    main(int(sys.argv[1]))
