"""Streams, CUDA graphs, threads and failures of the device."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

import kvarn
from gpu_case import Batch
from kvarn import ops

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

# About half a second: far longer than it takes to launch what follows.
SLEEP_CYCLES = 1 << 30


def run_all(batch: Batch, new: Any, mapping: Any, slots: Any, blocks: Any, out: Any) -> None:
    """append, encode, decode, hadamard and attend, on the current stream."""
    plan, memory = batch.plans["cuda"], batch.cuda
    ops.append(plan, new, new, mapping, memory["staging"])
    ops.encode(plan, memory["staging"], memory["records"], slots, blocks)
    k, v = ops.decode(plan, memory["records"], blocks)
    ops.hadamard(plan, k, out=k)
    ops.hadamard(plan, v, out=v)
    batch.attend(out=out)


def test_work_waits_for_a_producer_on_the_same_side_stream(rng: np.random.Generator) -> None:
    batch = Batch(rng, (700, 200), (1, 3))
    expected = batch.attend()
    q = batch.cuda["q"].clone()
    batch.cuda["q"].fill_(1)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES)
        batch.cuda["q"].copy_(q)
        out = batch.attend()
    assert not side.query(), "the calls returned before the device was done"
    side.synchronize()
    assert torch.equal(out, expected)


def test_capture_is_the_first_work_after_the_plan_and_replays_with_other_lengths_and_tables(rng: np.random.Generator) -> None:
    batch = Batch(rng, (900, 300, 128), (1, 2, 1))
    other = Batch(rng, (200, 77, 1000), (1, 2, 1))
    names = ("q", "seq_lens")
    new = torch.randn(4, 2, 128, dtype=torch.float16, device="cuda")
    index = torch.zeros(1, dtype=torch.int32, device="cuda")
    mapping = torch.full((4,), -1, device="cuda")
    out = torch.zeros_like(batch.cuda["q"])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_all(batch, new, mapping, index, index, out)
    assert not out.any(), "capture runs nothing"
    graph.replay()
    expected = torch.empty_like(out)
    run_all(batch, new, mapping, index, index, expected)
    assert torch.equal(out, expected)
    # The second batch's sequences through the same graph: its lengths and queries, and the first one's blocks in another order.
    flat = batch.cuda["block_table"].flatten()
    for name in names:
        batch.cuda[name].copy_(other.cuda[name])
    batch.cuda["block_table"].copy_(flat[torch.randperm(len(flat), device="cuda")].view_as(batch.cuda["block_table"]))
    mapping.copy_(torch.arange(4, device="cuda") + 128)
    memory = {name: batch.cuda[name].clone() for name in ("records", "staging")}
    graph.replay()
    for name, value in memory.items():
        batch.cuda[name].copy_(value)
    run_all(batch, new, mapping, index, index, expected)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("shared", [True, False], ids=["one plan", "two plans"])
def test_two_threads_on_two_streams(shared: bool, rng: np.random.Generator) -> None:
    batches = [Batch(rng, (3000, 100), (1, 1)), Batch(rng, (3000, 100), (1, 1))]
    if shared:
        batches[1].plans = batches[0].plans
    expected = [batch.attend() for batch in batches]
    torch.cuda.synchronize()
    wrong: list[str] = []

    def work(index: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(200):
                    out = batches[index].attend()
                    torch.cuda.current_stream().synchronize()
                    if not torch.equal(out, expected[index]):
                        wrong.append(f"thread {index}")
        except Exception as error:
            wrong.append(f"thread {index}: {error}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_calls_in_flight_on_two_streams_do_not_disturb_each_other(rng: np.random.Generator) -> None:
    batch = Batch(rng, (8000, 100, 4000), (1, 1, 1))
    expected = batch.attend()
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    outs = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(batch.attend())
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)


def test_arrays_of_another_device_are_refused(rng: np.random.Generator) -> None:
    batch = Batch(rng, (200,), (1,))
    with pytest.raises(ValueError, match=r"\[kvarn.attend\] records: expected uint8 .* on cuda:0, got uint8 .* on cpu"):
        batch.attend(records=batch.cpu["records"])
    with pytest.raises(ValueError, match=r"\[kvarn.attend\] q: expected float16 .* on cpu, got float16 .* on cuda:0"):
        batch.attend("cpu", q=batch.cuda["q"])
    with pytest.raises(ValueError, match=r"\[kvarn.hadamard\] x: expected .* on cuda:0, got float16 .* on cpu"):
        ops.hadamard(batch.plans["cuda"], batch.cpu["q"])


def test_a_device_that_does_not_exist() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(ValueError, match=rf"\[kvarn.plan_create\] device: expected 0 to {count - 1}, got {count}"):
        kvarn.Plan("k4v2_g128", head_dim=128, num_kv_heads=1, backend="cuda", device=count)


def test_the_current_device_is_put_back(rng: np.random.Generator) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    plan = kvarn.Plan("k4v2_g128", head_dim=128, num_kv_heads=1, backend="cuda", device=1)
    x = torch.randn(3, 128, device="cuda:1")
    with torch.cuda.device(0):
        y = ops.hadamard(plan, x)
        assert torch.cuda.current_device() == 0
    assert torch.equal(y.cpu(), ops.hadamard(kvarn.Plan("k4v2_g128", head_dim=128, num_kv_heads=1), x.cpu()))


def test_plan_without_memory() -> None:
    with pytest.raises(MemoryError, match=r"\[kvarn.plan_create\] counters: expected success, got cudaErrorMemoryAllocation"):
        kvarn.Plan(
            "k4v2_g128",
            head_dim=128,
            num_kv_heads=128,
            num_q_heads=3072,
            max_num_seqs=1 << 20,
            max_q_tokens=1 << 30,
            max_tiles=1 << 14,
            backend="cuda",
            batch_invariant=True,
        )


def test_cache_without_memory_stays_as_it_was(rng: np.random.Generator) -> None:
    cache = kvarn.Cache("k4v2_g128", num_layers=2, num_kv_heads=2, num_q_heads=4, head_dim=128, device="cuda")
    sequence = cache.sequence()
    k, v = (torch.randn(2, 600, 2, 128, dtype=torch.float16, device="cuda") for _ in range(2))
    q = torch.randn(1, 4, 128, dtype=torch.float16, device="cuda")
    cache.append(sequence, k, v)
    expected = cache.attend(sequence, 1, q)
    table = sequence.table()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (4 << 20)) / total)
    try:
        with pytest.raises(kvarn.OutOfMemoryError, match=r"\[kvarn.Cache\] records: expected [\d,]+ bytes on cuda:0, got out of memory"):
            cache.begin([sequence], [1_000_000])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    np.testing.assert_array_equal(sequence.table(), table)
    assert sequence.num_tokens == sequence.num_committed == 600
    assert torch.equal(cache.attend(sequence, 1, q), expected)
    cache.append(sequence, k, v)
    assert sequence.num_tokens == 1200


def test_a_broken_device_is_an_error_that_names_the_operation() -> None:
    code = """
import torch, kvarn
plan = kvarn.Plan("k4v2_g128", head_dim=128, num_kv_heads=1, backend="cuda")
x = torch.zeros(4, 128, device="cuda")
try:
    x[torch.tensor([1 << 20], device="cuda")] = 1
    torch.cuda.synchronize()
except Exception:
    pass
try:
    kvarn.ops.hadamard(plan, x, out=x)
except kvarn.LaunchError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "[kvarn.hadamard]" in done.stdout, done
    assert "cudaError" in done.stdout


def test_cupy_through_dlpack(rng: np.random.Generator) -> None:
    cupy = pytest.importorskip("cupy")
    plan = kvarn.Plan("k4v2_g128", head_dim=128, num_kv_heads=1, backend="cuda")
    x = rng.standard_normal((5, 128)).astype(np.float32)
    expected = ops.hadamard(kvarn.Plan("k4v2_g128", head_dim=128, num_kv_heads=1), x)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        out = ops.hadamard(plan, cupy.asarray(x))
        stream.synchronize()
        np.testing.assert_array_equal(cupy.asnumpy(out), expected)
