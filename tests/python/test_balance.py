"""Balancing: models compute what they did, in a frame in which rounding costs least; what cannot be balanced is left as it was."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import kvarn  # noqa: E402
from kvarn._balance import Balance  # noqa: E402
from kvarn.eval.twins import key_outliers, value_outliers  # noqa: E402
from kvarn.integrations import sensitivity  # noqa: E402
from kvarn.integrations.frames import k_scales, v_frames  # noqa: E402
from kvarn.integrations.sensitivity import observing, read  # noqa: E402
from kvarn.integrations.transformers import KvarnCache  # noqa: E402

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-reason"
SIZES = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
HALF = SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1}  # where head_dim is hidden_size / heads
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS = {
    "Llama": SIZES,
    "Mistral": SIZES,
    "Qwen2": HALF,  # biases
    "Qwen3": SIZES,  # norms of K and q that all heads share
    "Gemma3": SIZES,  # norms that read [batch, heads, tokens, D] and multiply by 1 + weight
    "Olmo2": HALF,  # norms over all heads
    "Phi3": HALF | ENDS,  # one projection for q, K and V
    "Cohere": HALF | ENDS,  # neighbouring channels turn together
}


def make(kind: str, seed: int = 0) -> Any:
    """A random model whose norms and biases are not the ones and zeros that they begin as."""
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")(**KINDS[kind])
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.3 * torch.rand_like(parameter)
    return model


def tokens(count: int, seed: int = 1) -> Any:
    return torch.randint(97, (1, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any) -> Any:
    return model(tokens(50)).logits


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_balanced_model_computes_the_same(kind: str, per_head: bool) -> None:
    model = make(kind)
    moments = kvarn.prepare(model, num_tokens=400)
    before = logits(model)
    made = kvarn.balance(model, moments, per_head=per_head)
    # fp32 weights rounded anew.
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-5 * float(before.abs().max()))
    # The moments are those that the changed model has.
    again = kvarn.prepare(model, num_tokens=400)
    for mine, measured in ((made.k, again.k), (made.v, again.v)):
        np.testing.assert_allclose(mine, measured, rtol=0, atol=1e-5 * np.abs(measured).max())
    assert made.weights == again.weights != moments.weights
    assert "balanced" in repr(made)
    # A balanced model wants no more of it.
    assert again.balance is not None
    if per_head:
        np.testing.assert_allclose(again.balance.k_scale, 1, atol=5e-3)  # ten iterations
    assert moments.balance is not None
    if kind != "Gemma3":  # whose layers have encodings of two kinds, which is not recognised: K stays as it is
        assert moments.balance.k_scale.max() > 1.05


@pytest.mark.parametrize("kind", list(KINDS))
def test_any_scale_and_frame_keep_the_function(kind: str) -> None:
    """Also a frame that is not symmetric, and scales of an encoding that is not recognised."""
    model = make(kind)
    heads, rng = KINDS[kind]["num_key_value_heads"], np.random.default_rng(4)
    scale = np.exp(0.5 * rng.standard_normal((2, heads, 32)))
    scale = np.repeat(scale, 2, -1) if kind == "Cohere" else np.tile(scale, 2)
    frame = np.eye(64) + 0.05 * rng.standard_normal((2, heads, 64, 64))
    zero = np.zeros((2, heads, 64, 64), np.float32)
    before = logits(model)
    kvarn.balance(model, kvarn.Moments(zero[None], zero, balance=Balance(scale.astype(np.float32), frame.astype(np.float32))))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-5 * float(before.abs().max()))


def test_spreads_leave_out_first_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """K varies about its means over 128 tokens; of the windows' first ones, short windows among them, nothing is taken."""
    spread = sensitivity._spread
    k, v = torch.randn(2, 2, 300, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    squares, products = spread(k, v)
    expected = sum(part.shape[1] * part.var(1, correction=0) for part in (k[:, :128], k[:, 128:256], k[:, 256:]))
    torch.testing.assert_close(squares, expected)
    torch.testing.assert_close(products, v.mT @ v)

    lengths: list[int] = []
    monkeypatch.setattr(sensitivity, "_spread", lambda k, v: lengths.append(k.shape[1]) or spread(k, v))
    model = make("Llama")
    sensitivity.measure(model, [tokens(400)[0], tokens(100)[0]])
    sensitivity.measure(model, [tokens(100)[0]])
    assert lengths[::2] == [272, 0, 100]  # of each of the two layers


def cost(covariance: Any, moment: Any) -> float:
    """What frames are chosen by, the mean over heads of its logarithm."""
    dim = covariance.shape[-1]
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    damped = moment + 0.03 * mean[..., None, None] * torch.eye(dim, dtype=torch.float64)
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    return float((trace.log() + torch.linalg.slogdet(damped)[1] / dim).mean())


def matrices(seed: int, dim: int = 16, decades: float = 1.0) -> tuple[Any, Any]:
    """A covariance and a moment [3, dim, dim] with eigenvalues over some decades."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(2):
        turn = np.linalg.qr(rng.standard_normal((3, dim, dim)))[0]
        out.append(torch.from_numpy(turn * 10 ** rng.uniform(-decades, 0, (3, 1, dim)) @ turn.swapaxes(1, 2)))
    return out[0], out[1]


@pytest.mark.parametrize("seed", range(4))
def test_frames_cost_least(seed: int) -> None:
    """No small change of the frame of V, or of the scales of K, costs less."""
    c, m = matrices(seed)
    frame = v_frames(c, m)
    torch.testing.assert_close(frame, frame.mT)

    def of_v(a: Any) -> float:
        back = torch.linalg.inv(a)
        return cost(a.mT @ c @ a, back @ m @ back.mT)

    least = of_v(frame)
    assert least < cost(c, m)
    generator = torch.Generator().manual_seed(seed)
    for size in (0.01, 0.1):
        for _ in range(20):
            change = torch.eye(16, dtype=torch.float64) + size * torch.randn(3, 16, 16, dtype=torch.float64, generator=generator)
            assert of_v(frame @ change) > least - 1e-4  # the floor under directions

    pairs = torch.arange(16).view(8, 2)
    scale = k_scales(c.diagonal(dim1=-2, dim2=-1), m, pairs)

    def of_k(s: Any) -> float:
        return cost(c / s[..., :, None] / s[..., None, :], m * s[..., :, None] * s[..., None, :])

    least = of_k(scale)
    assert least < cost(c, m)
    torch.testing.assert_close(scale[:, ::2], scale[:, 1::2], rtol=0, atol=0)
    for size in (0.01, 0.1):
        for _ in range(20):
            change = (size * torch.randn(3, 8, dtype=torch.float64, generator=generator)).exp().repeat_interleave(2, 1)
            assert of_k(scale * change) > least - 1e-4


def test_frames_of_nothing_and_of_loud_channels() -> None:
    zero = torch.zeros(1, 8, 8, dtype=torch.float64)
    eye = torch.eye(8, dtype=torch.float64)
    pairs = torch.arange(8).view(4, 2)
    for c, m in ((zero, zero), (zero, eye[None]), (eye[None], zero)):
        torch.testing.assert_close(v_frames(c, m)[0], eye)
        torch.testing.assert_close(k_scales(c.diagonal(dim1=-2, dim2=-1), m, pairs), torch.ones(1, 8, dtype=torch.float64))
    # Channels that are 8 times as loud where readers are 8 times as quiet cost nothing more.
    c, m = matrices(5)
    loud = torch.ones(16, dtype=torch.float64)
    loud[4:8] = 8.0
    cost_of = []
    for size in (torch.ones_like(loud), loud):
        cc, mm = c * size[:, None] * size, m / size[:, None] / size
        scale = k_scales(cc.diagonal(dim1=-2, dim2=-1), mm, torch.arange(16).view(8, 2))
        frame = v_frames(cc, mm)
        back = torch.linalg.inv(frame)
        of_k = cost(cc / scale[..., :, None] / scale[..., None, :], mm * scale[..., :, None] * scale[..., None, :])
        cost_of.append((of_k, cost(frame.mT @ cc @ frame, back @ mm @ back.mT)))
    np.testing.assert_allclose(cost_of[1], cost_of[0], atol=0.01)


def test_twins_are_balanced_alike() -> None:
    """K of a model and of its twin with outliers are the same, but for its size, once both are balanced."""
    model = make("Llama")
    ids = tokens(300)[0]
    twins = [model, key_outliers(model), value_outliers(model, size=1 / 16)]
    of_k, trace_of_v = [], []
    for twin in twins:
        kvarn.balance(twin, kvarn.prepare(twin, ids))
        kept: dict[int, tuple[Any, Any]] = {}
        with observing(twin), torch.no_grad():
            read(twin, ids, 0, lambda layer, k, v, kept=kept: kept.__setitem__(layer, (k, v)), 1)
        k = torch.stack([kept[layer][0] for layer in range(2)])
        of_k.append(k / k.square().mean((3, 4), keepdim=True).sqrt())  # its size is free
        spread = torch.stack([kept[layer][1] for layer in range(2)]).double().var((2, 3))
        trace_of_v.append(spread.amax(-1) / spread.mean(-1))
    torch.testing.assert_close(of_k[1], of_k[0], rtol=0.02, atol=0.02 * float(of_k[0].abs().max()))
    # Of V the frame is the same but for a rotation: no channel is much louder than the mean, as 64 times was.
    assert float(trace_of_v[2].max()) < 1.5 * float(trace_of_v[0].max())


def test_a_cache_of_a_balanced_model() -> None:
    """Divergence at k2v2 with feedback falls; and the moments of the one model are refused for the other."""
    if not MODEL.is_dir():
        pytest.skip("no model in this checkout")
    from kvarn.demo.tasks import problem

    problems = [problem("chase", index, "easy") for index in range(12)]
    text = "".join(one.prompt + one.response for one in problems)
    ids = torch.tensor([list(text.encode()[:1536])])
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    moments = kvarn.prepare(model, ids[0])
    twin = key_outliers(model)
    of_twin = kvarn.prepare(twin, ids[0])
    with torch.no_grad():
        expected = model(ids).logits.log_softmax(-1)

    def divergence(reader: Any, given: kvarn.Moments) -> float:
        cache = KvarnCache(reader, "k2v2_g128", moments=given)
        with torch.no_grad():
            got = [reader(input_ids=part, past_key_values=cache).logits.log_softmax(-1) for part in ids.split(128, 1)]
        return float(torch.nn.functional.kl_div(torch.cat(got, 1), expected, reduction="none", log_target=True).sum(-1).mean())

    before, of_outliers = divergence(model, moments), divergence(twin, of_twin)
    plain = copy.deepcopy(model)
    made = kvarn.balance(model, moments)
    made_of_twin = kvarn.balance(twin, of_twin)
    after = divergence(model, made)
    assert after < 0.95 * before
    assert divergence(twin, made_of_twin) < 1.15 * after < of_outliers
    with pytest.raises(ValueError, match=r"\[kvarn.Moments\] moments: expected those of a model whose weights"):
        KvarnCache(model, moments=moments)
    with pytest.raises(ValueError, match=r"\[kvarn.Moments\] moments: expected those of a model whose weights"):
        KvarnCache(plain, moments=made)


def test_refusals_leave_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = make("Qwen3"), make("Qwen3", seed=1)
    moments = kvarn.prepare(model, num_tokens=200)
    parameters = dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def unchanged() -> None:
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert all(torch.equal(parameter, values[name]) for name, parameter in model.named_parameters())

    with pytest.raises(ValueError, match=r"\[kvarn.Moments\] moments: expected those of a model whose weights"):
        kvarn.balance(other, moments)
    with pytest.raises(ValueError, match=r"\[kvarn.balance\] moments: expected those that kvarn.prepare returns"):
        kvarn.balance(model, kvarn.Moments(moments.k, moments.v))
    learned = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=97, n_embd=128, n_layer=2, n_head=2)).eval()
    with pytest.raises(kvarn.UnsupportedError, match=r"\[kvarn.balance\] model: expected 2 attention layers with an o_proj"):
        kvarn.balance(learned, kvarn.prepare(learned, num_tokens=200))

    # A norm that takes no weights for each head, and one that does something else with them.
    norm = type(model.model.layers[0].self_attn.k_norm)
    plain = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: torch.nn.functional.rms_norm(x, (x.shape[-1],), self.weight, 1e-6))
    with pytest.raises(kvarn.UnsupportedError, match=r"\[kvarn.balance\] model: expected one that runs balanced \(per_head=True\)"):
        kvarn.balance(model, moments)
    unchanged()
    monkeypatch.setattr(norm, "forward", lambda self, x: plain(self, x) * (1 + self.weight))
    with pytest.raises(
        kvarn.UnsupportedError, match=r"\[kvarn.balance\] layer 0: expected the K of before, balanced, within 0.0001, got one"
    ):
        kvarn.balance(model, kvarn.prepare(model, num_tokens=200))
    unchanged()
    monkeypatch.setattr(norm, "forward", plain)

    # The last layer is the one that does not fit; moments that name no weights, because these are other ones.
    last = model.model.layers[1].self_attn
    last.v_proj = torch.nn.utils.parametrizations.weight_norm(last.v_proj)
    anonymous = kvarn.Moments(moments.k, moments.v, balance=moments.balance)
    with pytest.raises(kvarn.UnsupportedError, match=r"\[kvarn.balance\] projection: expected a linear layer of 128 rows of floats"):
        kvarn.balance(model, anonymous)
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters() if "layers.0" in name)


def test_what_are_no_moments_of_the_model_is_refused() -> None:
    model = make("Llama")
    for bad in (None, "moments.safetensors"):
        with pytest.raises(TypeError, match=r"\[kvarn.balance\] moments: expected kvarn.Moments, got"):
            kvarn.balance(model, bad)
    moments = kvarn.prepare(model, num_tokens=200)
    assert moments.balance is not None
    flat = Balance(moments.balance.k_scale, np.zeros_like(moments.balance.v_frame))
    with pytest.raises(ValueError, match=r"\[kvarn.balance\] moments: expected frames of V that have an inverse"):
        kvarn.balance(model, kvarn.Moments(moments.k, moments.v, balance=flat))
    one = kvarn.Moments(moments.k[:, :1], moments.v[:1])
    with pytest.raises(ValueError, match=r"\[kvarn.Moments\] moments: expected those of a model with .* got \(1, 2, 64\)"):
        kvarn.balance(model, kvarn.Moments(one.k, one.v, balance=Balance(flat.k_scale[:1], flat.v_frame[:1])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("what", ["gate", "norm"])
def test_what_lies_between_attention_and_projection_is_found(what: str, dtype: Any) -> None:
    """Also where the residual stream is so large that no later layer and no prediction shows it."""
    model = make("Llama").to(dtype)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(60)

    def change(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        (x,) = inputs
        if what == "gate":
            return (x * torch.linspace(0.2, 0.8, x.shape[-1]).to(x),)
        return ((x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).to(x),)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(change)
    with pytest.raises(kvarn.UnsupportedError, match=r"\[kvarn.balance\] layer 0: expected the output of before"):
        kvarn.balance(model, kvarn.prepare(model, num_tokens=300))


@pytest.mark.parametrize("kind", ["Mixtral", "Llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deep_models_in_half_precision(kind: str, dtype: Any) -> None:
    """Rounding that lets later layers choose other experts is no reason to refuse."""
    more = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "Mixtral" else {}
    config = getattr(transformers, f"{kind}Config")(**SIZES | {"num_hidden_layers": 12}, **more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().to(dtype)
    made = kvarn.balance(model, kvarn.prepare(model, num_tokens=256))
    assert made.source.endswith(", balanced")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_biases_of_k_are_kept_exactly(dtype: Any) -> None:
    """Scales are powers of two there: K comes out bit for bit, but for its power."""
    model = make("Qwen2").to(dtype)
    for layer in model.model.layers:
        with torch.no_grad():
            layer.self_attn.k_proj.bias[:8] += 100 * torch.randn(8, generator=torch.Generator().manual_seed(3))
    before = [layer.self_attn.k_proj.bias.clone() for layer in model.model.layers]
    kvarn.balance(model, kvarn.prepare(model, num_tokens=300))
    for layer, bias in zip(model.model.layers, before, strict=True):
        power = (bias / layer.self_attn.k_proj.bias).float().log2()
        torch.testing.assert_close(power, power.round(), rtol=0, atol=0)
        assert power.abs().max() >= 1


def test_a_failure_midway_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("Llama")
    moments = kvarn.prepare(model, num_tokens=200)
    parameters = dict(model.named_parameters())
    made: list[int] = []
    parameter_of = torch.nn.Parameter

    def fail_at_sixth(*arguments: Any, **options: Any) -> Any:
        made.append(1)
        if len(made) == 6:
            raise MemoryError
        return parameter_of(*arguments, **options)

    monkeypatch.setattr(torch.nn, "Parameter", fail_at_sixth)
    with pytest.raises(MemoryError):
        kvarn.balance(model, moments)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_norms_that_have_weights_for_each_head_already() -> None:
    model = make("Qwen3")
    kvarn.balance(model, kvarn.prepare(model, num_tokens=200))
    before = logits(model)
    kvarn.balance(model, kvarn.prepare(model, num_tokens=300))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-5 * float(before.abs().max()))


def test_half_precision() -> None:
    model = make("Qwen3").to(torch.bfloat16)
    moments = kvarn.prepare(model, num_tokens=400)
    before = logits(model).float()
    kvarn.balance(model, moments)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert float((logits(model).float() - before).norm() / before.norm()) < 0.02


def test_what_is_no_balance_is_refused() -> None:
    scale, frame = np.ones((2, 2, 64), np.float32), np.broadcast_to(np.eye(64, dtype=np.float32), (2, 2, 64, 64)).copy()
    Balance(scale, frame)
    for bad in (-scale, scale * np.float32("nan"), scale.astype(np.float64), scale[..., :32]):
        with pytest.raises(ValueError, match=r"\[kvarn.Balance\] (k_scale|v_frame): expected"):
            Balance(bad, frame)
    k = np.zeros((1, 2, 2, 64, 64), np.float32)
    with pytest.raises(ValueError, match=r"\[kvarn.Moments\] balance: expected one of \[2, 2, 64, 64\], got \[1, 2, 64, 64\]"):
        kvarn.Moments(k, k[0], balance=Balance(scale[:1], frame[:1]))


def test_moments_keep_their_balance(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    moments = kvarn.prepare(make("Llama"), num_tokens=200)
    moments.save(tmp_path / "m.safetensors")
    read = kvarn.Moments.load(tmp_path / "m.safetensors")
    assert moments.balance is not None
    assert read.balance is not None
    np.testing.assert_array_equal(read.balance.k_scale, moments.balance.k_scale)
    np.testing.assert_array_equal(read.balance.v_frame, moments.balance.v_frame)
    assert read.hash == moments.hash != kvarn.Moments(moments.k, moments.v).hash
    from safetensors.numpy import save_file

    metadata = {"kvarn_moments": "3", "config": "", "weights": "", "source": "", "hash": moments.hash}
    save_file({"k": moments.k, "v": moments.v, "k_scale": moments.balance.k_scale}, tmp_path / "half.safetensors", metadata=metadata)
    with pytest.raises(kvarn.CorruptError, match=r"\[kvarn.Moments\] .*expected tensors k, v and perhaps k_scale, v_frame, got"):
        kvarn.Moments.load(tmp_path / "half.safetensors")


def test_the_command(tmp_path: Path) -> None:
    for package in ("typer", "rich"):
        pytest.importorskip(package)
    if not MODEL.is_dir():
        pytest.skip("no model in this checkout")
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    kvarn.prepare(model, torch.arange(256).repeat(2)).save(tmp_path / "moments.safetensors")
    out = tmp_path / "balanced"
    arguments = ["balance", str(MODEL), str(out), "--moments", str(tmp_path / "moments.safetensors")]
    run = subprocess.run([sys.executable, "-m", "kvarn", *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    balanced = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    KvarnCache(balanced, moments=kvarn.Moments.load(out / "moments.safetensors"))
    ids = torch.arange(200)[None]
    with torch.no_grad():
        a, b = (m(ids).logits.float().log_softmax(-1) for m in (model, balanced))
    assert float(torch.nn.functional.kl_div(b, a, reduction="none", log_target=True).sum(-1).mean()) < 0.01
    again = subprocess.run([sys.executable, "-m", "kvarn", *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 1
    assert "[kvarn.balance] OUTPUT: expected a folder that does not exist yet" in again.stderr
