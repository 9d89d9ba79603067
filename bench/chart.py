"""The chart: speed-up over density, with the line 1/d that only skipped padding and slow rivals let pass."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.records import Row, best

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_TICKS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
_MOST_LAYERS = len(_COLOURS)


def draw(rows: list[Row], prefix: Path, caption: str) -> list[Path]:
    """PREFIX.png and PREFIX.svg, one panel a pass, batch and number of threads; nothing where no row has a
    density axis.

    Coloured lines: auto, one a layer. Grey: the median over layers of the best slim contestant and of the
    paper's path.
    """
    panels: dict[tuple[str, int, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row.speedup is not None and row.source == "iid":
            panels[row.which, row.batch, row.threads].append(row)
    if not panels:
        return []
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.2 * columns, 4.4 * lines), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, ((which, batch, threads), found) in zip(axes.flat, panels.items(), strict=False):
        _panel(ax, found)
        ax.set_title(
            f"{which}, batch {batch}, {threads} thread{'s' if threads > 1 else ''}", loc="left", fontsize=11
        )
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle("Times faster than the fastest dense contestant", x=0.01, ha="left", fontsize=12)
    figure.supxlabel(caption, fontsize=7, color="#555555")
    paths = [prefix.with_suffix(f".{kind}") for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths


def _panel(ax: Axes, rows: list[Row]) -> None:
    densities = sorted({row.density for row in rows})
    low = min(*densities, 0.5) * 0.9
    ax.plot([low, 1], [1 / low, 1], color="black", linestyle="--", linewidth=1, label="1/d")
    ax.axhline(1, color="black", linewidth=0.6)
    autos: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.contestant == "auto":
            autos[row.what].append(row)
    for colour, (layer, line) in zip(_COLOURS, list(autos.items())[:_MOST_LAYERS], strict=False):
        line.sort(key=lambda row: row.density)
        x, y = [r.density for r in line], [r.speedup or 0.0 for r in line]
        error = [[v - (r.speedup_low or v) for v, r in zip(y, line, strict=True)],
                 [(r.speedup_high or v) - v for v, r in zip(y, line, strict=True)]]  # fmt: skip
        ax.errorbar(
            x, y, yerr=error, color=colour, marker="o", markersize=3.5, linewidth=1.4, capsize=2, label=layer
        )
    for kind, style, name in (
        ("slim", "-", "channels removed (median)"),
        ("paper", ":", "1x1 + shifted adds (median)"),
    ):
        points = _medians(rows, kind)
        if points:
            ax.plot(*zip(*points, strict=True), color="#888888", linestyle=style, linewidth=1.6, label=name)
    ax.set(xscale="log", yscale="log", xlabel="density d")
    ticks = [t for t in _TICKS if t >= low]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.set_yticks((0.25, 0.5, 1, 2, 3, 5, 10, 20), ["¼", "½", "1", "2", "3", "5", "10", "20"])
    ax.minorticks_off()
    ax.set_ylim(0.2, 1.4 / low)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def _medians(rows: list[Row], kind: str) -> list[tuple[float, float]]:
    """(density, median over layers of the best of a kind), densities rounded so that layers meet."""
    by_density: dict[float, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_density[round(row.density, 2)][row.what].append(row)
    points = []
    for density, layers in sorted(by_density.items()):
        found = sorted(b.speedup for r in layers.values() if (b := best(r, kind)) and b.speedup)
        if found:
            points.append((density, found[len(found) // 2]))
    return points
