"""kvarn.ops on CUDA tensors: bytes equal to the CPU's, attention within its budget of float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import kvarn
from gpu_case import Batch
from kvarn import ops

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

DTYPES = ["float16", "bfloat16", "float32"]


def plans(format: str = "k4v2_g128", **options: Any) -> tuple[kvarn.Plan, kvarn.Plan]:
    shape = {"head_dim": 128, "num_kv_heads": 2, **options}
    return kvarn.Plan(format, **shape), kvarn.Plan(format, **shape, backend="cuda")


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "float16") -> Any:
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(getattr(torch, dtype))


def bits(tensor: Any) -> Any:
    """The tensor's bytes, on the CPU: NaN equals itself."""
    return tensor.contiguous().view(torch.uint8).cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 160, 192, 256, 512])
def test_hadamard_bytes(head_dim: int, dtype: str, rng: np.random.Generator) -> None:
    cpu, cuda = plans(head_dim=head_dim)
    x = normal(rng, (37, 3, head_dim), dtype)
    for inverse in (False, True):
        assert torch.equal(bits(ops.hadamard(cuda, x.cuda(), inverse=inverse)), bits(ops.hadamard(cpu, x, inverse=inverse)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_append_bytes(head_dim: int, dtype: str, rng: np.random.Generator) -> None:
    cpu, cuda = plans(head_dim=head_dim, dtype=dtype)
    # K and V as slices of one projection.
    packed = normal(rng, (200, 4, head_dim), dtype)
    mapping = torch.from_numpy(rng.permutation(3 * 128)[:200].astype(np.int64))
    mapping[::17] = -1
    for rotated in (False, True):
        staging = torch.full((3, 2, 2, 128, head_dim), 7, dtype=packed.dtype)
        on_gpu, both = staging.cuda(), packed.cuda()
        ops.append(cpu, packed[:, :2], packed[:, 2:], mapping, staging, rotated=rotated)
        ops.append(cuda, both[:, :2], both[:, 2:], mapping.cuda(), on_gpu, rotated=rotated)
        assert torch.equal(bits(on_gpu), bits(staging))


@pytest.mark.parametrize(
    ("format", "head_dim", "dtype"),
    [(f"k{k}v{v}_g128", 128, "float16") for k, v in ((2, 2), (3, 2), (4, 2), (4, 4), (5, 6), (8, 4), (8, 8))]
    + [("k4v2_g128", head_dim, "bfloat16") for head_dim in (64, 80, 192, 256, 512)]
    + [("k4v2_g32", 128, "float32"), ("k3v2_g64_m8", 96, "float16"), ("k2v2_g256", 64, "bfloat16")],
)
def test_encode_and_decode_bytes(format: str, head_dim: int, dtype: str, rng: np.random.Generator) -> None:
    cpu, cuda = plans(format, head_dim=head_dim, dtype=dtype)
    layers, slots = 2, 3
    staging = normal(rng, (layers, slots, 2, 2, cpu.tile_tokens, head_dim), dtype)
    staging[1] *= 100  # another scale
    source = torch.tensor([2, 0], dtype=torch.int32)
    target = torch.tensor([4, 1], dtype=torch.int32)
    for options in ({}, {"normalisation": "published"}, {"rounding": "minmax"}, {"rounding": "unbiased"}):
        records = torch.full((layers, 5, 2, cpu.record_bytes), 0xA5, dtype=torch.uint8)
        on_gpu = records.cuda()
        ops.encode(cpu, staging, records, source, target, **options)
        ops.encode(cuda, staging.cuda(), on_gpu, source.cuda(), target.cuda(), **options)
        assert torch.equal(on_gpu.cpu(), records), options
    for rotated in (False, True):
        expected = ops.decode(cpu, records[1], target, rotated=rotated)
        got = ops.decode(cuda, on_gpu[1], target.cuda(), rotated=rotated)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("group", range(1, 25))
def test_attend_of_every_group(group: int, rng: np.random.Generator) -> None:
    Batch(rng, (1, 300, 129, 1000), (1, 1, 1, 1), group=group).check()


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("q_len", range(1, 10))
def test_attend_of_several_queries(q_len: int, group: int, rng: np.random.Generator) -> None:
    Batch(rng, (q_len, 300, 128 * 4, 777), (q_len,) * 4, group=group).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "format", ["k2v2_g128", "k3v2_g128", "k4v2_g128", "k4v4_g128", "k5v6_g128", "k8v4_g128", "k8v8_g128", "k4v2_g64", "k4v2_g128_m8"]
)
def test_attend_of_every_width(format: str, dtype: str, rng: np.random.Generator) -> None:
    Batch(rng, (700, 5, 260), (1, 2, 3), format=format, dtype=dtype).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 160, 192, 256, 512])
def test_attend_of_every_head_dim(head_dim: int, dtype: str, rng: np.random.Generator) -> None:
    Batch(rng, (520, 129, 44), (2, 1, 4), head_dim=head_dim, dtype=dtype).check()


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"window": 1},
        {"window": 200},
        {"logits_soft_cap": 5.0},
        {"alibi_slopes": "slopes"},
        {"sinks": "sinks"},
        {"window": 300, "sinks": "sinks", "logits_soft_cap": 3.0, "alibi_slopes": "slopes"},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("q_len", [1, 5])
def test_attend_options(options: dict[str, Any], q_len: int, rng: np.random.Generator) -> None:
    vectors = {"slopes": torch.linspace(0.01, 0.3, 8).cuda(), "sinks": torch.linspace(-1, 3, 8).cuda()}
    given = {name: vectors[value] if isinstance(value, str) else value for name, value in options.items()}
    Batch(rng, (900, 130, 64), (q_len,) * 3).check(**given)


def test_attend_of_ragged_batches(rng: np.random.Generator) -> None:
    contexts = (*map(int, rng.integers(1, 3000, 60)), 20_000)
    q_lens = tuple(min(int(count), context) for count, context in zip(rng.integers(0, 9, 61), contexts, strict=True))
    Batch(rng, contexts, q_lens, kv_heads=1, group=5, head_dim=64).check()


def test_attend_with_strides_and_rotated_frames(rng: np.random.Generator) -> None:
    batch = Batch(rng, (300, 520), (1, 3))
    expected = batch.attend()
    wide = torch.empty(4, 3 * 8, 128, dtype=torch.float16, device="cuda")
    wide[:, 8:16] = batch.cuda["q"]
    out = torch.full((4, 16, 128), 7, dtype=torch.float16, device="cuda")
    batch.attend(q=wide[:, 8:16], out=out[:, ::2])
    assert torch.equal(out[:, ::2], expected)
    assert (out[:, 1::2] == 7).all(), "between the heads of a strided output nothing is written"
    plan = batch.plans["cuda"]
    turned = batch.attend(q=ops.hadamard(plan, batch.cuda["q"]), q_rotated=True, out_rotated=True)
    back = ops.hadamard(plan, turned, inverse=True).double()
    # q, the output and its rotation are rounded to fp16 on the way; three independent roundings beside the kernels' budgets.
    assert ((back - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)).max() < 2 * 5e-4 + 3 * 2**-11


def test_the_same_bits_on_every_run(rng: np.random.Generator) -> None:
    batch = Batch(rng, (5000, 128, 2000, 1), (1, 2, 1, 1))
    expected = batch.attend()
    noise = torch.empty(1 << 26, dtype=torch.uint8, device="cuda")
    for run in range(30):
        if run % 2:
            noise.random_()  # another state of the caches and of the workspace's memory
        assert torch.equal(batch.attend(), expected)


def test_batch_invariance(rng: np.random.Generator) -> None:
    batch = Batch(rng, (5000, 17, 2560, 900), (2, 2, 2, 2), batch_invariant=True)
    together = batch.attend()

    def alone(rows: list[int]) -> Any:
        chosen = torch.tensor(rows, device="cuda")
        return batch.attend(
            q=torch.cat([batch.cuda["q"][2 * row : 2 * row + 2] for row in rows]),
            block_table=batch.cuda["block_table"][chosen],
            seq_lens=batch.cuda["seq_lens"][chosen],
            cu_q_lens=torch.arange(len(rows) + 1, dtype=torch.int32, device="cuda") * 2,
        )

    for row in range(4):
        assert torch.equal(alone([row]), together[2 * row : 2 * row + 2])
    assert torch.equal(alone([2, 0]), together[[4, 5, 0, 1]])


def test_a_nan_stays_in_its_sequence_and_head(rng: np.random.Generator) -> None:
    batch = Batch(rng, (500, 500, 500), (1, 2, 1))
    clean = batch.attend()
    block = int(batch.cpu["block_table"][1, 2])
    tile = torch.full((1, 2, 2, 128, 128), 1.0, dtype=torch.float16, device="cuda")
    tile[0, 0, 1, 5, 9] = float("nan")
    index = torch.zeros(1, dtype=torch.int32, device="cuda")
    ops.encode(batch.plans["cuda"], tile, batch.cuda["records"], index, index + block)
    dirty = batch.attend()
    assert torch.equal(dirty[[0, 3]], clean[[0, 3]])
    assert torch.isnan(dirty[1:3, 4:]).all(), "the query heads of the KV head that holds the NaN"
    assert torch.isfinite(dirty[1:3, :4]).all()


def test_offsets_past_four_gib(rng: np.random.Generator) -> None:
    """Blocks and slots at the far end of buffers that 32 bits cannot address, and the records' and staging's layer strides past 4 GiB."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    heads, dim = 8, 128
    plan = kvarn.Plan(
        "k4v2_g128", head_dim=dim, num_kv_heads=heads, num_q_heads=heads, max_num_seqs=1, max_q_tokens=1, max_tiles=2, backend="cuda"
    )
    blocks = (5 << 30) // (heads * plan.record_bytes)
    slots = (5 << 30) // (2 * heads * 128 * dim * 2)
    records = torch.zeros(2, blocks, heads, plan.record_bytes, dtype=torch.uint8, device="cuda")
    staging = torch.zeros(2, slots, 2, heads, 128, dim, dtype=torch.float16, device="cuda")
    k, v = (normal(rng, (200, heads, dim)).cuda() for _ in range(2))

    def run(records: Any, staging: Any, block: int, slot: int) -> tuple[Any, ...]:
        places = torch.arange(200, device="cuda")
        ops.append(plan, k, v, places + (slot - 1) * 128, staging)
        index = torch.tensor([slot - 1], dtype=torch.int32, device="cuda")
        ops.encode(plan, staging, records, index, torch.full_like(index, block))
        decoded = ops.decode(plan, records, torch.full_like(index, block))
        out = ops.attend(
            plan,
            k[:1],
            records=records,
            staging=staging,
            block_table=torch.tensor([[block, ~slot]], dtype=torch.int32, device="cuda"),
            seq_lens=torch.tensor([200], dtype=torch.int32, device="cuda"),
            cu_q_lens=torch.tensor([0, 1], dtype=torch.int32, device="cuda"),
        )
        return records[block].clone(), *decoded, out

    far = run(records[1], staging[1], blocks - 1, slots - 1)
    assert int(records[0].max()) == 0, "nothing but the far block was written"
    assert int(records[1, :-1].max()) == 0
    assert not staging[1, :-2].any()
    near = run(torch.zeros_like(records[0, :1]), torch.zeros_like(staging[0, :2]), 0, 1)
    for a, b in zip(far, near, strict=True):
        assert torch.equal(a, b)
    # Both layers in one call.
    records[1, -1] = 0
    index = torch.tensor([slots - 2, blocks - 1], dtype=torch.int32, device="cuda")
    ops.encode(plan, staging, records, index[:1], index[1:])
    assert torch.equal(records[1, -1], near[0])
    del records, staging, far, near
    torch.cuda.empty_cache()


def test_sanitizer_subset(rng: np.random.Generator) -> None:
    """Every operation once on small shapes; scripts/gpu_check.sh runs this under compute-sanitizer."""
    batch = Batch(rng, (200, 33), (1, 2), format="k4v2_g32", head_dim=64, group=3)
    batch.check(window=100)
    cpu, cuda = plans()
    staging = normal(rng, (1, 2, 2, 128, 128))
    records, index = torch.zeros(1, 2, cpu.record_bytes, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    on_gpu, there = records.cuda(), index.cuda()
    ops.encode(cpu, staging, records, index, index)
    ops.encode(cuda, staging.cuda(), on_gpu, there, there)
    assert torch.equal(on_gpu.cpu(), records)
    k, _ = ops.decode(cuda, on_gpu, there)
    expected, _ = ops.decode(cpu, records, index)
    assert torch.equal(bits(k), bits(expected))
    ops.append(cuda, batch.cuda["q"][:, :2].new_zeros(3, 2, 128), k.new_ones(3, 2, 128), torch.arange(3, device="cuda"), staging.cuda())
    Batch(rng, (300, 20), (1, 4)).check()
