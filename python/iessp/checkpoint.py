"""Checkpoints that a kill at any moment cannot spoil: written beside, synced, renamed; the last few are
kept."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

KEPT = 2


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` (tensors, numbers, strings, lists, dicts) as FOLDER/step-NNNNNNNN.pt and drop the oldest
    ones, with what a kill left half written and what is of later steps: a folder is one run's, which has come from
    before them because they are damaged."""
    folder.mkdir(parents=True, exist_ok=True)
    for half in folder.glob(".step-*.tmp"):
        half.unlink()
    path = folder / f"step-{step:08d}.pt"
    write_atomically(path, lambda file: torch.save(state, file))
    found = saved(folder)
    kept = [other for other in found if other.name <= path.name][-KEPT:]
    for other in found:
        if other not in kept:
            other.unlink()
    return path


def load(folder: Path) -> dict[str, Any] | None:
    """The newest state that reads back whole; None without any. Says so when it has to pass over a damaged
    file."""
    for path in reversed(saved(folder)):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            reason = error if isinstance(error, OSError) else "it is damaged"  # torch advises to trust it
            print(f"{path} cannot be read ({reason}); going back to the one before it")
    return None


def read(path: Path) -> Any:
    """What one file of torch.save or of safetensors holds, on the CPU; ValueError with its name for any other."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if not zipfile.is_zipfile(path) and path.open("rb").read(1) != b"\x80":  # old ones are bare pickles
            raise ValueError("it is no file of torch.save")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # readers say "no" to files of strangers in every type there is
        said = str(error).splitlines() or [type(error).__name__]
        if "weights_only" in str(error):
            said = [
                "it holds more than tensors, such as a whole model; save model.state_dict() and give that file"
            ]
        raise ValueError(f"{path} cannot be read: {said[0]}") from error


def saved(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*.pt") if re.fullmatch(r"step-\d{8}\.pt", path.name))


def write_atomically(path: Path, write: Any) -> None:
    """`write(file)` into a temporary file beside `path`, then put it in place in one step that survives a
    power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk does not say which
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
