"""Tiles of consecutive pixels, of all images, and the patch that each reads (csrc/cuda/tiles_sm90.h). Torch-free."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from stripe_kernels.geometry import IntPair

MOST_ROWS = 256  # of a copy
PIXEL_BYTES = 16
TAPS = 32  # of a phase, most
SIDE = 1 << 19  # pixels of a phase in either direction: the kernels divide in float32


@lru_cache(maxsize=128)
def patches_of(
    taps: tuple[IntPair, ...], written: tuple[int, int, int], read: IntPair, pixels: int
) -> tuple[np.ndarray, np.ndarray]:
    """First pixel read and count, of all images, of each tile of `pixels` pixels: (n, i, j) of those written reads
    (i, j) - tap."""
    images, rows, columns = written
    area, read_area = rows * columns, read[0] * read[1]
    tiles = -(-images * area // pixels)
    low = np.full(tiles, images * read_area, np.int64)
    high = np.full(tiles, -1, np.int64)
    n, i, j = (a.astype(np.int32) for a in np.unravel_index(np.arange(images * area), written))
    starts = np.arange(0, images * area, pixels)
    for tap in taps:
        p, q = i - tap[0], j - tap[1]
        inside = (p >= 0) & (p < read[0]) & (q >= 0) & (q < read[1])
        pixel = (n * read[0] + p) * read[1] + q
        low = np.minimum(low, np.minimum.reduceat(np.where(inside, pixel, images * read_area), starts))
        high = np.maximum(high, np.maximum.reduceat(np.where(inside, pixel, -1), starts))
    count = np.maximum(high - low + 1, 0)
    return np.where(count > 0, low, 0), count
