"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): official archives, python or binary, packed or unpacked."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from iessp.data.images import Images, Splits, split

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PIXELS = 3 * 32 * 32

# Of each form: files of the training set and of the test set, wherever they lie.
FILES = {
    "cifar10": {
        "python": ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]),
        "binary": ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]),
    },
    "cifar100": {"python": (["train"], ["test"]), "binary": (["train.bin"], ["test.bin"])},
}
ARCHIVES = ("cifar-{}-python.tar.gz", "cifar-{}-binary.tar.gz")


def cifar10(data_dir: Path | None) -> Splits:
    """60,000 images in 10 classes from the official files in `data_dir`."""
    return _load("cifar10", data_dir, CIFAR10)


def cifar100(data_dir: Path | None) -> Splits:
    """60,000 images in 100 (fine) classes from the official files in `data_dir`."""
    return _load("cifar100", data_dir, tuple(str(i) for i in range(100)))


def _load(name: str, data_dir: Path | None, classes: tuple[str, ...]) -> Splits:
    if data_dir is None:
        raise FileNotFoundError(f"{name} needs --data-dir, a folder with its official archive from {PAGE}")
    read = _reader(name, data_dir)
    for form, (training, testing) in FILES[name].items():
        found = [read(file) for file in (*training, *testing)]
        if all(found):
            parse = _parse_python if form == "python" else _parse_binary
            parts = [parse(name, data) for data in found if data is not None]
            train, test = (_join(p) for p in (parts[: len(training)], parts[len(training) :]))
            return split(name, train, test, classes, flip=True)
    archives = " or ".join(a.format(name.removeprefix("cifar")) for a in ARCHIVES)
    raise FileNotFoundError(
        f"{data_dir} has no complete {name}: expected {archives} from {PAGE}, or its files unpacked"
    )


def _reader(name: str, data_dir: Path) -> Callable[[str], bytes | None]:
    """A function that finds a file by its last name, in the folder or in an official archive there."""
    if not data_dir.is_dir():
        raise FileNotFoundError(f"{data_dir} is not a folder")
    members: dict[str, bytes] = {}
    for archive in ARCHIVES:
        path = data_dir / archive.format(name.removeprefix("cifar"))
        if path.exists():
            members.update(_unpack(path))
    unpacked = {path.name: path for path in sorted(data_dir.rglob("*")) if path.is_file()}

    def read(file: str) -> bytes | None:
        if file in members:
            return members[file]
        return unpacked[file].read_bytes() if file in unpacked else None

    return read


def _unpack(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                yield PurePosixPath(member.name).name, file.read()


def _parse_binary(name: str, data: bytes) -> Images:
    """Records of one label byte (cifar100: coarse, fine) and 3072 pixels."""
    labels = 2 if name == "cifar100" else 1
    if len(data) % (labels + PIXELS):
        raise ValueError(f"a {name} file of {len(data)} bytes is not made of records of {labels + PIXELS}")
    records = np.frombuffer(data, np.uint8).reshape(-1, labels + PIXELS)
    return _images(records[:, labels:], records[:, labels - 1])


def _parse_python(name: str, data: bytes) -> Images:
    batch = _Plain(io.BytesIO(data), encoding="bytes").load()
    labels = batch[b"fine_labels" if name == "cifar100" else b"labels"]
    return _images(np.asarray(batch[b"data"], np.uint8), np.asarray(labels))


class _Plain(pickle.Unpickler):
    """Reads arrays and plain values; any other class in the file is refused, so that it cannot run code."""

    def find_class(self, module: str, name: str) -> object:
        if module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a CIFAR file does not hold {module}.{name}")


def _images(pixels: np.ndarray, labels: np.ndarray) -> Images:
    x = torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy())
    return Images(x, torch.from_numpy(labels.astype(np.int64)))


def _join(parts: list[Images]) -> Images:
    return Images(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]))
