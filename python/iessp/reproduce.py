"""`iessp reproduce`: every method on one recipe, several seeds, one table; resumable by run and by step.

A cell is a method with one seed, in a folder of its own, OUT/<method>/<seed>. Before its cells a method has
its trials (the recipe's `trials`), each `trial_seeds` runs, OUT/trials/<method>/<trial>/<run>; the trial whose mean
accuracy on the held-out images is highest is chosen. The runs' seeds are of no cell, so that what the table says of the
held-out images was not chosen by, but each starts from the pretrained network of a cell. Methods are written as on the
command line: "iem", "magnitude" or, with a part taken away, "iem(message=false)".
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from iessp import runs
from iessp.attach import METHODS
from iessp.data.images import Splits, reduced
from iessp.progress import console, train_with_bar
from iessp.recipe import UNPRUNED, Recipe, bundled, parse_changes, read
from iessp.report import draw_curves, draw_skeletons, table
from iessp.timing import busy
from iessp.train import Trainer, count_errors, write_results

DEFAULT = ("dense", "iem", "filter-skeleton", "magnitude", "random", "l1-filter", "slim")
ABLATION = (
    "iem",
    *(f"iem({part}=false)" for part in ("module", "message", "aliveness", "statistic", "centre", "exact")),
    "iem(hard=true)",
    "iem(kappa=0)",
    "iem(adaptive=false)",
)
LOSS_PARTS = ("kappa", "adaptive")
LATENCY_SECONDS = 3.0
LATENCY_BATCHES = (1, 32)
TRIAL_SEED = 1000  # and the next ones: of no run in a table


def with_method(recipe: Recipe, method: str) -> Recipe:
    """The recipe with "method" or "method(option=value, ...)"; raises ValueError for what is neither.

    kappa and adaptive, the parts of the loss, are written as the method's options are.
    """
    found = re.fullmatch(r"([\w-]+)(?:\((.*)\))?", method.strip())
    if found is None:
        raise ValueError(f'"{method}" is not METHOD or METHOD(OPTION=VALUE, ...)')
    options = parse_changes([part for part in (found[2] or "").split(",") if part.strip()])
    of_loss = {name: options.pop(name) for name in LOSS_PARTS if name in options}
    return recipe.but(method=found[1], options=options, **of_loss)


def possible(recipe: Recipe) -> list[str]:
    """DEFAULT, but for methods that the recipe's network or budget rules out, as is said."""
    methods = []
    for method in DEFAULT:
        try:
            with_method(recipe, method)
        except ValueError as error:
            console.print(f"{method} is left out: {error}", highlight=False)
        else:
            methods.append(method)
    return methods


def cell_of(recipe: Recipe, method: str, changes: dict[str, Any], seed: int) -> Recipe:
    """One run: the method with what its trials chose, but for the options it was written with."""
    base = with_method(recipe, method)
    return base.changed(changes).changed({"options": base.options}).untried().but(seed=seed)


def run(recipe: Recipe, splits: Splits, out: Path, methods: list[str], seeds: int, device: str) -> Path:
    """Tune each method, train the unfinished cells, write OUT/table.json, curves and skeletons; returns the
    table's path.

    Where the machine is busy no latency is measured; the same command fills it in later.
    """
    for method in methods:  # what is wrong with one is said before any is trained
        for changes in ({}, *trials_of(recipe, method)[1]):
            cell_of(recipe, method, changes, 0)
    splits = reduced(splits, 0, recipe.resolution)  # once, not in every cell
    tried = {method: tune(recipe, method, splits, out, device) for method in methods}
    finished: dict[tuple[str, int], Trainer] = {}
    for seed in range(seeds):
        for method in methods:
            cell = cell_of(recipe, method, chosen(tried[method]), seed)
            trainer = trained(cell, splits, out, folder_of(out, method) / str(seed), device)
            finished[method, seed] = trainer
            _write(out, recipe, splits, seeds, tried, finished)
    for trainer in finished.values():
        time_once(trainer)
    rows = _write(out, recipe, splits, seeds, tried, finished)
    console.print(summary(rows, f"{recipe.name}: {recipe.model} on {splits.name}, mean ± spread"))
    logs = {method: read_log(folder_of(out, method) / "0" / "log.csv") for method in methods}
    draw_curves(logs, out / "curves.png")
    for method in methods:
        if with_method(recipe, method).pruned:
            frozen = runs.load_run(folder_of(out, method) / "0")
            draw_skeletons(frozen.network, frozen.skeletons, folder_of(out, method) / "skeletons.png")
    return out / "table.json"


def trained(recipe: Recipe, splits: Splits, out: Path, folder: Path, device: str = "cpu") -> Trainer:
    """The finished run of `recipe` in `folder`, after the one in OUT/pretrained that it starts from, if any."""
    before, start = recipe.before(), None
    if before is not None:
        start = out / "pretrained" / before.method / str(before.seed)
        train_with_bar(Trainer(before, splits, start, device), f"pretrained {before.method} {before.seed}")
    trainer = Trainer(recipe, splits, folder, device, start)
    train_with_bar(trainer, f"{recipe.method} {recipe.seed} in {folder}")
    return trainer


def trials_of(recipe: Recipe, method: str) -> tuple[str, list[dict[str, Any]]]:
    """The name that a method's trials have in the recipe, and their changes.

    They are listed under the method as given or under its bare name, so that "iem(message=false)" runs with what was
    chosen for "iem".
    """
    name = method if method in recipe.trials else with_method(recipe, method).method
    return name, recipe.trials.get(name, [])


def tune(recipe: Recipe, method: str, splits: Splits, out: Path, device: str) -> list[dict[str, Any]]:
    """The runs of the method's trials, judged on the held-out images; empty without any."""
    name, tried = trials_of(recipe, method)
    found = []
    for index, changes in enumerate(tried):
        for draw in range(recipe.trial_seeds):
            cell = trial_of(recipe, name, changes, draw)
            folder = folder_of(out / "trials", name) / str(index) / str(draw)
            trainer = trained(cell, splits, out, folder, device)
            path = folder / "held_out.json"
            if not path.exists():
                errors = count_errors(trainer.model, trainer.splits.held_out, trainer.splits)
                write_results(folder, {"held_out_accuracy": 1 - errors / len(splits.held_out)}, path.name)
            run = {"method": name, "changes": changes, "epochs": cell.epochs, "trial_seed": cell.seed}
            found.append(run | json.loads(path.read_text()))
    return found


def trial_of(recipe: Recipe, name: str, changes: dict[str, Any], draw: int) -> Recipe:
    """Run `draw` of a trial, after the dense network of cell `draw` where the recipe names no seed for it."""
    cell = with_method(recipe, name).changed(changes).untried()
    start = {"seed": draw, **recipe.pretrain} if recipe.pretrain else {}
    return cell.but(seed=TRIAL_SEED + draw, epochs=recipe.trial_epochs, pretrain=start)


def chosen(tried: list[dict[str, Any]]) -> dict[str, Any]:
    """The changes that were best on the held-out images in the mean of their runs; none without trials."""

    def mean(changes: dict[str, Any]) -> float:
        return statistics.mean(run["held_out_accuracy"] for run in tried if run["changes"] == changes)

    return max((run["changes"] for run in tried), key=mean, default={})


def _write(
    out: Path,
    recipe: Recipe,
    splits: Splits,
    seeds: int,
    tried: dict[str, list[dict[str, Any]]],
    finished: dict[tuple[str, int], Trainer],
) -> list[dict[str, Any]]:
    """OUT/table.json, a whole record of what was run and found; returns its rows."""
    rows = [
        {"method": method, "seed": seed, **row(finished[method, seed])}
        for method in tried
        for seed in range(seeds)
        if (method, seed) in finished
    ]
    record = {
        "what": f"{recipe.model} of width {recipe.width} on {splits.name}, {splits.size}x{splits.size}",
        "command": " ".join(
            [
                "iessp reproduce",
                recipe.name,
                *(f"--set {shlex.quote(change)}" for change in changed(recipe)),
                f"--seeds {seeds}",
                *(f'--method "{method}"' for method in tried),
            ]
        ),
        "images": {
            "train": recipe.images or len(splits.train),
            "held_out": len(splits.held_out),
            "test": len(splits.test),
        },
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "recipe": {
            k: v for k, v in recipe.as_dict().items() if k not in ("method", "options", "seed", "trials")
        },
        "trials": list({str(run): run for found in tried.values() for run in found}.values()),
        "chosen": {method: chosen(found) for method, found in tried.items()},
        "rows": rows,
    }
    write_results(out, record, "table.json")
    return rows


def changed(recipe: Recipe) -> list[str]:
    """FIELD=VALUE, as in TOML, of what is not as in the bundled recipe of that name; a recipe of one's own has none."""
    if recipe.name not in bundled():
        return []
    theirs = read(recipe.name).as_dict()
    return [f"{k}={_toml(v)}" for k, v in recipe.as_dict().items() if v != theirs[k]]


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return json.dumps(value)


def folder_of(out: Path, method: str) -> Path:
    """OUT/METHOD with the characters that a path had better not have replaced."""
    return out / re.sub(r"[^\w=-]+", "_", method).strip("_")


def time_once(trainer: Trainer) -> None:
    """Measure a finished run's latency in a quiet moment, once; the figures are kept in its results.json."""
    found = runs.results(trainer)
    if "latency" in found or busy() is not None:
        return
    frozen, latency = runs.load_run(trainer.folder), {}
    for batch in LATENCY_BATCHES:
        times = runs.contest(frozen.model, batch, frozen.example, LATENCY_SECONDS, optimize=False)
        latency[str(batch)] = {name: timing.median for name, (timing, _) in times.items()}
    found |= {"latency": latency, "threads": torch.get_num_threads()}
    write_results(trainer.folder, found)


def row(trainer: Trainer) -> dict[str, Any]:
    """What the table says of one run."""
    found = runs.results(trainer)
    recipe, tested = trainer.recipe, found["images"]["test"]
    latency = {
        f"{title}_{batch}": times[name]
        for batch, times in found.get("latency", {}).items()
        for name, title in (("dense", "dense_ms"), ("frozen", "frozen_ms"))
    }
    return {
        "model": recipe.model,
        "width": recipe.width,
        "data": trainer.splits.name,
        "recipe": recipe.name,
        "accuracy": 1 - found["test_errors"] / tested,
        "held_out_accuracy": 1 - found["held_out_errors"] / found["images"]["held_out"],
        "macs_kept": found["macs_kept"],
        "macs_kept_after_compaction": found["macs_kept_after_compaction"],
        "threads": found.get("threads"),
        **latency,
    }


def summary(rows: list[dict[str, Any]], title: str) -> Table:
    """Mean and spread (standard deviation) over the seeds of each method."""
    lines = []
    latencies = {
        f"{kind}_ms_{batch}": f"{title}, {batch}, ms"
        for batch in LATENCY_BATCHES
        for kind, title in (("dense", "dense twin"), ("frozen", "frozen"))
    }
    for method in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == method]

        def cell(key: str, scale: float = 100.0, mine: list[dict[str, Any]] = mine) -> str:
            values = [scale * r[key] for r in mine if key in r]
            if not values:
                return "-"
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            return f"{statistics.mean(values):.2f} ± {spread:.2f}"

        lines.append([
            method, str(len(mine)), cell("accuracy"), cell("macs_kept"), cell("macs_kept_after_compaction"),
            *(cell(column, 1.0) for column in latencies),
        ])  # fmt: skip
    columns = [
        "method",
        "n",
        "test accuracy, %",
        "MACs kept, %",
        "compacted, %",
        *latencies.values(),
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
