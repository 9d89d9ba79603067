"""A folder of images: train/<class>/* and test/<class>/* (or val/), read into memory at one size."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from iessp.data.images import Images, Splits, split

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp"}


def folder(data_dir: Path | None, size: int | None = None, flip: bool = True) -> Splits:
    """Images of every class in the first image's size, or size x size; a file of another size is resized."""
    train_dir, test_dir, classes = two_parts(data_dir)
    train, test = (_read(d, classes, size) for d in (train_dir, test_dir))
    return split(train_dir.parent.name, train, test, classes, flip)


def two_parts(data_dir: Path | None) -> tuple[Path, Path, tuple[str, ...]]:
    """The folders of training and test images and the classes they share; raises when something is missing."""
    if data_dir is None:
        raise FileNotFoundError(
            "a folder of images needs --data-dir, with train/<class>/ and test/<class>/ in it"
        )
    test_dir = next((data_dir / d for d in ("test", "val") if (data_dir / d).is_dir()), data_dir / "test")
    train_dir = data_dir / "train"
    for needed in (train_dir, test_dir):
        if not needed.is_dir():
            raise FileNotFoundError(
                f"{needed} is missing: expected train/<class>/ and test/<class>/ in {data_dir}"
            )
    classes = tuple(sorted(path.name for path in train_dir.iterdir() if path.is_dir()))
    other = tuple(sorted(path.name for path in test_dir.iterdir() if path.is_dir()))
    if classes != other:
        raise ValueError(f"{train_dir} has classes {list(classes)} but {test_dir} has {list(other)}")
    return train_dir, test_dir, classes


def is_folder(data_dir: Path | None) -> bool:
    """Whether `data_dir` looks like a folder of images by class."""
    return data_dir is not None and (data_dir / "train").is_dir()


def listed(split_dir: Path, classes: Iterable[str]) -> tuple[list[Path], list[int]]:
    """The image files of each class and their labels; raises when there is none."""
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(p for p in (split_dir / name).rglob("*") if p.suffix.lower() in SUFFIXES)
        files += found
        labels += [label] * len(found)
    if not files:
        raise FileNotFoundError(
            f"no image ({', '.join(sorted(SUFFIXES))}) in the class folders of {split_dir}"
        )
    return files, labels


def _read(split_dir: Path, classes: Iterable[str], size: int | None) -> Images:
    from PIL import Image

    files, labels = listed(split_dir, classes)
    with Image.open(files[0]) as first:
        shape = (size, size) if size else first.size

    def decode(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        return np.asarray(rgb if rgb.size == shape else rgb.resize(shape, Image.Resampling.BILINEAR))

    with ThreadPoolExecutor() as pool:  # decoding releases the GIL
        pixels = np.stack(list(pool.map(decode, files, chunksize=64)))
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))
