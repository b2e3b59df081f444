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
    """Cells as text; the first column is left-aligned."""

    header: Sequence[str]
    rows: list[list[str]]
    names: bool = True  #: the first column holds names, set as code

    def markdown(self) -> str:
        """As Markdown."""
        marks = ["---"] + ["---:"] * (len(self.header) - 1)
        lines = [list(self.header), marks, *([f"`{row[0]}`" if self.names else row[0], *row[1:]] for row in self.rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def html(self) -> str:
        """As HTML."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.header)
        tags = ("<code>", "</code>") if self.names else ("", "")
        body = "".join(
            f"<tr><td>{html.escape(row[0]).join(tags)}</td>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:]) + "</tr>\n"
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
    methods = ("kvarn", "kvarn+k", "kvarn+v", "kvarn+kv", "balanced+kv")
    made = []
    for width in ("k4v4", "k4v2", "k2v2"):
        base = found.get(f"published-{width}")
        if base:
            made.append([width, number(base, 5), *(number(found[n] / base, 3) if (n := f"{m}-{width}") in found else "-" for m in methods)])
    return Table(("widths", "published", *methods), made)


_WIDTHS = ("k4v4", "k4v2", "k2v2")
_OTHERS = ("kivi32", "kivi128", "kvquant", "quarot", "turboquant", "rtn", "hadamard")


def goals_table(rows: list[Row], own: str = "balanced+kv") -> Table:
    """The goals of the project that these rows answer, for one of its own methods: what was found beside what is wanted."""

    def find(kind: str, name: str, key: str, **where: Any) -> Any:
        for row in rows:
            if row["kind"] == kind and row.get("format") == name and all(row.get(k) == v for k, v in where.items()) and key in row:
                return row[key]
        return None

    made: list[list[str]] = []

    def add(what: str, found: float | None, goal: float, at_most: bool = True, digits: int = 3) -> None:
        if found is not None:
            reached = found <= goal if at_most else found >= goal
            sign = "at most" if at_most else "at least"
            made.append([what, number(found, digits) if digits else str(int(found)), f"{sign} {goal:g}", "yes" if reached else "no"])

    def ratio(a: Any, b: Any) -> float | None:
        return a / b if a is not None and b else None

    lengths = sorted({row["length"] for row in rows if row["kind"] == "text" and row["model"] == "tiny-code"})
    if lengths:
        at = {"model": "tiny-code", "length": lengths[-1]}
        for width, goal in zip(_WIDTHS, (0.6, 0.3, 0.45), strict=True):
            added = [find("text", f"{method}-{width}", "added_bits_per_byte", **at) for method in (own, "published")]
            add(f"added bits/byte over published's, {width}, at {lengths[-1]}", ratio(*added), goal)
        kl = {
            name: find("text", name, "kl_mean", **at) for name in (*(f"{own}-{w}" for w in _WIDTHS), "fp8", "kivi32-k4v4", "kivi128-k4v4")
        }
        for other in ("kivi32-k4v4", "kivi128-k4v4"):
            add(f"KL of {own}-k4v2 over {other}'s", ratio(kl[f"{own}-k4v2"], kl[other]), 0.5)
        add(f"KL of {own}-k4v4 over fp8's", ratio(kl[f"{own}-k4v4"], kl["fp8"]), 1)
        others = {m: value for m in _OTHERS if (value := find("text", f"{m}-k2v2", "kl_mean", **at)) is not None}
        if others:
            best = min(others, key=lambda m: others[m])
            add(f"KL of {own}-k2v2 over {best}-k2v2's, the best other", ratio(kl[f"{own}-k2v2"], others[best]), 0.5)
    for width, goal in zip(_WIDTHS, (965, 962, 600), strict=True):
        where = {"model": "tiny-reason", "level": "base", "temperature": 0.0}
        right, count = (find("tasks", f"{own}-{width}", key, **where) for key in ("right", "count"))
        if count == 1000:
            add(f"right answers of 1,000, {width}", right, goal, at_most=False, digits=0)
    for twin in sorted({row["model"] for row in rows if row["kind"] == "text" and "/" in row["model"]}):
        for width in _WIDTHS:
            length = next(row["length"] for row in rows if row["kind"] == "text" and row["model"] == twin)
            pair = [find("text", f"{own}-{width}", "kl_mean", model=model, length=length) for model in (twin, "tiny-code")]
            add(f"KL on {twin} over that on the plain model, {width}", ratio(*pair), 1)
    for width in _WIDTHS:
        grown = {
            m: find("growth", f"{m}-{width}", "accumulated", step_tokens=128)["kl_mean"] - static["kl_mean"]
            for m in (own, "published", *_OTHERS)
            if (static := find("growth", f"{m}-{width}", "static", step_tokens=128))
        }
        least = [m for m in grown if m in _OTHERS]
        if own in grown and least:
            best = min(least, key=lambda m: grown[m])
            made.append(
                [
                    f"KL, accumulated minus static, {width}",
                    number(grown[own], 5),
                    f"below {number(grown[best], 5)} ({best})",
                    "yes" if grown[own] < grown[best] else "no",
                ]
            )
    return Table(("goal", "found", "wanted", "reached"), made, names=False)


_COLOURS = ("#1b7f79", "#2a6fb0", "#c8553d", "#8a5fb0", "#b08a2a", "#444444", "#6a9f3a", "#d08fb0")


def _method(name: str) -> str:
    return name.rsplit("-", 1)[0]


def _few(rows: list[Row]) -> list[Row]:
    """Those that one plot can hold: of the narrowest width when there are many."""
    if len(rows) <= len(_COLOURS):
        return rows
    plain = [row for row in rows if "(" not in row["format"] and "-" in row["format"]]
    last = plain[-1]["format"].rsplit("-", 1)[1] if plain else ""
    return [row for row in plain if row["format"].endswith(f"-{last}")][: len(_COLOURS)] or rows[: len(_COLOURS)]


def _png(draw: Callable[[Any, Any], None], height: float = 4.4) -> bytes:
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, height), layout="constrained")
    draw(figure, axis)
    axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    pyplot.close(figure)
    return buffer.getvalue()


# Parts of the names of variants, which have tables of their own.
_VARIANTS = ("(", "_g32", "_g64", "_g256", "_m8")


def plot_size(rows: list[Row]) -> Figure:
    """Bits per value against divergence, of the formats with tiles of 128 tokens and fewer than 16 bits."""
    shown = [row for row in rows if row["bits"] < 16 and not any(mark in row["format"] for mark in _VARIANTS)]
    methods = list(dict.fromkeys(_method(row["format"]) for row in shown))

    def draw(figure: Any, axis: Any) -> None:
        from matplotlib import colormaps

        for i, method in enumerate(methods):
            points = sorted((row["bits"], max(row["kl_mean"], 1e-8)) for row in shown if _method(row["format"]) == method)
            axis.plot(*zip(*points, strict=True), "o-", color=colormaps["tab20"](i % 20), label=method, markersize=4, linewidth=1)
        axis.set(xlabel="bits per value, metadata included", ylabel="KL of the next token, nats", yscale="log", xscale="log")
        ticks = [2, 3, 4, 5, 6, 8]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=7, ncols=2)

    return Figure("Size against divergence", _png(draw))


def plot_growth(rows: list[Row], name: str = "k") -> Figure:
    """Error by tile: accumulated (solid) and static (dashed)."""

    def draw(figure: Any, axis: Any) -> None:
        for i, row in enumerate(_few(rows)):
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
        for i, row in enumerate(_few(rows)):
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

    return Figure("Right answers", _png(draw, 1.2 + 0.24 * len(rows)))


def sections(rows: list[Row], figures: bool = True) -> list[Section]:
    """Everything that was measured, a section for each kind, model and size."""
    good = [row for row in rows if "error" not in row]
    made: list[Section] = []
    goals = goals_table(good) if any(row.get("model") == "tiny-code" for row in good) else None
    if goals is not None and goals.rows:
        made.append(Section("Goals", [goals]))
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
        return [*parts, plot_size(members)] if figures else parts

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
    add(
        "growth",
        ("model", "length", "step_tokens"),
        lambda row: f"Accumulation: {row['model']}, windows of {row['length']} tokens, read {row.get('step_tokens', 128)} at a time",
        of_growth,
    )
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
