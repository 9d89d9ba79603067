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
    # Only where a tile begins and ends is looked at: what a tap reads rises from pixel to pixel.
    n, rest = np.divmod(np.minimum(np.arange(tiles + 1) * pixels, images * area), max(1, area))
    i, j = np.divmod(rest, max(1, columns))
    for tap in taps:
        top, left = max(0, tap[0]), max(0, tap[1])  # the first pixel that the tap meets, of those it meets
        tall, wide = max(0, min(rows, read[0] + tap[0]) - top), max(0, min(columns, read[1] + tap[1]) - left)
        if not tall * wide:
            continue
        inside = (i >= top) & (i < top + tall)
        before = n * tall * wide + np.clip(i - top, 0, tall) * wide + inside * np.clip(j - left, 0, wide)
        first, last = (_nth(at, tap, (top, left), (tall, wide), read) for at in (before[:-1], before[1:] - 1))
        some = last >= first
        low = np.where(some, np.minimum(low, first), low)
        high = np.where(some, np.maximum(high, last), high)
    count = np.maximum(high - low + 1, 0)
    return np.where(count > 0, low, 0), count


def _nth(at: np.ndarray, tap: IntPair, corner: IntPair, size: IntPair, read: IntPair) -> np.ndarray:
    """The pixel read by the pixel number `at` of those that a tap meets: `size` of each image, from `corner` on."""
    n, rest = np.divmod(at, size[0] * size[1])
    i, j = np.divmod(rest, size[1])
    found: np.ndarray = (n * read[0] + i + corner[0] - tap[0]) * read[1] + j + corner[1] - tap[1]
    return found
