"""Labelled images as tensors, by the name of the data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from iessp.attach import nearest
from iessp.data.cifar import cifar10, cifar100
from iessp.data.digits import digits
from iessp.data.download import download
from iessp.data.folder import folder, is_folder
from iessp.data.idx import fashion_mnist, mnist
from iessp.data.images import Images, Splits
from iessp.data.stream import imagenet

DATASETS: dict[str, Callable[[Path | None], Splits]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "folder": folder,
    "imagenet": imagenet,
}


def load(name: str, data_dir: Path | None = None, fetch: bool = False) -> Splits:
    """Train, held-out and test images of a data set; fetch: download its official files into `data_dir` first.

    A `data_dir` with train/<class>/ and test/<class>/ is read as a folder of images, whatever the name; the
    splits' name then says so, for JPEG loses detail and such figures compare only with each other.
    Raises ValueError for an unknown name, FileNotFoundError for missing files.
    """
    if name not in DATASETS:
        raise ValueError(nearest("data set", name, DATASETS))
    if fetch:
        if data_dir is None:
            raise ValueError("--download needs --data-dir, the folder to put the files into")
        download(name, data_dir)
    if data_dir and name not in ("digits", "folder", "imagenet") and is_folder(data_dir):
        kind = "JPEG copies" if next(data_dir.glob("train/*/*.jpg"), None) else "image files"
        return replace(folder(data_dir), name=f"{name} ({kind})")
    return DATASETS[name](data_dir)


__all__ = ["DATASETS", "Images", "Splits", "download", "load"]
