"""Measured choices that outlive the process: one small file a problem.

A file appears whole (written aside, then renamed), so processes need no lock: the later writer wins, and both
are right. A file that cannot be read counts as absent. Its name is a digest of all the measurement depends
on, the candidates included, so a new kernel, build or version of a library asks anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import sys
from collections.abc import Iterable
from functools import lru_cache
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from stripe_kernels.compile import choices
from stripe_kernels.plan import Candidate
from stripe_kernels.registry import Pass, Problem
from stripe_kernels.version import __version__

PACKAGE = Path(__file__).parents[1]
DRIVER = Path("/proc/driver/nvidia/version")
KEPT = 4096  # files; the least recently used go first


def default_folder() -> Path:
    """The user's cache folder, where the platform wants it."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "stripe_kernels" / "tune"


def key(problem: Problem, which: Pass, epilogue: str, candidates: Iterable[Candidate]) -> str:
    """Names one measurement: processor, build, libraries, problem, epilogue, and who was in the race."""
    s = problem.shape
    contents = {
        "processor": processor(problem.device),
        "library": [__version__, build_of(PACKAGE)],
        "torch": torch.__version__,
        "gpu": gpu_libraries() if problem.device == "cuda" else None,
        "problem": choices.entry(problem, which, ()),
        "geometry": [s.stride, s.padding, s.dilation, s.groups],
        "epilogue": epilogue,
        "candidates": sorted([c.kernel, list(c.config)] for c in candidates),
    }
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:32]


def read(folder: Path, name: str) -> tuple[Candidate, ...] | None:
    """The candidates written under `name`, or None where there is no such file or it is not whole."""
    path = folder / f"{name}.json"
    try:
        written = json.loads(path.read_text())
        found = choices.candidates_of(written["candidates"])
        os.utime(path)
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found or None


def write(folder: Path, name: str, problem: Problem, which: Pass, measured: Iterable[Candidate]) -> None:
    """Keeps measured candidates under `name`. Raises OSError where the folder cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.{secrets.token_hex(4)}"
    try:
        temporary.write_text(json.dumps(choices.entry(problem, which, measured)))
        os.replace(temporary, folder / f"{name}.json")
    finally:
        temporary.unlink(missing_ok=True)


def prune(folder: Path, kept: int = KEPT) -> None:
    """Deletes the least recently used files beyond `kept`; another process may be doing the same."""
    ages: list[tuple[float, Path]] = []
    for path in folder.glob("*.json"):
        try:
            ages.append((path.stat().st_mtime, path))
        except FileNotFoundError:
            continue
    for _, path in sorted(ages)[: max(0, len(ages) - kept)]:
        path.unlink(missing_ok=True)


@lru_cache(maxsize=8)
def build_of(package: Path) -> str:
    """A digest of the package's sources and native extensions: within one version kernels change as they are worked on.
    Some 12 MB, once a process."""
    found = (p for p in package.rglob("*") if p.name.endswith((".py", *EXTENSION_SUFFIXES)))
    digest = hashlib.sha256()
    for path in sorted(found):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError:  # an editor's lock, or a file that is being replaced
            continue
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1)
def gpu_libraries() -> dict[str, Any]:
    """Versions of what kernels on a GPU are compiled by, or run against; None where there is no such thing."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton,
        "driver": DRIVER.read_text() if DRIVER.exists() else None,
    }


@lru_cache(maxsize=8)
def processor(device: str) -> str:
    """The model of the processor that kernels run on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    if sys.platform == "linux":
        wanted: dict[str, Any] = {}
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "cpu family", "model", "CPU part", "flags", "Features"):
                wanted.setdefault(name.strip(), value.strip())
        return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    return f"{platform.machine()} {platform.processor()}"
