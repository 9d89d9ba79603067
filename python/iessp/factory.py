"""A user's own model by name: package.module:factory or path/file.py:factory."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import runpy
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iessp.attach import nearest


def make(text: str) -> tuple[nn.Module, Tensor | None]:
    """What the factory makes, called without arguments: a module, or a module and an example [N, C, H, W] of its input.

    A module in place of a factory is taken as it is. Raises ValueError or FileNotFoundError, with the nearest valid
    choice, for a wrong name; RuntimeError with one line for what the user's code raises.
    """
    source, _, attribute = text.rpartition(":") if ":" in text else (text, "", "")
    names = _names(source)
    if attribute not in names:
        valid = _factories(names, attribute)
        if not attribute:
            choice = ", ".join(f"{source}:{name}" for name in valid) or "none is in it"
            raise ValueError(f"{source} needs the name of a factory: {choice}")
        raise ValueError(nearest(f"factory of {source}", attribute, valid))
    made = names[attribute]
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise ValueError(f"{text} is no factory but of type {type(made).__name__}")
        made = _calling(text, made)
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not (example is None or isinstance(example, Tensor)):
        said = textwrap.shorten(f"{type(made).__name__} {made!r}", 80, placeholder=" ...")
        raise ValueError(f"{text} returned {said}: expected nn.Module, or (nn.Module, Tensor)")
    return model, example


def _factories(names: dict[str, Any], near: str) -> list[str]:
    """What may be meant: callables that the module itself defines, its models, and an imported name only where it comes
    near or nothing else is there."""
    public = {name: value for name, value in names.items() if callable(value) and not name.startswith("_")}
    own = [
        name
        for name, value in public.items()
        if isinstance(value, nn.Module) or getattr(value, "__module__", None) == names["__name__"]
    ]
    imported = [name for name in public if name not in own]
    return [*own, *difflib.get_close_matches(near, imported, n=1)] or imported


@torch.no_grad()
def check_fit(name: str, model: nn.Module, data: str, classes: int, example: Tensor) -> None:
    """Raises ValueError where a model does not take the data's images [1, C, H, W], or has other classes."""
    size, training = "x".join(map(str, example.shape[1:])), model.training
    try:
        scores = model.eval()(example)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name} does not take images of {data}, which are {size}: {reason}") from error
    model.train(training)
    if not isinstance(scores, Tensor) or scores.shape != (1, classes):
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"{name} gives {got} for one image of {data}: expected [1, {classes}], a score a class"
        )


def absent(path: Path) -> OSError:
    """The error for a file that is not there, or is a folder, with the one beside it that comes nearest."""
    if path.is_dir():
        return IsADirectoryError(f"{path} is a folder: a file is needed")
    if path.exists():  # a device or a pipe
        return FileNotFoundError(f"{path} is no regular file")
    siblings = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(str(path), siblings, n=1)
    return FileNotFoundError(f"{path} does not exist{f'; did you mean {close[0]}?' if close else ''}")


def _names(source: str) -> dict[str, Any]:
    """What a module defines, given by its dotted name or its file; modules beside it can be imported from it."""
    path = Path(source)
    by_file = source.endswith(".py")
    if by_file and not path.is_file():
        raise absent(path)
    place = str(path.resolve().parent) if by_file else ""  # as python does; console scripts do not
    if place not in sys.path:
        sys.path.insert(0, place)
    if not by_file and (not source or importlib.util.find_spec(source.partition(".")[0]) is None):
        raise ValueError(
            f'no module "{source}"; a model of your own is package.module:factory or path/file.py:factory'
        )
    load = runpy.run_path if by_file else importlib.import_module
    found = _calling(f"importing {source}", load, source)
    return found if by_file else vars(found)


def _calling(what: str, function: Any, *arguments: Any) -> Any:
    """Calls code of the user's."""
    try:
        return function(*arguments)
    except Exception as error:
        raise RuntimeError(f"{what} raised {type(error).__name__}: {error}") from error
    except SystemExit as error:  # a script that reads its arguments, which here are those of iessp
        raise RuntimeError(
            f'{what} ended the program: what a script does belongs below if __name__ == "__main__"'
        ) from error
