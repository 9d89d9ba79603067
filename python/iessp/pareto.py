"""Accuracy against measured latency, with the budget in MACs and in milliseconds.

    python -m iessp.pareto --out runs/pareto

For every share of MACs a run is trained and timed; then one whose budget is that many milliseconds. Both kinds
meet at equal times, so what the kernel-aware budget is worth can be read off. Resumable: a finished run is not
trained again. Latencies are worth something on a quiet machine only.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from iessp import runs
from iessp.data import load
from iessp.data.images import Splits
from iessp.progress import console
from iessp.recipe import Recipe, parse_changes, read
from iessp.report import _pyplot, _write, table
from iessp.reproduce import trained
from iessp.timing import busy
from iessp.train import write_results

Point = dict[str, Any]  # budget, kind, ms, accuracy (held-out images), macs_kept


def point(recipe: Recipe, splits: Splits, folder: Path, kind: str, seconds: float) -> Point:
    """Train (or find) a run and time its frozen network on `timed_batch` images."""
    trainer = trained(recipe, splits, folder.parent, folder)
    found = runs.results(trainer)
    if "frozen_ms" not in found:
        frozen = runs.load_run(folder)
        times = runs.contest(frozen.model, recipe.timed_batch, frozen.example, seconds, optimize=False)
        found["frozen_ms"] = times["frozen"][0].median
        write_results(folder, found)
    return {
        "budget": recipe.budget,
        "kind": kind,
        "ms": found["frozen_ms"],
        "accuracy": 1 - found["held_out_errors"] / found["images"]["held_out"],
        "macs_kept": found["macs_kept"],
    }


def front(recipe: Recipe, splits: Splits, out: Path, shares: list[float], seconds: float) -> list[Point]:
    """Two points for every share of MACs; the second's budget is the first's measured time."""
    points = []
    for share in shares:
        first = point(recipe.but(budget=share), splits, out / f"macs-{share:g}", "MACs", seconds)
        timed = recipe.but(budget=f"{first['ms']:.4g} ms")
        points.append(first)
        try:
            points.append(point(timed, splits, out / f"time-{share:g}", "milliseconds", seconds))
        except ValueError as error:  # what is fixed takes longer than that, as measured
            console.print(f"no point in milliseconds for {share:g} of the MACs: {error}", highlight=False)
    write_results(out, {"recipe": recipe.name, "points": points, "busy": busy()}, "pareto.json")
    return points


def draw(points: list[Point], path: Path) -> None:
    """PNG: held-out accuracy over ms, a line for each kind of budget."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.4))
    for kind, colour in (("MACs", "#b5523b"), ("milliseconds", "#1f3a5f")):
        mine = sorted((p["ms"], 100 * p["accuracy"]) for p in points if p["kind"] == kind)
        if mine:
            axis.plot(*zip(*mine, strict=True), marker="o", color=colour, label=f"budget in {kind}")
    axis.set(xlabel="measured ms", ylabel="held-out accuracy, %")
    axis.legend()
    axis.grid(alpha=0.3)
    _write(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", default="digits-small")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/pareto"))
    parser.add_argument(
        "--share", type=float, action="append", help="of MACs; repeatable. Default: .12 .24 .48"
    )
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], help="change a field of the recipe"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="spent on timing each network")
    given = parser.parse_args()
    recipe = read(given.recipe).but(trials={}, trial_epochs=0, **parse_changes(given.changes))
    splits = load(recipe.data, given.data_dir)
    points = front(recipe, splits, given.out, given.share or [0.12, 0.24, 0.48], given.seconds)
    draw(points, given.out / "pareto.png")
    rows = [
        [
            p["kind"],
            str(p["budget"]),
            f"{p['ms']:.3f}",
            f"{100 * p['accuracy']:.2f}",
            f"{100 * p['macs_kept']:.2f}",
        ]
        for p in points
    ]
    columns = ["budget in", "budget", "measured, ms", "held-out accuracy, %", "MACs kept, %"]
    console.print(table(f"{recipe.name}: {busy() or 'the machine was quiet'}", columns, rows))


if __name__ == "__main__":
    main()
