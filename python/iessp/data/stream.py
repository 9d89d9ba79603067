"""ImageNet-style folders, larger than memory: files are decoded by worker processes when their batch comes.

    training    a random part of the image, 8 % to 100 % of its area and 3/4 to 4/3 of its shape, at size x size
    otherwise   the centre, 7/8 of the shorter side, at size x size

What is random is a function of (salt, image), so a resumed run sees the same pixels for any number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from iessp.data.folder import listed, opened, two_parts
from iessp.data.images import Images, Splits, held_out_mask

SIZE = 224
CENTRE = 7 / 8  # of the shorter side
SAMPLE = 1000  # images that mean and spread are measured on
WORKERS = 4


@dataclass(frozen=True)
class Stream:
    """As `Images`, from files: labels y int64 [N] in memory, uint8 [n, 3, size, size] decoded by the batch."""

    files: tuple[Path, ...]
    y: Tensor
    size: int = SIZE
    workers: int = WORKERS
    device: str = "cpu"

    def __len__(self) -> int:
        return len(self.files)

    @property
    def channels(self) -> int:
        return 3

    def to(self, device: torch.device | str) -> Stream:
        return replace(self, device=str(device))

    def take(self, index: Tensor) -> Images:
        """Decoded here and now, in their evaluation form."""
        return self._stacked([self._decoded(i, None) for i in index.tolist()])

    def part(self, index: Tensor) -> Stream:
        return replace(self, files=tuple(self.files[i] for i in index.tolist()), y=self.y[index])

    def batches(self, order: list[Tensor], salt: int | None = None) -> Iterator[Images]:
        """The images of each index tensor in turn, decoded ahead; salt: in their training form."""
        loader: DataLoader[tuple[int, Tensor]] = DataLoader(
            _Decoder(self, salt), batch_sampler=[index.tolist() for index in order], num_workers=self.workers,
            collate_fn=partial(list), pin_memory=self.device.startswith("cuda"),
        )  # fmt: skip
        for found in loader:
            yield self._stacked(found).to(self.device)

    def _stacked(self, found: list[tuple[int, Tensor]]) -> Images:
        return Images(torch.stack([x for _, x in found]), self.y[[i for i, _ in found]])

    def _decoded(self, index: int, salt: int | None) -> tuple[int, Tensor]:
        from PIL import Image

        rgb = opened(self.files[index])
        if salt is None:
            box = _centre(*rgb.size)
        else:
            box = _random_part(*rgb.size, np.random.default_rng((salt, index)))
        pixels = np.asarray(rgb.resize((self.size, self.size), Image.Resampling.BILINEAR, box))
        return index, torch.from_numpy(pixels.transpose(2, 0, 1).copy())


class _Decoder(torch.utils.data.Dataset[tuple[int, Tensor]]):
    """What a worker process does."""

    def __init__(self, stream: Stream, salt: int | None):
        self.stream, self.salt = stream, salt

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return self.stream._decoded(index, self.salt)

    def __len__(self) -> int:
        return len(self.stream)


def imagenet(data_dir: Path | None, size: int = SIZE, workers: int = WORKERS) -> Splits:
    """train/<class>/* and val/<class>/* (or test/), streamed; a fixed tenth of train is held out."""
    train_dir, test_dir, classes = two_parts(data_dir)
    train, test = (
        Stream(tuple(files), torch.tensor(labels), size, workers)
        for files, labels in (listed(d, classes) for d in (train_dir, test_dir))
    )
    out = held_out_mask(train.y)
    kept = train.part((~out).nonzero().flatten())
    random = torch.Generator().manual_seed(0)
    sample = kept.take(torch.randperm(len(kept), generator=random)[:SAMPLE]).x.float().div_(255)
    mean, std = sample.mean((0, 2, 3)), sample.std((0, 2, 3)).clamp_min(1e-3)
    return Splits(
        train_dir.parent.name, kept, train.part(out.nonzero().flatten()), test, classes, tuple(mean.tolist()),
        tuple(std.tolist()), flip=True,
    )  # fmt: skip


def _centre(w: int, h: int) -> tuple[float, float, float, float]:
    side = CENTRE * min(w, h)
    return (w - side) / 2, (h - side) / 2, (w + side) / 2, (h + side) / 2


def _random_part(w: int, h: int, random: np.random.Generator) -> tuple[float, float, float, float]:
    """left, top, right, bottom; the centre when ten draws do not fit."""
    for _ in range(10):
        area = random.uniform(0.08, 1.0) * w * h
        shape = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, high = math.sqrt(area * shape), math.sqrt(area / shape)
        if wide <= w and high <= h:
            left, top = random.uniform(0, w - wide), random.uniform(0, h - high)
            return left, top, left + wide, top + high
    return _centre(w, h)
