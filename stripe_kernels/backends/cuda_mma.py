"""Layouts, tables and runners of the tensor-core kernels (csrc/cuda/*_mma.cu): channels last, 16-byte
pieces of channels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stripe_kernels.backends.cuda_columns import BLOCKS, COLUMNS, PARTS, ColumnTile, column_tiles
from stripe_kernels.backends.cuda_runner import CudaRunner
from stripe_kernels.backends.cuda_tables import SHARED_BYTES, Layout, Tables
from stripe_kernels.backends.cuda_walk import Walked, fprop_walk, position_walk
from stripe_kernels.registry import Config, Problem
from stripe_kernels.skeleton import FilterSkeleton

PIXELS = 128  # of an fprop block
UNIT = 64  # bytes of channels the tensor cores take at a time
FRAGMENT = 512  # bytes: eight columns of one unit
ROW_TABLE, PIXEL_TABLE = 12, 8  # bytes a row of the patch, a pixel of the tile
PATCH, POSITION = (
    0,
    1,
)  # first integer of a config; then how filters are cut into columns, and the splits of the sum
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


def _patch_room(units: int) -> int:
    """Most rows of a patch of `units` units, with a slab that takes the fullest tap beside it."""
    room = SHARED_BYTES - PIXELS * PIXEL_TABLE - 16 - FRAGMENT - 2 * BLOCKS * units * FRAGMENT
    return room // (ROW_TABLE + 2 * (units * UNIT + 16))


def _moved(walk: Walked) -> int:
    return walk[0].blocks * walk[0].rows * max(len(c.loads) for c in walk[1])


@lru_cache(maxsize=512)
def fprop_walked(problem: Problem, mode: int) -> tuple[Walked, int]:
    """The walk, and the units of a chunk: two, unless one lets a tile keep its whole halo."""
    s = problem.shape
    single = s.group_c * SIZES[problem.dtype] <= UNIT
    if mode == POSITION:
        return position_walk(s, PIXELS), 1 if single else 2
    one, two = (fprop_walk(s, PIXELS, _patch_room(units)) for units in (1, 2))
    return (one, 1) if single or _moved(one) < 0.8 * _moved(two) else (two, 2)


def fprop_layout(problem: Problem, config: Config) -> Layout:
    mode, how, splits = config
    s, size = problem.shape, SIZES[problem.dtype]
    (walk, _), units = fprop_walked(problem, mode)
    tiles = column_tiles(problem.skeleton, s.groups, how)
    width = 8 if all(len(t.columns) <= 8 for g in tiles for t in g) else 16
    pitch = units * UNIT + 16
    fixed = walk.rows * ROW_TABLE + 16 + PIXELS * PIXEL_TABLE + FRAGMENT
    slab = (SHARED_BYTES - fixed - 2 * walk.rows * pitch) // (2 * FRAGMENT)
    most = max((int(t.unions.sum()) * units for g in tiles for t in g), default=0)
    return Layout(
        walk, s.groups, s.group_c, s.group_k, tiles[0][0].count, len(tiles[0]), units * UNIT // size, pitch,
        min(slab, max(most, 1)), splits, width,
    )  # fmt: skip


def round_to_tf32(weight: Tensor) -> Tensor:
    return ((weight.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def dense_channels_last(t: Tensor) -> Tensor:
    """t itself where it is dense, channels last and aligned to 16 bytes; a copy otherwise."""
    n, c, h, w = t.shape
    if t.stride() != (c * h * w, 1, w * c, c):
        t = torch.empty(n, h, w, c, dtype=t.dtype, device=t.device).permute(0, 3, 1, 2).copy_(t)
    return t.clone() if t.data_ptr() % 16 else t


def empty_channels_last(size: tuple[int, int, int, int], like: Tensor) -> Tensor:
    """Strides follow from the sizes alone, also where torch would call the map contiguous (H = W = 1)."""
    n, c, h, w = size
    return torch.empty(n, h, w, c, dtype=like.dtype, device=like.device).permute(0, 3, 1, 2)


class ChannelsLastFprop(CudaRunner):
    """fprop of a kernel that takes and gives channels last."""

    def __call__(
        self,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        act: str,
    ) -> Tensor:
        y = empty_channels_last(self.shape.output_size, x)
        return self.launch(
            dense_channels_last(x), packed, y, None, (bias, scale, residual, act), (self.shape.K, 1)
        )


class MmaFprop(ChannelsLastFprop):
    """An entry is one tap of a step: row of the tap, and the blocks that live there as bits. Fragments of a
    step lie in the order they are executed: by entry, unit of channels, block."""

    def __init__(self, native: Any, problem: Problem, config: Config) -> None:
        s, layout = problem.shape, fprop_layout(problem, config)
        (_, classes), per_chunk = fprop_walked(problem, config[0])
        self.units = -(-s.group_c * SIZES[problem.dtype] // UNIT)
        pack = _FragmentOrder(problem.skeleton, self.units)
        tables = Tables(classes=[v for c in classes for v in c.offset])
        for group, of_group in enumerate(column_tiles(problem.skeleton, s.groups, config[1])):
            for tile in of_group:
                pack.open(tile, group * s.group_k)
                for pixel_class in classes:
                    start = tables.step_count
                    for load in pixel_class.loads:
                        taps = [(t, row) for t, row in load.taps if tile.unions[:, t].any()]
                        for first in range(0, self.units if taps else 0, per_chunk):
                            chunk = range(first, min(first + per_chunk, self.units))
                            channel = first // per_chunk * layout.chunk
                            for part in _slabs(taps, tile, len(chunk), layout.slab):
                                entries, weights, count = pack.step(tables, tuple(part), chunk)
                                tables.add_step(
                                    load.origin, channel, part[0] == taps[0], entries, weights, count
                                )
                    tables.add_item(start, layout.splits)
                _list_columns(tables, tile, layout)
        rows, fragments = np.asarray(pack.rows, np.int64).reshape(-1), np.asarray(pack.fragments, np.int64)
        super().__init__(native, "fprop_mma", problem, layout, tables, rows=rows, fragments=fragments)

    def pack(self, weight: Tensor) -> Tensor:  # [A, C/groups] -> [fragments, lane, 16 bytes]
        arrays, size = self.arrays.on(weight.device), weight.element_size()
        weight = weight.detach()
        if size == 4:
            weight = round_to_tf32(weight)
        # One row of zeros for columns without this tap, zeros behind the channels.
        rows = torch.nn.functional.pad(weight, (0, self.units * UNIT // size - weight.shape[1], 0, 1))[
            arrays["rows"]
        ]
        # column, unit, step of the tensor core, half of it, lane's word, value -> lane (column, word) first
        parts = rows.view(-1, COLUMNS, self.units, 2, 2, 4, 4 // size).permute(0, 2, 1, 5, 3, 4, 6)
        return parts.reshape(-1, FRAGMENT // size)[arrays["fragments"]]


class _FragmentOrder:
    """Which packed rows the columns of every (block, tap) hold, and in which order their fragments are
    executed."""

    def __init__(self, skeleton: FilterSkeleton, units: int) -> None:
        filters, rows, columns = skeleton.shape
        self.dead = skeleton.stripes
        self.row_of = np.full((filters, rows * columns), self.dead)
        self.row_of[skeleton.live.reshape(filters, -1)] = np.arange(skeleton.stripes)
        self.units = units
        self.rows: list[list[int]] = []
        self.fragments: list[int] = []

    def open(self, tile: ColumnTile, first_filter: int) -> None:
        """Goes on to a tile; its filters count from `first_filter`."""
        self.tile = tile
        self.number: dict[tuple[int, int], int] = {}
        self.steps: dict[Any, tuple[tuple[int, int], int, int]] = {}
        for b, block in enumerate(tile.columns):
            for t in np.flatnonzero(tile.unions[b]).tolist():
                own = [int(self.row_of[first_filter + k, t]) if taps[t] else self.dead for k, taps in block]
                self.number[b, t] = len(self.rows)
                self.rows.append(own + [self.dead] * (COLUMNS - len(own)))

    def step(
        self, tables: Tables, taps: tuple[tuple[int, int], ...], chunk: range
    ) -> tuple[tuple[int, int], int, int]:
        """Entries, first fragment and number of fragments; equal steps of several classes share them."""
        key = (taps, chunk)
        if key not in self.steps:
            entry, weights = len(tables.entries) // 2, len(self.fragments)
            for t, row in taps:
                live = np.flatnonzero(self.tile.unions[:, t]).tolist()
                tables.entries += [row, sum(1 << b for b in live)]
                self.fragments += [self.number[b, t] * self.units + unit for unit in chunk for b in live]
            self.steps[key] = (entry, len(tables.entries) // 2), weights, len(self.fragments) - weights
        return self.steps[key]


def _slabs(
    taps: list[tuple[int, int]], tile: ColumnTile, units: int, slab: int
) -> Iterator[list[tuple[int, int]]]:
    """The taps of a patch in runs whose fragments fit a slab."""
    part: list[tuple[int, int]] = []
    filled = 0
    for t, row in taps:
        count = int(tile.unions[:, t].sum()) * units
        if part and filled + count > slab:
            yield part
            part, filled = [], 0
        part.append((t, row))
        filled += count
    yield part


def _list_columns(tables: Tables, tile: ColumnTile, layout: Layout) -> None:
    """Where the epilogue finds each filter; a part it does not have is the column of zeros behind the last
    block."""
    places = tile.places() + [[]] * (layout.tile_out - tile.count)
    tables.lists += [max(1, *(len(p) for p in places)), 0, 0, 0]
    for p in places:
        tables.lists += [*p, *[COLUMNS * layout.width] * (PARTS - len(p))]
