"""CPU decode attention and encode: kvarn beside torch, ONNX Runtime and llama.cpp, in one process.

Each engine attends one query token per head to the same cached tokens. Its cache exists in so many copies that at least --min-bytes
of them are read before a copy comes again. A plain read of memory is measured right before every engine, because the bandwidth that a
shared machine grants changes from minute to minute; ratios between engines are the figures to look at.
"""

import argparse
import gc
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from engines import Kvarn, LlamaFlashAttention, OnnxRuntimeGqa, Problem, TorchSdpa, Unavailable
from measure import PlainRead, describe_machine, time_calls, usable_cores
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ENGINES: dict[str, Callable[[Problem], object]] = {
    "torch-fp32": lambda p: TorchSdpa(p, "float32"),
    "torch-bf16": lambda p: TorchSdpa(p, "bfloat16"),
    "onnxruntime-int8": lambda p: OnnxRuntimeGqa(p, 8),
    "onnxruntime-int4": lambda p: OnnxRuntimeGqa(p, 4),
    "llama-f16": lambda p: LlamaFlashAttention(p, "f16"),
    "llama-q8_0": lambda p: LlamaFlashAttention(p, "q8_0"),
    "llama-q4_0": lambda p: LlamaFlashAttention(p, "q4_0"),
}
PACKAGES = ["kvarn", "numpy", "torch", "onnxruntime", "llama-cpp-python"]
console = Console(width=None if sys.stdout.isatty() else 140)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768, help="cached tokens, a multiple of 128")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--gqa", type=int, nargs="+", default=[1, 4, 8], help="query heads per KV head")
    parser.add_argument("--formats", nargs="+", default=["k4v2_g128", "k4v4_g128", "k2v2_g128"])
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--min-bytes", type=float, default=512e6, help="bytes an engine reads before it repeats itself")
    parser.add_argument("--calls", type=int, default=30, help="timed calls per engine")
    parser.add_argument("--seconds", type=float, default=15, help="time limit per engine; a slow one is called less often")
    parser.add_argument("--only", help="regular expression on engine names, such as 'kvarn|torch'")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results", help="folder for the JSON and Markdown files")
    parser.add_argument("--name", help="stem of the files; default: from the kernels that ran")
    return parser.parse_args()


def make_problem(args: argparse.Namespace, gqa: int) -> Problem:
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((args.kv_heads, args.tokens, args.head_dim), dtype=np.float32) for _ in range(2))
    # Queries of this size make each head look at some hundreds of tokens, as trained models do, and not at all of them equally.
    q = 2 * rng.standard_normal((args.kv_heads * gqa, args.head_dim), dtype=np.float32)
    return Problem(k, v, q, args.threads, int(args.min_bytes))


def measure(engine, problem: Problem, exact: np.ndarray, args: argparse.Namespace, read: PlainRead) -> dict[str, object]:
    read_rate = read.bytes_per_second()
    timing = time_calls(engine.run, min_calls=args.calls, max_seconds=args.seconds)
    result = engine.result()
    error = float(np.linalg.norm(result - exact) / np.linalg.norm(exact))
    rate = engine.bytes_per_call / timing.median
    return {
        "engine": engine.name,
        "detail": engine.detail,
        "ms": timing.median * 1e3,
        "ms_10th": timing.low * 1e3,
        "ms_90th": timing.high * 1e3,
        "calls": timing.calls,
        "cache_bytes": engine.bytes_per_call,
        "gb_per_s": rate / 1e9,
        "plain_read_gb_per_s": read_rate / 1e9,
        "share_of_plain_read": rate / read_rate,
        "relative_error": error,
    }


def measure_encode(engine: Kvarn, problem: Problem, args: argparse.Namespace) -> dict[str, object]:
    timing = time_calls(engine.encode, min_calls=args.calls, max_seconds=args.seconds)
    tiles = engine.group * problem.shape[0]
    return {
        "engine": engine.name,
        "detail": engine.detail,
        "tiles": tiles,
        "us_per_tile_and_core": timing.median * 1e6 * min(args.threads, usable_cores()) / tiles,
        "calls": timing.calls,
    }


def run(args: argparse.Namespace) -> dict[str, object]:
    wanted = re.compile(args.only or "")
    builders = {f"kvarn-{name}": (lambda p, name=name: Kvarn(p, name)) for name in args.formats} | ENGINES
    builders = {name: build for name, build in builders.items() if wanted.search(name)}
    read = PlainRead(int(args.min_bytes), args.threads)
    rows, encode_rows, skipped = [], [], {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(args.gqa) * len(builders))
        for gqa in args.gqa:
            problem = make_problem(args, gqa)
            exact = problem.exact()
            for name, build in builders.items():
                progress.update(task, description=f"GQA {gqa}: {name}")
                try:
                    engine = build(problem)
                    rows.append({"gqa": gqa, "name": name} | measure(engine, problem, exact, args, read))
                    if isinstance(engine, Kvarn) and gqa == args.gqa[0]:
                        encode_rows.append(measure_encode(engine, problem, args))
                    del engine
                except Unavailable as reason:
                    skipped[name] = str(reason)
                gc.collect()
                progress.advance(task)
    shape = {"tokens": args.tokens, "kv_heads": args.kv_heads, "head_dim": args.head_dim, "min_bytes": int(args.min_bytes)}
    return {"machine": describe_machine(args.threads, PACKAGES), "shape": shape, "attend": rows, "encode": encode_rows, "skipped": skipped}


HEADINGS = ["GQA", "engine", "ms", "10-90 %", "calls", "MB read", "GB/s", "of plain read", "kvarn is faster by", "error"]


def report_lines(report: dict) -> list[list[str]]:
    """Cells of the attention table. The factor compares with the first kvarn format of the same GQA ratio."""
    lines = []
    for row in report["attend"]:
        own = next((r["ms"] for r in report["attend"] if r["gqa"] == row["gqa"] and r["name"].startswith("kvarn")), None)
        factor = "" if own is None or row["name"].startswith("kvarn") else f"{row['ms'] / own:.1f} x"
        lines.append(
            [
                str(row["gqa"]),
                row["engine"],
                f"{row['ms']:.2f}",
                f"{row['ms_10th']:.2f}-{row['ms_90th']:.2f}",
                str(row["calls"]),
                f"{row['cache_bytes'] / 1e6:.0f}",
                f"{row['gb_per_s']:.1f}",
                f"{100 * row['share_of_plain_read']:.0f} %",
                factor,
                f"{row['relative_error']:.1e}",
            ]
        )
    return lines


def print_report(report: dict) -> None:
    table = Table(title="Attention of one decode step")
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if i == 1 else "right")
    previous = None
    for line in report_lines(report):
        if previous not in (None, line[0]):
            table.add_section()
        previous = line[0]
        table.add_row(*line)
    console.print(table)
    if report["encode"]:
        encode = Table(title="Encode")
        for heading in ("format", "tiles per call", "us per tile and core"):
            encode.add_column(heading)
        for row in report["encode"]:
            encode.add_row(row["engine"], str(row["tiles"]), f"{row['us_per_tile_and_core']:.1f}")
        console.print(encode)
    for name, reason in report["skipped"].items():
        console.print(f"skipped {name}: {reason}", markup=False)


def markdown(report: dict) -> str:
    machine, shape = report["machine"], report["shape"]
    reads = [row["plain_read_gb_per_s"] for row in report["attend"]]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    text = [
        "# CPU decode attention and encode",
        "",
        f"- machine: {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {', '.join(machine['instruction sets'])}",
        f"- kernels: {report['attend'][0]['detail']}" if report["attend"] else "- kernels: none ran",
        f"- software: Python {machine['python']}, {packages}, commit {machine['commit']}",
        f"- work of a call: 1 query token per head, {shape['tokens']} cached tokens, {shape['kv_heads']} KV heads, "
        f"head_dim {shape['head_dim']}; every engine reads {shape['min_bytes'] / 1e6:.0f} MB or more before it repeats a copy of its cache",
        f"- plain read, measured before every engine: {min(reads):.1f} to {max(reads):.1f} GB/s" if reads else "- plain read: not measured",
        "- error: relative L2 error of all outputs against float64 attention over the unquantised Gaussian K and V, so mostly the format's",
        f"- command: `{machine['command']}`",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "|".join("---" if i == 1 else "---:" for i in range(len(HEADINGS))) + "|",
    ]
    text += ["| " + " | ".join(line) + " |" for line in report_lines(report)]
    if report["encode"]:
        text += ["", "| encode | tiles per call | us per tile and core |", "|---|---:|---:|"]
        text += [f"| {row['engine']} | {row['tiles']} | {row['us_per_tile_and_core']:.1f} |" for row in report["encode"]]
    text += [""] + [f"- skipped {name}: {reason}" for name, reason in report["skipped"].items()] if report["skipped"] else []
    return "\n".join(text) + "\n"


def main() -> int:
    args = parse_arguments()
    report = run(args)
    print_report(report)
    if not report["attend"]:
        console.print("nothing could be measured")
        return 1
    name = args.name or "attend_" + re.sub(r"[^a-z0-9]+", "_", report["attend"][0]["detail"].lower()).strip("_")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / f"{name}.md").write_text(markdown(report))
    console.print(f"written: {args.out / name}.json and .md", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
