"""`iessp demo`: the whole path on real images, from training to a faster network, in one table and two
pictures.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from iessp import runs
from iessp.data import load
from iessp.progress import console, train_with_bar
from iessp.recipe import Recipe
from iessp.report import draw_skeletons, draw_time_against_macs, table
from iessp.runs import Frozen
from iessp.timing import Equality
from iessp.train import Trainer

BATCHES = (1, 32)
SECONDS = 6.0  # of timing for each batch size, and for the layers


def run(out: Path, recipe: Recipe) -> dict[str, Any]:
    """Train `recipe` and its dense baseline (same schedule and seed), compare, time; resumable. Returns the
    figures: dense and pruned results, their files, ms by batch and network, pictures.
    """
    import stripe_kernels

    start = time.monotonic()
    splits = load(recipe.data)
    console.print(
        f"{recipe.model} on {splits.name}: {len(splits.train)} training images, {len(splits.held_out)} held "
        f"out, {len(splits.test)} for one test at the end. It all goes to {out}; Ctrl-C keeps what is done.",
        highlight=False,
    )
    trainers = {
        "dense": Trainer(recipe.but(method="dense"), splits, out / "dense"),
        "pruned": Trainer(recipe, splits, out / "pruned"),
    }
    for title, trainer in trainers.items():
        train_with_bar(trainer, title)
    found = {title: runs.results(trainer) for title, trainer in trainers.items()}

    frozen = runs.load_run(out / "pruned")
    dense_file, frozen_file = out / "dense.safetensors", out / "frozen.safetensors"
    stripe_kernels.save(runs.load_run(out / "dense").model, dense_file, frozen.example)
    stripe_kernels.save(frozen.model, frozen_file, frozen.example)
    times = {batch: runs.contest(frozen.model, batch, frozen.example, SECONDS) for batch in BATCHES}

    rows = comparison(found["dense"], found["pruned"], dense_file, frozen_file)
    for batch, contest in times.items():
        for kind in ("", ", optimized"):
            if not {f"dense{kind}", f"frozen{kind}"} <= contest.keys():
                continue  # left out, as a warning has said
            dense, pruned = (contest[name + kind][0] for name in ("dense", "frozen"))
            change = f"{dense.median / pruned.median:.2f}x faster"
            rows.append([f"ms, batch {batch}{kind}", str(dense), str(pruned), change])
    console.print(table(f"{recipe.model} on {splits.name}", ["", "dense", "pruned", "change"], rows))

    equality = Equality(**found["pruned"]["equality"])
    console.print(
        f"Frozen against masked network, {'inside' if equality.ok else 'OUTSIDE'} the error budget: largest "
        f"{equality.error:.2e} of {equality.allowed:.2e}, relative RMS {equality.rms_error:.2e} of "
        f"{equality.rms_allowed:.2e}\n(the budget is twice torch's own error against float64, plus 2 ulp). "
        f"{runs.conditions()}.",
        highlight=False,
    )
    pictures = draw(frozen, out)
    console.print(
        f"Pictures: {', '.join(str(p) for p in pictures)}. {time.monotonic() - start:.0f} s in all."
    )
    console.print(
        f"Next: iessp report {out / 'pruned'} -o report.html    one page: what was kept, where the time goes\n"
        f"      iessp optimize {frozen_file} -o fast.safetensors    the file to deploy; stripe_kernels.load reads it\n"
        "      iessp prune --help    a network of your own; to train it, docs/prune-your-own.md",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return {
        **found,
        "files": [str(dense_file), str(frozen_file)],
        "networks": [row for batch, contest in times.items() for row in runs.contest_records(contest, batch)],
        "conditions": runs.conditions(),
        "pictures": [str(path) for path in pictures],
    }


def comparison(
    dense: dict[str, Any], pruned: dict[str, Any], dense_file: Path, frozen_file: Path
) -> list[list[str]]:
    """Rows of the table: quantity, dense, pruned, change."""
    tested = dense["images"]["test"]
    both = (dense, pruned)
    macs = [r["macs"] for r in both]
    parameters = [r["parameters"] for r in both]
    sizes = [file.stat().st_size for file in (dense_file, frozen_file)]

    def row(title: str, pair: Sequence[float], unit: str) -> list[str]:
        return [title, *(f"{v / 1e6:.2f} {unit}" for v in pair), f"-{1 - pair[1] / pair[0]:.2%}"]

    return [
        ["test errors", *(f"{r['test_errors']} of {tested}" for r in both), ""],
        ["accuracy", *(f"{1 - r['test_errors'] / tested:.2%}" for r in both), ""],
        row("convolution MACs", macs, "M"),
        row("parameters", parameters, "M"),
        row("file", sizes, "MB"),
    ]


def draw(frozen: Frozen, out: Path) -> tuple[Path, Path]:
    """The skeletons by layer, and each layer's time against the MACs it executes."""
    skeletons, plot = out / "skeletons.png", out / "time-against-macs.png"
    draw_skeletons(frozen.network, frozen.skeletons, skeletons)
    batch = BATCHES[-1]
    x = torch.randn(batch, *frozen.example.shape[1:], generator=torch.Generator().manual_seed(0))
    points: dict[str, list[tuple[float, float]]] = {"dense": [], "stripes": []}
    for name, (dense, stripes) in runs.time_layers(frozen.model, x, SECONDS).items():
        site, live = frozen.network[name], int(frozen.skeletons[name].sum())
        points["dense"].append((batch * site.macs / 1e6, dense.median))
        points["stripes"].append((batch * live * site.stripe_macs / 1e6, stripes.median))
    draw_time_against_macs(points, f"Each layer at batch {batch}, threads: {torch.get_num_threads()}", plot)
    return skeletons, plot
