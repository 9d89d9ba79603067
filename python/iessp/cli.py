"""The command line: `iessp --help`. The verbs and their options; cli_work.py does the work."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from iessp import ranks
from iessp.attach import nearest
from iessp.cli_frame import app, main, verb
from iessp.recipe import Recipe, bundled, parse_changes, read
from iessp.reproduce import ABLATION, DEFAULT, known_methods

__all__ = ["app", "main"]


def _models(incomplete: str) -> list[str]:
    """Completes MODEL: built-in names, files and folders."""
    from iessp.models import MODELS

    folder, _, stem = incomplete.rpartition("/")
    paths = [str(p) + ("/" if p.is_dir() else "") for p in Path(folder or ".").glob(f"{stem}*")]
    return [name for name in [*MODELS, *paths] if name.startswith(incomplete)]


def _among(known: Iterable[str]) -> Any:
    return lambda incomplete: [name for name in known if name.startswith(incomplete)]


def _one_shot(incomplete: str) -> list[str]:
    from iessp.cli_work import ONE_SHOT

    return _among(ONE_SHOT)(incomplete)


def _device(text: str) -> str:
    """The name of a device that is there; BadParameter says why another is none."""
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise typer.BadParameter(nearest("device", text, ("cpu", "cuda", "cuda:0")))
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(
            f'torch sees {torch.cuda.device_count()} GPUs, no "{text}": see iessp doctor'
        )
    return text


def _named(suffix: str) -> Any:
    """Refuses, before any work, a file to write that is a folder, says it is of another kind or has no place to lie."""

    def checked(path: Path | None) -> Path | None:
        if path is not None and (path.is_dir() or path.suffix != suffix):
            raise typer.BadParameter(
                f'"{path}" is a folder' if path.is_dir() else f'"{path}" does not end in {suffix}'
            )
        if path is not None:
            place = next(folder for folder in path.absolute().parents if folder.exists())
            if not (place.is_dir() and os.access(place, os.W_OK)):
                raise typer.BadParameter(f'"{path}" cannot be written: "{place}" is no folder to write into')
        return path

    return checked


_network = _named(".safetensors")
RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help=f"A bundled recipe ({', '.join(bundled())}) or the path of a TOML file.",
        autocompletion=_among(bundled()),
    ),
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A file that `iessp freeze` or stripe_kernels.save wrote; a run's folder or one of its checkpoints; "
        "package.module:factory or path/file.py:factory, which returns a module or (module, example); or a "
        "built-in name such as vgg16, untrained.",
        autocompletion=_models,
    ),
]
Input = Annotated[
    str | None,
    typer.Option(
        "--input", metavar="CxHxW", help="Size of an input image. Default: the model's own, else 32x32."
    ),
]
Weights = Annotated[
    Path | None, typer.Option("--weights", help="state_dict to load into MODEL: .pt, .pth or .safetensors.")
]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Folder with the data set's files; digits need none.")
]
Download = Annotated[
    bool, typer.Option("--download", help="Fetch the data set's official files into --data-dir first.")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Folder of the run; a run found there is resumed. Default: runs/RECIPE."),
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a field of the recipe, as in --set epochs=3; repeatable."
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...", callback=_device)]
MOST_THREADS = max(64, os.cpu_count() or 1)  # OpenMP ends the process where the system gives it no more
Threads = Annotated[
    int | None, typer.Option(min=1, max=MOST_THREADS, help="CPU threads. Default: what torch chooses.")
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Images a call.")]
Seconds = Annotated[float, typer.Option(min=0.0, help="Time spent on timing each batch size.")]


@verb("iessp demo --threads 1")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything it writes.")] = Path("runs/demo"),
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
    out: Out = None,
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
        folder = out or Path("runs") / chosen.name
        splits = load(chosen.data, data_dir, download)
        start = folder / "pretrained"
        if before := chosen.before():
            train_with_bar(Trainer(before, splits, start, device), "pretrained", tensorboard)
        trainer = Trainer(chosen, splits, folder, device, start)
        train_with_bar(trainer, chosen.name, tensorboard)
        if ranks.mine() != 0:
            return None
        finish(trainer, console)
        return {"folder": str(folder), **results(trainer)}


@verb("iessp prune my_package.net:make --weights trained.pt --budget 0.3 -o pruned.safetensors")
def prune(
    model: Model,
    budget: Annotated[
        str, typer.Option(help='What to keep: a share of the MACs, as 0.25 or 25%, or a time, as "2.5 ms".')
    ] = "0.25",
    method: Annotated[
        str,
        typer.Option(
            help="How stripes are ranked: magnitude, l1-filter (whole filters) or random. Others learn, see train.",
            autocompletion=_one_shot,
        ),
    ] = "magnitude",
    output: Annotated[Path, typer.Option("-o", "--output", callback=_network, help="File to write.")] = Path(
        "pruned.safetensors"
    ),
    exclude: Annotated[
        list[str] | None, typer.Option(help="Convolution to leave as it is, by its name; repeatable.")
    ] = None,
    pointwise: Annotated[
        bool, typer.Option("--pointwise", help="Prune 1x1 convolutions too, where a stripe is a filter.")
    ] = False,
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
        Path | None,
        typer.Option(
            "-o",
            "--output",
            callback=_network,
            help="File to write. Default: frozen.safetensors, in the run's folder.",
        ),
    ] = None,
    weights: Weights = None,
    input_size: Input = None,
) -> dict[str, Any] | None:
    """Write a pruned network as one file that loads without training code.

    Takes a run, or any model with stripes that are zeros or masked by torch.nn.utils.prune.
    """
    from iessp import cli_work

    given = _given(model, input_size, weights)
    folder = given.folder or Path()
    return cli_work.freeze_to(given, output or folder / "frozen.safetensors")


@verb("iessp optimize frozen.safetensors --batch 1 -o fast.safetensors")
def optimize(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", callback=_network, help="File to write.")] = Path(
        "optimized.safetensors"
    ),
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
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Images a call; repeatable. Default: 1 and 32.")
    ] = None,
    seconds: Seconds = 8.0,
    weights: Weights = None,
    input_size: Input = None,
    threads: Threads = None,
) -> dict[str, Any] | None:
    """Time a network against its dense twin.

    Both as they are and optimized, interleaved, after their outputs were compared: medians with quartiles.
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
    html: Annotated[
        Path | None, typer.Option("--html", callback=_named(".html"), help="Write it as a page too.")
    ] = None,
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
    output: Annotated[
        Path, typer.Option("-o", "--output", callback=_named(".html"), help="Page to write.")
    ] = Path("report.html"),
    batch: Batch = 1,
    runs: Annotated[
        list[Path] | None,
        typer.Option(
            "--runs",
            help="Folder with records for the accuracy charts: of runs, or of `iessp reproduce`; repeatable. "
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
        typer.Option(
            "--out", help="Folder of the runs; those found are resumed. Default: runs/reproduce-RECIPE."
        ),
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", help=f"{known_methods()}, or iem(message=false); repeatable. Default: all."),
    ] = None,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="IEM with each of its parts taken away.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 3,
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
    listed = methods or (list(ABLATION) if ablation else list(DEFAULT))
    folder = out or Path("runs") / f"reproduce-{chosen.name}"
    path = run(chosen, load(chosen.data, data_dir, download), folder, listed, seeds, device)
    console.print(f"rows are in {path}")
    return {"file": str(path), **json.loads(path.read_text())}


@verb("iessp doctor")
def doctor(
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for the self-test, about.")] = 10.0,
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
