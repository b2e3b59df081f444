"""Reports in Markdown, from the results of `kvarn eval` and of the campaign."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers are right-aligned."""
    body = [[str(cell) for cell in row] for row in rows]
    marks = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(header), marks, *body])


def number(value: object, digits: int = 4) -> str:
    """A number of some digits, "-" for none, small ones with an exponent."""
    if value is None:
        return "-"
    if not isinstance(value, (int, float)):
        return str(value)
    if value != value:
        return "-"
    return f"{value:.1e}" if 0 < abs(value) < 10**-digits else f"{value:.{digits}f}"


def _code(name: object) -> str:
    return f"`{name}`"


def text_table(rows: Iterable[Row]) -> str:
    """Text results, a row for each format."""
    header = ("format", "bits", "added bits/byte", "±", "KL mean", "KL median", "KL 99.9 %", "top-1 agreement")
    return table(
        header,
        (
            (
                _code(row["format"]),
                number(row["bits"], 3),
                number(row["added_bits_per_byte"], 5),
                number(row.get("added_interval"), 5),
                number(row.get("kl_mean"), 5),
                number(row.get("kl_median"), 6),
                number(row.get("kl_999"), 3),
                number(row.get("top1_agreement")),
            )
            for row in rows
        ),
    )


def tasks_table(rows: Iterable[Row]) -> str:
    """Right answers, a row for each format."""
    made = []
    for row in rows:
        low, high = row["interval"]
        paired = row.get("paired")
        difference = "-" if paired is None else f"{100 * paired[0]:+.1f} % ({100 * paired[1]:+.1f} to {100 * paired[2]:+.1f})"
        by_task = ", ".join(f"{name.split('/')[0]} {right}" for name, (right, _) in row["by_task"].items())
        made.append(
            (
                _code(row["format"]),
                number(row["bits"], 3),
                f"{row['right']} of {row['count_all']}",
                f"{100 * low:.1f} to {100 * high:.1f} %",
                difference,
                by_task,
            )
        )
    return table(("format", "bits", "right", "95 % interval", "against fp16, paired", "by task"), made)


def layers_table(rows: Iterable[Row]) -> str:
    """Errors of K, V and attention, a row for each format."""
    names = ("k_error", "v_error", "k_norm_share", "k_norm_p50", "k_norm_p99", "k_norm_max", "attention_kl", "logit_slope", "output_error")
    header = ("format", "K error", "V error", "norm share of K's", "norm p50", "p99", "max", "attention KL", "logit slope", "output error")
    return table(header, ([_code(row["format"]), *(number(row.get(name)) for name in names)] for row in rows))


def growth_table(rows: Iterable[Row]) -> str:
    """Accumulated beside static: divergence, and the errors of the last quarter of the tiles."""

    def late(part: Row, name: str) -> float:
        values = part[name][-max(1, len(part[name]) // 4) :]
        return float(sum(values) / len(values))

    made = []
    for row in rows:
        own, once = row["accumulated"], row["static"]
        made.append(
            (
                _code(row["format"]),
                number(row["bits"], 3),
                number(once["kl_mean"], 5),
                number(own["kl_mean"], 5),
                number(own["kl_mean"] - once["kl_mean"], 5),
                number(late(once, "k")),
                number(late(own, "k")),
                number(late(once, "v")),
                number(late(own, "v")),
            )
        )
    header = (
        "format",
        "bits",
        "KL static",
        "KL accumulated",
        "difference",
        "K error static",
        "accumulated",
        "V error static",
        "accumulated",
    )
    return table(header, made)


def _goal_ratios(rows: list[Row]) -> str:
    """Added bits per byte over those of `published` at the same widths."""
    found = {row["format"]: row["added_bits_per_byte"] for row in rows}
    made = []
    for width, goal in (("k4v4", 0.6), ("k4v2", 0.3), ("k2v2", 0.45)):
        base = found.get(f"published-{width}")
        if base:
            cells = (
                number(found[name] / base, 3) if (name := f"{method}-{width}") in found else "-"
                for method in ("kvarn", "kvarn+k", "kvarn+v", "kvarn+kv")
            )
            made.append((width, number(base, 5), *cells, goal))
    return table(("widths", "published", "kvarn", "kvarn+k", "kvarn+v", "kvarn+kv", "goal"), made) if made else ""


def campaign_markdown(rows: list[Row]) -> str:
    """All results of a campaign."""
    parts = ["# Results", ""]
    for row in rows:
        if row["kind"] == "environment" and "device" in row:
            parts += [", ".join(f"{key} {value}" for key, value in row.items() if key not in ("kind", "wall_seconds")) + ".", ""]
    good = [row for row in rows if "error" not in row]

    def section(kind: str, keys: tuple[str, ...], make: Callable[[list[Row]], str]) -> None:
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in good:
            if row["kind"] == kind:
                groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
        for values, members in groups.items():
            title = ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
            parts.extend([f"## {kind}: {title}", "", make(members), ""])

    def with_ratios(members: list[Row]) -> str:
        ratios = _goal_ratios(members)
        full = f"16 bits: {members[0]['full_bits_per_byte']:.5f} bits per byte over {members[0]['tokens']} tokens.\n\n"
        return full + text_table(members) + (f"\n\nAdded bits per byte, divided by those of `published`:\n\n{ratios}" if ratios else "")

    section("text", ("model", "length"), with_ratios)
    section(
        "tasks",
        ("model", "level", "temperature", "seed"),
        lambda members: tasks_table([{**row, "count_all": _count(row)} for row in members]),
    )
    section("growth", ("model", "length"), growth_table)
    section("layers", ("model", "length"), layers_table)
    failed = [row for row in rows if "error" in row]
    if failed:
        parts += ["## Failed", "", *(f"- {row['kind']} {row.get('format')}: {row['error']}" for row in failed), ""]
    return "\n".join(parts)


def _count(row: Row) -> int:
    return sum(count for _, count in row["by_task"].values())


def main(arguments: list[str]) -> int:
    """Writes the report of a campaign's results.jsonl to the terminal."""
    print(campaign_markdown([json.loads(line) for line in Path(arguments[0]).read_text().splitlines()]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
