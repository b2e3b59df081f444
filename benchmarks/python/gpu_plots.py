"""Plots of bench_attend_gpu.py's results."""

from pathlib import Path
from typing import Any


def plot(results: dict[str, Any], file: Path) -> Path:
    """Roofline (GB/s over bytes per call, under the copy's rate) and the factor over fp16, as one PNG.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    roofline, factors = figure.subplots(1, 2)
    copy = results["copy"]
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in results["attend"]:
        tables.setdefault(row["table"], []).append(row)
    for table, rows in tables.items():
        roofline.scatter([row["bytes"] for row in rows], [row["gb_per_s"] for row in rows], label=table, s=24)
    roofline.axhline(copy * 1e-9, color="black", linewidth=1)
    roofline.annotate(
        "copy, same run", (1, copy * 1e-9), xycoords=("axes fraction", "data"), xytext=(-4, -12), textcoords="offset points", ha="right"
    )
    roofline.set(xscale="log", xlabel="bytes of records and staging per call", ylabel="GB/s", ylim=(0, copy * 1.1e-9))
    roofline.set_title("attention: bytes read per second")
    roofline.legend(fontsize="small")
    compared = [row for row in results["attend"] if row["best_fp16_us"]]
    at = range(len(compared))
    factors.barh(at, [row["best_fp16_us"] / row["us"] for row in compared], color="tab:blue")
    factors.set_yticks(at, [row["name"] for row in compared], fontsize="x-small")
    factors.axvline(1, color="black", linewidth=1)
    factors.invert_yaxis()
    factors.set_title("times faster than the best fp16 engine")
    figure.suptitle(str(results["machine"]["device"]))
    figure.savefig(file, dpi=130)
    return file
