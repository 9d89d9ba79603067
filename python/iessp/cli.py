"""The command line: `iessp --help`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from iessp import demo as demonstration
from iessp import ranks
from iessp.progress import console, train_with_bar
from iessp.recipe import Recipe, bundled, parse_changes, read
from iessp.reproduce import ABLATION, DEFAULT, known_methods
from iessp.reproduce import run as run_all
from iessp.train import Interrupted, Trainer

app = typer.Typer(
    help="Learn which stripes of a network's convolutions to keep, freeze them, and run the rest faster.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeName = Annotated[
    str, typer.Argument(help=f"A bundled recipe ({', '.join(bundled())}) or the path of a TOML file.")
]
Folder = Annotated[Path, typer.Argument(help="Folder of a run, as `iessp train` left it.")]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Folder with the data set's files; digits need none.")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Folder of the run; a run found there is resumed. Default: runs/RECIPE."),
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a field of the recipe, as in --set epochs=3; repeatable."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: what torch chooses.")]
Batches = Annotated[list[int] | None, typer.Option("--batch", min=1, help="Batch size to time; repeatable.")]


@app.command()
def train(
    recipe: RecipeName,
    data_dir: DataDir = None,
    out: Out = None,
    changes: Changes = None,
    device: Device = "cpu",
    threads: Threads = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also log to RUN/tensorboard.")] = False,
) -> None:
    """Train a recipe, or go on where it stopped. Ctrl-C leaves a checkpoint; works under torchrun."""
    from iessp.runs import finish

    _threads(threads)
    chosen = read(recipe).but(**parse_changes(changes or []))
    with ranks.joined(device) as device:
        trainer = _trainer(chosen, data_dir, out or Path("runs") / chosen.name, device)
        train_with_bar(trainer, chosen.name, tensorboard)
        if ranks.mine() == 0:
            finish(trainer, console)


@app.command()
def freeze(
    run: Folder,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write. Default: RUN/frozen.safetensors.")
    ] = None,
) -> None:
    """Write the pruned network of a run as one safetensors file that loads without any training code."""
    from iessp.runs import write_frozen

    write_frozen(run, output or run / "frozen.safetensors", console)


@app.command()
def bench(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or a file that `iessp freeze` wrote.")],
    batch: Batches = None,
    seconds: Annotated[float, typer.Option(help="Time spent on each batch size.")] = 8.0,
    threads: Threads = None,
) -> None:
    """Time the frozen network against its dense twin, interleaved, after checking that their outputs
    agree.
    """
    from iessp.runs import bench_frozen

    _threads(threads)
    bench_frozen(run, batch or [1, 32], seconds, console)


@app.command()
def reproduce(
    recipe: RecipeName,
    data_dir: DataDir = None,
    out: Out = None,
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
) -> None:
    """Every method on one recipe, several seeds: one table with spreads and latencies, curves, skeletons."""
    from iessp.data import load

    _threads(threads)
    chosen = read(recipe).but(**parse_changes(changes or []))
    listed = methods or (list(ABLATION) if ablation else list(DEFAULT))
    folder = out or Path("runs") / f"reproduce-{chosen.name}"
    splits = load(chosen.data, data_dir)
    console.print(f"rows are in {run_all(chosen, splits, folder, listed, seeds, device)}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything it writes.")] = Path("runs/demo"),
    threads: Threads = None,
    changes: Changes = None,
) -> None:
    """Train VGG-16 on handwritten digits dense and with IEM, freeze, compare, time: one table, two pictures.
    Minutes.
    """
    _threads(threads)
    demonstration.run(out, read("digits").but(**parse_changes(changes or [])))


def _trainer(recipe: Recipe, data_dir: Path | None, out: Path, device: str) -> Trainer:
    from iessp.data import load

    return Trainer(recipe, load(recipe.data, data_dir), out, device)


def _threads(threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)


def main() -> None:
    """Run the command line; what a user can put right ends with one line and status 2, an interrupt with
    130.
    """
    try:
        app()
    except Interrupted as stopped:
        console.print(f"[yellow]{stopped}[/]. Run the same command again.")
        sys.exit(130)
    except (ValueError, OSError) as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(2)
