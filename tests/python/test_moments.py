"""Moments: the factors made of them, files of them, caches that round with them, and how they are made from a model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvarn
from kvarn import Cache, Moments, ops

LAYERS, HEADS, DIM, TILE = 2, 2, 64, 32
FORMAT = "k2v2_g32"
MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-reason"


def random_moments(seed: int = 0, layers: int = LAYERS, heads: int = HEADS, dim: int = DIM) -> Moments:
    """Correlated channels: few directions and a little of all."""
    rng = np.random.default_rng(seed)
    k, v = (rng.standard_normal((layers, heads, dim // 8, dim)) for _ in range(2))
    of = [(a.swapaxes(2, 3) @ a + 0.1 * np.eye(dim)).astype(np.float32) for a in (k, v)]
    return Moments(of[0], of[1], source="a test")


def make(**options: Any) -> Cache:
    settings = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": DIM, "dtype": "float32", "sink_tokens": TILE, "num_threads": 1}
    return Cache(FORMAT, **(settings | options))


def random_kv(tokens: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    shape = (LAYERS, tokens, HEADS, DIM)
    return rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)


@pytest.mark.parametrize("dim", [64, 80])
def test_factors_are_those_of_gptq(dim: int) -> None:
    moments = random_moments(dim=dim)
    for moment, factor in zip((moments.k, moments.v), moments.factors, strict=True):
        assert factor.dtype == np.float32
        m = moment.astype(np.float64)
        m += 0.1 * np.trace(m, axis1=2, axis2=3)[..., None, None] / dim * np.eye(dim)
        lower = np.linalg.cholesky(np.linalg.inv(m))
        upper = lower.swapaxes(2, 3)
        expected = upper / np.diagonal(upper, axis1=2, axis2=3)[..., None]
        # Rounding to fp32, and the conditioning of M, at most a few hundred after damping, times float64's.
        np.testing.assert_allclose(factor, expected, rtol=1e-6, atol=1e-7)


def test_a_moment_of_nothing_feeds_nothing_back() -> None:
    zero = np.zeros((1, 1, DIM, DIM), np.float32)
    k, v = Moments(zero, zero).factors
    np.testing.assert_array_equal(k[0, 0], np.eye(DIM, dtype=np.float32))
    np.testing.assert_array_equal(v[0, 0], np.eye(DIM, dtype=np.float32))


def test_a_file_keeps_everything(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    moments = random_moments()
    moments.config, moments.weights = "c", "w"
    moments.save(tmp_path / "m.safetensors")
    read = Moments.load(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(read.k, moments.k)
    np.testing.assert_array_equal(read.v, moments.v)
    assert (read.config, read.weights, read.source, read.hash) == ("c", "w", "a test", moments.hash)
    assert random_moments(1).hash != moments.hash
    data = bytearray((tmp_path / "m.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "m.safetensors").write_bytes(bytes(data))
    with pytest.raises(kvarn.CorruptError, match=r"\[kvarn.Moments\] .*expected contents of hash"):
        Moments.load(tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").write_bytes(b"nothing")
    with pytest.raises(kvarn.CorruptError, match=r"\[kvarn.Moments\] .*does not open"):
        Moments.load(tmp_path / "m.safetensors")


def make_filled(cache: Cache, tokens: int = 4 * TILE + 5) -> kvarn.CacheSequence:
    sequence = cache.sequence()
    cache.append(sequence, *random_kv(tokens))
    return sequence


def test_what_is_no_moment_is_refused() -> None:
    good = random_moments().k
    for bad in (good.astype(np.float64), good[0], good[..., :8], np.full_like(good, np.nan)):
        with pytest.raises(ValueError, match=r"\[kvarn.Moments\] k: expected "):
            Moments(bad, bad)
    with pytest.raises(ValueError, match=r"\[kvarn.Moments\] v: expected "):
        Moments(good, good[:1])


def test_moments_of_another_model_are_refused() -> None:
    for options in ({"layers": 3}, {"heads": 1}, {"dim": 80}):
        with pytest.raises(ValueError, match=r"\[kvarn.Moments\] moments: expected those of a model with .* \(2, 2, 64\), got"):
            make(moments=random_moments(**options))


@pytest.mark.parametrize("direct", [True, False])
def test_a_cache_rounds_every_layer_with_its_own_factors(direct: bool) -> None:
    moments = random_moments()
    cache = make(moments=moments)
    sequence = cache.sequence()
    k, v = random_kv(4 * TILE + 5)
    if direct:  # a prompt, encoded layer by layer as it is written
        cache.append(sequence, k, v)
    else:  # token by token, encoded in all layers by the commit
        for t in range(k.shape[1]):
            cache.append(sequence, k[:, t : t + 1], v[:, t : t + 1])
    plan = kvarn.Plan(FORMAT, head_dim=DIM, num_kv_heads=HEADS, dtype="float32", num_threads=1)
    zero = np.zeros(1, np.int32)
    for layer in range(LAYERS):
        for index, entry in enumerate(sequence.table()):
            if entry < 0:
                continue
            tile = slice(index * TILE, (index + 1) * TILE)
            staging = np.zeros((1, 2, HEADS, TILE, DIM), np.float32)
            record = np.zeros((1, HEADS, plan.record_bytes), np.uint8)
            ops.append(plan, k[layer, tile], v[layer, tile], np.arange(TILE), staging)
            ops.encode(plan, staging, record, zero, zero, k_feedback=moments.factors[0][layer], v_feedback=moments.factors[1][layer])
            np.testing.assert_array_equal(cache.records[layer, entry], record[0])
            ops.encode(plan, staging, record, zero, zero)
            assert (cache.records[layer, entry] != record[0]).any()


def test_weighted_errors_fall() -> None:
    """The K error of a query drawn from the moment, with and without: the moment's directions are an eighth of the channels, and most of
    its weight; what is left of their error after feedback at 2 bits is less than half."""
    moments = random_moments()
    k, _ = random_kv(4 * TILE + 5)
    plan = kvarn.Plan(FORMAT, head_dim=DIM, num_kv_heads=HEADS, dtype="float32", num_threads=1)
    errors = []
    for given in (None, moments):
        cache = make(moments=given)
        sequence = make_filled(cache)
        error = 0.0
        for layer in range(LAYERS):
            got, _ = cache.dequantise(sequence, layer)
            e = ops.hadamard(plan, np.ascontiguousarray(got - k[layer]))
            error += float(np.einsum("thd,hde,the->", e, moments.k[layer], e))
        errors.append(error)
    assert errors[1] < 0.5 * errors[0]


def test_saved_sequences_name_their_moments(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from kvarn._sequence_file import describe

    moments = random_moments()
    cache = make(moments=moments)
    path = tmp_path / "s.safetensors"
    cache.save(make_filled(cache), path)
    assert describe(path)["moments"] == moments.hash
    make(moments=moments).load(path)  # warnings are not expected
    for other, name in ((None, "none"), (random_moments(1), random_moments(1).hash)):
        cache = make(moments=other)
        with pytest.warns(UserWarning, match=rf"rounded with moments {moments.hash}, those of this cache are with {name}"):
            sequence = cache.load(path)
        assert len(sequence) == 4 * TILE + 5


def test_feedback_arguments(plan: kvarn.Plan) -> None:
    staging = np.ones((3, 4, 2, 2, TILE, DIM), np.float16)
    records = np.full((3, 4, 2, plan.record_bytes), 7, np.uint8)
    index = np.arange(2, dtype=np.int32)
    factors = np.zeros((3, 2, DIM, DIM), np.float32)
    ops.encode(plan, staging, records.copy(), index, index, k_feedback=factors)
    for bad in (factors[:2], factors[0], factors.astype(np.float64), factors.swapaxes(2, 3)[..., ::2, :]):
        for name in ("k_feedback", "v_feedback"):
            with pytest.raises((ValueError, TypeError), match=rf"\[kvarn.encode\] {name}: expected "):
                ops.encode(plan, staging, records, index, index, **{name: bad})
    with pytest.raises(ValueError, match=r"\[kvarn.encode\] k_feedback: expected float32 \[2, 64, 64\]"):
        ops.encode(plan, staging[0], records[0], index, index, k_feedback=factors)
    assert (records == 7).all()


def test_torch_operator() -> None:
    torch = pytest.importorskip("torch")
    from kvarn import torch_ops  # noqa: F401

    plan = kvarn.Plan(FORMAT, head_dim=DIM, num_kv_heads=HEADS, dtype="float32", num_threads=1)
    staging = np.random.default_rng(1).standard_normal((1, 2, HEADS, TILE, DIM), np.float32)
    zero = np.zeros(1, np.int32)
    k, v = (factor[0] for factor in random_moments().factors)
    expected = np.zeros((1, HEADS, plan.record_bytes), np.uint8)
    ops.encode(plan, staging, expected, zero, zero, k_feedback=k, v_feedback=v)
    got = torch.zeros((1, HEADS, plan.record_bytes), dtype=torch.uint8)
    of = torch.from_numpy
    torch.ops.kvarn.encode(plan.handle, of(staging), got, of(zero), of(zero), k_feedback=of(k), v_feedback=of(v))
    np.testing.assert_array_equal(got.numpy(), expected)


# ---- from a model ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def test_prepare_measures_queries_and_output_projections(model: Any) -> None:
    import torch
    from transformers.models.llama import modeling_llama

    ids = torch.randint(97, (50,), generator=torch.Generator().manual_seed(1))
    moments = kvarn.prepare(model, ids)
    assert moments.shape == (2, 2, 64)
    assert moments.source == "50 tokens of text"
    # The first layer by hand.
    layer = model.model.layers[0]
    with torch.inference_mode():
        x = layer.input_layernorm(model.model.embed_tokens(ids[None]))
        q = layer.self_attn.q_proj(x).view(1, 50, 4, 64).transpose(1, 2)
        cos, sin = model.model.rotary_emb(x, torch.arange(50)[None])
        q, _ = modeling_llama.apply_rotary_pos_emb(q, q, cos, sin)
        k = q[0].reshape(2, 100, 64).double()
        expected_k = k.transpose(1, 2) @ k / 100
        w = layer.self_attn.o_proj.weight.view(128, 2, 2, 64).double()
        expected_v = torch.einsum("ikgd,ikge->kde", w, w)
    plan = kvarn.Plan("k4v2_g128", head_dim=64, num_kv_heads=1, dtype="float32", num_threads=1)
    h = ops.hadamard(plan, np.eye(64, dtype=np.float32)).astype(np.float64)
    for got, expected in ((moments.k[0], expected_k), (moments.v[0], expected_v)):
        rotated = h.T @ expected.numpy() @ h
        # fp32 products over 50 tokens.
        np.testing.assert_allclose(got, rotated, rtol=0, atol=1e-5 * np.abs(rotated).max())


def test_prepare_spreads_its_windows_over_the_context(model: Any) -> None:
    seen = []
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
    done = []
    kvarn.prepare(model, num_tokens=2100, progress=lambda i, n: done.append((i, n)))
    handle.remove()
    assert [int(position[0, 0]) for position in seen] == [0, 4096 - 52]
    assert done == [(1, 2), (2, 2)]
    assert model.config._attn_implementation == "sdpa"


def test_prepare_is_reproducible_and_knows_its_model(model: Any) -> None:
    import torch
    import transformers

    from kvarn.integrations.moments import check_weights
    from kvarn.integrations.transformers import KvarnCache

    moments = kvarn.prepare(model, num_tokens=64, seed=3)
    assert moments.hash == kvarn.prepare(model, num_tokens=64, seed=3).hash
    assert moments.hash != kvarn.prepare(model, num_tokens=64, seed=4).hash
    assert "64 random tokens of seed 3" in repr(moments)

    torch.manual_seed(1)
    twin = transformers.LlamaForCausalLM(model.config).eval()
    KvarnCache(twin.config, moments=moments)  # a configuration does not tell the two apart
    check_weights(moments, model)
    with pytest.raises(ValueError, match=r"\[kvarn.Moments\] moments: expected those of a model whose weights"):
        KvarnCache(twin, moments=moments)
    config = transformers.LlamaConfig(**(model.config.to_dict() | {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}))
    with pytest.raises(ValueError, match=r"\[kvarn.Moments\] moments: expected those of a model with the configuration"):
        KvarnCache(config, moments=moments)

    cache = KvarnCache(model, FORMAT, moments=moments, sink_tokens=TILE, num_threads=1)
    ids = torch.randint(97, (1, 4 * TILE), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache)
    assert cache.store.moments is moments


def test_prepare_refuses_what_it_cannot_read(model: Any) -> None:
    with pytest.raises(ValueError, match=r"\[kvarn.prepare\] text: expected at least one token, each from 0 to 96"):
        kvarn.prepare(model, [1, 97])
    with pytest.raises(ValueError, match=r"\[kvarn.prepare\] tokenizer: expected the model's tokenizer"):
        kvarn.prepare(model, "words")
    with pytest.raises(ValueError, match=r"\[kvarn.prepare\] num_tokens: expected at least 1"):
        kvarn.prepare(model, num_tokens=0)


def test_the_command(tmp_path: Path) -> None:
    for package in ("torch", "transformers", "typer", "rich"):
        pytest.importorskip(package)
    if not MODEL.is_dir():
        pytest.skip("no model in this checkout")
    (tmp_path / "text").write_text("one two three " * 20)
    out = tmp_path / "moments.safetensors"
    arguments = ["prepare", str(MODEL), "-o", str(out), "--text", str(tmp_path / "text"), "--tokens", "256"]
    run = subprocess.run([sys.executable, "-m", "kvarn", *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    moments = Moments.load(out)
    assert moments.shape == (6, 2, 128)
    assert "256 tokens of text" in run.stdout
    assert moments.hash in run.stdout
