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
    return Moments(of[0][None], of[1], source="a test")


def make(**options: Any) -> Cache:
    settings = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": DIM, "dtype": "float32", "sink_tokens": TILE, "num_threads": 1}
    return Cache(FORMAT, **(settings | options))


def random_kv(tokens: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    shape = (LAYERS, tokens, HEADS, DIM)
    return rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)


@pytest.mark.parametrize(("dim", "k_bits", "damping"), [(64, 2, 0.1), (80, 3, 0.1), (80, 4, 0.03), (64, 8, 0.03)])
def test_factors_are_those_of_gptq_in_an_order_that_pays(dim: int, k_bits: int, damping: float) -> None:
    moments = random_moments(dim=dim)
    for moment, factor in ((moments.k[0], moments.k_factors(0, k_bits)), (moments.v, moments.v_factors(k_bits))):
        assert factor.dtype == np.float32
        m = moment.astype(np.float64)
        m += damping * np.trace(m, axis1=2, axis2=3)[..., None, None] / dim * np.eye(dim)
        order = np.diagonal(factor, axis1=2, axis2=3).astype(int)
        np.testing.assert_array_equal(np.sort(order), np.broadcast_to(np.arange(dim), order.shape))
        ordered = np.take_along_axis(np.take_along_axis(m, order[..., None], 2), order[..., None, :], 3)
        lower = np.linalg.cholesky(np.linalg.inv(ordered))
        upper = lower.swapaxes(2, 3)
        expected = np.triu(upper / np.diagonal(upper, axis1=2, axis2=3)[..., None], 1)
        # Rounding to fp32, and the conditioning of M, at most a thousand after damping, times float64's.
        np.testing.assert_allclose(np.triu(factor, 1), expected, rtol=1e-6, atol=1e-7)
        # What each step's error costs once the steps after it have made up for it. Each channel was the cheapest of those before it.
        for layer, head in np.ndindex(order.shape[:2]):
            left = ordered[layer, head].copy()
            for j in range(dim - 1, 0, -1):
                assert left[j, j] <= left.diagonal()[: j + 1].min() * (1 + 1e-9)
                left[:j, :j] -= np.outer(left[:j, j], left[j, :j]) / left[j, j]


def test_a_moment_of_nothing_feeds_nothing_back() -> None:
    zero = np.zeros((1, 1, DIM, DIM), np.float32)
    moments = Moments(zero[None], zero)
    for factors in (moments.k_factors(0, 4), moments.v_factors(4)):
        np.testing.assert_array_equal(factors[0, 0], np.diag(np.arange(DIM, dtype=np.float32)))  # channels as they lie


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
            Moments(bad, bad[0])
    with pytest.raises(ValueError, match=r"\[kvarn.Moments\] v: expected "):
        Moments(good, good)


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
    k_factors, v_factors = moments.k_factors(0, 2), moments.v_factors(2)
    for layer in range(LAYERS):
        for index, entry in enumerate(sequence.table()):
            if entry < 0:
                continue
            tile = slice(index * TILE, (index + 1) * TILE)
            staging = np.zeros((1, 2, HEADS, TILE, DIM), np.float32)
            record = np.zeros((1, HEADS, plan.record_bytes), np.uint8)
            ops.append(plan, k[layer, tile], v[layer, tile], np.arange(TILE), staging)
            ops.encode(plan, staging, record, zero, zero, k_feedback=k_factors[layer], v_feedback=v_factors[layer])
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
            error += float(np.einsum("thd,hde,the->", e, moments.k[0, layer], e))
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
    factors = np.broadcast_to(np.diag(np.arange(DIM, dtype=np.float32)), (3, 2, DIM, DIM)).copy()
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
    k, v = random_moments().k_factors(0, 2)[0], random_moments().v_factors(2)[0]
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


def test_prepare_measures_gradients(model: Any) -> None:
    """The last layer's V by hand: its moment is the mean of the squared gradients for tokens drawn from the model's predictions."""
    import torch
    from torch.nn import functional

    ids = torch.randint(97, (50,), generator=torch.Generator().manual_seed(1))
    moments = kvarn.prepare(model, ids, seed=5)
    assert moments.shape == (2, 2, 64)
    assert moments.source == "50 tokens of text"
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad for parameter in model.parameters())
    kept = []
    projection = model.model.layers[1].self_attn.v_proj
    hook = projection.register_forward_hook(lambda module, args, output: kept.append(output) or output.retain_grad())
    logits = model(input_ids=ids[None]).logits[0]
    hook.remove()
    chance = torch.rand(50, 1, generator=torch.Generator().manual_seed(5))
    drawn = (logits.detach().softmax(-1).cumsum(-1) <= chance).sum(-1)
    functional.cross_entropy(logits, drawn, reduction="sum").backward()
    model.zero_grad()
    g = kept[0].grad[0].double().view(50, 2, 64).transpose(0, 1)
    expected = (g.transpose(1, 2) @ g / 50).numpy()
    plan = kvarn.Plan("k4v2_g128", head_dim=64, num_kv_heads=1, dtype="float32", num_threads=1)
    h = ops.hadamard(plan, np.eye(64, dtype=np.float32)).astype(np.float64)
    rotated = h.T @ expected @ h
    # Gradients in fp32, through two layers.
    np.testing.assert_allclose(moments.v[1], rotated, rtol=0, atol=1e-4 * np.abs(rotated).max())


def test_moments_of_k_turn_with_the_positions(model: Any) -> None:
    """Each bucket's M_K is the mean of R M R^T over its positions, R being transformers' own encoding."""
    import torch
    from transformers.models.llama import modeling_llama

    from kvarn.integrations.moments import bucket_moments
    from kvarn.integrations.sensitivity import measure

    ids = torch.randint(97, (80,), generator=torch.Generator().manual_seed(1))
    found = measure(model, [ids])
    assert found.turns is not None
    made = bucket_moments(found, 2000)
    assert len(made) == 3
    positions = torch.arange(1024, 2048)
    cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.float64), positions[None])
    rows = torch.linalg.cholesky(found.k[1, 0] + 1e-12 * torch.eye(64)).T  # M = rows^T rows
    turned = [
        modeling_llama.apply_rotary_pos_emb(row.expand(1, 1, 1024, 64), row.expand(1, 1, 1024, 64), cos, sin)[0][0, 0] for row in rows
    ]
    expected = sum(x.T @ x for x in turned) / 1024
    # cos and sin are fp32's, at angles up to 2048 radians.
    np.testing.assert_allclose(made[1, 1, 0], expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    assert np.abs(made[0, 1, 0] - made[1, 1, 0]).max() > 0.01 * np.abs(made[0, 1, 0]).max()


def test_layers_run_again_on_the_way_back(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moments are those of layers that keep everything, and layers are afterwards as they were, wrapped ones too."""
    import contextlib

    import torch

    from kvarn.integrations import sensitivity

    ids = torch.randint(97, (80,), generator=torch.Generator().manual_seed(1))
    first, second = model.model.layers
    calls: list[int] = []
    wrapped = lambda *args, **kwargs: calls.append(1) or type(second).forward(second, *args, **kwargs)  # noqa: E731
    second.forward = wrapped
    found = sensitivity.measure(model, [ids])
    assert len(calls) == 4  # two passes that look for the encoding, one forward, one on the way back
    assert second.__dict__.pop("forward") is wrapped
    assert "forward" not in first.__dict__
    monkeypatch.setattr(sensitivity, "_recomputing", lambda model: contextlib.nullcontext())
    kept = sensitivity.measure(model, [ids])
    torch.testing.assert_close(found.k, kept.k, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.v, kept.v, rtol=1e-6, atol=0)


def test_other_encodings_are_recognised_or_not() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from kvarn.integrations.sensitivity import find_turns

    sizes = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ids = torch.arange(64)
    torch.manual_seed(0)
    neighbours = transformers.CohereForCausalLM(transformers.CohereConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()
    turns = find_turns(neighbours, ids)
    assert turns is not None
    np.testing.assert_array_equal(turns.pairs[:2], [[0, 1], [2, 3]])
    part = transformers.PhiForCausalLM(transformers.PhiConfig(**sizes, partial_rotary_factor=0.5)).eval()
    turns = find_turns(part, ids)
    assert turns is not None
    np.testing.assert_array_equal(turns.pairs[:2], [[0, 8], [1, 9]])
    learned = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=97, n_embd=128, n_layer=2, n_head=2, n_positions=96)).eval()
    assert find_turns(learned, ids) is None
    moments = kvarn.prepare(learned, num_tokens=200)  # in windows of its 96 positions
    assert moments.k.shape == (1, 2, 2, 64, 64)


def test_a_cache_takes_each_tiles_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets of two tiles: the same records whether a prompt is read at once, token by token, or in two long runs that share a tile."""
    import kvarn._moments as module

    monkeypatch.setattr(module, "BUCKET_TOKENS", 2 * TILE)
    several = [random_moments(seed) for seed in range(3)]
    moments = Moments(np.concatenate([m.k for m in several]), several[0].v)
    k, v = random_kv(8 * TILE)
    whole, single, halves = make(moments=moments), make(moments=moments), make(moments=moments)
    ones = [make(moments=m) for m in several]
    tables = []
    for cache in (whole, *ones):
        sequence = cache.sequence()
        cache.append(sequence, k, v)
        tables.append((cache, sequence.table()))
    slow = single.sequence()
    for t in range(k.shape[1]):
        single.append(slow, k[:, t : t + 1], v[:, t : t + 1])
    parted, cut = halves.sequence(), 4 * TILE + TILE // 2
    halves.append(parted, k[:, :cut], v[:, :cut])
    halves.append(parted, k[:, cut:], v[:, cut:])
    for index in range(1, 8):
        got = whole.records[:, tables[0][1][index]]
        bucket = min(index // 2, 2)
        of, table = tables[1 + bucket]
        half = whole.record_bytes  # V's moments are those of the first
        k_bytes = slice(0, TILE * DIM * 2 // 8)
        np.testing.assert_array_equal(got[..., k_bytes], of.records[:, table[index]][..., k_bytes])
        other, table = tables[1 + (bucket + 1) % 3]
        assert (got[..., k_bytes] != other.records[:, table[index]][..., k_bytes]).any()
        np.testing.assert_array_equal(got, single.records[:, slow.table()[index]])
        np.testing.assert_array_equal(got, halves.records[:, parted.table()[index]])
        assert got.shape[-1] == half


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
