"""Tables and pictures of a pruned network."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from iessp.network import Network


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A rich table, numbers to the right."""
    made = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*row)
    return made


def layer_table(network: Network, skeletons: dict[str, Tensor]) -> Table:
    """Stripes, filters and MACs that each layer keeps."""
    rows = []
    for site in network.sites:
        k = site.stripe_shape[0]
        skeleton = skeletons.get(site.name, torch.ones(site.stripe_shape, dtype=torch.bool))
        live, filters = int(skeleton.sum()), int(skeleton.flatten(1).any(1).sum())
        rows.append(
            [
                site.name,
                f"{site.stripe_channels} -> {k}, {site.stripe_shape[1]}x{site.stripe_shape[2]}",
                f"{live} / {site.stripes}",
                f"{filters} / {k}",
                f"{live * site.stripe_macs / 1e6:.2f} / {site.macs / 1e6:.2f}",
            ]
        )
    return table("What each layer keeps", ["layer", "shape", "stripes", "filters", "MACs, M"], rows)


def skeleton_mosaic(skeleton: Tensor) -> Tensor:
    """bool [K, R, S] -> float [h, w]: every filter a small tile of taps, 1 live, 0 dead, 0.5 the lines
    between them.
    """
    k, r, s = skeleton.shape
    columns = max(1, math.ceil(math.sqrt(k / 2)))
    rows = math.ceil(k / columns)
    tiles = torch.full((rows * columns, r + 1, s + 1), 0.5)
    tiles[:k, :r, :s] = skeleton.cpu().float()
    return (
        tiles.view(rows, columns, r + 1, s + 1).permute(0, 2, 1, 3).reshape(rows * (r + 1), columns * (s + 1))
    )


def draw_skeletons(network: Network, skeletons: dict[str, Tensor], path: Path) -> None:
    """PNG: the filter skeletons of every gated layer, one small tile of taps a filter."""
    plt = _pyplot()
    sites = [site for site in network.sites if site.name in skeletons]
    columns = min(len(sites), 7)
    rows = math.ceil(len(sites) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.2 * columns, 3.9 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, site in zip(axes.flat, sites, strict=False):
        skeleton = skeletons[site.name]
        axis.imshow(skeleton_mosaic(skeleton), cmap=_inks(plt), vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(f"{site.name}\n{skeleton.float().mean():.0%} of {site.stripes} stripes", fontsize=8)
    figure.suptitle("Filter skeletons: dark taps live", x=0.01, ha="left")
    _write(figure, path)


def _inks(plt: Any) -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap(["#e8e4da", "#ffffff", "#1f3a5f"])


def draw_time_against_macs(points: dict[str, list[tuple[float, float]]], title: str, path: Path) -> None:
    """PNG: each layer a point (million MACs executed, ms), dense and stripes; a dense point is joined to its
    stripe point.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.8))
    series = list(points.values())
    for pair in zip(*series, strict=True):
        axis.plot(*zip(*pair, strict=True), color="#bbbbbb", linewidth=0.8, zorder=1)
    for (name, values), colour in zip(points.items(), ("#b5523b", "#1f3a5f"), strict=False):
        axis.scatter(*zip(*values, strict=True), label=name, color=colour, zorder=2)
    axis.set(xscale="log", yscale="log", xlabel="million MACs executed", ylabel="milliseconds", title=title)
    axis.legend()
    axis.grid(alpha=0.3, which="both")
    _write(figure, path)


def draw_curves(logs: dict[str, dict[str, list[float]]], path: Path) -> None:
    """PNG: the task's loss and the share of MACs over the steps, a line for each log."""
    plt = _pyplot()
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(7.5, 6.0), sharex=True)
    for name, log in logs.items():
        if not log:
            continue
        window = max(1, len(log["step"]) // 50)
        smooth = torch.tensor(log["task_loss"]).unfold(0, window, 1).mean(1)
        upper.plot(log["step"][window - 1 :], smooth, label=name, linewidth=1.2)
        lower.plot(log["step"], log["share_hard"], linewidth=1.2)
    upper.set(ylabel=f"training loss, mean of {window} steps", yscale="log")
    lower.set(ylabel="share of MACs", xlabel="step")
    upper.legend(fontsize=8)
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
    _write(figure, path)


def draw_front(points: list[dict[str, Any]], kinds: tuple[str, ...], path: Path) -> None:
    """SVG: accuracy over measured ms, for each kind of budget a dot a run and a line through the means of each share of
    MACs. Without a background, in inks that can be read on white and on black."""
    plt, grey = _pyplot(), "#7d8590"
    inks = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), grey
    )
    with plt.rc_context({**inks, "svg.fonttype": "none", "svg.hashsalt": "iessp"}):
        figure, axis = plt.subplots(figsize=(5.6, 3.6))
        for kind, colour in zip(kinds, ("#d0603f", "#3f82d8"), strict=True):
            mine = [(p["share"], p["ms"], 100 * p["accuracy"]) for p in points if p["kind"] == kind]
            axis.scatter([ms for _, ms, _ in mine], [a for *_, a in mine], s=9, color=colour, alpha=0.6)
            groups = [[m[1:] for m in mine if m[0] == share] for share in sorted({m[0] for m in mine})]
            means = [tuple(map(statistics.mean, zip(*group, strict=True))) for group in groups]
            axis.plot(*zip(*means, strict=True), marker="o", color=colour, label=f"budget in {kind}")
        axis.set(xlabel="measured ms", ylabel="test accuracy, %")
        axis.legend(frameon=False)
        axis.grid(color=grey, alpha=0.25)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _write(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    figure.clf()
