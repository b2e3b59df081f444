"""The command ``kvarn``: demo, prepare, eval, inspect, doctor, bench. Needs typer and rich; each imports the rest of what it needs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from kvarn._errors import KvarnError
from kvarn._moments import CALIBRATION_TOKENS

if TYPE_CHECKING:
    from kvarn._doctor.report import Result

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="KV-cache quantization with variance normalisation.", rich_markup_mode=None
)


@app.command()
def demo(
    model: Annotated[Path | None, typer.Option(help="folder of the model; models/tiny-reason of a clone when not given")] = None,
    output: Annotated[Path, typer.Option(help="folder for the plot")] = Path("demo-output"),
    formats: Annotated[str, typer.Option(help="record formats, comma separated")] = "k4v4_g128,k4v2_g128,k2v2_g128",
    problems: Annotated[int | None, typer.Option(min=1, help="problems per task")] = None,
    threads: Annotated[int, typer.Option(min=0, help="PyTorch threads; 0: its choice")] = 0,
) -> None:
    """Solve generated problems with a small model through KVarN caches, side by side with the 16-bit cache."""
    from kvarn.demo.show import run

    run(model=model, output=output, formats=formats.split(","), problems=problems, threads=threads, console=Console())


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="folder or hub name of a causal language model of transformers")],
    formats: Annotated[str, typer.Option(help="what is compared, comma separated; see docs/ACCURACY.md for the names")] = "",
    what: Annotated[str, typer.Option(help="text (bits and divergence), growth (of errors), layers (K, V, attention)")] = "text,layers",
    tasks: Annotated[str, typer.Option(help="problems to solve: chase, regs, add, sort, retrieve, or all")] = "",
    level: Annotated[str, typer.Option(help="size of the problems: easy, base, hard, long, longest")] = "base",
    problems: Annotated[int, typer.Option(min=1, help="problems per task")] = 20,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy")] = 0.0,
    seeds: Annotated[int, typer.Option(min=1, help="sampled runs per format")] = 1,
    text: Annotated[Path | None, typer.Option(help="text file; the sources of networkx, pygments and simplejson when not given")] = None,
    length: Annotated[int, typer.Option(help="tokens of a window of text")] = 2048,
    windows: Annotated[int, typer.Option(min=1, help="windows of text")] = 4,
    step_tokens: Annotated[int, typer.Option(min=1, help="tokens read at once; 1: as decoding does")] = 128,
    calibration: Annotated[int, typer.Option(min=1, help="tokens that calibrate, at most; as for prepare")] = CALIBRATION_TOKENS,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    dtype: Annotated[str, typer.Option(help="of the model: auto (float16 on a GPU, else float32), float16, bfloat16, float32")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="PyTorch threads; 0: its choice")] = 0,
    report: Annotated[Path | None, typer.Option(help="report to write: a name that ends in .md or .html")] = None,
) -> None:
    """Measure what cache formats cost on a model: text, problems, and the tensors themselves, beside other methods."""
    from kvarn.eval.show import FORMATS, run

    run(
        model=model,
        formats=formats or FORMATS,
        what=what,
        tasks=tasks,
        level=level,
        problems=problems,
        temperature=temperature,
        seeds=seeds,
        text=text,
        length=length,
        windows=windows,
        step_tokens=step_tokens,
        calibration=calibration,
        device=device,
        dtype=dtype,
        threads=threads,
        report_path=report,
        console=Console(),
    )


@app.command()
def prepare(
    model: Annotated[str, typer.Argument(help="a transformers causal language model: folder or name")],
    output: Annotated[Path, typer.Option("-o", "--output", help="safetensors file to write")] = Path("moments.safetensors"),
    text: Annotated[Path | None, typer.Option(help="text file to read; random tokens, which serve worse, when not given")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="at most so many tokens")] = CALIBRATION_TOKENS,
    context: Annotated[
        int | None, typer.Option(min=1, help="positions with moments of their own; the model's maximum, up to 8192, when not given")
    ] = None,
    device: Annotated[str, typer.Option(help="where the model runs")] = "cpu",
    seed: Annotated[int, typer.Option(help="of random tokens")] = 0,
) -> None:
    """Make the moments of a model once, so that caches can round with feedback."""
    from kvarn.integrations.prepare import run

    run(model, output, text=text, num_tokens=tokens, context=context, device=device, seed=seed, console=Console())


@app.command()
def balance(
    model: Annotated[str, typer.Argument(help="a transformers causal language model: folder or name")],
    output: Annotated[Path, typer.Argument(help="folder to write the balanced model and its moments to")],
    moments: Annotated[Path, typer.Option(help="the model's moments, of kvarn prepare")] = Path("moments.safetensors"),
) -> None:
    """Write a model with the same function whose K and V cost less to round, and its moments."""
    from kvarn.integrations.prepare import save_balanced

    save_balanced(model, output, moments=moments, console=Console())


@app.command()
def inspect(
    what: Annotated[str, typer.Argument(help="a format name (k4v2_g128) or a file that Cache.save wrote")],
    head_dim: Annotated[int, typer.Option(help="channels of one head, for a format")] = 128,
) -> None:
    """Show where every byte of a record format lies, or what a saved sequence holds."""
    from kvarn._inspect import show_file, show_format

    console = Console()
    if Path(what).is_file():
        show_file(Path(what), console)
    else:
        show_format(what, head_dim, console)


@app.command()
def doctor(
    backend: Annotated[str, typer.Option(help="cpu, cuda or hip")] = "cpu",
    device: Annotated[int, typer.Option(min=0, help="index of the GPU")] = 0,
    output: Annotated[Path, typer.Option(help="file for the report, to attach to an issue: Markdown, or JSON for .json")] = Path(
        "kvarn-doctor.md"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="a small choice of the checks")] = False,
) -> None:
    """Check every operation of a backend on this machine and write a report. Exit status 1: something is wrong."""
    from kvarn._doctor import run

    console = Console()

    def show(result: Result) -> None:
        console.print(f"{result.outcome:<8}{result.group}: {result.name}: {result.text()}", highlight=False, markup=False, soft_wrap=True)

    report = run(backend, output, device, quick=quick, progress=show)
    console.print(f"{report.summary}; the report is in {output}", highlight=False, markup=False, soft_wrap=True)
    if report.count("failed"):
        raise typer.Exit(1)


@app.command()
def bench(
    format: Annotated[str, typer.Option(help="record format")] = "k4v2_g128",
    tokens: Annotated[int, typer.Option(min=256, help="context of each sequence")] = 8192,
    sequences: Annotated[int, typer.Option(min=1)] = 1,
    q_heads: Annotated[int, typer.Option(min=1)] = 32,
    kv_heads: Annotated[int, typer.Option(min=1)] = 8,
    head_dim: Annotated[int, typer.Option()] = 128,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32")] = "float16",
    device: Annotated[str, typer.Option("--device", "--backend", help="cpu, cuda, cuda:N or hip")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="of the CPU backend; 0: all that this process may use")] = 0,
    seconds: Annotated[float, typer.Option(min=0.05, help="time for each measurement")] = 0.5,
) -> None:
    """Time decode attention and encoding here, beside a plain read of the same bytes and PyTorch's attention where it is installed."""
    from kvarn._bench import run

    run(
        format=format,
        tokens=tokens,
        sequences=sequences,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        threads=threads,
        seconds=seconds,
        console=Console(),
    )


def main() -> int:
    """Runs the command line and returns the exit status; what a user got wrong is one line, not a traceback."""
    try:
        status = app(standalone_mode=False)
    except (KvarnError, FileNotFoundError) as error:
        print(f"kvarn: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"kvarn: needs the package {error.name}; install it with: pip install 'kvarn[demo]'", file=sys.stderr)
        return 1
    except typer.Abort:
        return 130
    except Exception as error:
        # Usage errors of typer's parser know how to print themselves.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            return int(error.exit_code)
        raise
    return status if isinstance(status, int) else 0
