"""DecodeGraph: the same logits as the model's own decode steps, on the CPU without a graph and on a GPU with one."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvarn.integrations.decode_graph import DecodeGraph  # noqa: E402
from kvarn.integrations.transformers import KvarnCache, disable, enable  # noqa: E402

TILE = 32


def make_model(device: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    options = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 96}
    config = transformers.Qwen3Config(**options, intermediate_size=128, vocab_size=300, **changes)
    return enable(transformers.AutoModelForCausalLM.from_config(config).eval().to(device))


def prompt(model: Any, tokens: Any) -> KvarnCache:
    threads = 1 if tokens.device.type == "cpu" else 0  # of the CPU backend alone
    cache = KvarnCache(model.config, "k4v4_g32", sink_tokens=TILE, num_threads=threads)
    with torch.inference_mode():
        model(input_ids=tokens, past_key_values=cache)
    return cache


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("batch", [1, 3])
def test_steps_equal_the_models_own(batch: int, device: str) -> None:
    model = make_model(device)
    tokens = torch.randint(300, (batch, 200), device=device)
    expected, cache = prompt(model, tokens[:, :100]), prompt(model, tokens[:, :100])
    graph = DecodeGraph(model, cache, graph=device != "cpu")
    for at in range(100, 200):
        if at == 150:  # speculated tokens are taken back, sequences change places
            for held in (expected, cache):
                held.crop(-3)
                held.reorder_cache(torch.arange(batch - 1, -1, -1))
        token = tokens[:, at : at + 1]
        with torch.inference_mode():
            own = model(input_ids=token, past_key_values=expected).logits[:, -1]
        got = graph.step(token)
        # On a GPU the plan of a wider block table splits the work otherwise: attention rows differ within their budget of 5e-4, and a 4-bit
        # code at a rounding boundary may move by a fifteenth of its channel's range. A wrong tile or position moves logits by 1.
        torch.testing.assert_close(got, own, rtol=0, atol=0 if device == "cpu" else 0.1)
    assert cache.get_seq_length() == expected.get_seq_length() == 197
    assert [sequence.num_tokens for sequence in cache.sequences] == [197] * batch


def test_the_model_and_the_graph_take_turns() -> None:
    model = make_model("cpu")
    tokens = torch.randint(300, (1, 120))
    expected, cache = prompt(model, tokens[:, :90]), prompt(model, tokens[:, :90])
    graph = DecodeGraph(model, cache, graph=False)
    for at in range(90, 120):
        token = tokens[:, at : at + 1]
        with torch.inference_mode():
            own = model(input_ids=token, past_key_values=expected).logits[:, -1]
            got = graph.step(token) if at % 3 else model(input_ids=token, past_key_values=cache).logits[:, -1]
        assert torch.equal(got, own)


def test_refusals() -> None:
    model = make_model("cpu")
    cache = prompt(model, torch.randint(300, (2, 40)))
    with pytest.raises(NotImplementedError, match=r"\[kvarn.DecodeGraph\] graph: expected a cache on a GPU, got one on the CPU"):
        DecodeGraph(model, cache)
    with pytest.raises(ValueError, match=r"\[kvarn.DecodeGraph.step\] tokens: expected \[2, 1\], got \[1, 1\]"):
        DecodeGraph(model, cache, graph=False).step(torch.zeros(1, 1, dtype=torch.int64))
    assert cache.get_seq_length() == 40
    disable(model)
    with pytest.raises(NotImplementedError, match="got the plain path"):
        DecodeGraph(model, cache, graph=False)
    sliding = make_model("cpu", use_sliding_window=True, sliding_window=64, max_window_layers=1)
    with pytest.raises(NotImplementedError, match="expected full_attention layers"):
        DecodeGraph(sliding, prompt(sliding, torch.randint(300, (1, 40))), graph=False)
    padded = KvarnCache(enable(model).config, "k4v4_g32", sink_tokens=TILE, num_threads=1)
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[0, :5] = 0
    with torch.inference_mode():
        model(input_ids=torch.randint(300, (2, 40)), attention_mask=mask, past_key_values=padded)
    with pytest.raises(NotImplementedError, match="expected sequences without padding"):
        DecodeGraph(model, padded, graph=False).step(torch.zeros(2, 1, dtype=torch.int64))
