"""Each baseline against its paper's or code's own definition, written out again in plain loops or taken from its own numbers."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
baselines = pytest.importorskip("kvarn.eval.baselines")
quantisers = pytest.importorskip("kvarn.eval.quantisers")


@pytest.fixture
def x(rng: np.random.Generator) -> torch.Tensor:
    """K or V of 1 layer, 2 sequences, 2 heads, 256 tokens of 64 channels."""
    return torch.from_numpy((rng.standard_normal((1, 2, 2, 256, 64)) * np.exp(rng.standard_normal(64))).astype(np.float32))


def half(value: float) -> float:
    return float(np.float16(value))


def kivi_group(values: np.ndarray, bits: int) -> np.ndarray:
    """KIVI's new_pack.py: scale = (max - min) / (2^bits - 1); codes = round((x - min) / scale)."""
    low, high = float(values.min()), float(values.max())
    scale, low = half((high - low) / (2**bits - 1)), half(low)
    return np.rint(np.clip((values - low) / scale, 0, 2**bits - 1)) * scale + low


@pytest.mark.parametrize("group", [32, 128])
def test_kivi_groups_k_along_tokens_and_v_along_channels(x: torch.Tensor, group: int) -> None:
    made = quantisers.parse(f"kivi{group}-k2v4")
    keys, values, data = made.keys(x, 128)[0, 1, 0].numpy(), made.values(x, 128)[0, 1, 0].numpy(), x[0, 1, 0].numpy()
    # One float32 rounding here or there.
    np.testing.assert_allclose(keys[group : 2 * group, 5], kivi_group(data[group : 2 * group, 5], 2), rtol=1e-5, atol=1e-6)
    first = min(group, 64)
    np.testing.assert_allclose(values[7, :first], kivi_group(data[7, :first], 4), rtol=1e-5, atol=1e-6)
    assert made.recent_tokens == (0, 128)
    assert made.bits(64, 2) == (2 + 32 / group, 4 + 32 / first)


def test_q8_0_blocks_of_llama_cpp(x: torch.Tensor) -> None:
    """quantize_row_q8_0_ref: d = amax / 127, q = roundf(x / d); the stored d is fp16."""
    block = x[0, 0, 0, 3, 32:64].numpy().astype(np.float32)
    d = np.float32(np.abs(block).max() / np.float32(127))
    scaled = block * (np.float32(1) / d)
    expected = np.sign(scaled) * np.floor(np.abs(scaled) + np.float32(0.5)) * half(d)
    made = quantisers.parse("q8_0")
    np.testing.assert_allclose(made.keys(x, 0)[0, 0, 0, 3, 32:64].numpy(), expected, rtol=1e-6)
    assert made.bits(64, 2) == (8.5, 8.5)  # 34 bytes for 32 values


def test_q4_0_blocks_of_llama_cpp(x: torch.Tensor) -> None:
    """quantize_row_q4_0_ref: d = (the value of largest magnitude) / -8, q = min(15, (int8_t)(x / d + 8.5)), read (q - 8) d."""
    block = x[0, 1, 1, 9, :32].numpy().astype(np.float32)
    largest = block[np.abs(block).argmax()]
    d = np.float32(largest / np.float32(-8))
    codes = np.minimum(15, (block * (np.float32(1) / d) + np.float32(8.5)).astype(np.int8))
    made = quantisers.parse("q4_0")
    np.testing.assert_allclose(made.values(x, 0)[0, 1, 1, 9, :32].numpy(), (codes - 8.0) * half(d), rtol=1e-6)
    assert made.keys(torch.zeros(1, 1, 1, 128, 64), 0).abs().max() == 0
    assert made.bits(64, 2) == (4.5, 4.5)  # 18 bytes for 32 values


def test_fp8_scales(x: torch.Tensor) -> None:
    per_tensor, per_head = quantisers.parse("fp8"), quantisers.parse("fp8_head")
    x = x.clone()
    x[:, :, 1] *= 100
    # E4M3 has 3 bits of mantissa: half a step is 2^-4 of the value, or of the smallest normal number, 2^-6 of 448.
    for made, largest in ((per_tensor, x.abs().amax((2, 3, 4), keepdim=True)), (per_head, x.abs().amax((3, 4), keepdim=True))):
        error = (made.keys(x, 0) - x).abs()
        assert (error <= torch.maximum(x.abs() / 16, largest / 448 * 2**-6 / 16) * 1.0001).all()
        assert error.max() > 0
    # The quiet head is finer with a scale of its own: its values are below the normal numbers under the loud head's.
    quiet = [(made.keys(x, 0) - x)[:, :, 0].square().mean() for made in (per_tensor, per_head)]
    assert quiet[1] < quiet[0]


def test_rtn_is_per_channel_for_k_and_per_token_for_v(x: torch.Tensor) -> None:
    made = quantisers.parse("rtn-k2v2")
    data = x[0, 0, 1].numpy()
    low, high = data[:128, 3].min(), data[:128, 3].max()
    scale = np.float32((high - low) / 3)
    expected = np.rint((data[:128, 3] - low) / scale) * half(scale) + half(low)
    # Tiles pass through fp16, as they lie in staging.
    np.testing.assert_allclose(made.keys(x, 0)[0, 0, 1, :128, 3].numpy(), expected, rtol=2e-3, atol=2e-3 * float(scale))
    v = made.values(x, 0)[0, 0, 1, 200].numpy()
    assert len(np.unique(v)) <= 4
    assert made.bits(64, 2) == (2 + 32 / 128, 2 + 32 / 64)


def test_quarot_is_clipped_and_keeps_zero(x: torch.Tensor) -> None:
    """fake_quant's quant_utils: max and min times the clip ratio, scale = (max - min) / 15, zero = round(-min / scale)."""
    made = quantisers.parse("quarot-k4v4")
    from kvarn.eval.encoder import rotation

    h = rotation(64, torch.device("cpu"))
    turned = (x[0, 0, 0, 17] @ h).numpy().astype(np.float64)
    high, low = max(turned.max(), 0) * 0.95, min(turned.min(), 0) * 0.95
    scale = half((high - low) / 15)
    zero = np.rint(-low / scale)
    expected = (np.clip(np.rint(turned / scale) + zero, 0, 15) - zero) * scale
    np.testing.assert_allclose((made.keys(x, 0)[0, 0, 0, 17] @ h).numpy(), expected, atol=1e-5 * np.abs(turned).max())
    assert made.keys(torch.zeros(1, 1, 1, 128, 64), 0).abs().max() == 0


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.36), (2, 0.117), (3, 0.03), (4, 0.009)])
def test_turboquant_distortion_is_the_papers(rng: np.random.Generator, bits: int, distortion: float) -> None:
    """The paper gives the squared error of a unit vector for 1 to 4 bits, in many dimensions; with 128 it is up to 1/128 smaller."""
    levels = baselines.sphere_levels(bits, 128)
    x = torch.from_numpy(rng.standard_normal((4000, 128)))
    x = x / x.norm(dim=1, keepdim=True) * 128**0.5
    error = (levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)] - x).square().mean()
    assert error == pytest.approx(distortion, abs=distortion / 128 + 0.6 * 10 ** -len(str(distortion).split(".")[1]))


def test_turboquant_rotation_is_orthonormal_and_norms_survive(x: torch.Tensor) -> None:
    turn = baselines.random_rotation(64)
    torch.testing.assert_close(turn @ turn.T, torch.eye(64), atol=1e-5, rtol=0)
    made = quantisers.parse("turboquant-k4v4").keys(x, 0)
    # Four bits: 0.009 of the square is lost.
    assert ((made - x).square().sum() / x.square().sum()) < 0.012


def test_weighted_kmeans_finds_what_is_there() -> None:
    places = torch.tensor([-0.8, -0.1, 0.3, 0.9])
    x = places.repeat_interleave(100)
    levels = baselines.weighted_kmeans(x, torch.ones_like(x), 4)
    torch.testing.assert_close(levels, places, atol=2 / 4096, rtol=0)  # the width of a bin
    # Where the weight is, the levels go.
    x = torch.linspace(-1, 1, 10_001)
    weight = torch.where(x > 0, 1000.0, 1e-3)
    assert (baselines.weighted_kmeans(x, weight, 4) > 0).sum() >= 3


class Turning:
    """What KvQuant asks of a model: a calibration, and a position encoding (here one that swaps signs at odd positions)."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        from kvarn.eval.language_model import Calibration

        self.found = Calibration(k, v, torch.ones_like(k), torch.ones_like(v))

    def calibration(self) -> object:
        return self.found

    def rotate(self, x: torch.Tensor, start: int) -> torch.Tensor:
        sign = 1 - 2 * (torch.arange(start, start + x.shape[-2]) % 2)
        return x * sign[:, None]

    unrotate = rotate


def test_kvquant_keeps_outliers_and_uses_its_levels(x: torch.Tensor) -> None:
    made = quantisers.parse("kvquant-k2v2")
    with pytest.raises(ValueError, match="prepare"):
        made.keys(x, 0)
    model = Turning(x, x)
    made.prepare(model)
    back = made.keys(x, 128)
    # At most four levels in a channel before the position encoding; the values outside the calibrated range come back in fp16.
    plain, original = model.unrotate(back, 128)[0, 0, 0, :, 5], model.unrotate(x, 128)[0, 0, 0, :, 5]
    inside = (original >= made.k_low[0, 0, 0, 0, 5]) & (original <= made.k_high[0, 0, 0, 0, 5])
    assert len(plain[inside].unique()) <= 4
    torch.testing.assert_close(plain[~inside], original[~inside].half().float())
    share = float((~((model.unrotate(x, 0) >= made.k_low) & (model.unrotate(x, 0) <= made.k_high))).float().mean())
    assert 0.001 < share <= 0.01
    v = made.values(x, 0)[0, 0, :, 9].flatten()
    kept = v == x[0, 0, :, 9].flatten().half().float()
    assert kept.sum() >= 2  # 1 % of 128 channels, half on each side
    assert len(v[~kept].unique()) <= 4
    assert made.bits(64, 2) == pytest.approx((2.32, 2.32 + 32 / 128))


def test_repair_of_the_worst_and_of_the_rest_share_the_tokens(x: torch.Tensor) -> None:
    worst, rest, plain = (quantisers.parse(name) for name in ("rtn-k2v2", "rtn-k2v2", "rtn-k2v2"))
    worst, rest = quantisers.Repaired(worst), quantisers.Repaired(rest, worst=False)
    a, b, bare = worst.values(x, 0), rest.values(x, 0), plain.values(x, 0)
    is_repaired = (a == x).all(-1)
    assert int(is_repaired.sum()) == 2 * 2 * 2 * 6  # 5 % of 128 tokens are 6, in every tile and head
    assert torch.equal(torch.where(is_repaired[..., None], bare, x), b)
    error = (bare.norm(dim=-1) - x.norm(dim=-1)).abs()
    assert error[is_repaired].min() >= error[:, :, :, :128][~is_repaired[:, :, :, :128]].median()
    assert worst.bits(64, 2)[1] == pytest.approx(plain.bits(64, 2)[1] + 0.05 * (16 - plain.bits(64, 2)[1]))
