"""``kvarn bench``: quick timings on this machine. benchmarks/ has the careful ones."""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from kvarn import ops
from kvarn._backends import backends
from kvarn._devices import HOST_DTYPES, Device, open_device, to_bits
from kvarn._errors import InvalidArgumentError
from kvarn._formats import Format
from kvarn._plan import Plan

#: Tiles that are appended and encoded at once.
_CHUNK_TILES = 64
#: Seconds of work between two waits for a device, so that a wait does not count.
_BETWEEN_WAITS = 2e-3


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
    """Times one layer's decode attention, encoding and a plain read (on a GPU a copy). Arguments as in ``kvarn bench --help``.

    Raises:
        ValueError: a shape that kvarn does not support, or a device that it does not know.
        UnavailableError: the device's backend cannot run here; the message says whether a runtime, a device or a torch is missing.
    """
    kind, _, index = device.partition(":")
    if dtype not in HOST_DTYPES:
        raise InvalidArgumentError(f"[kvarn.bench] dtype: expected one of {', '.join(HOST_DTYPES)}, got {dtype}")
    if index and not index.isdigit():
        raise InvalidArgumentError(f'[kvarn.bench] device: expected "cpu", "cuda", "cuda:N", "hip" or "hip:N", got "{device}"')
    opened = open_device("bench", kind, int(index or 0))
    plan = Plan(
        format,
        head_dim=head_dim,
        num_kv_heads=kv_heads,
        num_q_heads=q_heads,
        dtype=dtype,
        max_num_seqs=sequences,
        max_q_tokens=sequences,
        max_tiles=-(-(tokens + 1) // Format(format).tile_tokens),
        backend=kind,
        device=opened.index,
        num_threads=threads,
    )
    layer = _Layer(plan, opened, tokens, sequences)
    encode_seconds = layer.fill()
    attend_seconds = _time(layer.attend, opened, seconds)
    used = layer.used_bytes

    console.print(
        f"{sequences} x {tokens} tokens, {q_heads} query heads over {kv_heads}, {format}, {dtype}, {plan.describe}", soft_wrap=True
    )
    table = Table()
    baseline = "copy" if opened.asynchronous else "plain read"
    for column in ("what", "time", "GB/s of its bytes", f"of {baseline}"):
        table.add_column(column, justify="left" if column == "what" else "right")
    plain = _copy(used, opened, seconds) if opened.asynchronous else _plain_read(used, threads, opened, seconds)
    rate = used / attend_seconds / 1e9
    table.add_row(f"{baseline} of as many bytes ({used / 1e6:.1f} MB)", f"{1e6 * used / plain / 1e9:.0f} us", f"{plain:.1f}", "1.00")
    table.add_row(f"attend, {format}", f"{1e6 * attend_seconds:.0f} us", f"{rate:.1f}", f"{rate / plain:.2f}")
    torch, missing = _torch_for(kind)
    if torch is None:
        console.print(f"no comparison with PyTorch's attention: {missing}", style="dim", soft_wrap=True)
    else:
        if threads:
            torch.set_num_threads(threads)
        where = f"cuda:{opened.index}" if opened.asynchronous else "cpu"
        for each in (torch.float32, torch.bfloat16) if not opened.asynchronous else (getattr(torch, dtype),):
            full = 2 * sequences * tokens * kv_heads * head_dim * each.itemsize
            spent = _time(_sdpa(torch, each, where, sequences, tokens, q_heads, kv_heads, head_dim), opened, seconds)
            name = str(each).removeprefix("torch.")
            ratio = f"{spent / attend_seconds:.1f} x attend"
            table.add_row(f"PyTorch attention, {name} ({ratio})", f"{1e6 * spent:.0f} us", f"{full / spent / 1e9:.1f}", "")
    written = layer.encoded_bytes
    table.add_row(
        f"append and encode {written / 1e6:.1f} MB", f"{1e6 * encode_seconds:.0f} us", f"{written / encode_seconds / 1e9:.2f}", ""
    )
    console.print(table)


class _Layer:
    """One layer's records, staging and query: each sequence has its first tile and the last, unfinished one in staging, as in a cache."""

    def __init__(self, plan: Plan, device: Device, tokens: int, sequences: int) -> None:
        self._plan, self._device, dtype = plan, device, plan.dtype
        tile, heads, dim = plan.tile_tokens, plan.num_kv_heads, plan.head_dim
        tiles, rng = -(-(tokens + 1) // tile), np.random.default_rng(0)
        encoded = max(tiles - 2, 0)
        self._num_blocks = sequences * encoded

        def values(*shape: int) -> Any:
            return device.put(to_bits(rng.standard_normal(shape, np.float32), dtype), dtype)

        table = np.zeros((sequences, tiles), np.int32)
        slots = np.arange(sequences * min(tiles, 2), dtype=np.int32).reshape(sequences, -1)
        table[:, 0], table[:, -1] = ~slots[:, 0], ~slots[:, -1]
        table[:, 1:-1] = np.arange(self._num_blocks, dtype=np.int32).reshape(sequences, -1)
        self._chunk = min(_CHUNK_TILES, max(self._num_blocks, 1))
        self._k, self._v = (values(self._chunk * tile, heads, dim) for _ in "kv")
        self._scratch = device.empty((self._chunk, 2, heads, tile, dim), HOST_DTYPES[dtype], dtype)
        self._mapping = device.put(np.arange(self._chunk * tile))
        self._arrays = {
            "records": device.empty((max(self._num_blocks, 1), heads, plan.record_bytes), np.uint8),
            "staging": values(slots.size, 2, heads, tile, dim),
            "block_table": device.put(table),
            "seq_lens": device.put(np.full(sequences, tokens + 1, np.int32)),
            "cu_q_lens": device.put(np.arange(sequences + 1, dtype=np.int32)),
            "out": device.empty((sequences, plan.num_q_heads, dim), HOST_DTYPES[dtype], dtype),
        }
        self._q = values(sequences, plan.num_q_heads, dim)
        if device.asynchronous:
            self._arrays["workspace"] = device.empty((plan.workspace_bytes,), np.uint8)
        token_bytes = 2 * heads * dim * np.dtype(HOST_DTYPES[dtype]).itemsize
        staged = sequences * (tokens + 1 - encoded * tile)
        self.used_bytes = self._num_blocks * heads * plan.record_bytes + staged * token_bytes
        self.encoded_bytes = max(self._num_blocks, 1) * tile * token_bytes

    def _chunks(self) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Slots of the scratch staging, and blocks."""
        blocks = np.arange(max(self._num_blocks, 1), dtype=np.int32)
        parts = [blocks[at : at + self._chunk] for at in range(0, len(blocks), self._chunk)]
        return [(np.arange(len(part), dtype=np.int32), part) for part in parts]

    def fill(self) -> float:
        """Appends and encodes all records. Returns the seconds of the second time: the first one makes what is made once."""
        chunks = [(self._device.put(slots), self._device.put(blocks)) for slots, blocks in self._chunks()]
        spent = 0.0
        for _ in range(2):
            began = time.perf_counter()
            for slots, blocks in chunks:
                ops.append(self._plan, self._k, self._v, self._mapping, self._scratch)
                ops.encode(self._plan, self._scratch, self._arrays["records"], slots, blocks)
            self._device.synchronize()
            spent = time.perf_counter() - began
        return spent

    def attend(self) -> None:
        ops.attend(self._plan, self._q, **self._arrays)


def _time(body: Callable[[], Any], device: Device, seconds: float) -> float:
    """Median seconds of one call."""

    def measured(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            body()
        device.synchronize()
        return (time.perf_counter() - began) / calls

    measured(1)
    calls = math.ceil(_BETWEEN_WAITS / max(measured(1), 1e-6)) if device.asynchronous else 1
    end = time.perf_counter() + seconds
    spent: list[float] = []
    while not spent or time.perf_counter() < end:
        spent.append(measured(calls))
    return statistics.median(spent)


def _plain_read(size: int, threads: int, device: Device, seconds: float) -> float:
    """GB/s of summing `size` bytes as 64-bit words on as many threads as attend uses: what no attention over them can beat."""
    from concurrent.futures import ThreadPoolExecutor

    count = threads or next(backend.num_threads for backend in backends() if backend.name == "cpu")
    words = np.ones(max(size // 8, count), np.int64)
    parts = np.array_split(words, count)
    with ThreadPoolExecutor(count) as pool:
        spent = _time(lambda: list(pool.map(np.sum, parts)), device, seconds)
    return float(words.nbytes / spent / 1e9)


def _copy(size: int, device: Device, seconds: float) -> float:
    """GB/s of copying on the GPU, read and written bytes together, `size` of them."""
    source, target = (device.put(np.ones(max(size // 2, 1), np.uint8)) for _ in range(2))
    return float(2 * max(size // 2, 1) / _time(lambda: device.copy(target, source), device, seconds) / 1e9)


def _torch_for(backend: str) -> tuple[Any, str]:
    """torch where it runs on a backend's devices; else None and the reason."""
    try:
        torch: Any = importlib.import_module("torch")
    except ModuleNotFoundError:
        return None, "it is not installed"
    built = "ROCm" if torch.version.hip else f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs alone"
    if backend == "hip" and not torch.version.hip:
        return None, f"expected a torch built for ROCm, got {torch.__version__} built for {built}"
    if backend == "cpu" or torch.cuda.is_available():
        return torch, ""
    return None, f"torch {torch.__version__}, built for {built}, finds no GPU"


def _sdpa(
    torch: Any, dtype: Any, device: str, sequences: int, tokens: int, q_heads: int, kv_heads: int, head_dim: int
) -> Callable[[], Any]:
    """One decode step of PyTorch's attention, the query heads of a KV head packed as rows."""
    k, v = (torch.randn(sequences, kv_heads, tokens, head_dim, device=device).to(dtype) for _ in range(2))
    q = torch.randn(sequences, kv_heads, q_heads // kv_heads, head_dim, device=device).to(dtype)
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)
