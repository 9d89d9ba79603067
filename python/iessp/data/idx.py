"""MNIST (LeCun et al., 1998) and Fashion-MNIST (Xiao et al., 2017): IDX files, padded to 32x32."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from iessp.data.images import Images, Splits, split

FASHION = ("top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def mnist(data_dir: Path | None) -> Splits:
    """70,000 handwritten digits, 28x28 padded to 32x32, one channel."""
    return _load("mnist", data_dir, tuple(str(d) for d in range(10)), flip=False)


def fashion_mnist(data_dir: Path | None) -> Splits:
    """70,000 pictures of clothes, 28x28 padded to 32x32, one channel."""
    return _load("fashion-mnist", data_dir, FASHION, flip=True)


def _load(name: str, data_dir: Path | None, classes: tuple[str, ...], flip: bool) -> Splits:
    if data_dir is None:
        raise FileNotFoundError(
            f"{name} needs --data-dir, a folder with train-images-idx3-ubyte and the other three files"
        )
    train, test = (_images(data_dir, part) for part in ("train", "t10k"))
    return split(name, train, test, classes, flip)


def _images(data_dir: Path, part: str) -> Images:
    pixels, labels = (_read(data_dir, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    if pixels.ndim != 3 or labels.ndim != 1:
        raise ValueError(f"{part} files of {data_dir} have {pixels.shape} images and {labels.shape} labels")
    x = torch.from_numpy(pixels.copy()).unsqueeze(1)
    down, right = (max(0, 32 - n) for n in x.shape[-2:])
    x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
    return Images(x, torch.from_numpy(labels.astype(np.int64)))


def _read(data_dir: Path, name: str) -> np.ndarray:
    """An IDX file: two zero bytes, type 8 (bytes), number of dimensions, sizes as big-endian int32, data."""
    for path in (data_dir / name, data_dir / f"{name}.gz", data_dir / name.replace("-idx", ".idx")):
        if path.exists():
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            break
    else:
        raise FileNotFoundError(f"{data_dir / name} does not exist, packed (.gz) or not")
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of bytes: it begins with {data[:4].hex()}")
    sizes = struct.unpack(f">{data[3]}i", data[4 : 4 + 4 * data[3]])
    if len(data) != 4 + 4 * data[3] + int(np.prod(sizes)):
        raise ValueError(f"{path} has {len(data)} bytes, which does not fit its sizes {sizes}")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(sizes)
