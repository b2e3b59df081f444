"""The measurements: twins, simulated caches, text, tasks, intervals, reports."""

from __future__ import annotations

import hashlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest

import kvarn

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvarn.demo.tasks import LEVELS, problem  # noqa: E402
from kvarn.eval import encoder, held_out, problems, quantisers, report, statistics, synthetic, tensors, text, twins  # noqa: E402
from kvarn.eval.attention import SimulatedCache, norm_errors  # noqa: E402
from kvarn.eval.campaign import PARTS, Campaign, Sizes  # noqa: E402
from kvarn.eval.generate import generate  # noqa: E402
from kvarn.eval.language_model import LanguageModel  # noqa: E402
from kvarn.eval.quantisers import parse  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(kind: str = "qwen3", **changes: object) -> object:
    """A random model of 2 layers, 4 query and 2 KV heads of 64 channels, vocabulary 260."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048, **changes}
    config = (transformers.Qwen3Config if kind == "qwen3" else transformers.LlamaConfig)(**sizes)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (2, 384), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("twin", list(twins.TWINS))
def test_twins_compute_the_same(kind: str, twin: str, ids: torch.Tensor) -> None:
    model = tiny(kind).double()
    other = twins.TWINS[twin].make(model)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        full, same = model(ids).logits, other(ids).logits
    # Powers of two commute with rounding; what remains is the epsilon of QK normalisation's sums, far below float64's 1e-12.
    torch.testing.assert_close(same, full, rtol=1e-9, atol=1e-9)


def test_twins_are_harder_to_quantise() -> None:
    """Not in function, but in K and V: without rotation a loud channel spoils its token's V."""
    ids = torch.randint(0, 256, (1, 512), generator=torch.Generator().manual_seed(5))
    plain = tiny()
    loud = twins.TWINS["v-outliers"].make(plain)
    errors = [
        tensors.mean_row(tensors.layer_errors(tensors.sample(LanguageModel(m), ids), parse("rtn-k8v2")))["output_error"]
        for m in (plain, loud)
    ]
    assert errors[1] > 2 * errors[0]


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("step_tokens", [1, 50, 128, 384])
def test_reading_in_steps_is_the_models_forward(kind: str, step_tokens: int, ids: torch.Tensor) -> None:
    model = tiny(kind)
    ids = ids[:, :200]
    with torch.no_grad():
        full = model(ids).logits.log_softmax(-1)
    run, reference = text.read(LanguageModel(model), ids, step_tokens=step_tokens)
    # Two orders of float32 sums over at most 200 terms of size 1.
    torch.testing.assert_close(reference.log_probabilities, full, rtol=0, atol=2e-4)
    nll = -full[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(run.nll, nll, rtol=0, atol=2e-4)
    assert run.bits_per_byte == pytest.approx(float(nll.mean()) / math.log(2), abs=1e-3)


def test_sliding_windows_are_respected() -> None:
    model = tiny(sliding_window=48, use_sliding_window=True, max_window_layers=1)
    assert "sliding_attention" in model.config.layer_types
    ids = torch.randint(0, 256, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        full = model(ids).logits.log_softmax(-1)
    _, reference = text.read(LanguageModel(model), ids, step_tokens=64)
    torch.testing.assert_close(reference.log_probabilities, full, rtol=0, atol=2e-4)


def test_generate_is_greedy_decoding() -> None:
    model = tiny()
    prompt = torch.randint(0, 256, (2, 140), generator=torch.Generator().manual_seed(2))
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, eos_token_id=257, pad_token_id=257
    )[:, 140:].tolist()
    expected = [row[: row.index(257)] if 257 in row else row for row in expected]
    assert generate(LanguageModel(model), prompt.tolist(), 24, None) == expected


def test_sampling_repeats_with_its_seed() -> None:
    model = LanguageModel(tiny())
    prompt = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(2)).tolist()
    runs = [generate(model, prompt, 12, None, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_tiles_are_replaced_once_when_they_are_complete() -> None:
    calls: list[tuple[str, int, int]] = []

    class Counting(type(parse("fp16"))):  # type: ignore[misc]
        def keys(self, x: torch.Tensor, start: int) -> torch.Tensor:
            calls.append(("k", start, x.shape[3]))
            return x * 0

        def values(self, x: torch.Tensor, start: int) -> torch.Tensor:
            calls.append(("v", start, x.shape[3]))
            return x * 0

    quantiser = Counting(torch.float16)
    quantiser.tile_tokens, quantiser.sink_tokens, quantiser.recent_tokens = 32, 40, (0, 32)
    cache = SimulatedCache((1, 1, 1, 256, 8), torch.device("cpu"), torch.float32, quantiser)
    for count in (100, 20, 8, 1):
        cache.update(*torch.ones(2, 1, 1, count, 8), 0)
        cache.advance(count)
    # Sinks fill two tiles; V keeps one more tile of recent tokens.
    assert calls == [("k", 64, 32), ("k", 96, 32), ("v", 64, 32)]
    assert cache.k[0, 0, 0, :129, 0].tolist() == [1.0] * 64 + [0.0] * 64 + [1.0]
    assert cache.v[0, 0, 0, :129, 0].tolist() == [1.0] * 64 + [0.0] * 32 + [1.0] * 33


def test_split_of_the_error(rng: np.random.Generator) -> None:
    x, y = torch.from_numpy(rng.standard_normal((2, 1, 1, 2, 128, 16)))
    parts = norm_errors(x.float(), y.float())
    a, b = x[0, 0, 0].numpy(), y[0, 0, 0].numpy()
    na, nb = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    direction = 2 * na * nb * (1 - (a * b).sum(1) / (na * nb))
    assert float(parts["error"][0, 0, 0, 0]) == pytest.approx(((na - nb) ** 2 + direction).sum(), rel=1e-5)
    assert float(parts["norm_error"][0, 0, 0, 0]) == pytest.approx(((na - nb) ** 2).sum(), rel=1e-5)


def test_static_errors_are_the_quantisers_and_accumulated_ones_are_more(ids: torch.Tensor) -> None:
    model = LanguageModel(tiny())
    quantiser = parse("kvarn-k2v2_g32")
    _, reference = text.read(model, ids)
    static, _ = text.read(model, ids, quantiser, reference, accumulate=False, with_errors=True, step_tokens=64)
    own, _ = text.read(model, ids, quantiser, reference, with_errors=True, step_tokens=64)
    direct = quantiser.keys(reference.k[:, :, :, 128:], 128)
    expected = norm_errors(reference.k[:, :, :, 128:], direct)["error"]
    torch.testing.assert_close(static.errors["k"]["error"][:, :, 1:], expected, rtol=1e-4, atol=1e-6)
    # The first layer's K depends on no attention; the second's does.
    torch.testing.assert_close(own.errors["k"]["error"][0], static.errors["k"]["error"][0], rtol=1e-3, atol=1e-5)
    assert own.errors["k"]["error"][1].sum() != static.errors["k"]["error"][1].sum()
    assert static.errors["k"]["error"][:, :, 0].abs().max() < 1e-6  # sinks


def test_divergence_of_an_unquantised_cache_is_none(ids: torch.Tensor) -> None:
    model = LanguageModel(tiny())
    full, reference = text.read(model, ids)
    run, _ = text.read(model, ids, parse("k8v8_g128"), reference)
    row = text.summary(run, full)
    assert row["kl_mean"] < 1e-6
    assert row["top1_agreement"] > 0.99
    assert abs(row["added_bits_per_byte"]) < 1e-3


def test_logit_slope_sees_a_scale_and_attention_kl_sees_nothing_else(ids: torch.Tensor) -> None:
    class Shrinking(type(parse("fp16"))):  # type: ignore[misc]
        def keys(self, x: torch.Tensor, start: int) -> torch.Tensor:
            return 0.8 * x

        def values(self, x: torch.Tensor, start: int) -> torch.Tensor:
            return x

    found = tensors.sample(LanguageModel(tiny()), torch.cat([ids, ids[:, :128]], 1))
    row = tensors.mean_row(tensors.layer_errors(found, Shrinking(torch.float16)))
    assert row["logit_slope"] == pytest.approx(0.8, abs=1e-4)
    assert row["logit_noise"] < 1e-4
    assert row["k_norm_share"] == pytest.approx(1, abs=1e-4)
    assert row["k_norm_p50"] == pytest.approx(0.2, abs=1e-4)
    assert row["attention_kl"] > 0
    assert row["v_error"] == 0


def test_logit_bias_lowers_the_scores_of_noisy_tokens(ids: torch.Tensor) -> None:
    """With a bias the quantised tokens' weights are closer to the full ones' on average, and the unquantised ones are untouched."""
    model = LanguageModel(tiny())
    full, reference = text.read(model, ids)
    plain, _ = text.read(model, ids, parse("k2v2_g128"), reference)
    biased, _ = text.read(model, ids, parse("kvarn(logit_bias)-k2v2_g128"), reference)
    assert not torch.equal(plain.nll[:, 256:], biased.nll[:, 256:])
    torch.testing.assert_close(plain.nll[:, :255], biased.nll[:, :255], rtol=0, atol=1e-4)
    assert full.nll.shape == plain.nll.shape


def test_moments_are_their_definitions(ids: torch.Tensor) -> None:
    raw = tiny()
    model = LanguageModel(raw, calibration_tokens=ids)
    queries: list[torch.Tensor] = []
    for row, start in zip(ids, (0, 2048 - 384), strict=True):
        keep = lambda layer, q, k, v: queries.append(q) if layer == 1 else None  # noqa: E731
        model.step(row[None], model.cache(1, len(row)), observer=keep, start=start)
    q = torch.cat(queries).double()  # [B, Hq, T, D]
    pair = q[:, 2:4].permute(3, 0, 1, 2).flatten(1)
    torch.testing.assert_close(model.query_moment()[1, 1], pair @ pair.T / pair.shape[1], rtol=1e-6, atol=1e-9)
    w = raw.model.layers[0].self_attn.o_proj.weight.detach().double()
    first = w[:, :64].T @ w[:, :64] + w[:, 64:128].T @ w[:, 64:128]
    torch.testing.assert_close(model.output_moment()[0, 0], first, rtol=1e-9, atol=1e-12)


def test_gradients_of_the_calibration_are_the_losss(ids: torch.Tensor) -> None:
    """A step of K along its gradient changes the loss by the gradient's square."""
    model = LanguageModel(tiny(), calibration_tokens=ids[:, :64])
    found = model.calibration()
    assert found.k.shape == found.k_gradient.shape == (2, 2, 2, 64, 64)
    assert found.k_gradient.abs().max() > 0
    assert found.v_gradient.abs().max() > 0
    unrotated = model.unrotate(found.k, 0)
    torch.testing.assert_close(model.rotate(unrotated, 0), found.k, rtol=1e-4, atol=1e-4)
    # At position 0 the encoding does nothing.
    torch.testing.assert_close(unrotated[:, :, :, 0], found.k[:, :, :, 0])


def test_problems_are_the_published_ones() -> None:
    """The 1,000 problems of level "base" that docs/ACCURACY.md speaks of."""
    digest = hashlib.sha256()
    for task in LEVELS["base"]:
        for index in range(200):
            made = problem(task, index, "base")
            digest.update(f"{made.prompt}\0{made.response}\0".encode())
    assert digest.hexdigest() == "1de1c73415b2115121fce8916cd9ca6c98021a35fae5165d344c369c6399bc49"
    assert len(problem("retrieve", 0, "longest").prompt.splitlines()) == 602


def test_intervals() -> None:
    # Wilson's interval of 8 of 10, from his formula.
    assert statistics.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert statistics.wilson(0, 0) == (0.0, 1.0)
    full, other = [True] * 90 + [False] * 10, [True] * 80 + [False] * 20
    difference, low, high = statistics.paired(full, other)
    assert difference == pytest.approx(-0.1)
    assert low < -0.1 < high < 0
    assert statistics.paired(full, full)[1] < 0 < statistics.paired(full, full)[2]
    assert statistics.quantile(torch.arange(1, 1001), 0.999) == 999
    # Of 1, 2, 3: mean 2, standard deviation 1, Student's 4.303 at two degrees of freedom.
    assert statistics.mean_interval(torch.tensor([1.0, 2.0, 3.0])) == pytest.approx((2.0, 4.303 / 3**0.5), abs=1e-3)
    assert statistics.quantile(torch.arange(1, 1001), 1.0) == 1000


def test_held_out_text_is_the_packages() -> None:
    data, versions = held_out.collect(limit=200_000)
    assert 100_000 < len(data) <= 200_000
    assert set(versions) <= set(held_out.PACKAGES)
    assert b"import" in data
    assert held_out.collect(limit=200_000)[0] == data


def test_windows_begin_documents_as_the_model_does() -> None:
    model = LanguageModel(tiny())
    ids, count = text.windows(model, b"abc\0" + b"d" * 600, 256, 8)
    assert count == len(ids) == 2
    assert ids[0, :6].tolist() == [256, 97, 98, 99, 256, 100]
    with pytest.raises(ValueError, match="expected at least 4096 tokens"):
        text.windows(model, b"abc", 4096, 1)


def test_reports(tmp_path: Path) -> None:
    model = LanguageModel(tiny())
    from kvarn.eval.measure import Measurements

    measured = Measurements(model, bytes(range(32, 127)) * 12)
    rows = [{"kind": "environment", "device": "none"}]
    for name in ("fp16", "published-k2v2", "kvarn+kv-k2v2"):
        key = {"model": "random", "format": name, "length": 256}
        rows.append({"kind": "text", **key, **measured.text(name, 256, 2)})
        rows.append({"kind": "growth", **key, **measured.growth(name, 256, 2)})
        rows.append({"kind": "layers", **key, **measured.layers(name, 256, 2)})
    rows.append({"kind": "text", "format": "<broken>", "error": "ValueError: no"})
    json.dumps(rows)
    for name in ("report.md", "report.html"):
        report.write(report.sections(rows), tmp_path / name)
        content = (tmp_path / name).read_text()
        assert "published-k2v2" in content
        assert "ValueError: no" in content
    assert (tmp_path / "report-1.png").read_bytes().startswith(b"\x89PNG")
    assert "| `kvarn+kv-k2v2` | " in (tmp_path / "report.md").read_text()
    assert "data:image/png;base64," in (tmp_path / "report.html").read_text()


def test_solve_counts_what_is_right() -> None:
    run = problems.solve(LanguageModel(tiny()), "sort", "easy", 2, None)
    assert run.right == [False, False]
    assert run.traces == 0
    assert len(run.first_difference) == 2
    row = problems.summary([run], [run])
    assert (row["right"], row["count"]) == (0, 2)
    assert problems.runs_of({"wrong": {"sort": [0]}, "count_by_task": {"sort": 2}, "level": "easy"})[0].right == [False, True]


def test_the_command(tmp_path: Path) -> None:
    """Tables on the terminal and a report, of a random model that is on disk."""
    pytest.importorskip("rich")
    from rich.console import Console

    from kvarn.eval import show

    tiny().save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_bytes(b"".join(b"%d squared is %d\n" % (i, i * i) for i in range(300)))
    options = {
        "model": str(tmp_path / "model"),
        "formats": "fp16,engine-k4v2",
        "what": "text,growth,layers",
        "tasks": "sort",
        "level": "easy",
        "problems": 1,
        "temperature": 0.0,
        "seeds": 1,
        "text": tmp_path / "text",
        "length": 256,
        "windows": 1,
        "step_tokens": 128,
        "calibration": 256,
        "device": "cpu",
        "dtype": "auto",
        "threads": 1,
        "report_path": tmp_path / "report.html",
    }
    terminal = io.StringIO()
    rows = show.run(**options, console=Console(file=terminal, width=200))
    assert [row["kind"] for row in rows].count("text") == 2
    assert rows[-1]["paired"][0] == 0
    assert "engine-k4v2" in terminal.getvalue()
    assert "engine-k4v2" in (tmp_path / "report.html").read_text()
    for name, value in {"formats": "nothing", "what": "everything", "length": 200, "report_path": tmp_path / "report.pdf"}.items():
        with pytest.raises(ValueError, match="expected"):
            show.run(**{**options, name: value}, console=Console(file=io.StringIO()))


def test_normalisation_repairs_the_norms_of_loud_tokens() -> None:
    """What the paper's Figure 1 shows: without variance normalisation the tokens' norms have a tail of errors, with it hardly."""
    found = synthetic.sample(layers=1, tokens=512)
    rows = {
        name: tensors.layer_errors(found, parse(name))[0] for name in ("hadamard-k2v2", "published-k2v2", "kvarn(rounding=minmax)-k2v2")
    }
    plain, invariant = rows["hadamard-k2v2"], rows["kvarn(rounding=minmax)-k2v2"]
    assert invariant["k_norm_p99"] < 0.7 * plain["k_norm_p99"]
    assert invariant["k_error"] < 0.7 * plain["k_error"]
    # V is so small here that the published clamps leave it as it is.
    assert rows["published-k2v2"]["v_error"] > 0.9 * plain["v_error"]
    assert invariant["v_error"] < 0.95 * plain["v_error"]


def test_moments_are_the_engines(ids: torch.Tensor) -> None:
    """What `kvarn.prepare` makes of the same tokens, and the factors that the encoders read."""
    raw = tiny()
    moments = kvarn.prepare(raw, ids[0], context=2048)
    model = LanguageModel(raw, calibration_tokens=ids[:1])
    h = encoder.rotation(64, torch.device("cpu"))
    cases = [(True, bucket, moments.k[bucket], moments.k_factors(bucket, 4)) for bucket in range(2)]
    for is_key, bucket, theirs, factors in [*cases, (False, 0, moments.v, moments.v_factors(4))]:
        mine = quantisers.moment_at(model, is_key, h, bucket * 1024)
        # The same gradients in float32; the factor amplifies differences by the damped moment's condition, below 1,000.
        torch.testing.assert_close(mine.float(), torch.from_numpy(theirs), rtol=1e-3, atol=1e-5 * float(np.abs(theirs).max()))
        given = torch.from_numpy(factors)
        order = given.diagonal(dim1=-2, dim2=-1).long()
        assert torch.equal(order, encoder.pivoted(torch.from_numpy(theirs), 0.03))
        ordered = mine.gather(-2, order[..., None].expand_as(mine)).gather(-1, order[..., None, :].expand_as(mine))
        torch.testing.assert_close(encoder.feedback_factor(ordered, 0.03), given.triu(1), rtol=0, atol=1e-3)


def test_each_tile_is_weighed_by_its_bucket(ids: torch.Tensor) -> None:
    """Tiles of several buckets at once, and one at a time, for the encoder in PyTorch; the engine's agree but for codes at a boundary."""
    model = LanguageModel(tiny(), calibration_tokens=ids[:1])
    x = torch.randn(model.num_layers, 1, model.num_kv_heads, 4 * 128, 64, generator=torch.Generator().manual_seed(4))
    mine, engine = parse("kvarn+k-k2v2"), parse("engine+k-k2v2")
    for quantiser in (mine, engine):
        quantiser.prepare(model)
    whole = mine.keys(x, 768)
    for tile in range(4):
        part = slice(tile * 128, tile * 128 + 128)
        torch.testing.assert_close(mine.keys(x[:, :, :, part], 768 + tile * 128), whole[:, :, :, part], rtol=0, atol=1e-5)
    assert not torch.allclose(mine.keys(x, 2048), whole)
    differs = ((engine.keys(x, 768) - whole).abs() > 0.05).float().mean()
    assert differs < 0.02  # one code at a boundary moves those that its error is fed to


def test_a_campaign_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.write_bytes(b"text " * 100)

    def campaign(seconds: float) -> Campaign:
        return Campaign(tmp_path / "out", tmp_path, source, "cpu", Sizes.named("tiny"), seconds, None)

    def fail() -> dict[str, object]:
        raise RuntimeError("broken")

    first = campaign(1e9)
    first.measure(lambda: {"value": math.nan}, kind="x", format="a")
    first.measure(fail, kind="x", format="b")
    assert [json.loads(line).get("error") for line in first.path.read_text().splitlines()] == [None, "RuntimeError: broken"]
    assert "RuntimeError: broken" in (tmp_path / "out" / "campaign.md").read_text()
    second = campaign(1e9)
    second.measure(fail, kind="x", format="a")  # is there already
    assert second.rows == first.rows
    assert second.rows[0]["value"] is None
    late = campaign(-1)
    late.measure(fail, kind="x", format="c")
    assert late.rows == first.rows
    assert set(PARTS) == {name.removeprefix("part_") for name in dir(Campaign) if name.startswith("part_")}


def test_problems_wait_for_the_unquantised_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever format comes first, fp16 is solved before it and compared with; without fp16, when time is up, nothing is."""
    source = tmp_path / "text"
    source.write_bytes(b"text " * 100)
    asked: list[tuple[str, object]] = []

    class Solver:
        def tasks(self, name: str, tasks: object, level: str, count: int, full: object, **options: object) -> dict[str, object]:
            asked.append((name, full if full is None else full["format"]))
            return {"wrong": {}}

    def campaign(folder: str, seconds: float) -> Campaign:
        made = Campaign(tmp_path / folder, tmp_path, source, "cpu", Sizes.named("tiny"), seconds, None)
        made.shared = True
        monkeypatch.setattr(made, "of", lambda model: Solver())
        return made

    first = campaign("a", 1e9)
    first.tasks("tiny-reason", "kvarn-k4v2", "easy", 2)
    first.tasks("tiny-reason", "kvarn-k4v2", "easy", 2)
    assert asked == [("fp16", None), ("kvarn-k4v2", "fp16")]
    # Another process has claimed fp16 and does not come back.
    late = campaign("b", 0.2)
    key = {"kind": "tasks", "model": "tiny-reason", "level": "easy", "problems": 2, "temperature": 0.0, "seed": 0}
    assert late._claim({**key, "format": "fp16"})
    late.tasks("tiny-reason", "kvarn-k4v2", "easy", 2)
    assert len(asked) == 2
    assert late.rows == []


def test_every_format_of_the_campaign_has_a_name() -> None:
    from kvarn.eval import campaign

    options = [f"kvarn({option})-k2v2" for option in campaign.ENCODER_OPTIONS] + [
        f"published({o})-k2v2" for o in campaign.PUBLISHED_OPTIONS
    ]
    options += [f"kvarn+kv({option})-k2v2" for option in (*campaign.FEEDBACK_OPTIONS, *campaign.PROTOCOLS)]
    for name in (*campaign.GOALS, *campaign.BASELINES, *campaign.TASK_BASELINES, *campaign.MORE_FORMATS, *campaign.FIGURES, *options):
        assert parse(name).name == name


def test_a_step_at_a_position_is_a_step() -> None:
    """What a CUDA graph captures: a longer cache with the columns after the position masked, written at the position."""
    model = LanguageModel(tiny())
    prompt = torch.randint(0, 256, (2, 70), generator=torch.Generator().manual_seed(2))
    plain, captured = (model.cache(2, 128) for _ in range(2))
    captured.k.fill_(3)  # what lies beyond must not be seen
    captured.v.fill_(3)
    for cache in (plain, captured):
        model.step(prompt, cache)
        cache.advance(70)
    token = torch.tensor([[5], [6]])
    expected = model.step(token, plain)
    captured.position, captured.limit = torch.tensor([70]), 128
    torch.testing.assert_close(model.step(token, captured), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(captured.k[:, :, :, :71], plain.k[:, :, :, :71])
    assert captured.k[:, :, :, 71:].unique().tolist() == [3]
