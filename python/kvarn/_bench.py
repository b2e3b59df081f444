"""``kvarn bench``: quick timings on this machine. benchmarks/ has the careful ones."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kvarn.cache import Cache


def run(
    *,
    format: str,
    tokens: int,
    sequences: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    device: str,
    threads: int,
    seconds: float,
    console: Console,
) -> None:
    """Times one layer's decode attention, encoding and a plain read, and prints a table. Arguments as in ``kvarn bench --help``.

    Raises:
        ValueError: a shape that kvarn does not support.
        UnavailableError: the device's backend cannot run here.
        ModuleNotFoundError: a GPU or bfloat16 without PyTorch.
    """
    on_gpu = device != "cpu"
    wants_torch = on_gpu or dtype == "bfloat16"
    torch: Any = None
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError:
        if wants_torch:
            raise
        console.print("PyTorch is not installed: no comparison with its attention", style="dim")
    if torch is not None and threads:
        torch.set_num_threads(threads)
    cache = Cache(
        format,
        num_layers=1,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_q_heads=q_heads,
        max_tokens=tokens * sequences,
        max_sequences=sequences,
        dtype=getattr(torch, dtype) if wants_torch else dtype,
        device=device,
        num_threads=threads,
    )
    rng = np.random.default_rng(0)

    def values(*shape: int) -> Any:
        host = rng.standard_normal(shape, np.float32)
        return torch.from_numpy(host).to(cache.memory.torch_device, getattr(torch, dtype)) if wants_torch else host.astype(dtype)

    def finish() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    held = [cache.sequence() for _ in range(sequences)]
    k, v = values(1, tokens, kv_heads, head_dim), values(1, tokens, kv_heads, head_dim)
    started = time.perf_counter()
    for sequence in held:
        cache.append(sequence, k, v)
    finish()
    encode_seconds = time.perf_counter() - started
    step = cache.begin(held, [1] * sequences)
    cache.write(step, 0, values(sequences, kv_heads, head_dim), values(sequences, kv_heads, head_dim))
    q = values(sequences, q_heads, head_dim)
    attend_seconds = _time(lambda: cache.attend(step, 0, q), finish, seconds)
    used = cache.usage().used

    console.print(f"{sequences} x {tokens} tokens, {q_heads} query heads, {cache._plan.describe}; {cache!r}", soft_wrap=True)
    table = Table()
    for column in ("what", "time", "GB/s of its bytes", "of plain read"):
        table.add_column(column, justify="left" if column == "what" else "right")
    plain = None if on_gpu else _plain_read(used, cache, seconds)
    rate = used / attend_seconds / 1e9
    if plain:
        table.add_row(f"plain read of as many bytes ({used / 1e6:.1f} MB)", f"{1e6 * used / plain / 1e9:.0f} us", f"{plain:.1f}", "1.00")
    table.add_row(f"attend, {format}", f"{1e6 * attend_seconds:.0f} us", f"{rate:.1f}", f"{rate / plain:.2f}" if plain else "")
    full = used
    if torch is not None:
        dtypes = (torch.float32, torch.bfloat16) if not on_gpu else (getattr(torch, dtype),)
        for each in dtypes:
            full = 2 * sequences * tokens * kv_heads * head_dim * each.itemsize
            spent = _sdpa(torch, each, cache.memory.torch_device, sequences, tokens, q_heads, kv_heads, head_dim, finish, seconds)
            name = str(each).removeprefix("torch.")
            ratio = f"{spent / attend_seconds:.1f} x attend"
            table.add_row(f"PyTorch attention, {name} ({ratio})", f"{1e6 * spent:.0f} us", f"{full / spent / 1e9:.1f}", "")
    written = 2 * sequences * tokens * kv_heads * head_dim
    table.add_row(
        "append and encode the context",
        f"{1e6 * encode_seconds:.0f} us",
        f"{written * cache.memory.item_bytes / encode_seconds / 1e9:.2f}",
        "",
    )
    console.print(table)


def _time(body: Callable[[], Any], finish: Callable[[], None], seconds: float) -> float:
    """Median seconds of one call."""
    body()
    finish()
    end = time.perf_counter() + seconds
    spent: list[float] = []
    while not spent or time.perf_counter() < end:
        started = time.perf_counter()
        body()
        finish()
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)


def _plain_read(size: int, cache: Cache, seconds: float) -> float:
    """GB/s of summing `size` bytes as 64-bit words on as many threads as attend uses: what no attention over them can beat."""
    from concurrent.futures import ThreadPoolExecutor

    import kvarn

    count = cache.num_threads or next(backend.num_threads for backend in kvarn.backends() if backend.name == "cpu")
    words = np.ones(max(size // 8, count), np.int64)
    parts = np.array_split(words, count)
    with ThreadPoolExecutor(count) as pool:
        spent = _time(lambda: list(pool.map(np.sum, parts)), lambda: None, seconds)
    return float(words.nbytes / spent / 1e9)


def _sdpa(
    torch: Any,
    dtype: Any,
    device: str,
    sequences: int,
    tokens: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    finish: Callable[[], None],
    seconds: float,
) -> float:
    """Seconds of one decode step of PyTorch's attention, the query heads of a KV head packed as rows."""
    k, v = (torch.randn(sequences, kv_heads, tokens, head_dim, device=device).to(dtype) for _ in range(2))
    q = torch.randn(sequences, kv_heads, q_heads // kv_heads, head_dim, device=device).to(dtype)
    return _time(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), finish, seconds)
