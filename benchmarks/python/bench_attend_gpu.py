"""Attention over kvarn's records on a GPU beside torch and FlashInfer on fp16, and encoding, in one run with a plain copy.

    python benchmarks/python/bench_attend_gpu.py --out benchmarks/results

Writes gpu-<device>.md, .json and .png. Every time is the median of 30 replays of a CUDA graph that calls the engine on one copy of its data
after the other, so that the L2 cache holds none of what is read. GB/s counts the bytes of records and staging that a call must read, once.
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

from gpu_plots import plot


def shapes() -> "list[Shape]":  # noqa: F821
    from gpu_attention import Shape

    rows: list[Shape] = []

    def add(table: str, name: str, contexts: list[int], **options: Any) -> None:
        rows.append(Shape(name, contexts, groups={table}, **options))

    for batch, q_heads, kv_heads, context in (
        (1, 32, 8, 8192),
        (1, 32, 8, 32768),
        (1, 32, 8, 131072),
        (16, 32, 8, 2048),
        (16, 32, 8, 32768),
        (64, 32, 8, 8192),
        (16, 64, 8, 32768),
        (32, 8, 8, 16384),
    ):
        add("shapes", f"B={batch}, {q_heads}/{kv_heads}, {context:,}", [context] * batch, q_heads=q_heads, kv_heads=kv_heads)
    for group in (1, 3, 4, 5, 8, 16):
        add("query heads per KV head", f"GQA {group}", [8192] * 64, q_heads=8 * group)
    for q_len in (1, 2, 4, 8):
        add("queries per sequence", f"{q_len} queries", [8192] * 64, q_len=q_len)
    for head_dim, context in ((64, 16384), (128, 8192), (256, 4096)):
        add("head_dim", f"head_dim {head_dim}", [context] * 64, head_dim=head_dim)
    for name in ("k2v2_g128", "k3v2_g128", "k4v2_g128", "k4v4_g128", "k8v4_g128"):
        add("formats", name, [8192] * 64, format=name)
    for sequences, longest in ((64, 60_000), (256, 30_000)):
        lengths = [int(100 * (longest / 100) ** (i / (sequences - 1))) for i in range(sequences)]
        add("ragged batches", f"{sequences} of 100 to {longest:,}", lengths, staged=True)
    add("ragged batches", "one of 131,072 among 63 of 512", [131072] + [512] * 63, staged=True)
    for context in (128, 256, 512, 1024, 2048):
        for what, options in (
            ("as a cache has it", {"staged": True}),
            ("all tiles encoded", {}),
            ("without rotations", {"staged": True, "rotations": False}),
        ):
            # 20 tokens into the last tile, so that there is an unfinished one.
            tokens = context - 108 if options.get("staged") and context > 128 else context
            add("short contexts", f"B=64, {tokens:,}, {what}", [tokens] * 64, **options)
    add("short contexts", "B=64, 8,192, without rotations", [8192] * 64, rotations=False)
    return rows


def measure_row(shape: Any, copy: float, engines: list[str], seconds: float) -> dict[str, Any]:
    import torch
    from gpu_attention import Kvarn, flashinfer_calls, torch_calls
    from gpu_measure import time_graph

    row: dict[str, Any] = {"name": shape.name, "table": sorted(shape.groups)[0], "q_len": shape.q_len, "format": shape.format}
    start = time.perf_counter()
    ours = Kvarn(shape)
    row["error"] = ours.error()
    timing = time_graph(ours, max(ours.copies, 5))
    row.update(
        us=timing.median,
        us_low=timing.low,
        us_high=timing.high,
        bytes=ours.bytes,
        gb_per_s=ours.bytes / timing.median * 1e-3,
        of_copy=ours.bytes / timing.median * 1e6 / copy,
        plan=ours.plan.describe,
        fp16_at_copy_us=shape.fp16_bytes / copy * 1e6,
    )
    del ours
    torch.cuda.empty_cache()
    row["others"], row["failed"] = {}, {}
    for name, make in (("torch", torch_calls), ("flashinfer", flashinfer_calls)):
        if name not in engines or shape.staged or not shape.rotations or time.perf_counter() - start > seconds:
            continue
        try:
            calls = make(shape)
        except Exception as error:
            row["failed"][name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        for engine, call in calls.items():
            try:
                row["others"][engine] = time_graph(call, max(call.copies, 5), repeats=15).median  # type: ignore[attr-defined]
            except Exception as error:  # noqa: PERF203  a backend that does not do this shape
                row["failed"][engine] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        del calls
        torch.cuda.empty_cache()
    fp16 = [value for engine, value in row["others"].items() if not engine.endswith("fp8")]
    row["best_fp16_us"] = min(fp16) if fp16 else None
    return row


def measure_encode(name: str, head_dim: int, dtype: str, options: dict[str, str]) -> dict[str, Any]:
    import torch
    from gpu_measure import time_graph

    import kvarn
    from kvarn import ops

    slots, heads = 256, 8
    plan = kvarn.Plan(name, head_dim=head_dim, num_kv_heads=heads, dtype=dtype, backend="cuda")
    staging = torch.randn(slots, 2, heads, plan.tile_tokens, head_dim, device="cuda").to(getattr(torch, dtype))
    records = torch.empty(slots, heads, plan.record_bytes, dtype=torch.uint8, device="cuda")
    index = torch.arange(slots, dtype=torch.int32, device="cuda")
    timing = time_graph(lambda _: ops.encode(plan, staging, records, index, index, **options), 5)
    # K and V are tiles of their own.
    return {
        "format": name,
        "head_dim": head_dim,
        "dtype": dtype,
        **options,
        "us": timing.median,
        "tiles_per_s": 2 * slots * heads / timing.median * 1e6,
    }


def markdown(results: dict[str, Any]) -> str:
    from gpu_measure import machine_lines, markdown_table

    copy = results["copy"]
    lines = [f"# GPU attention and encoding: {results['machine']['device']}", "", *machine_lines(results["machine"])]
    lines += [f"- clocks before: {results['clocks'][0]}", f"- clocks after: {results['clocks'][1]}"]
    lines += [f"- device-to-device copy of 1 GiB, read and written: {copy * 1e-9:,.0f} GB/s", ""]
    lines += [
        "Times are medians of 30 replays of a CUDA graph over copies of the data that no cache holds; GB/s counts the bytes of records and",
        'staging a call must read. "fp16" is the fastest of the fp16 engines that ran, "fp16 at copy speed" what reading K and V in fp16',
        "would take at the copy's rate. The error is the largest relative L2 error of a row of the first sequence against float64 on the",
        "same records.",
        "",
    ]
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in results["attend"]:
        tables.setdefault(row["table"], []).append(row)
    for table, rows in tables.items():
        body = []
        for row in rows:
            best = row["best_fp16_us"]
            engine = min((e for e in row["others"] if not e.endswith("fp8")), key=row["others"].get, default="")
            body.append(
                [
                    row["name"],
                    f"{row['us']:,.1f}",
                    f"{row['gb_per_s']:,.0f}",
                    f"{100 * row['of_copy']:.0f} %",
                    f"{best:,.1f} ({engine})" if best else "-",
                    f"{best / row['us']:.2f}" if best else "-",
                    f"{row['fp16_at_copy_us'] / row['us']:.2f}",
                    f"{row['error']:.1e}",
                ]
            )
        header = [table, "us", "GB/s", "of copy", "fp16 us", "times faster", "than fp16 at copy speed", "error"]
        lines += [f"## {table[0].upper()}{table[1:]}", "", *markdown_table(header, body), ""]
    if results["encode"]:
        body = [
            [
                f"{row['format']}, head_dim {row['head_dim']}, {row['dtype']}, {row.get('rounding', 'auto')}",
                f"{row['us']:,.1f}",
                f"{row['tiles_per_s'] * 1e-6:.2f}",
            ]
            for row in results["encode"]
        ]
        lines += [
            "## Encode",
            "",
            "2,048 pairs of tiles; K and V counted apart.",
            "",
            *markdown_table(["format", "us", "million tiles/s"], body),
            "",
        ]
    failed = sorted({f"{engine}: {reason}" for row in results["attend"] for engine, reason in row["failed"].items()})
    if failed:
        lines += ["## What did not run", "", *(f"- {line}" for line in failed), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the results")
    parser.add_argument("--only", default="", help="regular expression: tables and rows to run")
    parser.add_argument("--engines", nargs="*", default=["torch", "flashinfer"], help="engines beside kvarn: torch, flashinfer")
    parser.add_argument("--seconds", type=float, default=480, help="no new row after this time")
    parser.add_argument("--plot", type=Path, help="draw the plot of a JSON file that was made earlier, and stop")
    args = parser.parse_args()
    if args.plot:
        print(plot(json.loads(args.plot.read_text()), args.plot.with_suffix(".png")))
        return

    import torch
    from gpu_measure import clocks, copy_bytes_per_second, describe_gpu

    if not torch.cuda.is_available():
        parser.error(f"expected a CUDA device, got none with torch {torch.__version__}")
    start = time.perf_counter()
    torch.manual_seed(0)
    results: dict[str, Any] = {"machine": describe_gpu(["kvarn", "torch", "flashinfer-python", "numpy"]), "copy": copy_bytes_per_second()}
    results.update(clocks=[clocks(), {}], attend=[], encode=[], left_out=[])
    print(f"{results['machine']['device']}, copy {results['copy'] * 1e-9:,.0f} GB/s", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", str(results["machine"]["device"]).lower()).strip("-")
    file = args.out / f"gpu-{device}.json"

    def save() -> None:
        results["clocks"][1] = clocks()
        file.write_text(json.dumps(results, indent=1, default=str) + "\n")
        file.with_suffix(".md").write_text(markdown(results))

    encodes = [
        ("k4v2_g128", 128, "float16", {}),
        ("k4v2_g128", 128, "bfloat16", {}),
        ("k4v4_g128", 128, "float16", {}),
        ("k2v2_g128", 128, "float16", {}),
        ("k2v2_g128", 128, "float16", {"rounding": "minmax"}),
        ("k3v2_g128", 128, "float16", {}),
        ("k8v4_g128", 128, "float16", {}),
        ("k4v2_g128", 64, "float16", {}),
        ("k4v2_g128", 256, "float16", {}),
        ("k4v2_g64", 128, "float16", {}),
    ]
    for name, head_dim, dtype, options in encodes:
        if re.search(args.only, f"encode {name}"):
            row = measure_encode(name, head_dim, dtype, options)
            results["encode"].append(row)
            print(f"encode {name} D{head_dim} {dtype} {options or ''}: {row['tiles_per_s'] * 1e-6:.2f} million tiles/s", flush=True)
    for shape in shapes():
        if not re.search(args.only, f"{sorted(shape.groups)[0]} {shape.name}"):
            continue
        if time.perf_counter() - start > args.seconds:
            results["left_out"].append(shape.name)
            continue
        row = measure_row(shape, results["copy"], args.engines, args.seconds - (time.perf_counter() - start))
        results["attend"].append(row)
        best = f", {row['best_fp16_us'] / row['us']:.2f} x fp16" if row["best_fp16_us"] else ""
        print(
            f"{row['table']}: {row['name']}: {row['us']:.1f} us, {100 * row['of_copy']:.0f} % of copy{best}, error {row['error']:.1e}",
            flush=True,
        )
        save()
    save()
    if results["left_out"]:
        print(f"left out after {args.seconds:.0f} s: {', '.join(results['left_out'])}")
    try:
        print(plot(results, file.with_suffix(".png")))
    except ModuleNotFoundError as error:
        print(f"no plot ({error}); draw it where matplotlib is: {Path(__file__).name} --plot {file}")


if __name__ == "__main__":
    main()
