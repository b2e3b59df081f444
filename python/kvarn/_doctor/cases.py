"""What ``kvarn doctor`` tries: every width, tile length, head dimension, element type, GQA ratio and option, and their combinations."""

from __future__ import annotations

from typing import NamedTuple

from kvarn._doctor.batch import Case

HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 256, 512)
DTYPES = ("float16", "bfloat16", "float32")


class Encoding(NamedTuple):
    """One call of encode. fed: the operands with feedback."""

    format: str
    head_dim: int
    dtype: str = "float16"
    normalisation: str = "scale_invariant"
    rounding: str = "auto"
    fed: str = ""

    def __str__(self) -> str:
        fed = f", feedback for {' and '.join(self.fed.upper())}" if self.fed else ""
        return f"{self.format} head_dim {self.head_dim} {self.dtype}, {self.normalisation}, rounding {self.rounding}{fed}"


# Every width with both roundings, every head dimension, tile length and element type, both kinds of metadata.
ENCODINGS = (
    Encoding("k4v2_g128", 128),
    Encoding("k2v3_g128", 64, "bfloat16", rounding="minmax"),
    Encoding("k5v6_g64_m8", 96, "float32", rounding="unbiased"),
    Encoding("k8v8_g32", 80, normalisation="published"),
    Encoding("k3v5_g64", 96, "float32", rounding="unbiased"),
    Encoding("k6v8_g32", 80),
    Encoding("k8v3_g256", 112, "bfloat16"),
    Encoding("k2v2_g128", 256, normalisation="published", rounding="minmax"),
    Encoding("k4v4_g64", 192, "bfloat16", rounding="unbiased"),
    Encoding("k3v2_g256_m8", 160, normalisation="published"),
    Encoding("k5v6_g128_m8", 512, "float32"),
    Encoding("k6v5_g128", 128, "float32", rounding="unbiased"),
    Encoding("k8v4_g128", 64, rounding="unbiased"),
    Encoding("k4v2_g128", 128, fed="kv"),
    Encoding("k2v3_g128", 128, "bfloat16", rounding="minmax", fed="kv"),
    Encoding("k4v4_g32", 64, "float32", rounding="unbiased", fed="k"),
    Encoding("k3v8_g128", 64, normalisation="published", fed="kv"),
    Encoding("k8v4_g64", 64, "float32", rounding="unbiased", fed="kv"),
    Encoding("k2v2_g128", 256, fed="kv"),
    Encoding("k4v4_g256", 80, "float32", fed="v"),
    Encoding("k5v6_g64_m8", 112, normalisation="published", rounding="unbiased", fed="kv"),
    Encoding("k6v5_g32", 160, "bfloat16", fed="kv"),
    Encoding("k3v2_g256_m8", 512, "float32", fed="kv"),
)
QUICK_ENCODINGS = (*ENCODINGS[:4], *ENCODINGS[13:16])

_ALL = {"window": 100, "logits_soft_cap": 15.0, "alibi": True, "sinks": True}

# Every width; GQA ratios up to and beyond 8 and 16 rows; 0 to 5 queries; every option, alone and with others; fp16, bf16, fp32.
ATTENTIONS = (
    Case("k4v2_g128", 128, 2, 8, (300, 129, 1), (1, 1, 1)),
    Case("k4v2_g128", 128, 1, 3, (128, 40, 700), (1, 0, 2), options={"window": 150}),
    Case("k2v4_g128", 128, 1, 5, (260,), (3,), dtype="bfloat16", options={"causal": False}),
    Case("k3v8_g128", 128, 1, 16, (400, 130), (1, 2), options={"logits_soft_cap": 20.0}),
    Case("k8v3_g128", 64, 2, 4, (200, 513), (2, 1), options={"alibi": True, "sinks": True}),
    Case("k5v6_g64", 96, 1, 3, (190, 64), (1, 1), options={"window": 70}),
    Case("k4v2_g128_m8", 112, 1, 9, (300,), (2,), dtype="bfloat16", options={"logits_soft_cap": 10.0, "sinks": True}),
    Case("k4v2_g32", 64, 2, 2, (100, 33), (1, 2), dtype="float32"),
    # The rest is of the full size.
    Case("k4v4_g128", 64, 1, 24, (270,), (1,), dtype="bfloat16"),
    Case("k4v2_g128", 256, 1, 7, (300, 17), (1, 1)),
    Case("k4v2_g128", 256, 1, 20, (300, 700), (1, 5), options=_ALL),
    Case("k4v2_g128", 128, 1, 4, (390,), (1,), dtype="bfloat16", scale=2.0**-12),
    Case("k4v2_g128", 128, 1, 4, (390,), (1,), scale=2.0**9, options={"softmax_scale": 2.0**-13}),
    Case("k4v2_g128", 128, 1, 4, (390, 140), (1, 1), options={"softmax_scale": -0.1, "sinks": True}),
    Case("k4v2_g128", 128, 2, 8, (700, 300), (2, 3), options=_ALL),
    Case("k4v2_g128", 128, 2, 8, (700, 300), (2, 3), dtype="bfloat16", options={"window": 200, "logits_soft_cap": 30.0}),
    Case("k4v2_g128", 128, 1, 4, (500,), (4,), options={"window": 60, "sinks": True}),
    Case("k4v2_g128", 128, 1, 32, (500, 260), (1, 4), options={"alibi": True}),
    Case("k4v2_g128", 128, 1, 8, (600,), (1,)),
    Case("k4v2_g128", 128, 2, 12, (500, 200, 70), (70, 33, 70), options={"window": 120}),
    Case("k4v2_g128", 128, 8, 8, (333, 128), (1, 1), dtype="bfloat16"),
    Case("k2v2_g128", 64, 1, 1, (4096,), (1,)),
    Case("k4v2_g128", 128, 1, 4, (4100, 1000), (1, 1)),
    Case("k4v2_g128", 128, 4, 16, (2500, 300, 1, 128, 129, 4000), (1, 1, 1, 2, 0, 1)),
    *(
        Case(f"k{k}v{v}_g128", dim, 1, heads, (390,), (1,), options={"logits_soft_cap": 15.0, "sinks": True} if k in (2, 8) else {})
        for dim, heads in ((64, 2), (64, 16), (128, 4), (128, 16), (256, 4))
        for k, v in ((2, 2), (3, 3), (4, 4), (8, 8))
    ),
    *(Case("k4v2_g128", dim, 2, 4, (270, 140), (1, 1)) for dim in (80, 96, 112, 160, 192, 512)),
    Case("k4v2_g128", 128, 2, 8, (900, 129), (1, 2), dtype="float32", options=_ALL),
    Case("k8v8_g256", 512, 1, 2, (600,), (1,), dtype="float32"),
    Case("k3v2_g128", 160, 1, 12, (4100,), (1,), options={"alibi": True}),
    Case("k6v5_g128", 80, 1, 2, (270,), (1,)),
    Case("k2v6_g64", 192, 1, 3, (150,), (2,), dtype="bfloat16"),
    Case("k5v4_g128", 256, 1, 2, (270,), (1,), options={"softmax_scale": -0.05}),
    Case("k4v2_g256_m8", 64, 1, 6, (1000, 20), (1, 1), options={"causal": False}),
)
NUM_QUICK_ATTENTIONS = 8

# Many tiles for every block that a large GPU runs at a time, so that blocks go on from run to run and warps from tile to tile.
_MIXED = (900, 130, 1000, 300, 640)
BUSY = (
    Case("k4v2_g128", 128, 2, 8, _MIXED, (1,) * 5, copies=400),
    Case("k4v2_g128", 128, 1, 16, _MIXED, (1,) * 5, dtype="bfloat16", options={"window": 500}, copies=400),
    Case("k2v2_g128", 64, 2, 8, _MIXED, (1,) * 5, options={"sinks": True}, copies=400),
    Case("k4v4_g128", 256, 1, 4, _MIXED, (1,) * 5, copies=400),
    Case("k4v2_g64", 96, 1, 3, _MIXED, (1,) * 5, dtype="float32", copies=200),
)

# Sequences that must not depend on their neighbours: lengths that are cut into several runs, and short ones.
INVARIANT = (
    Case("k4v2_g128", 128, 2, 8, (2500, 300, 129), (1, 1, 1), batch_invariant=True),
    Case("k4v2_g64", 96, 1, 3, (900, 64), (1, 2), dtype="bfloat16", batch_invariant=True, options={"sinks": True}),
    Case("k6v3_g128", 128, 2, 2, (1500, 129), (1, 1), dtype="float32", batch_invariant=True),
    Case("k4v2_g128", 128, 1, 16, (2300, 700), (1, 1), batch_invariant=True),
)
LONG = Case("k4v2_g128", 128, 1, 4, (65536, 1000), (1, 1))
