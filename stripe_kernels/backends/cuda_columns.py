"""Which filters share a tensor-core column block, and which blocks a thread block: the index mathematics of
fprop_mma. Torch-free.

A column is a filter, or its part in one band of kernel rows, or one of its stripes. Eight columns make a
block; a block executes the union of their taps. A tile is a range of filters whose blocks fit the
accumulators of a warp.

Executed share of the dense work for 3x3 filters with random skeletons, K = 64 / 128 / 512 (simulated):

    density    whole filters        bands of rows        single stripes
    .05        .15 / .12 / .10      .12 / .08 / .09      .12 / .07 / .08
    .10        .29 / .24 / .23      .18 / .15 / .19      .14 / .11 / .17
    .20        .47 / .41 / .44      .31 / .31 / .35      .28 / .29 / .34
    .30        .61 / .58 / .58      .40 / .44 / .48      .39 / .48 / .52
    .50        .79 / .75 / .76      .72 / .68 / .70      .79 / .85 / .86
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from stripe_kernels.skeleton import FilterSkeleton

COLUMNS = 8  # of a block
BLOCKS = 16  # most of a tile
PARTS = 4  # most columns of a filter
WHOLE, BANDS, STRIPES = 0, 1, 2  # how a filter is cut into columns
BoolArray = npt.NDArray[np.bool_]


Column = tuple[int, BoolArray]  # filter within its group, taps [T]


@dataclass(frozen=True, eq=False)
class ColumnTile:
    """Filters [first, first + count) of a group: `columns[b][j]` is (filter, taps [T] that column j of
    block b executes for it)."""

    first: int
    count: int
    columns: tuple[tuple[Column, ...], ...]
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
        """Cycles of one multiprocessor for 128 pixels and 64 bytes of channels: tensor cores 32 a block and
        tap, shared memory 16 for its weights and 64 for the pixels of a tap (rates of sm_80 and sm_90)."""
        executed = int(self.unions.sum())
        return max(32 * executed, 16 * executed + 64 * int(self.unions.any(0).sum()))


Tiles = tuple[tuple[ColumnTile, ...], ...]  # of each group


def _cluster(columns: list[Column], growth: int) -> tuple[tuple[Column, ...], ...]:
    """Greedy: the column with most taps founds a block and takes those that add least to its union,
    `growth` taps a time at most. Columns with equal taps are handled together."""
    waiting: dict[bytes, list[Column]] = {}
    for column in columns:
        waiting.setdefault(column[1].tobytes(), []).append(column)
    queues = sorted(waiting.values(), key=lambda q: -int(q[0][1].sum()))
    taps = np.stack([q[0][1] for q in queues]) if queues else np.zeros((0, 0), np.bool_)
    left = np.array([len(q) for q in queues])
    blocks = []
    while left.any():
        pick = int(np.argmax(left > 0))
        block: list[Column] = []
        union = taps[pick]
        while True:
            union = union | taps[pick]
            take = min(COLUMNS - len(block), int(left[pick]))
            block += [queues[pick].pop() for _ in range(take)]
            left[pick] -= take
            if len(block) == COLUMNS or not left.any():
                break
            added, shared = (taps & ~union).sum(1), (taps & union).sum(1)
            pick = int(np.argmin(np.where(left > 0, added * 1024 - shared, 1 << 30)))
            if added[pick] > growth:
                break
        blocks.append(tuple(block))
    return tuple(blocks)


def _parts(live: BoolArray, rows: int, how: int) -> list[BoolArray]:
    """The taps [T] of one filter, cut into at most PARTS columns."""
    count = live.size
    if how == WHOLE:
        owner = np.zeros(count, np.int64)
    elif how == BANDS:
        owner = np.arange(count) * rows // count * min(3, rows) // rows
    else:
        number = np.cumsum(live) - 1
        owner = number if number[-1] < PARTS else number * PARTS // (number[-1] + 1)
    parts = [live & (owner == i) for i in range(PARTS)]
    return [p for p in parts if p.any()]


def _tile(parts: list[list[BoolArray]], first: int, count: int, taps: int, growth: int) -> ColumnTile:
    blocks = _cluster([(k, m) for k in range(first, first + count) for m in parts[k]], growth)
    unions = [np.any([m for _, m in b], axis=0) for b in blocks]
    return ColumnTile(first, count, blocks, np.stack(unions) if unions else np.zeros((0, taps), np.bool_))


def _tiled(parts: list[list[list[BoolArray]]], taps: int, growth: int) -> Tiles:
    """As few tiles as fit the accumulators, all with the same number of filters but the last."""
    group_k = len(parts[0])
    count = max(1, -(-max(sum(map(len, g)) for g in parts) // (BLOCKS * COLUMNS)))
    while True:
        size = -(-group_k // count)
        size += size % 2  # channels are stored in pairs
        tiles = tuple(
            tuple(
                _tile(g, first, min(size, group_k - first), taps, growth) for first in range(0, group_k, size)
            )
            for g in parts
        )
        worst = max(len(t.columns) for g in tiles for t in g)
        if worst <= BLOCKS:
            return tiles
        count = max(count + 1, count * worst // (BLOCKS + 2))


@lru_cache(maxsize=1024)
def column_tiles(skeleton: FilterSkeleton, groups: int, how: int) -> Tiles:
    """The tiles of each group for one way of cutting filters, the cheaper of mixed blocks and blocks of
    like taps."""
    filters, rows, columns = skeleton.shape
    live = skeleton.live.reshape(groups, filters // groups, rows * columns)
    parts = [[_parts(k, rows, how) for k in g] for g in live]
    ways = [
        _tiled(parts, rows * columns, growth)
        for growth in ((rows * columns,) if how == WHOLE else (0, rows * columns))
    ]
    return min(ways, key=lambda tiles: sum(t.cycles for g in tiles for t in g))


def executed(tiles: Tiles) -> int:
    """Stripes executed, live or not."""
    return sum(int(t.unions.sum()) * COLUMNS for g in tiles for t in g)
