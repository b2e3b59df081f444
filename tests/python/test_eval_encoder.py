"""The encoder in PyTorch against the engine's records, and its options against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

import kvarn

torch = pytest.importorskip("torch")
encoder = pytest.importorskip("kvarn.eval.encoder")
quantisers = pytest.importorskip("kvarn.eval.quantisers")


def tile_values(rng: np.random.Generator, tiles: int, tokens: int, dim: int) -> np.ndarray:
    """Staging of one KV head [tiles, 2, 1, G, D] float16 with loud tokens and channels, each tile at a size of its own."""
    x = rng.standard_normal((tiles, 2, 1, tokens, dim))
    x[:, :, :, 5::37] *= 8
    x[..., 3::29] *= 4
    x *= np.exp2(rng.integers(-5, 3, (tiles, 2, 1, 1, 1)).astype(float))
    return x.astype(np.float16)


def engine_records(name: str, staging: np.ndarray, **options: object) -> tuple[np.ndarray, np.ndarray]:
    """K and V as the engine's records decode them in the rotated frame [tiles, G, D] float32."""
    tiles, dim = len(staging), staging.shape[-1]
    plan = kvarn.Plan(name, head_dim=dim, num_kv_heads=1)
    records = np.zeros((tiles, 1, plan.record_bytes), np.uint8)
    index = np.arange(tiles, dtype=np.int32)
    kvarn.ops.encode(plan, staging, records, index, index, **options)
    k, v = (np.zeros((tiles, 1, *staging.shape[-2:]), np.float32) for _ in range(2))
    kvarn.ops.decode(plan, records, index, k=k, v=v, rotated=True)
    return k[:, 0], v[:, 0]


@pytest.mark.parametrize(
    ("name", "dim", "normalisation", "rounding"),
    [
        ("k4v2_g128", 128, "scale_invariant", "auto"),
        ("k2v2_g128", 128, "scale_invariant", "auto"),
        ("k4v4_g128", 128, "published", "minmax"),
        ("k2v4_g128", 64, "published", "unbiased"),
        ("k3v8_g64", 96, "scale_invariant", "auto"),
        ("k5v6_g32", 80, "scale_invariant", "unbiased"),
        ("k4v2_g256_m8", 128, "scale_invariant", "auto"),
    ],
)
def test_values_equal_the_engines(rng: np.random.Generator, name: str, dim: int, normalisation: str, rounding: str) -> None:
    widths = kvarn.Format(name)
    staging = tile_values(rng, 12, widths.tile_tokens, dim)
    expected = engine_records(name, staging, normalisation=normalisation, rounding=rounding)
    options = encoder.EncoderOptions(normalisation=normalisation, rounding=rounding, metadata_bits=widths.metadata_bits)
    m = torch.from_numpy(staging[:, :, 0].astype(np.float32))
    made = (
        encoder.encode(m[:, 0].transpose(1, 2), widths.k_bits, options).decode().transpose(1, 2),
        encoder.encode(m[:, 1], widths.v_bits, options, is_key=False).decode(),
    )
    for mine, engine in zip(made, expected, strict=True):
        # Sums in another order move scales by about 1e-6 and with them a few roundings: of codes that lay on a boundary, and of scales to
        # fp16 (2^-11) or to a step of 8-bit metadata. A code that differs shows as an error of a whole step, far beyond both; in unbiased
        # rounding it also moves its row's scale, by up to 1 %: one row in 500 is let through, where one wrong step would spoil them all.
        tolerance = 2e-3 if widths.metadata_bits == 16 else 2e-2
        close = np.isclose(mine.numpy(), engine, rtol=tolerance, atol=tolerance * np.abs(engine).mean())
        assert close.mean() > 0.998


@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 160, 192, 256, 512])
def test_rotation_is_the_engines(rng: np.random.Generator, dim: int) -> None:
    plan = kvarn.Plan("k4v2_g128", head_dim=dim, num_kv_heads=1)
    x = rng.standard_normal((8, dim)).astype(np.float32)
    mine = torch.from_numpy(x) @ encoder.rotation(dim, torch.device("cpu"))
    # Sums of at most 512 products in float32: 512 * 2^-24 of the row's norm at the very most.
    np.testing.assert_allclose(mine.numpy(), kvarn.ops.hadamard(plan, x), rtol=0, atol=512 * 2**-24 * np.sqrt(dim))


def test_signed_rotation_is_orthonormal() -> None:
    h = encoder.rotation(128, torch.device("cpu"), 3)
    torch.testing.assert_close(h @ h.T, torch.eye(128))
    assert not torch.equal(h.abs() * 0 + h, encoder.rotation(128, torch.device("cpu")))


def test_engine_quantiser_is_the_torch_one(rng: np.random.Generator) -> None:
    x = torch.from_numpy(rng.standard_normal((2, 3, 2, 256, 128)).astype(np.float32))
    engine, mine = quantisers.parse("engine-k4v2"), quantisers.parse("k4v2_g128")
    for a, b in ((engine.keys(x, 0), mine.keys(x, 0)), (engine.values(x, 0), mine.values(x, 0))):
        assert torch.isclose(a, b, rtol=0, atol=1e-2).float().mean() > 0.998


def loss(x: torch.Tensor, y: torch.Tensor, moment: torch.Tensor) -> float:
    """What a reader with this moment sees of the error [..., D, G]: the mean of e^T M e."""
    e = (x - y).double()
    return float(torch.einsum("...dg,...de,...eg->", e, moment.double(), e))


def reader_moment(rng: np.random.Generator, dim: int) -> torch.Tensor:
    """A moment with a decaying spectrum, as queries have."""
    a = rng.standard_normal((4 * dim, dim)) * np.exp(-np.arange(dim) / 16) @ np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    return torch.from_numpy(a.T @ a / len(a))


@pytest.mark.parametrize("is_key", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_feedback_lowers_what_readers_see(rng: np.random.Generator, is_key: bool, bits: int) -> None:
    moment = reader_moment(rng, 128)
    x = torch.from_numpy(rng.standard_normal((4, 128, 128)).astype(np.float32))
    m = x if is_key else x.transpose(-1, -2)
    options = encoder.EncoderOptions(rounding="minmax")
    plain = encoder.encode(m, bits, options, is_key=is_key).decode()
    fed = encoder.encode(m, bits, options, encoder.Feedback(encoder.feedback_factor(moment, 0.1)), is_key=is_key).decode()
    if not is_key:
        plain, fed = plain.transpose(-1, -2), fed.transpose(-1, -2)
    assert loss(x, fed, moment) < 0.6 * loss(x, plain, moment)


def test_feedback_without_correlation_is_plain_rounding(rng: np.random.Generator) -> None:
    x = torch.from_numpy(rng.standard_normal((2, 64, 128)).astype(np.float32))
    options = encoder.EncoderOptions(rounding="minmax")
    plain = encoder.encode(x, 2, options)
    fed = encoder.encode(x, 2, options, encoder.Feedback.of(torch.eye(64), 2, options))
    assert torch.equal(plain.codes, fed.codes)


def test_feedback_is_the_recursion_of_its_definition(rng: np.random.Generator) -> None:
    """Against GPTQ's own statement: after rounding channel d, the channels to come minimise e^T M e given the errors made so far."""
    dim, bits = 12, 3
    moment = reader_moment(rng, dim) + 0.1 * torch.eye(dim)
    y = torch.from_numpy(rng.standard_normal((dim, 5)))
    scale, zero = torch.full((dim, 5), 0.5, dtype=torch.float64), torch.full((dim, 5), -1.7, dtype=torch.float64)
    factor = encoder.feedback_factor(moment, 0.0).double()
    codes, _ = encoder.feed(y, scale, zero, bits, factor, block=4)
    want, target = y.clone(), y.clone()
    for d in range(dim):
        code = ((target[d] - zero[d]) / scale[d]).round().clamp(0, 7)
        assert torch.equal(code, codes[d])
        want[d] = code * scale[d] + zero[d]
        if d + 1 < dim:
            # The remaining channels' best values: with errors e = y - want fixed up to d, minimise e^T M e over the rest of e.
            made = (y - want)[: d + 1]
            rest = -torch.linalg.solve(moment[d + 1 :, d + 1 :], moment[d + 1 :, : d + 1] @ made)
            target[d + 1 :] = y[d + 1 :] - rest


@pytest.mark.parametrize("order", ["largest", "smallest", "pivoted"])
def test_order_of_feedback_keeps_the_channels_in_place(rng: np.random.Generator, order: str) -> None:
    """With no correlation the order changes nothing; codes must come back to their channels."""
    moment = torch.diag(torch.from_numpy(rng.uniform(0.5, 2, 64)))
    x = torch.from_numpy(rng.standard_normal((2, 64, 128)).astype(np.float32))
    options = encoder.EncoderOptions(order=order, rounding="minmax")
    assert torch.equal(encoder.encode(x, 2, options, encoder.Feedback.of(moment, 2, options)).codes, encoder.encode(x, 2, options).codes)


def test_options_do_what_they_say(rng: np.random.Generator) -> None:
    x = torch.from_numpy(tile_values(rng, 6, 128, 128)[:, 0, 0].astype(np.float32)).transpose(1, 2)
    error = {}
    for key, changes in {
        "plain": {},
        "none": {"normalisation": "none"},
        "zero": {"iterations": 0},
        "by error": {"keep": "error"},
        "squares": {"rounding": "least_squares"},
        "axis": {"target": "axis"},
    }.items():
        made = encoder.encode(x, 2, encoder.EncoderOptions(**changes)).decode()
        error[key] = float((made - x).square().sum() / x.square().sum())
    assert error["squares"] < error["plain"] < error["none"]
    assert error["zero"] > error["plain"]  # the loud tokens are what the iterations are for
    last = encoder.EncoderOptions(keep="last")
    columns, rows, _ = encoder.normalise(x, 2, last)
    kept = encoder.normalise(x, 2, encoder.EncoderOptions())
    assert (encoder.imbalance(x / kept[0] / kept[1]) <= encoder.imbalance(x / columns / rows) * (1 + 1e-5)).all()


def test_unbiased_error_does_not_correlate(rng: np.random.Generator) -> None:
    x = torch.from_numpy(rng.standard_normal((2, 64, 128)).astype(np.float32))
    y = encoder.encode(x, 2, encoder.EncoderOptions(normalisation="none")).decode()
    centred = x - x.mean(-1, keepdim=True)
    # Exact before the scales' rounding to fp16, which is worth 2^-11 of the value.
    slope = (centred * (y - x)).sum(-1) / centred.square().sum(-1)
    assert slope.abs().max() < 2e-3


def test_names() -> None:
    for name in (
        "fp16",
        "k2v2_g64_m8",
        "kvarn+kv(damping=0.1;order=largest)-k2v2",
        "kivi32-k4v2",
        "q4_0",
        "published(sink=0;recent=128)-k4v4",
    ):
        assert quantisers.parse(name).name == name
    assert quantisers.parse("published(sink=0;recent=128)-k4v4").recent_tokens == (128, 128)
    assert quantisers.parse("kvarn(v.iterations=0)-k4v4").v_options.iterations == 0
    assert quantisers.parse("kvarn(v.iterations=0)-k4v4").k_options.iterations == 8
    for bad in (
        "",
        "nothing",
        "kivi32",
        "fp16-k4v2",
        "kvarn(nonsense=1)-k4v2",
        "kvarn(keep=all)-k4v2",
        "kvarn(rotate=twice)-k4v2",
        "kivi32+k-k4v2",
        "k4",
    ):
        with pytest.raises(ValueError, match="expected"):
            quantisers.parse(bad)


@pytest.mark.parametrize("name", ["k4v2_g128", "k2v2_g64", "k3v2_g256_m8", "k8v8_g32"])
def test_bits_are_the_records(name: str) -> None:
    format = kvarn.Format(name)
    # Padding of a record to 16 bytes is not counted.
    assert sum(quantisers.parse(name).bits(128, 2)) / 2 == pytest.approx(format.bits_per_element(128), abs=8 * 16 / (2 * 32 * 128))


@pytest.mark.parametrize(
    ("name", "rounding", "order"),
    [
        ("k2v2_g128", "auto", "pivoted"),
        ("k4v4_g128", "auto", "pivoted"),
        ("k3v3_g64", "unbiased", "pivoted"),
        ("k3v3_g64", "auto", "natural"),
    ],
)
def test_feedback_equals_the_engines(rng: np.random.Generator, name: str, rounding: str, order: str) -> None:
    widths = kvarn.Format(name)
    staging = tile_values(rng, 6, widths.tile_tokens, 128)
    options = encoder.EncoderOptions(rounding=rounding, order=order)
    made = [encoder.Feedback.of(reader_moment(rng, 128), widths.k_bits, options) for _ in range(2)]
    factors = [feedback.engine_factor[None].contiguous().numpy() for feedback in made]
    expected = engine_records(name, staging, rounding=rounding, k_feedback=factors[0], v_feedback=factors[1])
    m = torch.from_numpy(staging[:, :, 0].astype(np.float32))
    mine = (
        encoder.encode(m[:, 0].transpose(1, 2), widths.k_bits, options, made[0]).decode().transpose(1, 2),
        encoder.encode(m[:, 1], widths.v_bits, options, made[1], is_key=False).decode(),
    )
    for own, engine in zip(mine, expected, strict=True):
        # As without feedback; and where a rounding differs, so do the token's later channels, 64 on average.
        close = np.isclose(own.numpy(), engine, rtol=2e-3, atol=2e-3 * np.abs(engine).mean())
        assert close.mean() > 0.99
