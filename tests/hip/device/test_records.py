"""hadamard, append, encode and decode on an AMD device: the bytes of the CPU backend."""

from __future__ import annotations

import numpy as np
import pytest

import kvarn

HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 256, 512)
# (format, head_dim, dtype, normalisation, rounding): every width, tile length, dtype, both kinds of metadata, short chunks, both options.
RECORDS = [
    ("k4v2_g128", 128, "float16", "scale_invariant", "auto"),
    ("k4v2_g128", 64, "bfloat16", "scale_invariant", "auto"),
    ("k2v2_g128", 256, "float16", "published", "minmax"),
    ("k3v5_g64", 96, "float32", "scale_invariant", "unbiased"),
    ("k6v8_g32", 80, "float16", "scale_invariant", "auto"),
    ("k8v3_g256", 112, "bfloat16", "scale_invariant", "auto"),
    ("k5v6_g128_m8", 512, "float32", "scale_invariant", "auto"),
    ("k3v2_g256_m8", 160, "float16", "published", "auto"),
    ("k4v4_g64", 192, "bfloat16", "scale_invariant", "unbiased"),
    ("k5v6_g64_m8", 64, "bfloat16", "scale_invariant", "unbiased"),
    ("k6v3_g32_m8", 128, "bfloat16", "published", "unbiased"),
    ("k3v5_g128_m8", 256, "bfloat16", "scale_invariant", "auto"),
]
# The same, and which operands have a factor: every width with both roundings, both numbers of tokens that are rounded at the same time.
FED = [
    ("k4v2_g128", 128, "float16", "scale_invariant", "auto", "kv"),
    ("k2v3_g128", 128, "bfloat16", "scale_invariant", "minmax", "kv"),
    ("k3v8_g128", 64, "float16", "published", "auto", "kv"),
    ("k8v4_g64", 64, "float32", "scale_invariant", "unbiased", "kv"),
    ("k2v2_g128", 256, "float16", "scale_invariant", "auto", "kv"),
    ("k4v4_g32", 256, "bfloat16", "scale_invariant", "unbiased", "k"),
    ("k4v4_g256", 80, "float32", "scale_invariant", "auto", "v"),
    ("k5v6_g64_m8", 112, "float16", "published", "unbiased", "kv"),
    ("k6v5_g32", 160, "bfloat16", "scale_invariant", "auto", "kv"),
    ("k3v2_g256_m8", 512, "float32", "scale_invariant", "auto", "kv"),
]


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Random values with outlying channels; bfloat16 as its bits."""
    x = rng.standard_normal(shape).astype(np.float32)
    x[..., 3] *= 16
    if dtype == "bfloat16":
        return (x.view(np.uint32) >> 16).astype(np.uint16)
    return x.astype(dtype)


def host(array: np.ndarray, dtype: str) -> np.ndarray:
    """The array as the CPU backend takes it."""
    if dtype != "bfloat16":
        return array
    return array.view(pytest.importorskip("ml_dtypes").bfloat16)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_hadamard_gives_the_cpus_bytes(to_device, rng, head_dim, dtype):
    config = {"head_dim": head_dim, "num_kv_heads": 1}
    cpu, hip = kvarn.Plan("k4v2_g32", **config), kvarn.Plan("k4v2_g32", backend="hip", **config)
    x = values(rng, (19, head_dim), dtype)
    for inverse in (False, True):
        expected = x.copy()
        kvarn.ops.hadamard(cpu, host(x, dtype), out=host(expected, dtype), inverse=inverse)
        bits = dtype == "bfloat16"
        out = to_device(np.zeros_like(x), bits)
        kvarn.ops.hadamard(hip, to_device(x, bits), out=out, inverse=inverse)
        assert out.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_append_gives_the_cpus_bytes(to_device, rng, head_dim, dtype):
    config = {"head_dim": head_dim, "num_kv_heads": 3, "dtype": dtype}
    bits = dtype == "bfloat16"
    cpu, hip = kvarn.Plan("k4v2_g32", **config), kvarn.Plan("k4v2_g32", backend="hip", **config)
    k, v = values(rng, (2, 37, 3, head_dim), dtype)
    places = rng.permutation(96)[:37]
    places[5] = -1
    for rotated in (False, True):
        expected = values(rng, (3, 2, 3, 32, head_dim), dtype)
        staging = to_device(expected, bits)
        kvarn.ops.append(cpu, host(k, dtype), host(v, dtype), places, host(expected, dtype), rotated=rotated)
        kvarn.ops.append(hip, to_device(k, bits), to_device(v, bits), to_device(places), staging, rotated=rotated)
        assert staging.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize(("name", "head_dim", "dtype", "normalisation", "rounding"), RECORDS)
def test_encode_and_decode_give_the_cpus_bytes(to_device, rng, name, head_dim, dtype, normalisation, rounding):
    config = {"head_dim": head_dim, "num_kv_heads": 2, "dtype": dtype}
    cpu, hip = kvarn.Plan(name, **config), kvarn.Plan(name, backend="hip", **config)
    tokens = cpu.format.tile_tokens
    staging = values(rng, (4, 2, 2, tokens, head_dim), dtype)
    staging[1, 0, 0] = 0  # a tile of zeros
    staging[1, 1, 1, :, 7] = np.uint16(0x7FC0) if dtype == "bfloat16" else np.nan  # one that cannot be encoded
    slots, blocks = np.array([2, 0, 1], np.int32), np.array([0, 4, 2], np.int32)
    expected = rng.integers(0, 256, (5, 2, cpu.record_bytes), np.uint8)
    records = to_device(expected)
    options = {"normalisation": normalisation, "rounding": rounding}
    kvarn.ops.encode(cpu, host(staging, dtype), expected, slots, blocks, **options)
    bits = dtype == "bfloat16"
    kvarn.ops.encode(hip, to_device(staging, bits), records, to_device(slots), to_device(blocks), **options)
    assert records.numpy().tobytes() == expected.tobytes()

    destinations = np.array([3, 0, 1], np.int32)
    for rotated, dtype in ((False, "float16"), (True, "float32"), (False, "bfloat16")):
        bits = dtype == "bfloat16"
        k, v = values(rng, (2, 4, 2, tokens, head_dim), dtype)
        k_out, v_out = to_device(k, bits), to_device(v, bits)
        kvarn.ops.decode(cpu, expected, blocks, k=host(k, dtype), v=host(v, dtype), destinations=destinations, rotated=rotated)
        kvarn.ops.decode(hip, records, to_device(blocks), k=k_out, v=v_out, destinations=to_device(destinations), rotated=rotated)
        for got, wanted in ((k_out.numpy(), k), (v_out.numpy(), v)):
            # Which NaN comes out is not defined.
            got_values, wanted_values = host(got, dtype).astype(np.float32), host(wanted, dtype).astype(np.float32)
            np.testing.assert_array_equal(got_values, wanted_values)


@pytest.mark.parametrize(("name", "head_dim", "dtype", "normalisation", "rounding", "fed"), FED)
def test_encode_with_feedback_gives_the_cpus_bytes(to_device, rng, name, head_dim, dtype, normalisation, rounding, fed):
    layers, heads = 2, 2
    config = {"head_dim": head_dim, "num_kv_heads": heads, "dtype": dtype}
    cpu, hip = kvarn.Plan(name, cpu_isa="generic", **config), kvarn.Plan(name, backend="hip", **config)
    staging = values(rng, (layers, 2, 2, heads, cpu.format.tile_tokens, head_dim), dtype)
    staging[0, 1, 0, 1] = 0  # a tile of zeros
    staging[1, 0, 1, 0, :, 5] = np.uint16(0x7FC0) if dtype == "bfloat16" else np.nan  # one that cannot be encoded
    # Errors of a channel are spread with some tenths over the channels after it, in any order; what lies below the diagonal is not read.
    factors = rng.standard_normal((2, layers, heads, head_dim, head_dim)).astype(np.float32) * (2 / head_dim**0.5)
    factors[..., np.tri(head_dim, dtype=bool)] = np.nan
    for factor in factors.reshape(-1, head_dim, head_dim):
        np.fill_diagonal(factor, rng.permutation(head_dim))
    factors[:, 0, 1, 7, 7] = factors[:, 0, 1, 9, 9]  # one that leaves a channel out
    slots, blocks = np.array([1, 0], np.int32), np.array([2, 0], np.int32)
    expected = rng.integers(0, 256, (layers, 3, heads, cpu.record_bytes), np.uint8)
    records = to_device(expected)
    options = {"normalisation": normalisation, "rounding": rounding}
    named = {f"{operand}_feedback": factor for operand, factor in zip("kv", factors, strict=True) if operand in fed}
    plain = expected.copy()
    kvarn.ops.encode(cpu, host(staging, dtype), plain, slots, blocks, **options)
    kvarn.ops.encode(cpu, host(staging, dtype), expected, slots, blocks, **options, **named)
    assert (plain != expected).mean() > 0.05  # feedback shows
    kvarn.ops.encode(
        hip,
        to_device(staging, dtype == "bfloat16"),
        records,
        to_device(slots),
        to_device(blocks),
        **options,
        **{argument: to_device(factor) for argument, factor in named.items()},
    )
    assert records.numpy().tobytes() == expected.tobytes()


def test_indices_outside_their_tables_touch_nothing_else(to_device, rng):
    config = {"head_dim": 64, "num_kv_heads": 1, "dtype": "float16"}
    hip = kvarn.Plan("k4v2_g32", backend="hip", **config)
    staging = values(rng, (2, 2, 1, 32, 64), "float16")
    before = rng.integers(0, 256, (3, 1, hip.record_bytes), np.uint8)
    records = to_device(before)
    kvarn.ops.encode(hip, to_device(staging), records, to_device(np.array([0, 9], np.int32)), to_device(np.array([7, 1], np.int32)))
    after = records.numpy()
    assert (after[[0, 2]] == before[[0, 2]]).all()
    assert np.isnan(after[1].view(np.float16)[0, -6 * 96 // 2 :]).any()  # a slot that does not exist encodes as NaN
