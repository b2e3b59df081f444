"""The training script: its forward pass, its packs, what it must not read, and short runs of it at a tiny size."""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import packed_llama  # noqa: E402
import train_data  # noqa: E402
import train_model  # noqa: E402

from kvarn.demo import tasks  # noqa: E402
from kvarn.demo.model import BEGIN, END, PADDING  # noqa: E402

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
# Logits are sums of some hundred products of size 1 in float32 (2^-24), in another order, after a few layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus() -> np.ndarray:
    return train_data.read_corpus([Path(json.__file__).parent])


def packer(corpus: np.ndarray, tokens: int, code_share: float, position: float = 1.0) -> Any:
    return train_data.Packer(train_data.Mixture(tokens, code_share, 0), corpus, lambda: position)


def tensors(pack: Any) -> tuple[Any, Any, Any, int]:
    """What `PackedLlama.logits` takes."""
    return torch.tensor(pack.ids).long(), torch.tensor(pack.positions).long(), torch.tensor(pack.ends), pack.longest


def uneven(model: Any) -> Any:
    """The model with norms that are not all 1, so that leaving one out shows."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(1 + 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    return model.eval()


@pytest.fixture
def tiny() -> Any:
    torch.manual_seed(0)
    return uneven(packed_llama.new_model(packed_llama.llama_config(**TINY)))


@pytest.fixture
def run(corpus: np.ndarray, tmp_path: Path) -> Callable[..., Any]:
    """A run of the script at a tiny size: its progress."""

    def train(name: str, **changes: Any) -> Any:
        usual: dict[str, Any] = {"device": "cpu", "tokens_per_step": 1024, "workers": 0, "compiled": False, "log_steps": 10, "peak": 0.02}
        settings = train_model.Settings(tmp_path / name, **{**usual, **changes})
        return train_model.train(settings, packed_llama.llama_config(**TINY), corpus)

    return train


# ---- the model -----------------------------------------------------------------------------------------------------------------------


def test_the_vocabulary_is_the_projects() -> None:
    assert (packed_llama.BEGIN, packed_llama.END, packed_llama.PADDING) == (BEGIN, END, PADDING)


@torch.no_grad()
def test_the_forward_pass_is_transformers_at_full_size() -> None:
    model = uneven(packed_llama.new_model(packed_llama.llama_config()))
    ids = torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(0))
    # Far positions show a wrong base of the rotary encoding.
    positions = torch.arange(300) + 32000
    packed = packed_llama.PackedLlama(model, packed_llama.attend_by_document, compiled=False)
    mine = packed.logits(ids, positions, torch.tensor([0, 300]), 300)
    torch.testing.assert_close(mine, model(ids[None], position_ids=positions[None]).logits[0], **CLOSE)


@torch.no_grad()
def test_documents_of_a_pack_are_apart(corpus: np.ndarray, tiny: Any) -> None:
    pack = packer(corpus, 2048, 0.25, 0.0).pack()
    packed = packed_llama.PackedLlama(tiny, packed_llama.attend_by_document, compiled=False)
    ids, *rest = tensors(pack)
    logits = packed.logits(ids, *rest)
    for a, b in itertools.pairwise(pack.ends):
        torch.testing.assert_close(logits[a:b], tiny(ids[a:b][None]).logits[0], **CLOSE)
    first, last = pack.ends[1:3]
    ids[first:last] = 65
    changed = (packed.logits(ids, *rest) != logits).any(1)
    assert changed[first:last].any()
    assert not changed[:first].any()
    assert not changed[last:].any()


def test_the_loss_is_the_mean_over_learnt_tokens(corpus: np.ndarray, tiny: Any) -> None:
    pack = packer(corpus, 2048, 0.25, 0.0).pack()
    packed = packed_llama.PackedLlama(tiny, packed_llama.attend_by_document, compiled=False)
    ids, positions, ends, longest = tensors(pack)
    kinds = torch.tensor(pack.kinds)
    loss, sums, counts = packed.loss(ids, positions, kinds, ends, longest, len(train_data.KINDS))
    probabilities = packed.logits(ids, positions, ends, longest).log_softmax(-1).detach()
    learnt = [(i, int(kind)) for i, kind in enumerate(pack.kinds) if kind >= 0]
    losses = [(kind, -float(probabilities[i, ids[i + 1]])) for i, kind in learnt]
    assert float(loss.detach()) == pytest.approx(sum(value for _, value in losses) / len(losses), rel=1e-5)
    for kind in range(len(train_data.KINDS)):
        own = [value for k, value in losses if k == kind]
        assert float(counts[kind]) == len(own)
        assert float(sums[kind]) == pytest.approx(sum(own), rel=1e-4)


# ---- the data ------------------------------------------------------------------------------------------------------------------------


def test_packs_hold_whole_documents(corpus: np.ndarray) -> None:
    made = packer(corpus, 8192, 0.5)
    for _ in range(8):
        pack = made.pack()
        assert pack.ends[0] == 0
        assert pack.ends[-1] == 8192
        assert pack.longest == np.diff(pack.ends).max()
        assert (pack.positions == np.concatenate([np.arange(n) for n in np.diff(pack.ends)])).all()
        for first, last in itertools.pairwise(pack.ends):
            ids, kinds = pack.ids[first:last], pack.kinds[first:last]
            assert kinds[-1] == -1
            if ids[0] == PADDING:
                assert last == 8192
                assert (kinds == -1).all()
            elif kinds[0] == 0:
                assert (kinds[:-1] == 0).all()
                assert len(ids) in (2048, 4096, 8192)
            else:
                assert (ids[0], ids[-1]) == (BEGIN, END)
                prompt, response = ids[1 : np.argmax(kinds >= 0) + 1], ids[np.argmax(kinds >= 0) + 1 : -1]
                assert bytes(prompt.astype(np.uint8)).endswith(b"run\n")
                task = train_data.KINDS[kinds.max()]
                assert tasks.answer_of(task, bytes(response.astype(np.uint8)).decode())


@pytest.mark.parametrize("share", [0.0, 0.35, 1.0])
def test_the_share_of_code_is_as_asked(corpus: np.ndarray, share: float) -> None:
    long = np.tile(corpus, 1 + 65536 // len(corpus))
    made = packer(long, 65536, share)
    packs = [made.pack() for _ in range(30)]
    lengths = [last - first for pack in packs for first, last in itertools.pairwise(pack.ends) if pack.kinds[first] == 0]
    # A window of at most 32,768 tokens may be owed at the end.
    assert sum(lengths) / (30 * 65536) == pytest.approx(share, abs=0.5 / 30)
    assert not lengths or max(lengths) == 32768


def test_the_schedule_goes_from_small_to_full_size(corpus: np.ndarray) -> None:
    long = np.tile(corpus, 1 + 131072 // len(corpus))
    early, late = (packer(long, 131072, 0.35, position) for position in (0.0, 1.0))
    early_lengths, late_lengths = ([n for _ in range(12) for n in np.diff(made.pack().ends)] for made in (early, late))
    assert max(early_lengths) == 2048
    assert max(late_lengths) == 32768
    assert np.mean(early_lengths) * 3 < np.mean(late_lengths)


def test_problems_cover_every_level_of_the_evaluation() -> None:
    r = random.Random(0)
    for task in tasks.TASKS:
        drawn = [train_data.sizes(r, task, 1.0) for _ in range(2000)]
        for sizes in tasks.LEVELS.values():
            for name, value in sizes.get(task, {}).items():
                values = [d[name] for d in drawn]
                assert min(values) <= value <= max(values)


def test_no_problem_of_the_evaluation_is_trained_on() -> None:
    evaluated = {tasks.problem(task, i, level).prompt for level, sizes in tasks.LEVELS.items() for task in sizes for i in range(40)}
    r = random.Random("train/0/0")
    assert not evaluated & {train_data.training_problem(r).prompt for _ in range(1000)}


def test_held_out_packages_are_left_out(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    body = "".join(f"x{i} = {i}\n" for i in range(60))
    write("networkx/graph.py", "# held out 1\n" + body)
    write("tool/_vendor/Pygments/lexer.py", "# held out 2\n" + body)
    write("simplejson.py", "# held out 3\n" + body)
    write("other/copy_of_graph.py", "# held out 1\n" + body)
    write("other/networks.py", "# kept 1\n" + body)
    write("other/again.py", "# kept 1\n" + body)
    write("other/table.py", "x = [" + "1, " * 500 + "]\n")
    write("other/short.py", "x = 1\n")
    text = train_data.read_corpus([tmp_path, tmp_path / "other"]).tobytes()
    assert b"held out" not in text
    assert text == b"\0# kept 1\n" + body.encode()
    with pytest.raises(FileNotFoundError, match="sources"):
        train_data.read_corpus([tmp_path / "networkx" / "nothing"])


def test_installed_copies_of_held_out_packages_are_recognised() -> None:
    assert train_data.is_held_out(Path("site-packages/pip/_vendor/pygments/lexers/python.py"))
    assert not train_data.is_held_out(Path("json/decoder.py"))


# ---- runs ----------------------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_its_folder_is_a_model(run: Callable[..., Any], corpus: np.ndarray, tmp_path: Path) -> None:
    progress = run("model", max_steps=40)
    assert progress.log[0]["loss"] - progress.log[-1]["loss"] > 0.5
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "train.json",
    ]
    report = json.loads((tmp_path / "model" / "train.json").read_text())
    assert (report["steps"], report["tokens"]) == (40, 40 * 1024)
    assert set(report["loss_by_kind"]) <= set(train_data.KINDS)
    assert str(tmp_path) not in json.dumps(report)

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert isinstance(loaded, transformers.LlamaForCausalLM)
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id, loaded.config.pad_token_id) == (BEGIN, END, PADDING)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "model").dtype == torch.bfloat16
    ids, *rest = tensors(packer(corpus, 1024, 0.0).pack())
    with torch.no_grad():
        mine = packed_llama.PackedLlama(loaded, packed_llama.attend_by_document, compiled=False).logits(ids, *rest)
        for a, b in itertools.pairwise(rest[1].tolist()):
            torch.testing.assert_close(mine[a:b], loaded(ids[a:b][None]).logits[0], **CLOSE)


def test_a_resumed_run_goes_on(run: Callable[..., Any], tmp_path: Path) -> None:
    state = tmp_path / "state"
    run("first", max_steps=30, schedule=(0.0, 0.5), state=state)
    progress = run("second", max_steps=20, schedule=(0.5, 1.0), resume=state)
    assert (progress.runs, progress.steps, progress.tokens) == (2, 50, 50 * 1024)
    assert [line["step"] for line in progress.log] == [10, 20, 30, 40, 50]
    places = [line["schedule"] for line in progress.log]
    assert places == sorted(places)
    # The first losses after the break are those of a trained model: an untrained one has log(260) = 5.6 nats.
    assert progress.log[3]["loss"] < progress.log[0]["loss"] - 0.5


def test_a_state_restores_weights_and_moments(run: Callable[..., Any], tmp_path: Path) -> None:
    state = tmp_path / "state"
    run("first", max_steps=3, state=state)
    settings = train_model.Settings(tmp_path / "again", device="cpu")
    model = packed_llama.new_model(packed_llama.llama_config(**TINY))
    optimiser = train_model.new_optimiser(model, settings)
    saved = torch.load(state, weights_only=True)
    assert train_model.restore(saved, model, optimiser).steps == 3
    for name, p in model.named_parameters():
        assert torch.equal(p, saved["weights"][name])
        assert optimiser.state[p]["exp_avg"].dtype == torch.float32
        assert float(optimiser.state[p]["step"]) == 3
    assert any(of["exp_avg"].abs().max() > 0 for of in optimiser.state.values())


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    meter = train_model.Meter(torch.device("cpu"))
    meter.add(torch.full((len(train_data.KINDS),), float("nan")), torch.ones(len(train_data.KINDS)), 1)
    with pytest.raises(FloatingPointError, match="finite"):
        meter.check()


def test_packs_that_hold_no_problem_are_refused() -> None:
    packer = train_data.Packer(train_data.Mixture(16, 0.0, 0), np.zeros(0, np.uint8), lambda: 1.0, 0)
    with pytest.raises(ValueError, match=r"\[kvarn.train\] tokens: expected packs that hold a problem, got 16 tokens"):
        packer.pack()
