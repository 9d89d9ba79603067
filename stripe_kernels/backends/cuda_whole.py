"""Layout, tables and runner of fprop on Hopper's own instructions that multiplies whole filters, tap by tap
(csrc/cuda/fprop_whole_sm90.cu): strides of 1, channels last, 16-byte pieces of channels, few of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stripe_kernels.backends.cuda_mma import ChannelsLastFprop
from stripe_kernels.backends.cuda_tables import Layout, Tables
from stripe_kernels.backends.cuda_walk import Walk
from stripe_kernels.backends.cuda_wgmma import CHUNK, PROCESSORS, ROW, SHARED_BYTES, chunks_of, swizzled
from stripe_kernels.geometry import IntPair
from stripe_kernels.phases import PhaseTap, phases
from stripe_kernels.registry import Config, Problem

BLOCK = 64  # positions that a warpgroup computes at once
MOST_BLOCKS = 3  # of a tile: one a warpgroup
SUMS_BYTES = 3 * BLOCK * ROW  # results on their way to y
BUFFERS = 8  # most, of patches
SIDE = 256  # of a box of x, most
TAPS = 64  # of a tile of filters, most
POSITIONS = 1 << 30
FILTER_TILES = 65535
CONFIGS = ((64,), (128,))  # filters of a tile; one number tells these from the other algorithms of cuda_wgmma


@lru_cache(maxsize=512)
def taps_by_tile(problem: Problem, filters: int) -> tuple[tuple[PhaseTap, ...], ...]:
    """Of every tile of filters, group by group, the taps that one of them keeps."""
    s = problem.shape
    return tuple(
        tuple(t for t in p.taps if np.diff(t.filters.searchsorted((first, first + filters)))[0])
        for p in phases(problem.skeleton, s)
        for first in range(0, s.group_k, filters)
    )


def _reach(problem: Problem) -> tuple[IntPair, IntPair]:
    """What position (0, 0) reads through the first tap in either direction, and how far the last tap is from it."""
    taps = [(t.i, t.j) for p in phases(problem.skeleton, problem.shape) for t in p.taps] or [(0, 0)]
    low, high = np.min(taps, 0).tolist(), np.max(taps, 0).tolist()
    return (low[0], low[1]), (high[0] - low[0], high[1] - low[1])


@dataclass(frozen=True)
class Tiling:
    """Positions are numbered through the rows of a patch, `width` columns each, of a band of y's columns."""

    bands: int
    columns: int  # of a band
    width: int
    step: int  # positions from a tile to the next
    blocks: int  # of a tile
    tiles: int  # of a band of an image
    rows: int  # of a patch
    pitch: int  # bytes of a patch of 64 channels
    buffers: int
    cycles: float  # that the busiest multiprocessor should take


def _steps(columns: int, width: int, blocks: int) -> Iterator[int]:
    """Of a tile: its blocks are full, or it has whole rows; then only positions that are not stored lie behind them."""
    yield blocks * BLOCK
    rows = (blocks * BLOCK - columns) // width + 1 if blocks * BLOCK >= columns else 0
    if rows:
        yield rows * width


@lru_cache(maxsize=512)
def tiling_of(problem: Problem, config: Config, processors: int = PROCESSORS) -> Tiling | None:
    """The one that should be fastest; None where none fits a block of sm_90."""
    s, (filters,) = problem.shape, config
    found = taps_by_tile(problem, filters)
    taps, chunks = max(map(len, found)), chunks_of(problem)
    if s.stride != (1, 1) or s.group_c == 0 or taps > TAPS or len(found) > FILTER_TILES:
        return None
    # Weights, results, scale and shift, taps, barriers but those of patches, and up to a multiple of 1024.
    fixed = taps * (chunks * filters * ROW + 12) + SUMS_BYTES + filters * 8 + 64 + 1024
    _, span = _reach(problem)
    best: Tiling | None = None
    for columns in sorted({-(-s.Q // bands) for bands in range(1, 9)} | {*range(16, min(s.Q, SIDE), 8)}):
        bands, width = -(-s.Q // columns), columns + span[1]
        positions, reach = (s.P - 1) * width + columns, span[0] * width + span[1]
        if width > SIDE or max(positions, s.P * width) + reach > POSITIONS:
            continue
        for blocks in range(1, MOST_BLOCKS + 1):
            for step in _steps(columns, width, blocks):
                tiles = -(-positions // step)
                some = np.r_[: min(tiles, width), tiles - 1]  # where they begin in a row repeats itself
                first = some * step
                count = np.minimum(positions - first, min(step, blocks * BLOCK))
                rows = int(((first % width + count - 1 + reach) // width).max()) + 1
                read = int((first % width).max()) + blocks * BLOCK + reach
                pitch = -(-max(read, rows * width) * ROW // 1024) * 1024
                buffers = min(BUFFERS, (SHARED_BYTES - fixed) // (pitch + 16))
                if rows > SIDE or buffers < chunks:
                    continue
                full, last = -(-int(count[0]) // BLOCK), -(-int(count[-1]) // BLOCK)
                busy = full + (last - full) / tiles
                cycles = _cycles(
                    problem, filters, taps, busy, bands * tiles, rows * width, buffers, processors
                )
                tiling = Tiling(bands, columns, width, step, blocks, tiles, rows, pitch, buffers, cycles)
                if best is None or tiling.cycles < best.cycles:
                    best = tiling
    return best


def _cycles(
    problem: Problem,
    filters: int,
    taps: int,
    blocks: float,
    tiles: int,
    rows: int,
    buffers: int,
    processors: int,
) -> float:
    """A tile takes its products, shared memory's bandwidth for these and for what comes and goes, or its patches from
    the second-level cache; more where no patch is loaded before it is needed. Not fitted to a GPU yet."""
    s, chunks = problem.shape, chunks_of(problem)
    products = taps * chunks * 4 * max(filters / 2, 16 + filters / 4) + 100
    patch = chunks * rows * ROW
    shared = blocks * (taps * chunks * 4 * (16 + filters / 4) + filters * 4) + patch / 128
    tile = max(blocks * products, shared, patch / 32) + 0.05 * patch / 32
    tile += 0 if buffers > chunks else (800 + patch / chunks / 32) / chunks
    filter_tiles = s.groups * -(-s.group_k // filters)
    share = max(1, processors // filter_tiles)
    waves = -(-s.N * tiles // share) * -(-filter_tiles // processors)
    return waves * tile + 2000 + taps * chunks * filters * ROW / 32 + 6 * filters


@lru_cache(maxsize=512)
def layout_of(problem: Problem, config: Config, processors: int = PROCESSORS) -> Layout | None:
    s, tiling = problem.shape, tiling_of(problem, config, processors)
    if tiling is None:
        return None
    (filters,) = config
    found = taps_by_tile(problem, filters)
    walk = Walk(
        s.N, (1, 1, tiling.columns), (s.N, tiling.tiles, tiling.bands), (s.P, s.Q), (1, 1), (s.H, s.W), (1, 1),
        (tiling.rows, tiling.width), (tiling.buffers, tiling.blocks), (tiling.step, 1), 1,
    )  # fmt: skip
    return Layout(
        walk, s.groups, s.group_c, s.group_k, filters, len(found) // s.groups, CHUNK, tiling.pitch,
        max(map(len, found)), 1, filters,
    )  # fmt: skip


class WholeFprop(ChannelsLastFprop):
    """Items are the tiles of filters of every group, the step says where patches begin, entries are the tiles' taps."""

    def __init__(self, native: Any, problem: Problem, config: Config, processors: int = PROCESSORS) -> None:
        s, layout = problem.shape, layout_of(problem, config, processors)
        assert layout is not None
        (self.filters,), self.chunks = config, chunks_of(problem)
        origin, _ = _reach(problem)
        tables = Tables(steps=[*origin, 0, 0], classes=[0, 0])
        stripes = problem.skeleton.stripes
        rows = [np.empty((0, self.filters), np.int64)]
        for number, taps in enumerate(taps_by_tile(problem, self.filters)):
            group, first = divmod(number, layout.tiles_out)
            first *= self.filters
            tables.items += [len(tables.entries), len(tables.entries) + len(taps)]
            tables.items += [group * s.group_k + first, min(self.filters, s.group_k - first)]
            for tap in taps:
                tables.entries.append((tap.i - origin[0]) * layout.walk.patch[1] + tap.j - origin[1])
                low, high = (int(n) for n in tap.filters.searchsorted((first, first + self.filters)))
                row = np.full((1, self.filters), stripes, np.int64)
                row[0, tap.filters[low:high] - first] = tap.row[low:high]
                rows.append(row)
        super().__init__(
            native, "fprop_whole_sm90", problem, layout, tables, rows=np.concatenate(rows)
        )  # fmt: skip

    def pack(self, weight: Tensor) -> Tensor:
        """[A, C/groups] -> by tile of filters and tap [chunk, filter, 64 channels], swizzled; zeros where a stripe is
        dead and behind the channels."""
        rows = self.arrays.on(weight.device)["rows"]
        padded = torch.nn.functional.pad(weight.detach(), (0, self.chunks * CHUNK - weight.shape[1], 0, 1))
        pieces = padded[rows].view(-1, self.filters, self.chunks, 8, 8).transpose(1, 2)
        return torch.flatten(swizzled(pieces), 1)
