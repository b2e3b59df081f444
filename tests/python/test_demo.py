"""The demonstration: its problems, its baseline, what it measures; and one short run of all of it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

import kvarn
from kvarn.demo import tasks
from kvarn.demo.model import BEGIN, END, decode, encode, find_model

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-reason"


@pytest.mark.parametrize(("level", "task"), [(level, task) for level, sizes in tasks.LEVELS.items() for task in sizes])
def test_problems_are_reproducible_and_checked_by_their_answer(level: str, task: str) -> None:
    made = [tasks.problem(task, index, level) for index in range(3)]
    assert made[0] == tasks.problem(task, 0, level)
    assert made[0] != made[1]
    assert len({len(problem.prompt) for problem in made}) == 1
    for problem in made:
        assert problem.check(problem.response)
        assert not problem.check(problem.response[:-4])
        assert not problem.check("")


def test_a_problem_can_be_solved_from_its_prompt_alone() -> None:
    problem = tasks.problem("chase", 1, "easy")
    head, *rules = problem.prompt.splitlines()[:-1]
    table = {rule[:2]: (rule[3:5], int(rule[6:])) for rule in rules}
    at, total = head.split()[2], 0
    while at != "zz":
        at, value = table[at]
        total = (total + value) % 100
    assert problem.answer == f"{total:02d}"
    other = tasks.problem("sort", 2)
    assert other.answer is not None
    assert other.answer.split() == sorted(other.prompt.split()[1:-2])


def test_unknown_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="chase"):
        tasks.problem("chess", 0)
    with pytest.raises(ValueError, match="easy"):
        tasks.problem("chase", 0, "impossible")


def test_text_goes_to_tokens_and_back() -> None:
    assert encode("aé") == [BEGIN, 97, 195, 169]
    assert decode([97, 195, 169, END, 98]) == "aé"
    assert decode([BEGIN, 97]) == "a"


def test_the_model_is_looked_for_in_named_places(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        find_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_model(tmp_path) == tmp_path


def test_divergence_is_that_of_the_definition() -> None:
    torch = pytest.importorskip("torch")
    from kvarn.demo.solve import divergences

    p, q = torch.tensor([[[0.5, 0.25, 0.25]]]), torch.tensor([[[0.25, 0.5, 0.25]]])
    assert divergences(p.log(), q.log()) == pytest.approx([0.25 * 0.6931472], rel=1e-5)
    assert divergences(p.log(), p.log()) == [0.0]


def test_the_baseline_keeps_sixteen_bits() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from kvarn.demo.full_cache import Float16Cache

    cache = Float16Cache()
    parts = [torch.randn(2, 3, tokens, 64) for tokens in (1000, 1, 1, 100)]
    for part in parts:
        k, v = cache.update(part, -part, 0)
    want = torch.cat(parts, 2).half().float()
    assert torch.equal(k, want)
    assert torch.equal(v, -want)
    assert cache.used_bytes == 2 * want.numel() * 2
    cache.crop(-2)
    assert cache.get_seq_length() == 1100


@pytest.mark.skipif(not MODEL.is_dir(), reason="models/tiny-reason is not here")
def test_a_short_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torch", "transformers", "matplotlib"):
        pytest.importorskip(package)
    from rich.console import Console

    from kvarn.demo import show, solve

    monkeypatch.setattr(show, "BATCHES", (("regs", "easy", 2),))
    kept: dict[str, Any] = {}
    table = show._table
    monkeypatch.setattr(show, "_table", lambda results: kept.update({r.cache: r for r in results}) or table(results))
    text = io.StringIO()
    console = Console(file=text, width=120)
    assert show.run(model=MODEL, output=tmp_path / "out", formats=["k4v4_g128", "k2v2_g128"], problems=2, threads=1, console=console) == 0
    assert (tmp_path / "out" / "kvarn-demo.png").stat().st_size > 10_000
    assert "k4v4_g128" in text.getvalue()
    full, four, two = (kept[name] for name in (solve.FULL, "k4v4_g128", "k2v2_g128"))
    assert (full.right, full.problems, full.divergence, full.bits) == (2, 2, 0.0, 16.0)
    config = json.loads((MODEL / "config.json").read_text())
    layers, heads, dim = (config[name] for name in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
    token_bytes = 2 * 2 * layers * heads * dim  # K and V in float16
    for result in (four, two):
        tokens = result.bytes_full // (2 * token_bytes)  # of each sequence; the last one is not committed
        assert tokens > 264 + 128  # the prompt and more than a tile of the response
        encoded = (tokens - 1) // 128 - 1  # all complete tiles but the sinks
        staged = -(-tokens // 128) - encoded
        record_bytes = kvarn.Format(result.cache).record_bytes(dim)
        assert result.bytes_used == 2 * (encoded * layers * heads * record_bytes + staged * 128 * token_bytes)
    assert full.bytes_used == full.bytes_full
    assert 0 < four.divergence < two.divergence
    assert len(four.divergences) == 2 * 407
    assert four.tokens_per_second > 0
