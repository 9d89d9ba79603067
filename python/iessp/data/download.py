"""Official files of a data set, fetched on request; a file with another checksum than the published one is refused.

The publishers give MD5 sums: good against damage, no proof of origin, for which TLS has to stand. Readers of these
files trust nothing in them (`cifar`, `idx`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path

SECONDS = 30.0  # without a byte, before giving up
CIFAR = "https://www.cs.toronto.edu/~kriz/"
MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FASHION = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
IDX = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)

# data set -> where, and the MD5 sum of each file there
SOURCES: dict[str, tuple[str, dict[str, str]]] = {
    "cifar10": (CIFAR, {"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"}),
    "cifar100": (CIFAR, {"cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85"}),
    "mnist": (MNIST, dict(zip(IDX, (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c",
    ), strict=True))),
    "fashion-mnist": (FASHION, dict(zip(IDX, (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310",
    ), strict=True))),
}  # fmt: skip


def download(name: str, data_dir: Path) -> None:
    """Put the files of the data set into `data_dir`; those that are there and whole are left.

    Raises ValueError for a data set without a source and for a wrong checksum, FileNotFoundError when a file
    cannot be fetched.
    """
    if name not in SOURCES:
        raise ValueError(f"{name} has no place to download from: only {', '.join(SOURCES)} have")
    place, files = SOURCES[name]
    data_dir.mkdir(parents=True, exist_ok=True)
    for file, checksum in files.items():
        path = data_dir / file
        if not path.exists() or _checksum(path) != checksum:
            _fetch(place + file, path, checksum)


def _fetch(url: str, path: Path, checksum: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # every rank may fetch
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as source, part.open("wb") as file:
            shutil.copyfileobj(source, file)
    except (urllib.error.URLError, OSError) as error:
        part.unlink(missing_ok=True)
        raise FileNotFoundError(
            f"{url} cannot be fetched ({error}): put it into {path.parent} yourself"
        ) from error
    found = _checksum(part)
    if found != checksum:
        part.unlink()
        raise ValueError(f"{url} has the MD5 sum {found}, not the published {checksum}: nothing was kept")
    part.replace(path)


def _checksum(path: Path) -> str:
    found = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()
