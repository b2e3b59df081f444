"""Converts golden vectors made with the method authors' PyTorch code (.npz) into the flat files of tests/golden/published.

    python convert_published.py FOLDER_WITH_NPZ OUTPUT_FOLDER

Each .npz holds, for n tiles of one KV head: `k`, `v` [n, G, D] fp16 before the rotation; `k_codes` [n, D, G] and `v_codes` [n, G, D]; fp16
`k_scale`, `k_zero`, `k_token_scale`, `v_channel_scale`, `v_scale`, `v_zero`; `k_dequant`, `v_dequant` [n, G, D] rotated back; `q` [8, D];
`attention` [8, D] and `attention_lse` [8] in fp32 (scale 1/sqrt(D), no mask).

A flat file is little-endian: eight int32 (the bytes "KVGV", n, G, D, K bits, V bits, rows of q, stride of the dequantised tokens), then
  k, v               fp16 [n, G, D]
  records            n tiles in the authors' layout: K codes [D][G * bits / 8], V codes [G][D * bits / 8] (value i at bit i * bits of
                     its row), fp16 k_scale[D], k_zero[D], k_token_scale[G], v_channel_scale[D], v_scale[G], v_zero[G]
  k_dequant, v_dequant  fp16 [n, G / stride, D]: tokens 0, stride, 2 * stride, ...
  q                  fp16 [rows, D]
  attention          fp32 [rows, D]
  attention_lse      fp32 [rows]
"""

import re
import sys
from pathlib import Path

import numpy as np

STRIDE = 8
METADATA = ("k_scale", "k_zero", "k_token_scale", "v_channel_scale", "v_scale", "v_zero")


def pack(codes: np.ndarray, bits: int) -> bytes:
    """Codes [rows, n] as bytes [rows, n * bits / 8], value i of a row at bit i * bits."""
    planes = (codes[..., None] >> np.arange(bits)) & 1
    return np.packbits(planes.reshape(codes.shape[0], -1).astype(np.uint8), axis=1, bitorder="little").tobytes()


def convert(source: Path, target: Path) -> None:
    match = re.match(r"k(\d)v(\d)_g(\d+)_d(\d+)_", source.name)
    if match is None:
        raise ValueError(f"{source.name}: expected a name like k4v2_g128_d128_gaussian.npz")
    k_bits, v_bits, g, d = map(int, match.groups())
    z = np.load(source)
    n = len(z["k"])
    assert z["k"].shape == z["v_codes"].shape == (n, g, d)
    assert z["k_codes"].shape == (n, d, g)
    parts = [np.array([int.from_bytes(b"KVGV", "little"), n, g, d, k_bits, v_bits, len(z["q"]), STRIDE], "<i4").tobytes()]
    parts += [z[name].astype("<f2").tobytes() for name in ("k", "v")]
    for i in range(n):
        parts += [pack(z["k_codes"][i], k_bits), pack(z["v_codes"][i], v_bits)]
        parts += [z[name][i].astype("<f2").tobytes() for name in METADATA]
    parts += [z[name][:, ::STRIDE].astype("<f2").tobytes() for name in ("k_dequant", "v_dequant")]
    parts += [z["q"].astype("<f2").tobytes(), z["attention"].astype("<f4").tobytes(), z["attention_lse"].astype("<f4").tobytes()]
    target.write_bytes(b"".join(parts))


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.npz")):
        convert(path, target / (path.stem + ".bin"))


if __name__ == "__main__":
    main()
