"""``kvarn doctor``: whether a backend computes on this machine what it should. Needs numpy alone; a CUDA device also needs PyTorch."""

from __future__ import annotations

import datetime
import importlib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvarn import ops
from kvarn._backends import backends
from kvarn._errors import UnavailableError
from kvarn._plan import Plan
from kvarn._report import environment_report

Put = Callable[[NDArray[Any]], Any]
Get = Callable[[Any], NDArray[Any]]

#: attend's contract is 5e-4 per row against float64; outputs are fp16 numbers, which adds 2^-11 of each value.
TOLERANCE = 5e-4 + 2.0**-11
#: (format, head_dim, query heads, options of attend): tile lengths, widths, metadata, GQA ratios and options of every kernel.
CASES: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
    ("k4v2_g128", 128, 8, {}),
    ("k4v2_g128", 128, 32, {"window": 200}),
    ("k3v3_g128", 64, 6, {"logits_soft_cap": 20.0}),
    ("k8v4_g128", 256, 2, {"causal": False}),
    ("k2v2_g128", 64, 24, {}),
    ("k5v6_g64", 96, 4, {}),
    ("k4v2_g32_m8", 112, 10, {"window": 50}),
    ("k3v8_g256", 512, 2, {}),
)


@dataclass(frozen=True)
class Check:
    """One finding: what was computed, whether it is right, and a number or an error."""

    name: str
    passed: bool
    detail: str


def run(backend: str, output: Path, device: int = 0) -> list[Check]:
    """Compares every operation of a backend with the generic CPU kernels (bytes) and with float64 arithmetic (attend); writes a report.

    Args:
        backend: "cpu", "cuda" or "hip".
        output: The report's file, written whatever happens.
        device: Index of the GPU.

    Returns:
        The checks, in order.

    Raises:
        UnavailableError: The backend cannot run here; the report says so too.
    """
    checks: list[Check] = []
    title = f"kvarn doctor, backend {backend}, device {device}, {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC"
    try:
        put, get = _memory(backend, device)
        for name, head_dim, q_heads, options in CASES:
            checks += _case(backend, device, name, head_dim, q_heads, options, put, get)
    finally:
        lines = [f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.detail}" for check in checks]
        output.write_text("\n".join([title, "", *(lines or ["nothing could be checked"]), "", environment_report(), ""]))
    return checks


def _memory(backend: str, device: int) -> tuple[Put, Get]:
    info = next((info for info in backends() if info.name == backend), None)
    if info is None or not info.available:
        raise UnavailableError(
            f"[kvarn.doctor] backend: expected an available backend, got {backend}: {info.detail if info else 'unknown'}"
        )
    if backend == "cpu":
        return np.copy, np.copy
    if backend == "hip":
        from kvarn._hip_memory import HipArray, HipRuntime

        runtime = HipRuntime(device)
        return lambda host: HipArray(runtime, host), lambda array: array.numpy()
    torch: Any = importlib.import_module("torch")
    return lambda host: torch.from_numpy(np.ascontiguousarray(host)).to(f"cuda:{device}"), lambda array: array.cpu().numpy()


def _case(
    backend: str, device: int, name: str, head_dim: int, q_heads: int, options: dict[str, Any], put: Put, get: Get
) -> Iterator[Check]:
    kv_heads, tokens_seen = 2, (300, 129)
    config: dict[str, Any] = {"head_dim": head_dim, "num_kv_heads": kv_heads, "num_q_heads": q_heads}
    config |= {"max_num_seqs": 2, "max_q_tokens": 4, "max_tiles": 16}
    label = f"{name} head_dim {head_dim}, {q_heads} over {kv_heads} heads{''.join(f', {k} {v}' for k, v in options.items())}"
    rng = np.random.default_rng(11)
    try:
        reference, plan = Plan(name, cpu_isa="generic", **config), Plan(name, backend=backend, device=device, **config)
        tile = plan.format.tile_tokens
        tiles = [-(-length // tile) for length in tokens_seen]
        k, v = rng.standard_normal((2, sum(tiles) * tile, kv_heads, head_dim)).astype(np.float16)
        places = np.arange(sum(tiles) * tile)
        staging = np.zeros((sum(tiles), 2, kv_heads, tile, head_dim), np.float16)
        own_staging = put(staging)
        ops.append(reference, k, v, places, staging)
        ops.append(plan, put(k), put(v), put(places), own_staging)
        yield _same(f"append, {label}", get(own_staging), staging)

        numbers = np.arange(sum(tiles), dtype=np.int32)
        records = np.zeros((sum(tiles), kv_heads, plan.record_bytes), np.uint8)
        own_records = put(records)
        ops.encode(reference, staging, records, numbers, numbers)
        ops.encode(plan, own_staging, own_records, put(numbers), put(numbers))
        yield _same(f"encode, {label}", get(own_records), records)

        factors = np.triu(rng.standard_normal((2, kv_heads, head_dim, head_dim)) * 2 / np.sqrt(head_dim), 1).astype(np.float32)
        fed, own_fed = np.zeros_like(records), put(np.zeros_like(records))
        ops.encode(reference, staging, fed, numbers, numbers, k_feedback=factors[0], v_feedback=factors[1])
        ops.encode(plan, own_staging, own_fed, put(numbers), put(numbers), k_feedback=put(factors[0]), v_feedback=put(factors[1]))
        yield _same(f"encode with feedback, {label}", get(own_fed), fed)

        decoded = np.zeros((2, sum(tiles), kv_heads, tile, head_dim), np.float32)
        own_k, own_v = put(decoded[0]), put(decoded[1])
        ops.decode(reference, records, numbers, k=decoded[0], v=decoded[1])
        ops.decode(plan, own_records, put(numbers), k=own_k, v=own_v)
        yield _same(f"decode, {label}", np.stack([get(own_k), get(own_v)]), decoded)

        # The last tile of each sequence is read from staging, the others are records.
        table = np.zeros((2, max(tiles)), np.int32)
        table[0, : tiles[0]], table[1, : tiles[1]] = numbers[: tiles[0]], numbers[tiles[0] :]
        for sequence, count in enumerate(tiles):
            last = table[sequence, count - 1]
            table[sequence, count - 1] = ~last
            for operand in range(2):
                values = staging[last, operand].astype(np.float32)
                ops.hadamard(reference, values, out=values, inverse=True)
                decoded[operand, last] = values
        q = rng.standard_normal((3, q_heads, head_dim)).astype(np.float16)
        out = put(np.zeros_like(q))
        memory = {"workspace": put(np.zeros(plan.workspace_bytes, np.uint8))} if backend != "cpu" else {}
        ops.attend(
            plan,
            put(q),
            records=own_records,
            staging=own_staging,
            block_table=put(table),
            seq_lens=put(np.array(tokens_seen, np.int32)),
            cu_q_lens=put(np.array([0, 2, 3], np.int32)),
            out=out,
            **memory,
            **options,
        )
        sequences = [decoded[:, np.where(row[:count] < 0, ~row[:count], row[:count])] for row, count in zip(table, tiles, strict=True)]
        expected = np.concatenate(
            [_attend(rows, both, length, **options) for rows, both, length in zip((q[:2], q[2:]), sequences, tokens_seen, strict=True)]
        )
        error = np.linalg.norm(get(out).astype(np.float64) - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        passed = bool((error <= TOLERANCE).all())
        yield Check(f"attend, {label}", passed, f"largest relative error of a row {error.max():.2e}, expected at most {TOLERANCE:.2e}")
    except Exception as error:
        yield Check(label, False, "".join(traceback.format_exception_only(error)).strip())


def _same(name: str, got: NDArray[Any], expected: NDArray[Any]) -> Check:
    different = int((got.view(np.uint8) != expected.view(np.uint8)).sum())
    return Check(name, different == 0, f"{different} of {expected.nbytes} bytes differ")


def _attend(
    q: NDArray[Any], both: NDArray[Any], length: int, causal: bool = True, window: int = 0, logits_soft_cap: float = 0.0
) -> NDArray[np.float64]:
    """One sequence in float64. q [Tq, Hq, D]; both: K and V [2, tiles, Hkv, G, D]. Returns [Tq, Hq, D]."""
    heads, dim = both.shape[2], both.shape[-1]
    k, v = (x.transpose(1, 0, 2, 3).reshape(heads, -1, dim)[:, :length].astype(np.float64) for x in both)
    group = q.shape[1] // heads
    out = np.zeros(q.shape)
    positions = np.arange(length)
    for i, rows in enumerate(q.astype(np.float64)):
        own = length - len(q) + i
        last = own if causal or window else length - 1
        seen = (positions <= last) & (positions > own - window if window else True)
        for head, row in enumerate(rows):
            scores = k[head // group][seen] @ row / np.sqrt(dim)
            if logits_soft_cap:
                scores = logits_soft_cap * np.tanh(scores / logits_soft_cap)
            weights = np.exp(scores - scores.max())
            out[i, head] = weights @ v[head // group][seen] / weights.sum()
    return out
