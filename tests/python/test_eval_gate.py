"""A gate on accuracy: divergence and right answers of the engine's records on a small trained model must not get worse.

The figures were measured with the code as it stands; bytes are the same on every machine, and what PyTorch sums in another order moves a
divergence by about 1 % (a rounding here and there falls the other way). A bound is 12 % above its figure: what is left out of the encoder
costs more than that (the least are the order of feedback's channels at k4v2, 14 %, and the variance normalisation of published instead
of scale_invariant there, 23 %), but at k2v2 the order of channels gains nothing with so little text. Moments of gradients need more of it
than a gate has time for: at k4v4 those of queries do better here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import kvarn  # noqa: E402
from kvarn.eval import problems, text  # noqa: E402
from kvarn.eval.language_model import LanguageModel  # noqa: E402
from kvarn.eval.quantisers import Quantiser, parse  # noqa: E402

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-reason"
SLACK = 1.12


def solved(model: LanguageModel, first: int, count: int, tokens: int) -> torch.Tensor:
    """Windows of 1,024 tokens of problems with their worked answers."""
    made: list[int] = []
    for index in range(first, first + count):
        for task in ("chase", "regs", "add", "sort"):
            (one,) = problems.problems_of(task, "easy", 1, index)
            made += model.encode(one.prompt + one.response)
    return torch.tensor(made[:tokens]).view(-1, 1024)


@pytest.fixture(scope="module")
def model() -> Iterator[LanguageModel]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    made = LanguageModel.load(MODEL, "cpu", torch.float32)
    made.calibration_tokens = solved(made, 900, 2, 2048)
    yield made
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference(model: LanguageModel) -> tuple[torch.Tensor, text.TextRun, text.Reference]:
    ids = solved(model, 0, 4, 4096)
    run, made = text.read(model, ids)
    assert made is not None
    return ids, run, made


def ready(model: LanguageModel, name: str) -> Quantiser:
    made = parse(name)
    made.prepare(model)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "divergence"),
    [
        ("engine-k4v4", 0.01492),
        ("engine-k4v2", 0.03707),
        ("engine-k2v2", 0.2132),
        ("engine+kv-k4v4", 0.00646),
        ("engine+kv-k4v2", 0.00924),
        ("engine+kv-k2v2", 0.1017),
        ("engine+kv(moments=queries)-k4v4", 0.00598),
    ],
)
def test_divergence(model: LanguageModel, reference: tuple, name: str, divergence: float) -> None:
    ids, full, made = reference
    row = text.summary(text.read(model, ids, ready(model, name), made)[0], full)
    assert row["kl_mean"] <= SLACK * divergence


@pytest.mark.slow
def test_divergence_of_a_balanced_model(model: LanguageModel, reference: tuple) -> None:
    """Records of the engine on weights that are balanced, and the simulation in frames, against the model as it was; not balanced it is
    0.00646."""
    changed, found = copy.deepcopy(model.model), model.sensitivity()
    k, v = (moment.numpy().astype("float32") for moment in (found.k, found.v))
    kvarn.balance(changed, kvarn.Moments(k[None], v, balance=found.balance))
    balanced = LanguageModel(changed, None, model.calibration_tokens)
    ids, full, made = reference
    for reader, name in ((balanced, "engine+kv-k4v4"), (model, "balanced+kv-k4v4")):
        row = text.summary(text.read(reader, ids, ready(reader, name), made)[0], full)
        assert row["kl_mean"] <= 1.06 * 0.00586


@pytest.mark.slow
def test_right_answers(model: LanguageModel) -> None:
    """8 of 8 were right; one that falls the other way is no regression, two are."""
    run = problems.solve(model, "chase", "easy", 8, ready(model, "engine-k4v2"))
    assert sum(run.right) >= 7
