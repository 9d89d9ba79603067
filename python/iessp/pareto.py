"""Accuracy against measured latency, with the budget in MACs and in milliseconds.

    python -m iessp.pareto --out runs/pareto

The time of a stripe in each layer is measured once (`iessp.latency`). For every share of MACs a run is trained, then
one whose budget is the milliseconds that the first one's skeletons take by that measurement: both were given the same
time, so what the kernel-aware budget is worth can be read off. At the end all networks are timed together, and a dense
one with them. Resumable: a finished run is not trained again, and timing can be repeated on a quiet machine, the only
place where it is worth something.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from iessp import runs
from iessp.data import load
from iessp.data.images import Splits, reduced
from iessp.latency import Latency, measure
from iessp.progress import console
from iessp.recipe import Recipe, parse_changes, read
from iessp.report import draw_front, table
from iessp.reproduce import trained
from iessp.timing import EQUALITY_IMAGES, busy, time_networks
from iessp.train import assemble, image_format, write_results

Point = dict[str, Any]  # kind, share, seed, budget, predicted_ms, accuracy, held_out_accuracy, macs_kept, ms
KINDS = ("MACs", "milliseconds")


def fitted(recipe: Recipe, splits: Splits, out: Path) -> Latency:
    """What a stripe of each layer costs in time, measured once and kept in OUT/latency.json."""
    path = out / "latency.json"
    if not path.exists():
        size = recipe.resolution or splits.size
        example = torch.zeros(1, splits.channels, size, size)
        model = assemble(recipe, len(splits.classes), example)
        format = image_format(recipe, model, example.device)
        found = measure(
            model, example.expand(recipe.timed_batch, -1, -1, -1).contiguous(memory_format=format)
        )
        out.mkdir(parents=True, exist_ok=True)
        write_results(out, found.as_dict(), path.name)
    return Latency(**json.loads(path.read_text()))


def point(
    recipe: Recipe, splits: Splits, out: Path, folder: Path, latency: Latency
) -> tuple[Point, nn.Module]:
    """Train (or find) a run; its figures, and the frozen network."""
    found = runs.results(trained(recipe, splits, out, folder))
    frozen = runs.load_run(folder)
    images = found["images"]
    return {
        "budget": recipe.budget,
        "predicted_ms": latency.of(frozen.skeletons),
        "accuracy": 1 - found["test_errors"] / images["test"],
        "held_out_accuracy": 1 - found["held_out_errors"] / images["held_out"],
        "macs_kept": found["macs_kept"],
    }, frozen.model


def pairs(
    recipe: Recipe, splits: Splits, out: Path, shares: list[float], seeds: int
) -> Iterator[tuple[Point, nn.Module]]:
    """Two points for every share of MACs and seed; the second's budget is the time that the first one was given."""
    latency = fitted(recipe, splits, out)
    for seed in range(seeds):
        for share in shares:
            given = recipe.but(budget=share, seed=seed, timed_batch=1)  # in MACs the batch does not matter
            first, model = point(given, splits, out, out / f"macs-{share:g}" / str(seed), latency)
            yield {"kind": KINDS[0], "share": share, "seed": seed, **first}, model
            folder = out / f"time-{share:g}" / str(seed)
            folder.mkdir(parents=True, exist_ok=True)
            write_results(folder, latency.as_dict(), "latency.json")
            given = recipe.but(budget=f"{first['predicted_ms']:.4g} ms", seed=seed)
            second, model = point(given, splits, out, folder, latency)
            yield {"kind": KINDS[1], "share": share, "seed": seed, **second}, model


def front(
    recipe: Recipe, splits: Splits, out: Path, shares: list[float], seeds: int, seconds: float
) -> list[Point]:
    """The points with their networks' measured times, written to OUT/pareto.json."""
    splits = reduced(splits, 0, recipe.resolution)  # once, not in every run
    points, models = (list(each) for each in zip(*pairs(recipe, splits, out, shares, seeds), strict=True))
    batch = recipe.timed_batch
    x = torch.randn(max(batch, EQUALITY_IMAGES), splits.channels, splits.size, splits.size)
    networks = {str(i): runs.checked(model, x, batch) for i, model in enumerate(models)}
    times = time_networks({"dense": runs.thaw(models[0], fill=True), **networks}, x[:batch], seconds)
    for index, found in enumerate(points):
        found["ms"] = times[str(index)][0].median
    record = {
        "what": f"{recipe.model} of width {recipe.width} on {splits.name}, {splits.size}x{splits.size}",
        "recipe": recipe.name,
        "timed_batch": recipe.timed_batch,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "busy": busy(),
        "dense_ms": times["dense"][0].median,
        "latency": fitted(recipe, splits, out).as_dict(),
        "points": points,
    }
    write_results(out, record, "pareto.json")
    return points


def rows(points: list[Point]) -> list[list[str]]:
    """A row for every kind and share of MACs, means over the seeds."""

    def mean(mine: list[Point], key: str) -> float:
        return statistics.mean(p[key] for p in mine)

    groups: dict[tuple[float, str], list[Point]] = {(p["share"], p["kind"]): [] for p in points}
    for p in points:
        groups[p["share"], p["kind"]].append(p)
    return [
        [
            f"{kind}, {share:g} of the MACs" if kind == KINDS[0] else f"{kind}, as many",
            str(len(mine)),
            f"{mean(mine, 'predicted_ms'):.3f}",
            f"{mean(mine, 'ms'):.3f}",
            f"{100 * mean(mine, 'accuracy'):.2f}",
            f"{100 * mean(mine, 'held_out_accuracy'):.2f}",
            f"{100 * mean(mine, 'macs_kept'):.2f}",
        ]
        for (share, kind), mine in groups.items()
    ]


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
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], help="change a field of the recipe"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="spent on timing the networks")
    given = parser.parse_args()
    try:
        recipe = read(given.recipe).untried().but(**parse_changes(given.changes))
        splits = load(recipe.data, given.data_dir)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    shares = given.share or [0.12, 0.24, 0.48]
    points = front(recipe, splits, given.out, shares, given.seeds, given.seconds)
    draw_front(points, KINDS, given.out / "pareto.svg")
    columns = ["budget in", "n", "predicted, ms", "measured, ms", "test, %", "held-out, %", "MACs kept, %"]
    console.print(table(f"{recipe.name}: {busy() or 'the machine was quiet'}", columns, rows(points)))
    console.print(f"pareto.json and pareto.svg are in {given.out}")


if __name__ == "__main__":
    main()
