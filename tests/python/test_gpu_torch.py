"""torch.ops.kvarn, kvarn.Cache and KvarnCache on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvarn
import support
from gpu_case import Batch, attend_tolerance

torch = pytest.importorskip("torch")
from kvarn import torch_ops  # noqa: E402, F401

pytestmark = pytest.mark.gpu
MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-reason"


def test_operators_do_what_ops_do(rng: np.random.Generator) -> None:
    batch = Batch(rng, (300, 900), (1, 2))
    plan, memory = batch.plans["cuda"], batch.cuda
    out = torch.empty_like(memory["q"])
    torch.ops.kvarn.attend(plan.handle, *memory.values(), out, None, None, 128**-0.5)
    assert torch.equal(out, batch.attend())
    torch.library.opcheck(torch.ops.kvarn.hadamard.default, (plan.handle, memory["q"]), {"inverse": True})
    torch.library.opcheck(torch.ops.kvarn.attend.default, (plan.handle, *memory.values(), out, None, None, 128**-0.5))


@pytest.mark.parametrize(
    ("backend", "mode"),
    [
        ("aot_eager", None),
        pytest.param("inductor", None, marks=pytest.mark.slow),
        pytest.param("inductor", "reduce-overhead", marks=pytest.mark.slow),
    ],
)
def test_compiled_equals_eager(backend: str, mode: str | None, rng: np.random.Generator) -> None:
    batch = Batch(rng, (300, 900), (1, 1))
    plan, memory = batch.plans["cuda"], batch.cuda

    def layer(x: Any, mapping: Any, records: Any, staging: Any, table: Any, lens: Any, starts: Any) -> Any:
        q, k, v = x.split([8, 2, 2], dim=1)
        torch.ops.kvarn.append(plan.handle, k, v, mapping, staging)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        torch.ops.kvarn.attend(plan.handle, q, records, staging, table, lens, starts, out, None, None, 128**-0.5)
        return torch.ops.kvarn.hadamard(plan.handle, out * 2).flatten(1)

    compiled = torch.compile(layer, fullgraph=True, backend=backend, **({"mode": mode} if mode else {}))
    mapping = torch.tensor([5, 7], device="cuda")
    rest = [memory[name] for name in ("block_table", "seq_lens", "cu_q_lens")]
    for _ in range(3):
        x = torch.randn(2, 12, 128, dtype=torch.float16, device="cuda")
        eager_staging, compiled_staging = memory["staging"].clone(), memory["staging"].clone()
        expected = layer(x, mapping, memory["records"], eager_staging, *rest)
        got = compiled(x, mapping, memory["records"], compiled_staging, *rest)
        assert torch.equal(got, expected)
        assert torch.equal(compiled_staging, eager_staging)


def caches(**options: Any) -> tuple[kvarn.Cache, kvarn.Cache]:
    shape = {"num_layers": 2, "num_kv_heads": 2, "num_q_heads": 8, "head_dim": 128, "dtype": torch.float16, **options}
    return kvarn.Cache("k4v2_g128", **shape), kvarn.Cache("k4v2_g128", **shape, device="cuda")


def test_cache_holds_the_bytes_of_the_cpu(rng: np.random.Generator) -> None:
    cpu, cuda = caches()
    sequences = {cache: [cache.sequence(), cache.sequence()] for cache in (cpu, cuda)}
    for counts in ([1300, 5], [1, 1], [130, 200], [0, 3]):
        tokens = sum(counts)
        k, v, q = (torch.randn(2, tokens, heads, 128, dtype=torch.float16) for heads in (2, 2, 8))
        outs = []
        for cache in (cpu, cuda):
            where = cache.memory.torch_device
            step = cache.begin(sequences[cache], counts)
            for layer in range(2):
                cache.write(step, layer, k[layer].to(where), v[layer].to(where))
            outs.append([cache.attend(step, layer, q[layer].to(where)).double().cpu().numpy() for layer in range(2)])
            cache.commit(step)
        for a, b in zip(*outs, strict=True):
            # Each of the two is within its budget and its rounding of the same exact value.
            assert support.relative_error(b, a) < 2 * attend_tolerance("float16")
        used = int(max(table.max() for table in (s.table() for s in sequences[cpu]))) + 1
        for a, b in zip(sequences[cpu], sequences[cuda], strict=True):
            np.testing.assert_array_equal(a.table(), b.table())
        assert torch.equal(cuda.records[:, :used].cpu(), cpu.records[:, :used])


def test_cache_forks_truncates_and_moves_between_devices(tmp_path: Path, rng: np.random.Generator) -> None:
    pytest.importorskip("safetensors")
    cpu, cuda = caches()
    k, v = (torch.randn(2, 700, 2, 128, dtype=torch.float16, device="cuda") for _ in range(2))
    sequence = cuda.sequence()
    cuda.append(sequence, k, v)
    twin = sequence.fork()
    cuda.append(twin, k[:, :50], v[:, :50])
    sequence.truncate(300)
    cuda.append(sequence, k[:, 300:], v[:, 300:])
    for held in (sequence, twin):
        cuda.save(held, tmp_path / "sequence.safetensors")
        copy = cpu.load(tmp_path / "sequence.safetensors")
        for layer in range(2):
            for a, b in zip(cuda.dequantise(held, layer), cpu.dequantise(copy, layer), strict=True):
                assert torch.equal(a.cpu(), b)


def tiny_reason(device: str) -> tuple[Any, Any]:
    """The model and the tokens of one problem."""
    from kvarn.demo.model import encode, load_model
    from kvarn.demo.tasks import problem

    return load_model(MODEL).to(device), torch.tensor([encode(problem("chase", 0).prompt)], device=device)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_generate_gives_the_tokens_of_the_cpu(fused: bool) -> None:
    pytest.importorskip("transformers")
    from kvarn.integrations.transformers import KvarnCache, disable, enable

    results = []
    for device in ("cpu", "cuda"):
        model, tokens = tiny_reason(device)
        (enable if fused else disable)(model)
        cache = KvarnCache(model.config, "k4v4_g32", sink_tokens=32)
        with torch.inference_mode():
            results.append(model.generate(tokens, past_key_values=cache, max_new_tokens=120, do_sample=False).cpu())
        assert cache.store.memory.backend == device
    assert torch.equal(results[0], results[1])
