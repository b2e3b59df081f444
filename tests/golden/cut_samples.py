"""Cuts the real K and V tiles of tests/golden/samples.bin out of recorded tensors of the tiny models.

    python cut_samples.py OUTPUT_FILE RECORDED.npz [RECORDED.npz ...]

Each .npz holds fp16 `k`, `v` [layers, KV heads, tokens, D] of one sequence, K after RoPE. The output is little-endian: three int32
(tiles, G, D), then fp16 k [tiles, G, D] and v [tiles, G, D]: tokens 512 to 639 of the first and the last recorded layer, KV head 0.
"""

import sys
from pathlib import Path

import numpy as np

FIRST, G = 512, 128


def main() -> None:
    tiles = {name: [np.load(path)[name][layer, 0, FIRST : FIRST + G] for path in sys.argv[2:] for layer in (0, -1)] for name in ("k", "v")}
    k, v = np.stack(tiles["k"]), np.stack(tiles["v"])
    Path(sys.argv[1]).write_bytes(np.array(k.shape, "<i4").tobytes() + k.astype("<f2").tobytes() + v.astype("<f2").tobytes())


if __name__ == "__main__":
    main()
