"""The demonstration's plot."""

from __future__ import annotations

from pathlib import Path

from kvarn.demo.solve import Result

_COLOURS = ("#444444", "#1b7f79", "#2a6fb0", "#c8553d", "#8a5fb0", "#b08a2a")


def save(results: list[Result], path: Path) -> None:
    """Writes a PNG: bytes as the text grows, size against divergence, answers and speed. The first result is the 16-bit cache."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    colours = {result.cache: _COLOURS[i % len(_COLOURS)] for i, result in enumerate(results)}

    for result in results:
        if result.growth:
            tokens, used = zip(*result.growth, strict=True)
            axes[0].plot([t / 1e3 for t in tokens], [b / 1e6 for b in used], color=colours[result.cache], label=result.cache)
    axes[0].set(title="Cache size while solving", xlabel="thousand tokens", ylabel="megabytes", ylim=(0, None))
    axes[0].legend(frameon=False)

    for result in results[1:]:
        axes[1].scatter(result.compression, max(result.divergence, 1e-7), color=colours[result.cache], s=60)
        axes[1].annotate(result.cache, (result.compression, max(result.divergence, 1e-7)), xytext=(6, 6), textcoords="offset points")
    axes[1].set(title="Next-token KL to the 16-bit cache", xlabel="times smaller", ylabel="nats", yscale="log")
    axes[1].margins(0.25)

    names = [result.cache for result in results]
    shares = [100 * result.right / max(1, result.problems) for result in results]
    bars = axes[2].bar(names, shares, color=[colours[name] for name in names])
    axes[2].bar_label(
        bars, [f"{result.right}/{result.problems}\n{result.tokens_per_second:.0f} tokens/s" for result in results], fontsize=8
    )
    axes[2].set(title="Right answers", ylabel="per cent", ylim=(0, 125), yticks=range(0, 101, 25))
    axes[2].tick_params(axis="x", labelsize=8)

    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
