"""`iessp reproduce`: every method on one recipe, several seeds, one table; resumable by run and by step.

A cell is a method with one seed, in a folder of its own, OUT/<method>/<seed>. Methods are written as on the
command line: "iem", "magnitude" or, with a part taken away, "iem(message=false)".
"""

from __future__ import annotations

import csv
import re
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from iessp import runs
from iessp.attach import METHODS
from iessp.data.images import Splits
from iessp.progress import console, train_with_bar
from iessp.recipe import UNPRUNED, Recipe, parse_changes
from iessp.report import draw_curves, draw_skeletons, table
from iessp.train import Trainer, write_results

DEFAULT = ("dense", "iem", "filter-skeleton", "magnitude", "random", "l1-filter", "slim")
ABLATION = (
    "iem",
    *(f"iem({part}=false)" for part in ("module", "message", "aliveness", "statistic", "centre")),
)
LATENCY_SECONDS = 3.0


def with_method(recipe: Recipe, method: str) -> Recipe:
    """The recipe with "method" or "method(option=value, ...)"; raises ValueError for what is neither."""
    found = re.fullmatch(r"([\w-]+)(?:\((.*)\))?", method.strip())
    if found is None:
        raise ValueError(f'"{method}" is not METHOD or METHOD(OPTION=VALUE, ...)')
    options = parse_changes([part for part in (found[2] or "").split(",") if part.strip()])
    return recipe.but(method=found[1], options=options)


def run(recipe: Recipe, splits: Splits, out: Path, methods: list[str], seeds: int, device: str) -> Path:
    """Train the unfinished cells, write OUT/table.json, curves and skeletons; returns the table's path."""
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        for method in methods:
            cell = with_method(recipe, method).but(seed=seed)
            trainer = Trainer(cell, splits, folder_of(out, method) / str(seed), device)
            train_with_bar(trainer, f"{method} {seed}")
            rows.append({"method": method, "seed": seed, **row(trainer)})
            rows.sort(key=lambda r: (methods.index(r["method"]), r["seed"]))
            write_results(out, {"rows": rows}, "table.json")
    console.print(summary(rows, f"{recipe.name}: {recipe.model} on {splits.name}, mean ± spread"))
    logs = {method: read_log(folder_of(out, method) / "0" / "log.csv") for method in methods}
    draw_curves(logs, out / "curves.png")
    for method in methods:
        if with_method(recipe, method).pruned:
            frozen = runs.load_run(folder_of(out, method) / "0")
            draw_skeletons(frozen.network, frozen.skeletons, folder_of(out, method) / "skeletons.png")
    return out / "table.json"


def folder_of(out: Path, method: str) -> Path:
    """OUT/METHOD with the characters that a path had better not have replaced."""
    return out / re.sub(r"[^\w=-]+", "_", method).strip("_")


def row(trainer: Trainer) -> dict[str, Any]:
    """What the table says of one run, its latency included; measured once and kept in the run's folder."""
    found = runs.results(trainer)
    if "latency" not in found:
        frozen = runs.load_run(trainer.folder)
        times = runs.contest(frozen.model, 1, frozen.example, LATENCY_SECONDS, optimize=False)
        found["latency"] = {name: timing.median for name, (timing, _) in times.items()}
        found["threads"] = torch.get_num_threads()
        write_results(trainer.folder, found)
    recipe, tested = trainer.recipe, found["images"]["test"]
    return {
        "model": recipe.model,
        "width": recipe.width,
        "data": trainer.splits.name,
        "recipe": recipe.name,
        "accuracy": 1 - found["test_errors"] / tested,
        "held_out_accuracy": 1 - found["held_out_errors"] / found["images"]["held_out"],
        "macs_kept": found["macs_kept"],
        "macs_kept_after_compaction": found["macs_kept_after_compaction"],
        "dense_twin_ms": found["latency"]["dense"],
        "frozen_ms": found["latency"]["frozen"],
        "threads": found["threads"],
    }


def summary(rows: list[dict[str, Any]], title: str) -> Table:
    """Mean and spread (standard deviation) over the seeds of each method."""
    lines = []
    for method in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == method]

        def cell(key: str, scale: float = 100.0, mine: list[dict[str, Any]] = mine) -> str:
            values = [scale * r[key] for r in mine]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            return f"{statistics.mean(values):.2f} ± {spread:.2f}"

        lines.append([
            method, str(len(mine)), cell("accuracy"), cell("macs_kept"), cell("macs_kept_after_compaction"),
            cell("dense_twin_ms", 1.0), cell("frozen_ms", 1.0),
        ])  # fmt: skip
    columns = [
        "method",
        "n",
        "test accuracy, %",
        "MACs kept, %",
        "compacted, %",
        "dense twin, ms",
        "frozen, ms",
    ]
    return table(title, columns, lines)


def read_log(path: Path) -> dict[str, list[float]]:
    """Columns of a log.csv that are numbers."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {key: [float(r[key]) for r in rows] for key in rows[0] if key != "phase"} if rows else {}


def known_methods() -> str:
    """For help texts."""
    return ", ".join((*METHODS, *UNPRUNED))
