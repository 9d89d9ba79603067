"""What the verbs take: options that several share, their checks, what completes them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from iessp.attach import nearest
from iessp.models import MODELS
from iessp.recipe import bundled

ONE_SHOT = ("magnitude", "l1-filter", "random")  # methods that rank untrained gates


def among(known: Iterable[str]) -> Any:
    """Completes one of these names."""
    return lambda incomplete: [name for name in known if name.startswith(incomplete)]


def _models(incomplete: str) -> list[str]:
    """Completes MODEL: built-in names, files and folders."""
    folder, _, stem = incomplete.rpartition("/")
    paths = [str(p) + ("/" if p.is_dir() else "") for p in Path(folder or ".").glob(f"{stem}*")]
    return [name for name in [*MODELS, *paths] if name.startswith(incomplete)]


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


def _no_file(given: Any) -> Any:
    """Refuses, before any work, a file where a folder is meant; `given` is a path, a list of paths or None."""
    for path in given if isinstance(given, list) else [given]:
        if path is not None and path.is_file():
            raise typer.BadParameter(f'"{path}" is a file: a folder is needed')
    return given


RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help=f"A bundled recipe ({', '.join(bundled())}) or the path of a TOML file.",
        autocompletion=among(bundled()),
    ),
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A file that iessp or stripe_kernels.save wrote; a run's folder or one of its checkpoints; "
        "package.module:factory or path/file.py:factory, which returns a module or (module, example); or a "
        f"built-in network, untrained: {', '.join(MODELS)}.",
        autocompletion=_models,
    ),
]
Input = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="CxHxW",
        help="Size of an input image. Default: what the model came with (files keep it), else 32x32.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights", metavar="FILE", help="state_dict to load into MODEL: .pt, .pth or .safetensors."
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", metavar="FOLDER", help="Folder with the data set's files; digits need none."),
]
Download = Annotated[
    bool, typer.Option("--download", help="Fetch the data set's official files into --data-dir first.")
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a field of the recipe, as in --set epochs=3; repeatable."
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ...", callback=_device)]
MOST_THREADS = max(64, os.cpu_count() or 1)  # OpenMP ends the process where the system gives it no more
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=MOST_THREADS, metavar="N", help="CPU threads. Default: what torch chooses."),
]
Batch = Annotated[int, typer.Option("--batch", min=1, metavar="N", help="Images a call.")]
Batches = Annotated[
    list[int] | None,
    typer.Option("--batch", min=1, metavar="N", help="Images a call; repeatable. Default: 1 and 32."),
]
Seconds = Annotated[float, typer.Option(min=0.0, metavar="S", help="Time spent on timing each batch size.")]
Pointwise = Annotated[
    bool, typer.Option("--pointwise", help="Prune 1x1 convolutions too, where a stripe is a filter.")
]
Budget = Annotated[
    str,
    typer.Option(
        metavar="SHARE|TIME",
        help="What to keep: a share of the convolutions' multiply-adds, as 0.25 or 25%, or a time for one image on "
        'this machine, as "2.5 ms".',
    ),
]
Method = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="How stripes are ranked: magnitude, l1-filter (whole filters) or random. Others learn, see iessp train.",
        autocompletion=among(ONE_SHOT),
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Convolution to leave as it is, by its name; repeatable."),
]


def folder(flag: str, help: str) -> Any:
    """An option that takes a folder, or several."""
    return typer.Option(flag, metavar="FOLDER", callback=_no_file, help=help)


def network_file(help: str = "File to write.") -> Any:
    return typer.Option("-o", "--output", metavar="FILE", callback=_named(".safetensors"), help=help)


def page_file(*flags: str, help: str) -> Any:
    return typer.Option(*flags, metavar="FILE", callback=_named(".html"), help=help)
