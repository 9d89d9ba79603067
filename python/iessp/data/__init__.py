"""Labelled images as tensors, by the name of the data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from iessp.attach import nearest
from iessp.data.digits import digits
from iessp.data.images import Images, Splits

DATASETS: dict[str, Callable[[Path | None], Splits]] = {
    "digits": digits,
}


def load(name: str, data_dir: Path | None = None) -> Splits:
    """Train, held-out and test images of a data set; raises ValueError for an unknown name,
    FileNotFoundError without files."""
    if name not in DATASETS:
        raise ValueError(nearest("data set", name, DATASETS))
    return DATASETS[name](data_dir)


__all__ = ["DATASETS", "Images", "Splits", "load"]
