"""The command line: `iessp --help`. The verbs; cli_options.py has their options, cli_work.py does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from iessp import ranks
from iessp.cli_frame import app, main, verb
from iessp.cli_options import (
    Batch,
    Batches,
    Budget,
    Changes,
    DataDir,
    Device,
    Download,
    Exclude,
    Input,
    Method,
    Model,
    Pointwise,
    RecipeName,
    Seconds,
    Threads,
    Weights,
    folder,
    network_file,
    page_file,
)
from iessp.recipe import Recipe, parse_changes, read
from iessp.reproduce import ABLATION, known_methods, possible

__all__ = ["app", "main"]


@verb("iessp demo --threads 1")
def demo(
    out: Annotated[Path, folder("--out", "Folder for everything it writes.")] = Path("runs/demo"),
    changes: Changes = None,
    threads: Threads = None,
) -> dict[str, Any] | None:
    """The whole path on real images, in minutes: train, prune, freeze, compare, time.

    VGG-16 on handwritten digits, dense and with IEM: one table, two pictures.
    """
    from iessp import demo as demonstration

    _threads(threads)
    return demonstration.run(out, _recipe("digits", changes))


@verb("iessp train digits --out runs/a --set epochs=8 --set budget=0.3")
def train(
    recipe: RecipeName,
    out: Annotated[
        Path | None, folder("--out", "Folder of the run; one found there is resumed. Default: runs/RECIPE.")
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    changes: Changes = None,
    device: Device = "cpu",
    threads: Threads = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also log to RUN/tensorboard.")] = False,
) -> dict[str, Any] | None:
    """Train a recipe and learn which stripes to keep; resumes where it stopped.

    Ctrl-C leaves a checkpoint, the same command goes on from it; works under torchrun. The run's folder has
    checkpoints, log.csv and results.json.
    """
    from iessp.data import load
    from iessp.progress import console, train_with_bar
    from iessp.runs import finish, results
    from iessp.train import Trainer

    _threads(threads)
    chosen = _recipe(recipe, changes)
    with ranks.joined(device) as device:
        place = out or Path("runs") / chosen.name
        splits = load(chosen.data, data_dir, download)
        start = place / "pretrained"
        if before := chosen.before():
            train_with_bar(Trainer(before, splits, start, device), "pretrained", tensorboard)
        trainer = Trainer(chosen, splits, place, device, start)
        train_with_bar(trainer, chosen.name, tensorboard)
        if ranks.mine() != 0:
            return None
        finish(trainer, console)
        return {"folder": str(place), **results(trainer)}


@verb("iessp prune my_package.net:make --weights trained.pt --budget 0.3 -o pruned.safetensors")
def prune(
    model: Model,
    budget: Budget = "0.25",
    method: Method = "magnitude",
    output: Annotated[Path, network_file()] = Path("pruned.safetensors"),
    exclude: Exclude = None,
    pointwise: Pointwise = False,
    weights: Weights = None,
    input_size: Input = None,
    threads: Threads = None,
) -> dict[str, Any] | None:
    """Prune a network in one shot, from its weights alone.

    Without data or training, so accuracy suffers. To learn what to keep, see `iessp train`, or
    examples/prune_your_own.py for a loop of your own. Writes the frozen network.
    """
    from iessp import cli_work

    _threads(threads)
    given = _given(model, input_size, weights)
    return cli_work.prune(given, method, budget, output, exclude or [], pointwise)


@verb("iessp freeze runs/digits -o digits.safetensors")
def freeze(
    model: Model,
    output: Annotated[
        Path | None, network_file("File to write. Default: frozen.safetensors, in the run's folder.")
    ] = None,
    weights: Weights = None,
    input_size: Input = None,
) -> dict[str, Any] | None:
    """Write a pruned network as one file that loads without training code.

    Takes a run, or any model with stripes that are zeros or masked by torch.nn.utils.prune.
    """
    from iessp import cli_work

    given = _given(model, input_size, weights)
    return cli_work.freeze_to(given, output or (given.folder or Path()) / "frozen.safetensors")


@verb("iessp optimize frozen.safetensors --batch 1 -o fast.safetensors")
def optimize(
    model: Model,
    output: Annotated[Path, network_file()] = Path("optimized.safetensors"),
    batch: Batch = 1,
    weights: Weights = None,
    input_size: Input = None,
    threads: Threads = None,
) -> dict[str, Any] | None:
    """Compact, fuse and tune a network, and write the result.

    Norms are folded, dead channels dropped exactly, epilogues fused, every kernel is chosen by measurement. Where
    the rewritten network would not be exact or not faster it stays as it was, and says why.
    """
    from iessp import cli_work

    _threads(threads)
    return cli_work.optimize(_given(model, input_size, weights), batch, output)


@verb("iessp bench runs/digits --batch 1 --batch 32 --threads 2")
def bench(
    model: Model,
    batch: Batches = None,
    seconds: Seconds = 8.0,
    weights: Weights = None,
    input_size: Input = None,
    threads: Threads = None,
) -> dict[str, Any] | None:
    """Time a network against its dense twin.

    The dense network competes as it is, with its norms folded, optimized, and in ONNX Runtime and OpenVINO where they
    are installed; speed-ups are over the fastest of them. Interleaved, after the outputs were compared: medians with
    quartiles. The dense twin of an optimized file is compacted and folded like it.
    """
    from iessp import cli_work

    _threads(threads)
    return cli_work.bench(_given(model, input_size, weights), batch or [1, 32], seconds)


@verb("iessp explain optimized.safetensors --measure --html explained.html")
def explain(
    model: Model,
    batch: Batch = 1,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time every layer's kernels first; else predictions.")
    ] = False,
    html: Annotated[Path | None, page_file("--html", help="Write it as a page too.")] = None,
    weights: Weights = None,
    input_size: Input = None,
    threads: Threads = None,
) -> dict[str, Any] | None:
    """Show by layer what lives, which kernel runs it, how long, and why."""
    from iessp import cli_work

    _threads(threads)
    return cli_work.explain(_given(model, input_size, weights), batch, measure, html)


@verb("iessp report runs/digits -o report.html")
def report(
    model: Model,
    output: Annotated[Path, page_file("-o", "--output", help="Page to write.")] = Path("report.html"),
    batch: Batch = 1,
    runs: Annotated[
        list[Path] | None,
        folder(
            "--runs",
            "Folder with records for the accuracy charts: of runs, or of `iessp reproduce`; repeatable. "
            "Default: the folder that MODEL's own is in.",
        ),
    ] = None,
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Predictions only: seconds, not minutes.")
    ] = False,
    seconds: Seconds = 8.0,
    weights: Weights = None,
    input_size: Input = None,
    threads: Threads = None,
) -> dict[str, Any] | None:
    """Write one self-contained page about a network.

    Skeletons, density by layer and tap, time by layer, roofline, accuracy against MACs and milliseconds, the
    plan's decisions.
    """
    from iessp import cli_work

    _threads(threads)
    given = _given(model, input_size, weights)
    return cli_work.report(given, batch, not no_measure, seconds, runs or [], output)


@verb("iessp reproduce digits-small --seeds 3 --method iem --method magnitude")
def reproduce(
    recipe: RecipeName,
    out: Annotated[
        Path | None,
        folder("--out", "Folder of the runs; those found are resumed. Default: runs/reproduce-RECIPE."),
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help=f"{known_methods()}, or iem(message=false); repeatable. Default: all that the recipe can have.",
        ),
    ] = None,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="IEM with each of its parts taken away.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Runs of each method.")] = 3,
    changes: Changes = None,
    device: Device = "cpu",
    threads: Threads = None,
) -> dict[str, Any] | None:
    """Every method on one recipe, several seeds, in one table.

    With spreads and latencies, curves and skeletons. Runs that are finished are not repeated.
    """
    import json

    from iessp.data import load
    from iessp.progress import console
    from iessp.reproduce import run

    _threads(threads)
    chosen = _recipe(recipe, changes)
    listed = methods or (list(ABLATION) if ablation else possible(chosen))
    place = out or Path("runs") / f"reproduce-{chosen.name}"
    path = run(chosen, load(chosen.data, data_dir, download), place, listed, seeds, device)
    console.print(f"rows are in {path}")
    return {"file": str(path), **json.loads(path.read_text())}


@verb("iessp doctor")
def doctor(
    seconds: Annotated[
        float, typer.Option(min=0.0, metavar="S", help="Time for the self-test, about.")
    ] = 10.0,
    threads: Threads = None,
) -> dict[str, Any] | None:
    """Show what this machine has, and test every kernel.

    Instruction sets, GPU, compilers, versions, the cache of measured choices; which kernels run and why others do
    not. Every kernel that runs is tested against float64; status 1 if one computes wrong.
    """
    from iessp.doctor import run
    from iessp.progress import console

    _threads(threads)
    return run(seconds, console)


def _given(model: str, input_size: str | None, weights: Path | None) -> Any:
    from iessp.cli_model import resolve

    return resolve(model, input_size, weights)


def _recipe(name: str, changes: list[str] | None) -> Recipe:
    return read(name).but(**parse_changes(changes or []))


def _threads(threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)
