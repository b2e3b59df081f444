"""torch.ops.kvarn: schemas, fake implementations, torch.compile, and equality with kvarn.ops."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

import kvarn

torch = pytest.importorskip("torch")

from kvarn import ops, torch_ops  # noqa: E402

HEADS, Q_HEADS, DIM, TILE = 2, 8, 64, 32


@pytest.fixture
def memory(plan: kvarn.Plan, rng: np.random.Generator) -> dict[str, Any]:
    """One sequence of 70 tokens: two encoded tiles and one in staging; and the arguments of attend for three queries."""
    staging = torch.from_numpy(rng.standard_normal((4, 2, HEADS, TILE, DIM)).astype(np.float16))
    records = torch.zeros(4, HEADS, plan.record_bytes, dtype=torch.uint8)
    index = torch.tensor([0, 1], dtype=torch.int32)
    ops.encode(plan, staging, records, index, index)
    return {
        "q": torch.from_numpy(rng.standard_normal((3, Q_HEADS, DIM)).astype(np.float16)),
        "records": records,
        "staging": staging,
        "block_table": torch.tensor([[0, 1, ~2]], dtype=torch.int32),
        "seq_lens": torch.tensor([70], dtype=torch.int32),
        "cu_q_lens": torch.tensor([0, 3], dtype=torch.int32),
    }


def attend_arguments(plan: kvarn.Plan, memory: dict[str, Any], *, full: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    outputs = [torch.zeros_like(memory["q"]), torch.zeros(3, Q_HEADS) if full else None, None]
    options = {"window": 40, "sinks": torch.linspace(-1, 1, Q_HEADS), "alibi_slopes": torch.linspace(0, 0.1, Q_HEADS)} if full else {}
    return (plan.handle, *memory.values(), *outputs, DIM**-0.5), options


def cases(plan: kvarn.Plan, memory: dict[str, Any]) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of every operator."""
    handle = plan.handle
    new = memory["q"][:, :HEADS]
    index = torch.tensor([1, 0], dtype=torch.int32)
    tiles = torch.zeros(2, HEADS, TILE, DIM)
    return {
        "hadamard": ((handle, memory["q"]), {"inverse": True}),
        "hadamard_out": ((handle, memory["q"], False, torch.zeros_like(memory["q"])), {}),
        "append": ((handle, new, new, torch.tensor([96, 97, -1]), memory["staging"].clone()), {}),
        "encode": ((handle, memory["staging"], memory["records"].clone(), index, index, "published", "minmax"), {}),
        "decode": ((handle, memory["records"], index, None, tiles.clone(), tiles.clone()), {}),
        "attend": attend_arguments(plan, memory, full=False),
        "attend_full": attend_arguments(plan, memory, full=True),
    }


NAMES = ["hadamard", "hadamard_out", "append", "encode", "decode", "attend", "attend_full"]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, plan: kvarn.Plan, memory: dict[str, Any]) -> None:
    arguments, options = cases(plan, memory)[name]
    operator = getattr(torch.ops.kvarn, name.removesuffix("_full")).default
    torch.library.opcheck(operator, arguments, options)


def test_operators_do_what_ops_do(plan: kvarn.Plan, memory: dict[str, Any]) -> None:
    every = cases(plan, memory)

    def run(name: str) -> tuple[Any, ...]:
        arguments, options = every[name]
        result = getattr(torch.ops.kvarn, name.removesuffix("_full"))(*arguments, **options)
        return (result, *arguments)

    assert torch.equal(run("hadamard")[0], ops.hadamard(plan, memory["q"], inverse=True))
    assert torch.equal(run("hadamard_out")[-1], ops.hadamard(plan, memory["q"]))
    staging = memory["staging"].clone()
    new = memory["q"][:, :HEADS]
    ops.append(plan, new, new, torch.tensor([96, 97, -1]), staging)
    assert torch.equal(run("append")[-1], staging)
    records = memory["records"].clone()
    index = torch.tensor([1, 0], dtype=torch.int32)
    ops.encode(plan, memory["staging"], records, index, index, normalisation="published", rounding="minmax")
    assert torch.equal(run("encode")[3], records)
    k, v = ops.decode(plan, memory["records"], index, k=torch.zeros(2, HEADS, TILE, DIM), v=torch.zeros(2, HEADS, TILE, DIM))
    assert torch.equal(run("decode")[-2], k)
    assert torch.equal(run("decode")[-1], v)
    options = every["attend_full"][1]
    out, lse = ops.attend(plan, **memory, **options, return_lse=True)
    done = run("attend_full")
    assert torch.equal(done[8], out)
    assert torch.equal(done[9], lse)


class Layer(torch.nn.Module):
    """An attention layer of a model that keeps its cache in kvarn: append, attend, and tensor operations around them."""

    def __init__(self, handle: int) -> None:
        super().__init__()
        self.handle = handle

    def forward(self, x: Any, slot_mapping: Any, records: Any, staging: Any, block_table: Any, seq_lens: Any, cu_q_lens: Any) -> Any:
        q, k, v = x.split([Q_HEADS, HEADS, HEADS], dim=1)
        torch.ops.kvarn.append(self.handle, k, v, slot_mapping, staging)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        torch.ops.kvarn.attend(self.handle, q, records, staging, block_table, seq_lens, cu_q_lens, out, None, None, DIM**-0.5)
        return torch.ops.kvarn.hadamard(self.handle, out * 2).flatten(1)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_fullgraph_equals_eager(backend: str, plan: kvarn.Plan, memory: dict[str, Any], rng: np.random.Generator) -> None:
    layer = Layer(plan.handle)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    records, block_table, seq_lens = (memory[name] for name in ("records", "block_table", "seq_lens"))
    for tokens in (3, 5):  # the second shape is traced as a symbol
        x = torch.from_numpy(rng.standard_normal((tokens, Q_HEADS + 2 * HEADS, DIM)).astype(np.float16))
        mapping = 2 * TILE + torch.arange(tokens)
        cu_q_lens = torch.tensor([0, tokens], dtype=torch.int32)
        eager_staging, compiled_staging = memory["staging"].clone(), memory["staging"].clone()
        expected = layer(x, mapping, records, eager_staging, block_table, seq_lens, cu_q_lens)
        address = compiled_staging.data_ptr()
        got = compiled(x, mapping, records, compiled_staging, block_table, seq_lens, cu_q_lens)
        assert torch.equal(got, expected)
        # The write went to the caller's memory, not to a functionalised copy.
        assert compiled_staging.data_ptr() == address
        assert torch.equal(compiled_staging, eager_staging)
        assert not torch.equal(eager_staging, memory["staging"])


def test_errors_come_through(plan: kvarn.Plan, memory: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"\[kvarn.hadamard\] x: expected .*, got float64 \[3, 64\] on cpu"):
        torch.ops.kvarn.hadamard(plan.handle, torch.zeros(3, DIM, dtype=torch.float64))
    with pytest.raises(TypeError, match="that requires grad"):
        torch.ops.kvarn.hadamard(plan.handle, torch.zeros(3, DIM, requires_grad=True))
    with pytest.raises(ValueError, match=r"expected the handle of a living kvarn\.Plan, got 0"):
        torch.ops.kvarn.hadamard(0, memory["q"])


def test_inference_mode_and_no_grad(plan: kvarn.Plan, memory: dict[str, Any]) -> None:
    expected = torch.ops.kvarn.hadamard(plan.handle, memory["q"])
    with torch.inference_mode():
        assert torch.equal(torch.ops.kvarn.hadamard(plan.handle, memory["q"]), expected)
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float16))
    with torch.no_grad():
        assert torch.equal(torch.ops.kvarn.hadamard(plan.handle, memory["q"] * weight), expected)


def test_registration_is_idempotent(plan: kvarn.Plan, memory: dict[str, Any]) -> None:
    torch_ops.register()
    importlib.reload(torch_ops)
    assert torch.equal(torch.ops.kvarn.hadamard(plan.handle, memory["q"]), ops.hadamard(plan, memory["q"]))


def test_schemas_declare_what_they_write() -> None:
    written = {
        "hadamard": set(),
        "hadamard_out": {"out"},
        "append": {"staging"},
        "encode": {"records"},
        "decode": {"k", "v"},
        "attend": {"out", "lse", "workspace"},
    }
    for name, expected in written.items():
        schema = getattr(torch.ops.kvarn, name).default._schema
        assert {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write} == expected
