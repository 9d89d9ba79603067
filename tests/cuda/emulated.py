"""The kernels of csrc/cuda as an extension for the CPU: g++ compiles the .cu files against the headers in
emulate/."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

from tests.tree import CXX, ROOT

BUILD = ROOT / "build/emulated"
EMULATE = Path(__file__).parent / "emulate"


def device_sources() -> list[Path]:
    return sorted((ROOT / "csrc/cuda").glob("*.cu"))


def hash_of(*texts: str) -> str:
    """Names these sources and `texts`."""
    folders = (ROOT / "csrc/cuda", ROOT / "csrc/core", EMULATE)
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    digest = hashlib.sha256("\0".join(texts).encode())
    for path in sorted([*files, *(ROOT / "csrc/bindings").glob("cuda*")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def built_once(folder: Path, name: str = "") -> Iterator[None]:
    """Workers of one test run come in one after another."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def options(root: Path, *flags: str) -> list[str]:
    """Of the compiler, for the sources below `root`."""
    import pybind11

    folders = (
        root / "tests/cuda/emulate",
        root / "csrc",
        pybind11.get_include(),
        sysconfig.get_path("include"),
    )
    includes = [f"-I{p}" for p in folders]
    return ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas", *flags, *includes]


def build(*flags: str) -> Path:
    """The extension, from build/ where these very sources were compiled before."""
    target = BUILD / hash_of(CXX, *options(ROOT, *flags)) / "_cuda.so"
    with built_once(target.parent):
        if not target.exists():
            sources = [*device_sources(), ROOT / "csrc/bindings/cuda.cpp", EMULATE / "switch.cpp"]
            command = [
                *shlex.split(CXX),
                "-shared",
                "-x",
                "c++",
                *options(ROOT, *flags),
                *map(str, sources),
                "-o",
                f"{target}.new",
            ]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            os.replace(f"{target}.new", target)
    return target


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _switched(native: ModuleType, name: str, on: bool | bytes = True) -> Iterator[None]:
    switch = ctypes.CDLL(native.__file__)[name]
    switch(on)
    try:
        yield
    finally:
        switch(type(on)())


def backwards(native: ModuleType) -> AbstractContextManager[None]:
    """The threads of a block in falling order."""
    return _switched(native, "emulate_backwards")


def late(native: ModuleType) -> AbstractContextManager[None]:
    """Copies and products of sm_90 happen as late as they may."""
    return _switched(native, "emulate_late")


def greedy(native: ModuleType) -> AbstractContextManager[None]:
    """A warp runs as long as it can before the next one."""
    return _switched(native, "emulate_greedy")


def failing(native: ModuleType, call: str) -> AbstractContextManager[None]:
    """The call of the runtime or driver of this name fails."""
    return _switched(native, "emulate_failing", call.encode())


def last_block(native: ModuleType) -> AbstractContextManager[None]:
    """Of every grid the block of the highest numbers alone runs; a persistent grid has one for every item."""
    return _switched(native, "emulate_last_block")
