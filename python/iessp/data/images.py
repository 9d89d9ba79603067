"""Images that fit in memory, split once, augmented on the device where they live."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from iessp.data.stream import Stream

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

    @property
    def channels(self) -> int:
        return self.x.shape[1]

    @property
    def size(self) -> int:
        return self.x.shape[-1]

    def take(self, index: Tensor) -> Images:
        index = index.to(self.y.device)
        return Images(self.x[index], self.y[index])

    def batches(self, order: Iterable[Tensor], salt: int | None = None) -> Iterator[Images]:
        """The images of each index tensor in turn. `salt` is for those that decode as they go: see `stream`."""
        return map(self.take, order)


@dataclass(frozen=True)
class Splits:
    """train and held_out are for learning and for choices; test is read once, at the end."""

    name: str
    train: Images | Stream
    held_out: Images | Stream
    test: Images | Stream
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # per channel, of x / 255 over the training images
    std: tuple[float, ...]
    flip: bool  # a mirrored image is another image of the same class

    @property
    def channels(self) -> int:
        return self.train.channels

    @property
    def size(self) -> int:
        return self.train.size

    def to(self, device: torch.device | str) -> Splits:
        return replace(
            self, train=self.train.to(device), held_out=self.held_out.to(device), test=self.test.to(device)
        )


def split(
    name: str, train: Images, test: Images, classes: tuple[str, ...], flip: bool, held_out: float = 0.1
) -> Splits:
    """Hold out a stratified share of the training images, always the same ones."""
    out = held_out_mask(train.y, held_out)
    kept = train.take(~out)
    scaled = kept.x.float().div_(255)
    mean, std = scaled.mean((0, 2, 3)), scaled.std((0, 2, 3)).clamp_min(1e-3)
    return Splits(name, kept, train.take(out), test, classes, tuple(mean.tolist()), tuple(std.tolist()), flip)


def held_out_mask(y: Tensor, share: float = 0.1) -> Tensor:
    """bool [N]: the same share of every class of the labels y, one image at the least of every class that has two."""
    return _stratified(y, share, HELD_OUT_SEED, least=1)


def reduced(splits: Splits, images: int, resolution: int) -> Splits:
    """`splits` with about so many training images, and all brought to one size; 0: as they are. Twice is once."""
    if images and images < len(splits.train):
        splits = replace(splits, train=subset(splits.train, images))
    if resolution and resolution != splits.size:
        parts: Any = {
            name: _resized(getattr(splits, name), resolution) for name in ("train", "held_out", "test")
        }
        splits = replace(splits, **parts)
    return splits


def _resized(images: Images | Stream, size: int) -> Images | Stream:
    if not isinstance(images, Images):
        return replace(images, size=size)
    parts = [
        F.interpolate(x.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
        for x in images.x.split(4096)
    ]
    return Images(torch.cat([x.round().clamp(0, 255).to(torch.uint8) for x in parts]), images.y)


def subset(images: Images | Stream, n: int) -> Images | Stream:
    """About n images, the same share of every class, always the same ones."""
    chosen = _stratified(images.y, n / len(images), HELD_OUT_SEED + 1).nonzero().flatten()
    return images.take(chosen) if isinstance(images, Images) else images.part(chosen)


def _stratified(y: Tensor, share: float, seed: int, least: int = 0) -> Tensor:
    random, labels = np.random.default_rng(seed), y.cpu().numpy()
    chosen = []
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        chosen.append(members[: max(round(share * len(members)), min(least, len(members) - 1))])
    out = torch.zeros(len(y), dtype=torch.bool)
    out[torch.from_numpy(np.concatenate(chosen))] = True
    return out


def normalise(x: Tensor, splits: Splits, size: int | None = None) -> Tensor:
    """uint8 [N, C, H, W] -> float32 with zero mean and unit variance over the training set, resized to size
    x size."""
    mean = x.new_tensor(splits.mean, dtype=torch.float32).view(-1, 1, 1)
    std = x.new_tensor(splits.std, dtype=torch.float32).view(-1, 1, 1)
    x = (x.float() / 255 - mean) / std
    if size is None or x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def augment(
    x: Tensor, generator: torch.Generator, shift: int, flip: bool, part: tuple[int, int] = (0, 1)
) -> Tensor:
    """Shift by up to `shift` pixels, reflecting at the border, and mirror half of the images; one gather for
    the batch.

    x [N, C, H, W]; the random numbers come from `generator`, on the CPU, so that they do not depend on the
    device. part: (i, m) when x is images i, i + m, ... of the batch that the numbers are drawn for.
    """
    (mine, of), (_, _, h, w) = part, x.shape
    n = len(x) * of
    down = torch.randint(-shift, shift + 1, (n, 1), generator=generator)
    right = torch.randint(-shift, shift + 1, (n, 1), generator=generator)
    mirrored = torch.rand(n, 1, generator=generator) < (0.5 if flip else 0.0)
    down, right, mirrored = down[mine::of], right[mine::of], mirrored[mine::of]
    columns = torch.where(mirrored, torch.arange(w - 1, -1, -1), torch.arange(w))
    rows = _reflect(torch.arange(h) + down, h).to(x.device)  # [N, H]
    columns = _reflect(columns + right, w).to(x.device)  # [N, W]
    images = torch.arange(len(x), device=x.device)[:, None, None]
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
