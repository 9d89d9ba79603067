"""Layouts, tables and runners of dgrad and wgrad on tensor cores (csrc/cuda/dgrad_mma.cu, wgrad_mma.cu)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stripe_kernels.backends.cuda_mma import (
    FRAGMENT,
    PIXEL_TABLE,
    ROW_TABLE,
    SIZES,
    UNIT,
    dense_channels_last,
    empty_channels_last,
    round_to_tf32,
)
from stripe_kernels.backends.cuda_runner import CudaRunner
from stripe_kernels.backends.cuda_tables import SHARED_BYTES, Layout, Tables, pieces
from stripe_kernels.backends.cuda_walk import Walked, dgrad_walk, fprop_walk
from stripe_kernels.packed import StripeIndex
from stripe_kernels.registry import Config, Problem

DGRAD_PIXELS, WGRAD_PIXELS = 256, 64  # of a block, of a step
LEAST_SLAB = 4  # units of stripes beside the largest patch of dgrad
WARPS, COLUMNS = 4, 8  # of a wgrad block, of each of its warps; a column has eight stripes
FILTER_BYTES = 256  # of dy, a pixel of a wgrad block
Place = tuple[int, int]  # offset in the patch in bytes, row of the packed weight


def _width(channels: int) -> int:
    """Tiles of 16 channels a block has."""
    return 2 if channels <= 32 else 4


@lru_cache(maxsize=512)
def dgrad_walked(problem: Problem) -> Walked:
    room = SHARED_BYTES - DGRAD_PIXELS * PIXEL_TABLE - 16 - 2 * LEAST_SLAB * 4 * FRAGMENT
    return dgrad_walk(problem.shape, DGRAD_PIXELS, room // (ROW_TABLE + 2 * (UNIT + 16)))


def dgrad_layout(problem: Problem, config: Config) -> Layout:
    (splits,) = config
    s, (walk, _) = problem.shape, dgrad_walked(problem)
    width, pitch = _width(s.group_c), UNIT + 16
    room = SHARED_BYTES - DGRAD_PIXELS * PIXEL_TABLE - 16 - walk.rows * (ROW_TABLE + 2 * pitch)
    return Layout(
        walk, s.groups, s.group_k, s.group_c, 16 * width, -(-s.group_c // (16 * width)),
        UNIT // SIZES[problem.dtype], pitch, min(16, room // (2 * width * FRAGMENT)), splits, width,
    )  # fmt: skip


def spread_over_banks(places: Iterable[Place], per_unit: int, dead: Place) -> list[Place]:
    """The stripes in whole units of `per_unit`, ordered [unit][t][own]: the four lanes t read their own-th
    stripe at once, so these four should lie in different banks. Rows are 16-byte multiples: the word within
    16 bytes decides."""
    waiting: list[list[Place]] = [[], [], [], []]
    for place in places:
        waiting[place[0] // 4 % 4].append(place)
    count = sum(map(len, waiting))
    units, own = -(-count // per_unit), per_unit // 4
    ordered = [dead] * (units * per_unit)
    for turn in range(units * own):
        unit, i = divmod(turn, own)
        # One of each bank, then of whichever has most left.
        chosen = [w.pop() for w in waiting if w]
        while len(chosen) < 4 and any(waiting):
            chosen.append(max(waiting, key=len).pop())
        for t, place in enumerate(chosen):
            ordered[unit * per_unit + t * own + i] = place
    return ordered


class MmaDgrad(CudaRunner):
    """A step's entries are places in the lists: for each of its stripes, where its filter and tap lie in
    the patch."""

    def __init__(self, native: Any, problem: Problem, config: Config) -> None:
        s, layout, size = problem.shape, dgrad_layout(problem, config), SIZES[problem.dtype]
        _, classes = dgrad_walked(problem)
        index = StripeIndex.of(problem.skeleton, s.groups)
        per_unit = 32 // size
        tables = Tables(classes=[v for c in classes for v in c.offset])
        rows: list[int] = []
        plans: list[
            list[list[tuple[Any, ...]]]
        ] = []  # [group][class] -> steps, alike for every tile of channels
        for group in range(s.groups):
            ranges = [
                range(*index.tap_ptr[group * s.taps + t : group * s.taps + t + 2]) for t in range(s.taps)
            ]
            plans.append([])
            for pixel_class in classes:
                plans[-1].append([])
                for load in pixel_class.loads:
                    for k0 in range(0, s.group_k, layout.chunk):
                        places = [
                            (row * layout.pitch + (int(index.filter[j]) - k0) * size, int(index.row[j]))
                            for tap, row in load.taps
                            for j in ranges[tap]
                            if k0 <= index.filter[j] < k0 + layout.chunk
                        ]
                        ordered = spread_over_banks(places, per_unit, (0, problem.skeleton.stripes))
                        for begin, end in pieces(len(ordered) // per_unit, layout.slab):
                            part = ordered[begin * per_unit : end * per_unit]
                            at = len(tables.lists)
                            tables.lists += [where for where, _ in part]
                            step = (
                                load.origin,
                                k0,
                                begin == 0,
                                (at, at + len(part)),
                                len(rows) // per_unit,
                                end - begin,
                            )
                            plans[-1][-1].append(step)
                            rows += [row for _, row in part]
        units = len(rows) // per_unit
        for of_group in plans:
            for tile in range(layout.tiles_out):
                for steps in of_group:
                    start = tables.step_count
                    for origin, k0, fresh, entries, unit, count in steps:
                        tables.add_step(origin, k0, fresh, entries, tile * units + unit, count)
                    tables.add_item(start, layout.splits)
        self.per_unit = per_unit
        super().__init__(native, "dgrad_mma", problem, layout, tables, rows=np.asarray(rows, np.int64))

    def pack(self, weight: Tensor) -> Tensor:  # [A, C/groups] -> [tile, unit, 16 channels, lane, 16 bytes]
        layout, size = self.layout, weight.element_size()
        weight = weight.detach()
        if size == 4:
            weight = round_to_tf32(weight)
        channels = layout.tiles_out * layout.tile_out
        padded = torch.nn.functional.pad(weight, (0, channels - weight.shape[1], 0, 1))
        rows = padded[self.arrays.on(weight.device)["rows"]]
        # unit; lane's word, half, value of a stripe; tile, 16 channels, half, lane's column of a channel
        parts = rows.view(-1, 4, 2, 4 // size, layout.tiles_out, layout.width, 2, 8)
        return parts.permute(4, 0, 5, 7, 1, 2, 6, 3).contiguous()

    def __call__(self, dy: Tensor, packed: Tensor) -> Tensor:
        return self.launch(dense_channels_last(dy), packed, empty_channels_last(self.shape.input_size, dy))


@lru_cache(maxsize=512)
def wgrad_walked(problem: Problem) -> Walked:
    size = SIZES[problem.dtype]
    dy = WGRAD_PIXELS * (4 + 2 * (FILTER_BYTES + 16))
    pitch = 16 * _width(problem.shape.group_c) * size + 16
    return fprop_walk(problem.shape, WGRAD_PIXELS, (SHARED_BYTES - dy) // (2 * pitch))


def wgrad_blocks(problem: Problem) -> list[tuple[Any, ...]]:
    """(group, origin, first filter, columns) a block; a column is (row of its tap, up to eight (a, k)), its
    k counted from the block's first filter."""
    s = problem.shape
    _, (pixels,) = wgrad_walked(problem)
    index = StripeIndex.of(problem.skeleton, s.groups)
    filters = FILTER_BYTES // SIZES[problem.dtype]
    blocks = []
    for group in range(s.groups):
        for first in range(0, s.group_k, filters):
            for load in pixels.loads:
                columns = []
                for tap, row in load.taps:
                    stripes = [
                        (int(index.row[j]), int(index.filter[j]) - first)
                        for j in range(*index.tap_ptr[group * s.taps + tap : group * s.taps + tap + 2])
                        if first <= index.filter[j] < first + filters
                    ]
                    columns += [(row, stripes[a:b]) for a, b in pieces(len(stripes), 8)]
                for a, b in pieces(len(columns), WARPS * COLUMNS):
                    blocks.append((group, load.origin, first, columns[a:b]))
    return blocks


def wgrad_layout(problem: Problem, config: Config, blocks: int) -> Layout:
    (splits,) = config
    s, (walk, _), size = problem.shape, wgrad_walked(problem), SIZES[problem.dtype]
    chunk = 16 * _width(s.group_c)
    return Layout(
        walk, s.groups, s.group_c, s.group_k, WARPS * COLUMNS * 8, max(1, blocks), chunk, chunk * size + 16,
        FILTER_BYTES // size, splits, _width(s.group_c),
    )  # fmt: skip


class MmaWgrad(CudaRunner):
    def __init__(self, native: Any, problem: Problem, config: Config) -> None:
        blocks = wgrad_blocks(problem)
        _, (pixels,) = wgrad_walked(problem)
        tables = Tables(classes=list(pixels.offset))
        for group, origin, first, columns in blocks:
            tables.items += [group, *origin, first]
            share = -(-len(columns) // WARPS)  # neighbours to one warp: it reads x once for all of a tap
            padded = []
            for warp in range(WARPS):
                own = columns[warp * share : (warp + 1) * share]
                padded += [*own, *[(-1, [])] * (COLUMNS - len(own))]
            tables.entries += [row for row, _ in padded]
            for _, stripes in padded:
                tables.lists += [v for stripe in [*stripes, *[(-1, 0)] * (8 - len(stripes))] for v in stripe]
        self.blocks, self.stripes = len(blocks), problem.skeleton.stripes
        super().__init__(native, "wgrad_mma", problem, wgrad_layout(problem, config, len(blocks)), tables)

    def __call__(self, dy: Tensor, x: Tensor) -> Tensor:
        dw = torch.empty(self.stripes, self.shape.group_c, dtype=self.dtype, device=x.device)
        dy = dense_channels_last(dy)
        return self.launch(dense_channels_last(x), dy, dw, dy.stride()) if self.blocks else dw
