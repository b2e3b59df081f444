"""Reports in Markdown or HTML, from the rows that were measured.

``python -m kvarn.eval.report results.jsonl report.html`` makes one of a campaign's results.
"""

from __future__ import annotations

import base64
import html
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is left-aligned and holds names in code."""

    header: Sequence[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """As Markdown."""
        marks = ["---"] + ["---:"] * (len(self.header) - 1)
        lines = [list(self.header), marks, *([f"`{row[0]}`", *row[1:]] for row in self.rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def html(self) -> str:
        """As HTML."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.header)
        body = "".join(
            f"<tr><td><code>{html.escape(row[0])}</code></td>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:]) + "</tr>\n"
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"


@dataclass(frozen=True)
class Figure:
    """A plot as PNG."""

    title: str
    png: bytes


@dataclass(frozen=True)
class Section:
    """A title and what is under it: text, tables, figures."""

    title: str
    parts: list[str | Table | Figure]


def number(value: object, digits: int = 4) -> str:
    """A number of some digits, "-" for none, small ones with an exponent."""
    if value is None:
        return "-"
    if not isinstance(value, (int, float)):
        return str(value)
    if value != value:
        return "-"
    return f"{value:.1e}" if 0 < abs(value) < 10**-digits else f"{value:.{digits}f}"


def text_table(rows: Iterable[Row]) -> Table:
    """Text results, a row for each format."""
    header = ("format", "bits", "added bits/byte", "±", "KL mean", "±", "KL median", "KL 99.9 %", "top-1 agreement")
    columns = [("added_bits_per_byte", 5), ("added_interval", 5), ("kl_mean", 5), ("kl_interval", 5)]
    columns += [("kl_median", 6), ("kl_999", 3), ("top1_agreement", 4)]
    return Table(
        header, [[row["format"], number(row["bits"], 3), *(number(row.get(key), digits) for key, digits in columns)] for row in rows]
    )


def tasks_table(rows: Iterable[Row]) -> Table:
    """Right answers, a row for each format."""
    made = []
    for row in rows:
        low, high = row["interval"]
        paired = row.get("paired")
        difference = "-" if paired is None else f"{100 * paired[0]:+.1f} % ({100 * paired[1]:+.1f} to {100 * paired[2]:+.1f})"
        by_task = ", ".join(f"{name} {right}" for name, (right, _) in row["by_task"].items())
        right = f"{row['right']} of {row['count']}"
        made.append([row["format"], number(row["bits"], 3), right, f"{100 * low:.1f} to {100 * high:.1f} %", difference, by_task])
    return Table(("format", "bits", "right", "95 % interval", "against fp16, paired", "right by task"), made)


def layers_table(rows: Iterable[Row]) -> Table:
    """Errors of K, V and attention, a row for each format."""
    names = ("k_error", "v_error", "k_norm_share", "k_norm_p50", "k_norm_p99", "k_norm_max", "attention_kl", "logit_slope", "output_error")
    header = ("format", "K error", "V error", "norm share of K's", "norm p50", "p99", "max", "attention KL", "logit slope", "output error")
    return Table(header, [[row["format"], *(number(row.get(name)) for name in names)] for row in rows])


def growth_table(rows: Iterable[Row]) -> Table:
    """Accumulated beside static: divergence, and the errors of the last quarter of the tiles."""

    def late(part: Row, name: str) -> float:
        values = part[name][-max(1, len(part[name]) // 4) :]
        return float(sum(values) / len(values))

    made = []
    for row in rows:
        own, once = row["accumulated"], row["static"]
        kl = (once["kl_mean"], own["kl_mean"], own["kl_mean"] - once["kl_mean"])
        errors = [number(late(part, name)) for name in "kv" for part in (once, own)]
        made.append([row["format"], number(row["bits"], 3), *(number(value, 5) for value in kl), *errors])
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
    return Table(header, made)


def ratios_table(rows: Iterable[Row]) -> Table:
    """Added bits per byte over those of `published` at the same widths."""
    found = {row["format"]: row["added_bits_per_byte"] for row in rows}
    methods = ("kvarn", "kvarn+k", "kvarn+v", "kvarn+kv")
    made = []
    for width in ("k4v4", "k4v2", "k2v2"):
        base = found.get(f"published-{width}")
        if base:
            made.append([width, number(base, 5), *(number(found[n] / base, 3) if (n := f"{m}-{width}") in found else "-" for m in methods)])
    return Table(("widths", "published", *methods), made)


_COLOURS = ("#1b7f79", "#2a6fb0", "#c8553d", "#8a5fb0", "#b08a2a", "#444444", "#6a9f3a", "#d08fb0")


def _method(name: str) -> str:
    return name.rsplit("-", 1)[0]


def _png(draw: Callable[[Any, Any], None], width: float = 7.5) -> bytes:
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(width, 4.4), layout="constrained")
    draw(figure, axis)
    axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    pyplot.close(figure)
    return buffer.getvalue()


def plot_size(rows: list[Row]) -> Figure:
    """Bits per value against divergence."""

    def draw(figure: Any, axis: Any) -> None:
        methods = list(dict.fromkeys(_method(row["format"]) for row in rows))
        for i, method in enumerate(methods):
            points = sorted((row["bits"], max(row["kl_mean"], 1e-8)) for row in rows if _method(row["format"]) == method)
            axis.plot(*zip(*points, strict=True), "o-", color=_COLOURS[i % len(_COLOURS)], label=method, markersize=4, linewidth=1)
        axis.set(xlabel="bits per value, metadata included", ylabel="KL of the next token, nats", yscale="log")
        axis.legend(frameon=False, fontsize=7, ncols=2)

    return Figure("Size against divergence", _png(draw))


def plot_growth(rows: list[Row], name: str = "k") -> Figure:
    """Error by tile: accumulated (solid) and static (dashed)."""

    def draw(figure: Any, axis: Any) -> None:
        for i, row in enumerate(rows):
            for label, style in (("accumulated", "-"), ("static", "--")):
                values = row[label][name][1:]
                shown = row["format"] if label == "accumulated" else None
                axis.plot(range(1, len(values) + 1), values, style, color=_COLOURS[i % len(_COLOURS)], label=shown, linewidth=1)
        axis.set(xlabel="tile of 128 tokens", ylabel=f"relative squared error of {name.upper()}", yscale="log")
        axis.legend(frameon=False, fontsize=7, ncols=2)

    return Figure(f"Errors of {name.upper()} over the text: accumulated (solid), static (dashed)", _png(draw))


def plot_tails(rows: list[Row]) -> Figure:
    """Quantiles of the relative error of K's token norms."""
    quantiles = ("p50", "p95", "p99", "p999", "max")

    def draw(figure: Any, axis: Any) -> None:
        for i, row in enumerate(rows):
            values = [max(row[f"k_norm_{q}"], 1e-6) for q in quantiles]
            axis.plot(quantiles, values, "o-", color=_COLOURS[i % len(_COLOURS)], label=row["format"], markersize=3, linewidth=1)
        axis.set(xlabel="quantile over tokens", ylabel="relative error of K's token norm", yscale="log")
        axis.legend(frameon=False, fontsize=7, ncols=2)

    return Figure("Tails of the token norms' error", _png(draw))


def plot_answers(rows: list[Row]) -> Figure:
    """Right answers with their intervals."""

    def draw(figure: Any, axis: Any) -> None:
        names = [row["format"] for row in rows]
        shares = [100 * row["right"] / max(1, row["count"]) for row in rows]
        reach = [[s - 100 * row["interval"][0], 100 * row["interval"][1] - s] for s, row in zip(shares, rows, strict=True)]
        axis.barh(names, shares, xerr=[[max(0, r[i]) for r in reach] for i in range(2)], color=_COLOURS[0], error_kw={"linewidth": 0.8})
        axis.invert_yaxis()
        axis.set(xlabel="right answers, per cent, with 95 % intervals", xlim=(0, 100))
        axis.tick_params(axis="y", labelsize=7)
        figure.set_size_inches(7.5, 1.2 + 0.24 * len(names))

    return Figure("Right answers", _png(draw))


def sections(rows: list[Row], figures: bool = True) -> list[Section]:
    """Everything that was measured, a section for each kind, model and size."""
    good = [row for row in rows if "error" not in row]
    made: list[Section] = []
    for row in good:
        if row["kind"] == "environment":
            facts = (f"{key} {value}" for key, value in row.items() if key not in ("kind", "wall_seconds"))
            made.append(Section("Measured with", [", ".join(facts)]))

    def add(kind: str, keys: Sequence[str], title: Callable[[Row], str], make: Callable[[list[Row]], list[str | Table | Figure]]) -> None:
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in good:
            if row["kind"] == kind:
                groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
        made.extend(Section(title(members[0]), make(members)) for members in groups.values())

    def of_text(members: list[Row]) -> list[str | Table | Figure]:
        first = members[0]
        parts: list[str | Table | Figure] = [
            f"Without quantisation: {first['full_bits_per_byte']:.5f} bits per byte over {first['tokens']} tokens. Quantised formats add:",
            text_table(members),
        ]
        ratios = ratios_table(members)
        if ratios.rows:
            parts += ["Added bits per byte, divided by those of `published` at the same widths:", ratios]
        return [*parts, plot_size([row for row in members if "(" not in row["format"]])] if figures else parts

    def of_tasks(members: list[Row]) -> list[str | Table | Figure]:
        return [tasks_table(members), *([plot_answers(members)] if figures else [])]

    def of_growth(members: list[Row]) -> list[str | Table | Figure]:
        return [growth_table(members), *([plot_growth(members, name) for name in "kv"] if figures else [])]

    def of_layers(members: list[Row]) -> list[str | Table | Figure]:
        return [layers_table(members), *([plot_tails(members)] if figures else [])]

    add("text", ("model", "length"), lambda row: f"Text: {row['model']}, windows of {row['length']} tokens", of_text)
    add(
        "tasks",
        ("model", "level", "temperature", "seed"),
        lambda row: (
            f"Problems: {row['model']}, level {row['level']}"
            + (f", sampled at temperature {row['temperature']}, seed {row['seed']}" if row["temperature"] else ", greedy")
        ),
        of_tasks,
    )
    add("growth", ("model", "length"), lambda row: f"Accumulation: {row['model']}, windows of {row['length']} tokens", of_growth)
    add("layers", ("model", "length"), lambda row: f"K, V and attention: {row['model']}, windows of {row['length']} tokens", of_layers)
    failed = [f"- {row['kind']} {row.get('format')}: {row['error']}" for row in rows if "error" in row]
    return [*made, Section("Failed", ["\n".join(failed)])] if failed else made


def write(parts: list[Section], path: Path, title: str = "Accuracy of quantised KV caches") -> None:
    """Writes a report; the suffix says how: .html is one file, .md has its figures beside it."""
    if path.suffix == ".html":
        path.write_text(_html(parts, title), encoding="utf-8")
        return
    lines, figures = [f"# {title}", ""], 0
    for section in parts:
        lines += [f"## {section.title}", ""]
        for part in section.parts:
            if isinstance(part, Figure):
                figures += 1
                file = path.with_name(f"{path.stem}-{figures}.png")
                file.write_bytes(part.png)
                lines += [f"![{part.title}]({file.name})", ""]
            else:
                lines += [part.markdown() if isinstance(part, Table) else part, ""]
    path.write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}"
    "td,th{padding:2px 9px;text-align:right}td:first-child,th:first-child{text-align:left}th{border-bottom:1px solid #888}"
    "tr:nth-child(even){background:#f5f5f5}img{max-width:100%}"
)


def _html(parts: list[Section], title: str) -> str:
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section in parts:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        for part in section.parts:
            if isinstance(part, Figure):
                data = base64.b64encode(part.png).decode()
                body.append(f'<p><img alt="{html.escape(part.title)}" src="data:image/png;base64,{data}"></p>')
            elif isinstance(part, Table):
                body.append(part.html())
            else:
                body.append("<p>" + html.escape(part).replace("\n", "<br>") + "</p>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def main(arguments: list[str]) -> int:
    """Makes a report of a campaign's results."""
    source, target = Path(arguments[0]), Path(arguments[1])
    write(sections([json.loads(line) for line in source.read_text().splitlines()]), target)
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
