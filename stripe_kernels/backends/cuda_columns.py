"""Which filters share a tensor-core column block, and which blocks a thread block: the index mathematics of fprop_mma. Torch-free.

A column is a filter, or its part in one band of kernel rows. Eight columns make a block; a block executes the union of their
taps. A tile is a range of filters whose blocks fit the accumulators of a warp.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from stripe_kernels.skeleton import FilterSkeleton

COLUMNS = 8  # of a block
BLOCKS = 16  # most of a tile
BANDS = 3  # most parts of a filter
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class ColumnTile:
    """Filters [first, first + count) of a group: `columns[b][j]` is (filter, taps [T] that column j of block b executes for it)."""

    first: int
    count: int
    columns: tuple[tuple[tuple[int, BoolArray], ...], ...]
    unions: BoolArray  # [blocks, T]

    def places(self) -> list[list[int]]:
        """For each filter, the numbers of its columns."""
        found: list[list[int]] = [[] for _ in range(self.count)]
        for b, block in enumerate(self.columns):
            for j, (k, _) in enumerate(block):
                found[k - self.first].append(b * COLUMNS + j)
        return found

    @property
    def cycles(self) -> int:
        """Cycles of one multiprocessor for 128 pixels and 64 bytes of channels: tensor cores 32 a block and tap, shared memory
        16 for its weights and 64 for the pixels of a tap (rates of sm_80 and sm_90)."""
        executed = int(self.unions.sum())
        return max(32 * executed, 16 * executed + 64 * int(self.unions.any(0).sum()))


def _cluster(columns: list[tuple[int, BoolArray]]) -> tuple[tuple[tuple[int, BoolArray], ...], ...]:
    """Greedy: the column with most taps founds a block and takes the seven that add least to its union."""
    if not columns:
        return ()
    taps = np.stack([m for _, m in columns])
    left = np.argsort(-taps.sum(1), kind="stable").tolist()
    blocks = []
    while left:
        block, union = [left.pop(0)], taps[0]
        union = taps[block[0]]
        while left and len(block) < COLUMNS:
            rest = taps[left]
            added, shared = (rest & ~union).sum(1), (rest & union).sum(1)
            best = int(np.argmin(added * 1024 - shared))
            union = union | rest[best]
            block.append(left.pop(best))
        blocks.append(tuple(columns[i] for i in block))
    return tuple(blocks)


def _tile(live: BoolArray, first: int, count: int, bands: BoolArray) -> ColumnTile:
    """live [group_k, T]; bands [B, T] says which taps a part may hold."""
    columns = [(k, live[k] & band) for k in range(first, first + count) for band in bands if (live[k] & band).any()]
    blocks = _cluster(columns)
    empty = np.zeros((0, live.shape[1]), np.bool_)
    unions = np.stack([np.any([m for _, m in b], axis=0) for b in blocks]) if blocks else empty
    return ColumnTile(first, count, blocks, unions)


def _bands(rows: int, columns: int, split: bool) -> BoolArray:
    """[B, T]: one band of everything, or up to three of whole kernel rows."""
    if not split:
        return np.ones((1, rows * columns), np.bool_)
    count = min(BANDS, rows)
    band = np.repeat(np.arange(rows) * count // rows, columns)
    return band[None] == np.arange(count)[:, None]


@lru_cache(maxsize=1024)
def column_tiles(skeleton: FilterSkeleton, groups: int, split: bool) -> tuple[tuple[ColumnTile, ...], ...]:
    """The tiles of each group, all with the same number of filters but the last; as few as fit the accumulators."""
    filters, rows, columns = skeleton.shape
    group_k = filters // groups
    live = skeleton.live.reshape(groups, group_k, rows * columns)
    bands = _bands(rows, columns, split)
    parts = max(int((g[:, None] & bands).any(2).sum()) for g in live)
    count = max(1, -(-parts // (BLOCKS * COLUMNS)))
    while True:
        size = -(-group_k // count)
        size += size % 2  # channels are stored in pairs
        tiles = tuple(
            tuple(_tile(g, first, min(size, group_k - first), bands) for first in range(0, group_k, size)) for g in live
        )
        if all(len(t.columns) <= BLOCKS for of_group in tiles for t in of_group):
            return tiles
        count += 1
