"""A folder of images: train/<class>/* and test/<class>/* (or val/), read into memory at one size."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from iessp.data.images import Images, Splits, split

if TYPE_CHECKING:
    from PIL import Image

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
    classes, other = (
        tuple(sorted(d.name for d in part.iterdir() if d.is_dir() and not hidden(d.relative_to(part))))
        for part in (train_dir, test_dir)
    )
    if not classes:
        raise FileNotFoundError(f"{train_dir} has no folder, of which every class needs one")
    if classes != other:
        raise ValueError(f"{train_dir} has classes {list(classes)} but {test_dir} has {list(other)}")
    return train_dir, test_dir, classes


def is_folder(data_dir: Path | None) -> bool:
    """Whether `data_dir` looks like a folder of images by class."""
    return data_dir is not None and (data_dir / "train").is_dir()


def listed(split_dir: Path, classes: Iterable[str]) -> tuple[list[Path], list[int]]:
    """The image files of each class and their labels; raises where a class has none."""
    files, labels = [], []
    for label, name in enumerate(classes):
        folder = split_dir / name
        found = sorted(
            p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not hidden(p.relative_to(folder))
        )
        if not found:
            raise FileNotFoundError(f"{folder} has no image: no file ends in {', '.join(sorted(SUFFIXES))}")
        files += found
        labels += [label] * len(found)
    return files, labels


def hidden(path: Path) -> bool:
    """Whether it is another program's, such as .ipynb_checkpoints/ and the ._cat.jpg that macOS puts beside cat.jpg."""
    return any(part.startswith(".") for part in path.parts)


def opened(path: Path) -> Image.Image:
    """The image in RGB; ValueError names a file that is none."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:  # of PNG
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _read(split_dir: Path, classes: Iterable[str], size: int | None) -> Images:
    from PIL import Image

    files, labels = listed(split_dir, classes)
    shape = (size, size) if size else opened(files[0]).size

    def decode(path: Path) -> np.ndarray:
        rgb = opened(path)
        return np.asarray(rgb if rgb.size == shape else rgb.resize(shape, Image.Resampling.BILINEAR))

    with ThreadPoolExecutor() as pool:  # decoding releases the GIL
        pixels = np.stack(list(pool.map(decode, files, chunksize=64)))
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))
