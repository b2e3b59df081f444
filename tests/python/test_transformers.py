"""KvarnCache in transformers, against stock attention over the same dequantised values."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvarn
import support
from kvarn import ops

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvarn.demo.model import encode  # noqa: E402
from kvarn.demo.tasks import problem  # noqa: E402
from kvarn.integrations.transformers import KvarnCache, disable, enable  # noqa: E402

TILE = 32
FORMAT = "k4v4_g32"
OPTIONS = {"sink_tokens": TILE, "num_threads": 1}
MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-reason"
# Logits of the models below have a standard deviation of 1.2 to 1.4. An error of 5e-4 in an attention row, the kernels' budget, may change
# a 4-bit code that lies at a rounding boundary, a fifteenth of its channel's range in one of a hundred tokens: a few hundredths in the
# logits. A mask, a window or a tile that is wrong moves them by 1. Two tokens closer than twice the error may change places.
LOGIT_ERROR = 0.1


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class ReferenceCache(transformers.DynamicCache):
    """Keeps every token in full precision and, once a tile's tokens are all from earlier steps, returns its round trip through kvarn.ops.

    The quantisation of a KvarnCache without its memory, its tables, its kernels of attention and its attention function.
    `padding` is the mask of the columns so far, where some are no tokens: they belong to no tile.
    """

    def __init__(self, config: Any, name: str = FORMAT, padding: Any = None) -> None:
        super().__init__(config=None)
        self.name, self.padding, self.seen = name, padding, {}

    def update(self, key: Any, value: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
        past = self.seen.get(layer)
        self.seen[layer] = (key, value) if past is None else tuple(torch.cat(pair, 2) for pair in zip(past, (key, value), strict=True))
        if past is None:
            return key, value
        plan = kvarn.Plan(self.name, head_dim=key.shape[3], num_kv_heads=key.shape[1], dtype="float32", num_threads=1)
        k, v = (x.clone() for x in self.seen[layer])
        for row in range(len(k)):
            columns = torch.arange(past[0].shape[2])
            if self.padding is not None:
                columns = columns[self.padding[row, : len(columns)] != 0]
            for first in range(TILE, len(columns) - TILE + 1, TILE):
                tile = columns[first : first + TILE]
                k[row, :, tile], v[row, :, tile] = round_trip(plan, k[row, :, tile], v[row, :, tile])
        return k, v

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen[0][0].shape[2] if self.seen else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: Any) -> None:
        self.seen = {layer: tuple(x[beam_idx] for x in pair) for layer, pair in self.seen.items()}

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            self.seen = {layer: tuple(x[:, :, :tokens_to_remove] for x in pair) for layer, pair in self.seen.items()}

    is_croppable = True


class CheckedCache(KvarnCache):
    """Compares every attention output of the fused path with float64 attention over what the cache dequantises to."""

    checked = 0

    def _attend(self, layer: int, module: Any, query: Any, key: Any, value: Any, mask: Any, options: Any) -> Any:
        first = self.get_seq_length() == (0 if layer == 0 else key.shape[2])
        out = super()._attend(layer, module, query, key, value, mask, options)
        if first or key.shape[2] > TILE:
            return out
        window = module.sliding_window if hasattr(module, "sliding_window") else getattr(module.config, "sliding_window", None)
        real = self._rows if self._rows is not None else torch.ones(out.shape[:2], dtype=torch.bool)
        for row, sequence in enumerate(self.sequences):
            k, v = self.store.dequantise(sequence, layer)
            q = query[row, :, real[row]].transpose(0, 1) * options.scaling * query.shape[3] ** 0.5
            want, _ = support.attend(
                q.numpy(),
                k.numpy(),
                v.numpy(),
                window=window or 0,
                soft_cap=options.soft_cap,
                sinks=None if options.sinks is None else options.sinks.numpy(),
            )
            assert support.relative_error(out[row, real[row]].numpy(), want) <= support.ATTEND_ERROR
            self.checked += len(want)
        return out


def round_trip(plan: kvarn.Plan, k: Any, v: Any) -> Any:
    """One tile [heads, TILE, D] encoded and decoded."""
    heads, _, dim = k.shape
    staging = np.zeros((1, 2, heads, TILE, dim), np.float32)
    records = np.zeros((1, heads, plan.record_bytes), np.uint8)
    zero = np.zeros(1, np.int32)
    ops.append(plan, *(np.ascontiguousarray(x.transpose(0, 1).numpy()) for x in (k, v)), np.arange(TILE), staging)
    ops.encode(plan, staging, records, zero, zero)
    return [torch.from_numpy(x[0]) for x in ops.decode(plan, records, zero)]


COMMON = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}


def make_config(name: str) -> Any:
    """A small configuration of a family; between them they have every way of attending."""
    if name == "llama-mha-64":
        return transformers.LlamaConfig(**COMMON, num_attention_heads=2, num_key_value_heads=2, head_dim=64)
    if name == "qwen3-gqa-128":
        return transformers.Qwen3Config(**COMMON, num_attention_heads=4, num_key_value_heads=2, head_dim=128)
    if name == "mistral-window-80":
        return transformers.MistralConfig(**COMMON, num_attention_heads=4, num_key_value_heads=1, head_dim=80, sliding_window=45)
    if name == "gemma2-soft-cap-256":
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 64}
        return transformers.Gemma2Config(**COMMON, **heads, sliding_window=40, attn_logit_softcapping=5.0)
    if name == "gemma3-window-128":
        kinds = ["sliding_attention", "full_attention"]
        return transformers.Gemma3TextConfig(
            **COMMON, num_attention_heads=2, num_key_value_heads=1, head_dim=128, sliding_window=50, layer_types=kinds
        )
    assert name == "gpt-oss-sinks-64"
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_local_experts": 2, "num_experts_per_tok": 1}
    return transformers.GptOssConfig(**COMMON, **heads, sliding_window=40)


FAMILIES = ["llama-mha-64", "qwen3-gqa-128", "mistral-window-80", "gemma2-soft-cap-256", "gemma3-window-128", "gpt-oss-sinks-64"]
_models: dict[str, Any] = {}


def make_model(name: str = "qwen3-gqa-128", attention: str = "kvarn") -> Any:
    if name not in _models:
        torch.manual_seed(3)
        _models[name] = transformers.AutoModelForCausalLM.from_config(make_config(name)).float().eval()
        for parameter in _models[name].parameters():
            parameter.requires_grad_(False)
        if "gpt-oss" in name:  # sinks that matter
            for layer in _models[name].model.layers:
                layer.self_attn.sinks.data.normal_(1.0, 1.0)
    model = _models[name]
    return enable(model) if attention == "kvarn" else disable(model, attention)


def prompts(batch: int = 2, tokens: int = 70, seed: int = 1) -> Any:
    return torch.randint(1, 64, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, cache: Any, ids: Any, new: int = 60, **options: Any) -> Any:
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, return_dict_in_generate=True, output_logits=True, **options)


def assert_same(got: Any, want: Any, logit_error: float = LOGIT_ERROR, sampled: bool = False) -> None:
    """Equal tokens, row by row, up to a place where the reference's logits hold two tokens to be as good; logits equal up to there.

    A sampled token may change wherever the draw falls between sums of probabilities that differ by the logits' error.
    """
    new = len(want.logits)
    reached = 0
    for row in range(len(want.sequences)):
        a, b = got.sequences[row, -new:], want.sequences[row, -new:]
        for step in range(new):
            logits, target = got.logits[step][row], want.logits[step][row]
            torch.testing.assert_close(logits, target, rtol=0, atol=logit_error)
            reached += 1
            if a[step] != b[step]:
                assert sampled or target[b[step]] - target[a[step]] <= 2 * logit_error
                break
    assert reached >= new * len(want.sequences) // 2  # the comparison did not end at once


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("path", ["fused", "plain"])
def test_greedy(name: str, path: str) -> None:
    reference = generate(make_model(name, "eager"), ReferenceCache(None), prompts())
    model = make_model(name, "kvarn" if path == "fused" else "eager")
    cache = CheckedCache(model.config, FORMAT, **OPTIONS)
    assert_same(generate(model, cache, prompts()), reference)
    assert cache.checked == (2 * 2 * 59 if path == "fused" else 0)  # layers, rows, steps after the prompt
    encoded = [int((sequence.table() >= 0).sum()) for sequence in cache.sequences]
    assert encoded == [3, 3]  # 128 committed tokens and one that is not: 4 tiles, one of them sinks
    exact = generate(make_model(name, "eager"), transformers.DynamicCache(config=model.config), prompts())
    assert not torch.allclose(exact.logits[-1], reference.logits[-1], rtol=0, atol=LOGIT_ERROR)  # quantisation shows


@pytest.mark.parametrize("name", ["qwen3-gqa-128", "mistral-window-80"])
@pytest.mark.parametrize("chunk", [20, 45])
def test_prefill_in_chunks(name: str, chunk: int) -> None:
    """20 tokens attend to the records, 45 are a prompt of their own over what is cached."""
    ids = prompts(tokens=200)
    reference = generate(make_model(name, "eager"), ReferenceCache(None), ids, 20, prefill_chunk_size=chunk)
    for attention in ("kvarn", "sdpa"):
        model = make_model(name, attention)
        assert_same(generate(model, CheckedCache(model.config, FORMAT, **OPTIONS), ids, 20, prefill_chunk_size=chunk), reference)


def test_a_second_turn_goes_on_with_the_same_cache() -> None:
    model = make_model()
    first, more = prompts(1, 70), prompts(1, 50, seed=2)
    cache = KvarnCache(model.config, FORMAT, **OPTIONS)
    reference = ReferenceCache(None)
    turn = generate(model, cache, first, 30)
    ids = torch.cat([turn.sequences, more], 1)
    got = generate(model, cache, ids, 30)
    generate(make_model(attention="eager"), reference, first, 30)
    assert_same(got, generate(make_model(attention="eager"), reference, ids, 30))


def test_sampling_draws_the_same_tokens() -> None:
    outputs = []
    for attention, reference in (("eager", True), ("kvarn", False), ("sdpa", False)):
        model = make_model(attention=attention)
        torch.manual_seed(11)
        cache = ReferenceCache(None) if reference else KvarnCache(model.config, FORMAT, **OPTIONS)
        outputs.append(generate(model, cache, prompts(), 40, do_sample=True, temperature=1.0))
    for got in outputs[1:]:
        assert_same(got, outputs[0], sampled=True)
    greedy = generate(make_model(attention="eager"), ReferenceCache(None), prompts(), 40)
    assert not torch.equal(outputs[0].sequences, greedy.sequences)


@pytest.mark.parametrize("attention", ["kvarn", "sdpa"])
def test_beam_search(attention: str) -> None:
    ids = prompts(tokens=50)
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    want = generate(make_model(attention="eager"), ReferenceCache(None), ids, 60, **options)
    model = make_model(attention=attention)
    cache = KvarnCache(model.config, FORMAT, **OPTIONS)
    got = generate(model, cache, ids, 60, **options)
    assert torch.equal(got.sequences, want.sequences)
    # Mean log-probabilities: the logits' error at most.
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores, rtol=0, atol=LOGIT_ERROR)
    assert len(cache.sequences) == 6
    assert len({int(s.table()[1]) for s in cache.sequences}) < 6  # beams share what they have in common


@pytest.mark.parametrize("name", ["qwen3-gqa-128", "mistral-window-80", "gemma2-soft-cap-256"])
def test_padded_rows_are_as_if_alone(name: str) -> None:
    model = make_model(name)
    ids = prompts(3, 90)
    mask = torch.ones_like(ids)
    pads = [0, 41, 89]
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    cache = CheckedCache(model.config, FORMAT, **OPTIONS)
    together = generate(model, cache, ids, 50, attention_mask=mask)
    assert [len(sequence) for sequence in cache.sequences] == [139 - pad for pad in pads]  # no padding is stored
    reference = make_model(name, "eager")
    for row, pad in enumerate(pads):
        alone = generate(reference, ReferenceCache(None), ids[row : row + 1, pad:], 50)
        one = copy.copy(together)
        one.sequences, one.logits = together.sequences[row : row + 1], tuple(x[row : row + 1] for x in together.logits)
        assert_same(one, alone)


@pytest.mark.parametrize("name", ["qwen3-gqa-128", "mistral-window-80"])
def test_padded_rows_on_the_plain_path(name: str) -> None:
    """Padding is stored there, and fills places of a tile. Its values are what the attention makes of a row that sees nothing."""
    ids = prompts(2, 90)
    mask = torch.ones_like(ids)
    mask[0, :41] = 0
    model = make_model(name, "sdpa")
    reference = generate(model, ReferenceCache(None), ids, 50, attention_mask=mask)
    assert_same(generate(model, KvarnCache(model.config, FORMAT, **OPTIONS), ids, 50, attention_mask=mask), reference)


@pytest.mark.parametrize("name", ["qwen3-gqa-128", "mistral-window-80"])
def test_padding_after_real_tokens(name: str) -> None:
    """A padded second turn. The window counts columns, so these rows take the dense path."""
    ids = prompts(2, 120)
    mask = torch.ones_like(ids)
    mask[0, 40:50] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def logits(attention: str, cache: Any) -> Any:
        model = make_model(name, attention)
        more = torch.cat([mask, mask[:, :1]], 1)
        with torch.no_grad():
            model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            return model(ids[:, :1], attention_mask=more, position_ids=positions[:, -1:] + 1, past_key_values=cache).logits

    cache = KvarnCache(make_config(name), FORMAT, **OPTIONS)
    cache.config = make_model(name).config
    got, want = logits("kvarn", cache), logits("sdpa", ReferenceCache(None, padding=mask))
    assert [int((sequence.table() >= 0).sum()) for sequence in cache.sequences] == [2, 2]  # tiles of 110 and of 120 tokens
    torch.testing.assert_close(got, want, rtol=0, atol=LOGIT_ERROR)
    unpadded = logits("sdpa", ReferenceCache(None))
    assert (unpadded[0] - want[0]).abs().max() > LOGIT_ERROR  # where the tiles lie shows


def test_crop_takes_speculated_tokens_back_exactly() -> None:
    model = make_model()
    ids = prompts(2, 100)
    plain, speculating = (KvarnCache(model.config, FORMAT, **OPTIONS) for _ in range(2))
    with torch.no_grad():
        for cache in (plain, speculating):
            model(ids, past_key_values=cache)
        for step in range(40):
            token = ids[:, step : step + 1]
            want = model(token, past_key_values=plain).logits
            model(torch.cat([token, prompts(2, step % 7, seed=step)], 1), past_key_values=speculating)
            speculating.crop(-(step % 7))
            speculating.crop(-1)
            got = model(token, past_key_values=speculating).logits
            assert torch.equal(got, want)
    for a, b in zip(plain.sequences, speculating.sequences, strict=True):
        assert len(a) == len(b) == 140
        for layer in range(2):
            for x, y in zip(plain.store.dequantise(a, layer), speculating.store.dequantise(b, layer), strict=True):
                assert torch.equal(x, y)


@pytest.mark.parametrize("attention", ["kvarn", "sdpa"])
def test_assisted_decoding(attention: str) -> None:
    ids = prompts(1, 70).repeat(1, 2)  # with repetitions, so that the look-up proposes tokens
    # Tokens proposed past the end of a tile see it in full precision, where one at a time would see its record: so the reference proposes
    # too.
    want = generate(make_model(attention="eager"), ReferenceCache(None), ids, 60, prompt_lookup_num_tokens=5)
    model = make_model(attention=attention)
    got = generate(model, KvarnCache(model.config, FORMAT, **OPTIONS), ids, 60, prompt_lookup_num_tokens=5)
    assert_same(got, want)


def test_rows_can_be_repeated_and_chosen() -> None:
    model = make_model()
    ids = prompts(3, 80)
    cache = KvarnCache(model.config, FORMAT, **OPTIONS)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        want = model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 0, 2]))
        got = model(ids[[2, 0, 1], :1], past_key_values=cache).logits
    # The same records. Matrix products of other shapes round differently, so that a folded query may go to a neighbouring one of 32,639
    # integers: 3e-5 of logits of size 3.
    torch.testing.assert_close(got, want[[2, 0, 1]], rtol=0, atol=1e-4)
    assert cache.get_seq_length() == 81
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.usage().used == 0


def test_a_copy_goes_its_own_way() -> None:
    model = make_model()
    ids = prompts(1, 90)
    prefix = KvarnCache(model.config, FORMAT, **OPTIONS)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=prefix)
    used = prefix.usage().used
    twin = copy.deepcopy(prefix)
    assert prefix.usage().used == used  # shared
    first, second = (generate(model, cache, ids, 30) for cache in (prefix, twin))
    assert torch.equal(first.sequences, second.sequences)
    assert len(twin.sequences[0]) == len(prefix.sequences[0]) == 119


def test_a_dropped_cache_is_gone_at_once() -> None:
    model = make_model()
    cache = KvarnCache(model.config, FORMAT, **OPTIONS)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            model(prompts(), past_key_values=cache)
        gone = weakref.ref(cache.store)
        del cache
        assert gone() is None
    finally:
        gc.enable()


def test_a_full_cache_can_be_converted() -> None:
    model = make_model(attention="sdpa")
    ids = prompts(2, 100)
    full, direct = transformers.DynamicCache(config=model.config), KvarnCache(model.config, FORMAT, **OPTIONS)
    with torch.no_grad():
        model(ids, past_key_values=full)
        model(ids, past_key_values=direct)
    made = KvarnCache.from_cache(model.config, full, FORMAT, **OPTIONS)
    for a, b in zip(made.sequences, direct.sequences, strict=True):
        for layer in range(2):
            for x, y in zip(made.store.dequantise(a, layer), direct.store.dequantise(b, layer), strict=True):
                assert torch.equal(x, y)
    with pytest.raises(NotImplementedError, match="every token"):
        KvarnCache.from_cache(model.config, transformers.DynamicCache(config=model.config), FORMAT)


def test_without_a_kvarn_cache_the_attention_is_that_of_sdpa() -> None:
    ids = prompts(2, 50)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    with torch.no_grad():
        want = make_model(attention="sdpa")(ids, attention_mask=mask).logits
        got = make_model()(ids, attention_mask=mask).logits
    assert torch.equal(got, want)
    cache = transformers.DynamicCache(config=make_config("qwen3-gqa-128"))
    assert torch.equal(generate(make_model(), cache, ids, 10).sequences, generate(make_model(attention="sdpa"), None, ids, 10).sequences)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("attention", ["kvarn", "sdpa"])
def test_half_precision(dtype: str, attention: str) -> None:
    """The model in float32 with a 16-bit cache, and the model in 16 bits, stay near the model in float32.

    A value that moves by e of its size gets another 4-bit code with probability e / (2 * 0.4), because a step is 6 / 15 of a channel's
    standard deviation, and then moves by that step: an rms error of 0.4 sqrt(1.25 e). It comes in K and in V of two layers, independently,
    so twice in the logits.
    """

    def bound(e: float) -> float:
        return 2 * 0.4 * (1.25 * e) ** 0.5

    half = getattr(torch, dtype)
    rounding = 2**-9 if dtype == "bfloat16" else 2**-12
    ids = prompts(1, 100)
    model = make_model(attention=attention)
    whole = KvarnCache(model.config, FORMAT, **OPTIONS)
    stored = KvarnCache(model.config, FORMAT, dtype=half, **OPTIONS)
    with torch.no_grad():
        model(ids, past_key_values=whole)
        want = model(ids[:, :1], past_key_values=whole).logits
        model(ids, past_key_values=stored)
        got = model(ids[:, :1], past_key_values=stored).logits
        assert got.dtype == torch.float32
        assert stored.store.staging.dtype == half
        assert (got - want).std() < bound(rounding) * want.std()
        small = copy.deepcopy(model).to(half)
        cache = KvarnCache(small.config, FORMAT, **OPTIONS)
        small(ids, past_key_values=cache)
        # K of the second layer has been rounded some 30 times on its way there.
        assert (small(ids[:, :1], past_key_values=cache).logits.float() - want).std() < bound(30**0.5 * rounding) * want.std()


def test_a_mask_made_by_hand_is_honoured() -> None:
    ids = prompts(1, 40)
    mask = torch.ones(1, 1, 1, 41, dtype=torch.bool)
    mask[..., 5:20] = False
    results = []
    for attention, cache in (("kvarn", KvarnCache(make_config("qwen3-gqa-128"), FORMAT, **OPTIONS)), ("sdpa", ReferenceCache(None))):
        model = make_model(attention=attention)
        if isinstance(cache, KvarnCache):
            cache = KvarnCache(model.config, FORMAT, **OPTIONS)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            results.append(model(ids[:, :1], attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=LOGIT_ERROR)


def test_what_cannot_be_done_is_refused() -> None:
    model = make_model()
    ids = prompts(2, 40)

    def fresh() -> KvarnCache:
        return KvarnCache(model.config, FORMAT, **OPTIONS)

    with pytest.raises(ValueError, match="negative"):
        fresh().crop(3)
    kinds = transformers.Qwen3Config(**COMMON, layer_types=["full_attention", "linear_attention"], num_attention_heads=4)
    with pytest.raises(NotImplementedError, match="linear_attention"):
        KvarnCache(kinds)
    with pytest.raises(NotImplementedError, match="encoder-decoder"):
        KvarnCache(transformers.T5Config())
    with pytest.raises(ValueError, match="format_parse"), torch.no_grad():
        model(ids, past_key_values=KvarnCache(model.config, "k9v9_g32"))
    with pytest.raises(NotImplementedError, match="single layer"):
        fresh().layers[0].crop(-1)
    cache = fresh()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(NotImplementedError, match="batch"):
            model(ids[:1], past_key_values=cache)
    padded, mask = fresh(), torch.ones_like(ids)
    mask[0, :10] = 0
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=padded)
        with pytest.raises(NotImplementedError, match="attention_mask"):
            model(ids[:, :1], past_key_values=padded)
    k = torch.zeros(1, 2, 4, 128)
    with pytest.raises(NotImplementedError, match="same shape"):
        fresh().update(k, torch.zeros(1, 2, 4, 64), 0)
    with pytest.raises(NotImplementedError, match="require grad"):
        fresh().update(k.clone().requires_grad_(), k, 0)
    lost = fresh()
    lost.update(k, k, 0)
    with pytest.raises(NotImplementedError, match="layer 0"):
        lost.update(k, k, 1)


@pytest.mark.skipif(not MODEL.is_dir(), reason="models/tiny-reason is not here")
def test_the_trained_model_writes_the_same_answer() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    solved = problem("chase", 0, "easy")
    ids = torch.tensor([encode(solved.prompt)])
    want = generate(disable(model), ReferenceCache(None, "k4v2_g32"), ids, 80)
    got = generate(enable(model), KvarnCache(model.config, "k4v2_g32", **OPTIONS), ids, 80)
    assert_same(got, want)
    assert bytes(got.sequences[0, ids.shape[1] :].tolist()) == solved.response.encode()[:80]
