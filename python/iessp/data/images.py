"""Images that fit in memory, split once, augmented on the device where they live."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HELD_OUT_SEED = 20_250_407  # the split is part of the data set, not of a run


@dataclass(frozen=True)
class Images:
    """x: uint8 [N, C, H, W]; y: int64 [N]."""

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if self.x.dtype != torch.uint8 or self.x.dim() != 4 or len(self.x) != len(self.y):
            given = f"{self.x.dtype} {tuple(self.x.shape)} with {len(self.y)}"
            raise ValueError(f"images are uint8 [N, C, H, W] with N labels, got {given}")

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device | str) -> Images:
        return Images(self.x.to(device), self.y.to(device))

    def take(self, index: Tensor) -> Images:
        return Images(self.x[index], self.y[index])


@dataclass(frozen=True)
class Splits:
    """train and held_out are for learning and for choices; test is read once, at the end."""

    name: str
    train: Images
    held_out: Images
    test: Images
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # per channel, of x / 255 over the training images
    std: tuple[float, ...]
    flip: bool  # a mirrored image is another image of the same class

    @property
    def channels(self) -> int:
        return self.train.x.shape[1]

    @property
    def size(self) -> int:
        return self.train.x.shape[-1]

    def to(self, device: torch.device | str) -> Splits:
        return replace(
            self, train=self.train.to(device), held_out=self.held_out.to(device), test=self.test.to(device)
        )


def split(
    name: str, train: Images, test: Images, classes: tuple[str, ...], flip: bool, held_out: float = 0.1
) -> Splits:
    """Hold out a stratified share of the training images, always the same ones."""
    random = np.random.default_rng(HELD_OUT_SEED)
    chosen = []
    labels = train.y.numpy()
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        chosen.append(members[: round(held_out * len(members))])
    out = torch.zeros(len(train), dtype=torch.bool)
    out[torch.from_numpy(np.concatenate(chosen))] = True
    kept = train.take(~out)
    scaled = kept.x.float().div_(255)
    mean, std = scaled.mean((0, 2, 3)), scaled.std((0, 2, 3)).clamp_min(1e-3)
    return Splits(name, kept, train.take(out), test, classes, tuple(mean.tolist()), tuple(std.tolist()), flip)


def normalise(x: Tensor, splits: Splits, size: int | None = None) -> Tensor:
    """uint8 [N, C, H, W] -> float32 with zero mean and unit variance over the training set, resized to size
    x size."""
    mean = x.new_tensor(splits.mean, dtype=torch.float32).view(-1, 1, 1)
    std = x.new_tensor(splits.std, dtype=torch.float32).view(-1, 1, 1)
    x = (x.float() / 255 - mean) / std
    if size is None or x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def augment(x: Tensor, generator: torch.Generator, shift: int, flip: bool) -> Tensor:
    """Shift by up to `shift` pixels, reflecting at the border, and mirror half of the images; one gather for
    the batch.

    x [N, C, H, W]; the random numbers come from `generator`, on the CPU, so that they do not depend on the
    device.
    """
    n, _, h, w = x.shape
    down = torch.randint(-shift, shift + 1, (n, 1), generator=generator)
    right = torch.randint(-shift, shift + 1, (n, 1), generator=generator)
    mirrored = torch.rand(n, 1, generator=generator) < (0.5 if flip else 0.0)
    columns = torch.where(mirrored, torch.arange(w - 1, -1, -1), torch.arange(w))
    rows = _reflect(torch.arange(h) + down, h).to(x.device)  # [N, H]
    columns = _reflect(columns + right, w).to(x.device)  # [N, W]
    images = torch.arange(n, device=x.device)[:, None, None]
    picked = x[images, :, rows[:, :, None], columns[:, None, :]]  # [N, H, W, C]
    return picked.permute(0, 3, 1, 2).contiguous()


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices up to size - 1 outside of 0..size-1, mirrored back in."""
    return size - 1 - (size - 1 - index.abs()).abs()


def shuffled(n: int, batch: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Indices of the batches of one epoch, a function of (seed, epoch) alone; an incomplete last batch is
    left out."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return iter(order[: n - n % batch].split(batch) if n >= batch else (order,))
