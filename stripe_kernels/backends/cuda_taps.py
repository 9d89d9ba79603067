"""Layout, tables and runner of fprop on Hopper's own instructions that takes one tap after the other
(csrc/cuda/fprop_taps_sm90.cu): strides of 1, channels last, 16-byte pieces of channels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stripe_kernels.backends.cuda_mma import ChannelsLastFprop
from stripe_kernels.backends.cuda_tables import Layout, Tables
from stripe_kernels.backends.cuda_tiles import MOST_ROWS, SIDE, patches_of
from stripe_kernels.backends.cuda_walk import Walk
from stripe_kernels.backends.cuda_wgmma import CHUNK, ROW, SHARED_BYTES, swizzled
from stripe_kernels.phases import Phase, phases
from stripe_kernels.registry import Config, Problem

SIXTEEN = 16  # columns of a bundle, and of what is left over of all
SUMS_BYTES = 2048  # of a warp's results
MOST_STAGES = 64  # of the ring
MOST_STEPS = 1024  # of a tile of filters
MOST_BLOCKS = 65535  # of filters
NOWHERE = 1 << 20  # a tap that meets no image
PIXELS = 192  # of a tile
# Filters of a tile, and of a bundle: they share 16 columns. The third number tells these from cuda_wgmma's own.
CONFIGS = ((64, 64, PIXELS), (128, 64, PIXELS), (128, 128, PIXELS))
Column = tuple[int, int]  # filter within its tile, row of the packed weight


@dataclass(frozen=True, eq=False)
class Step:
    """A tap (its place among the phase's) and its stripes by column; None where a column is empty."""

    tap: int
    columns: tuple[Column | None, ...]


def _fill(columns: list[Column]) -> list[Column | None]:
    return [*columns, *[None] * (SIXTEEN - len(columns))]


def steps_of(phase: Phase, first: int, filters: int, serve: int) -> list[Step]:
    """Of filters [first, first + filters): every tap as often as it takes to place its stripes."""
    found = []
    for number, tap in enumerate(phase.taps):
        low, high = (int(n) for n in tap.filters.searchsorted((first, first + filters)))
        waiting: list[list[Column]] = [[] for _ in range(filters // serve)]
        for k, row in zip((tap.filters[low:high] - first).tolist(), tap.row[low:high].tolist(), strict=True):
            waiting[k // serve].append((k, row))
        while any(waiting):
            own = [bundle[:SIXTEEN] for bundle in waiting]
            waiting = [bundle[SIXTEEN:] for bundle in waiting]
            left = [column for bundle in waiting for column in bundle][:SIXTEEN]
            taken = set(left)
            waiting = [[column for column in bundle if column not in taken] for bundle in waiting]
            found.append(Step(number, tuple(c for part in (*own, left) for c in _fill(part))))
    return found or [Step(-1, (None,) * (SIXTEEN * (filters // serve + 1)))]


@dataclass(frozen=True)
class Stages:
    """Of the ring: 64s of channels of one, of them a step (and one of ones), bytes, and products of one."""

    chunks: int
    of_step: int
    bytes: int
    products: int

    @classmethod
    def of(cls, problem: Problem, config: Config) -> Stages:
        filters, serve, _ = config
        channels = -(-problem.shape.group_c // CHUNK)
        chunks = min(2, channels)
        columns = SIXTEEN * (filters // serve + 1)
        size = max(chunks * columns * ROW, 2 * filters * 2 * SIXTEEN)
        return cls(chunks, -(-channels // chunks), size, chunks * filters // 64)


@lru_cache(maxsize=512)
def steps_by_tile(problem: Problem, config: Config) -> tuple[tuple[Phase, tuple[tuple[Step, ...], ...]], ...]:
    """By group, and tile of filters."""
    filters, serve, _ = config
    s = problem.shape
    return tuple(
        (p, tuple(tuple(steps_of(p, first, filters, serve)) for first in range(0, s.group_k, filters)))
        for p in phases(problem.skeleton, s)
        if p.pixels
    )


def _patches(problem: Problem, pixels: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """By group."""
    s = problem.shape
    return [
        patches_of(tuple((-t.i, -t.j) for t in p.taps), (s.N, s.P, s.Q), (s.H, s.W), pixels)
        for p in phases(problem.skeleton, s)
        if p.pixels
    ]


@lru_cache(maxsize=512)
def layout_of(problem: Problem, config: Config) -> Layout | None:
    """None where a block of sm_90 has too little shared memory, there are too many pixels or blocks, or channels of the
    next group would be read, times zero, with those of a group: its infinities would not stay its own."""
    s, (filters, serve, pixels) = problem.shape, config
    if s.stride != (1, 1) or max(s.P, s.Q) > SIDE or s.group_c == 0:
        return None
    stage = Stages.of(problem, config)
    chunks = stage.chunks * stage.of_step
    if (s.groups > 1 and s.group_c != chunks * CHUNK) or s.groups * -(-s.group_k // filters) > MOST_BLOCKS:
        return None
    for phase in phases(problem.skeleton, s):
        away = [t.i * s.W + t.j for t in phase.taps]
        if away and chunks * ROW * min(max(away) - min(away), s.N * s.H * s.W) > SHARED_BYTES:
            return None
    most = max((int(count.max(initial=0)) for _, count in _patches(problem, pixels)), default=0)
    boxes = -(-max(1, most) // MOST_ROWS)
    box = max(1, most) if boxes == 1 else -(-most // boxes // 8) * 8  # each begins where the swizzle does
    pitch = -(-(-(-max(1, most) // box) * box + 1) // 8) * 8 * ROW
    found = steps_by_tile(problem, config)
    steps = max(len(tile) for _, tiles in found for tile in tiles)
    tiles_out = -(-s.group_k // filters)
    if steps > MOST_STEPS:
        return None
    tile = chunks * pitch + steps * pixels * 2 + pixels * 8 + 16
    fixed = pixels // 16 * SUMS_BYTES + 4 * 8 + 1024
    for buffers in (2, 1):
        stages = min(MOST_STAGES, (SHARED_BYTES - fixed - buffers * tile) // (stage.bytes + 16))
        if stages >= (4 if stage.products > 1 else 6):  # the kernel waits for weights that far ahead
            break
    else:
        return None
    count = len(_patches(problem, pixels)[0][0]) * s.groups
    walk = Walk(
        s.N, (pixels, 1, 1), (count, 1, 1), (s.P, s.Q), (1, 1), (s.H, s.W), (1, 1), (1, steps),
        (buffers, box), (1, sum(len(tile) for _, tiles in found for tile in tiles)), s.groups * tiles_out,
    )  # fmt: skip
    return Layout(
        walk, s.groups, s.group_c, s.group_k, filters, tiles_out, max(1, most), pitch, stages, 1, serve
    )


class TapsFprop(ChannelsLastFprop):
    """Items are tiles of pixels, steps the tiles of filters of every group, entries the steps with their tap."""

    def __init__(self, native: Any, problem: Problem, config: Config) -> None:
        s, layout = problem.shape, layout_of(problem, config)
        assert layout is not None
        filters, serve, pixels = config
        self.stage, self.columns = Stages.of(problem, config), SIXTEEN * (filters // serve + 1)
        tables = Tables(classes=[0, 0] * layout.walk.classes)
        columns: list[tuple[Column | None, ...]] = []
        by_group = steps_by_tile(problem, config)
        for number, ((phase, tiles), (low, count)) in enumerate(
            zip(by_group, _patches(problem, pixels), strict=True)
        ):
            first = np.arange(len(low)) * pixels
            place = np.unravel_index(first, (max(1, s.N), s.P, s.Q))
            tile = [np.full(len(low), number), first, low, count, *place, np.zeros_like(first)]
            tables.items += np.stack(tile, 1).ravel().tolist()
            for which, steps in enumerate(tiles):
                channel = which * filters
                tables.steps += [phase.group, 0, 0, s.P, s.Q, 0, 0, len(columns), len(columns) + len(steps)]
                tables.steps += [phase.group * s.group_k + channel, min(filters, s.group_k - channel), 0]
                for step in steps:
                    columns.append(step.columns)
                    tap = phase.taps[step.tap] if step.tap >= 0 else None
                    tables.entries += [tap.i, tap.j] if tap else [NOWHERE, NOWHERE]
        rows = np.array([[-1 if c is None else c[1] for c in step] for step in columns], np.int64)
        super().__init__(
            native, "fprop_taps_sm90", problem, layout, tables, rows=rows,
            ones=_ones(columns, config, self.stage.bytes, problem.dtype),
        )  # fmt: skip

    def pack(self, weight: Tensor) -> Tensor:
        """[A, C/groups] -> by stage of the ring: of every step its weights [chunk, column, 64 channels], swizzled, and
        the ones of its columns."""
        arrays, stage = self.arrays.on(weight.device), self.stage
        chunks = stage.chunks * stage.of_step
        # One row of zeros for columns without a stripe, zeros behind the channels.
        padded = torch.nn.functional.pad(weight.detach(), (0, chunks * CHUNK - weight.shape[1], 0, 1))
        pieces = padded[arrays["rows"]].view(-1, self.columns, chunks, 8, 8).transpose(1, 2)
        weights = swizzled(pieces).reshape(len(pieces), stage.of_step, -1)
        behind = stage.bytes // 2 - weights.shape[2]
        weights = torch.nn.functional.pad(weights, (0, behind)).flatten(1)
        return torch.cat([weights, arrays["ones"].view(weight.dtype)], 1)


def _ones(columns: list[tuple[Column | None, ...]], config: Config, stage: int, dtype: str) -> np.ndarray:
    """[step, a stage of the ring as 16-bit values]: for every bundle a one where one of its own columns is its
    filter's, then where a column left over is; [eight filters][eight columns][filter][column]."""
    filters, serve, _ = config
    bundles = filters // serve
    matrices = np.zeros((len(columns), 2 * bundles, serve, SIXTEEN), np.int16)
    one = np.float16(1).view(np.int16) if dtype == "float16" else 0x3F80  # bfloat16
    for number, step in enumerate(columns):
        for place, column in enumerate(step):
            if column is not None:
                bundle, k = divmod(column[0], serve)
                matrices[number, 2 * bundle + (place // SIXTEEN == bundles), k, place % SIXTEEN] = one
    laid = matrices.reshape(len(columns), 2 * bundles, serve // 8, 8, 2, 8).swapaxes(3, 4)
    laid = laid.reshape(len(columns), -1)
    return np.pad(laid, ((0, 0), (0, stage // 2 - laid.shape[1])))
