"""Layouts, tables and runners of the strict float32 kernels (csrc/cuda/*_ffma.cu)."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stripe_kernels.backends.cuda_runner import CudaRunner
from stripe_kernels.backends.cuda_tables import Layout, Tables, pieces
from stripe_kernels.backends.cuda_walk import Walked, dgrad_walk, fprop_walk, position_walk
from stripe_kernels.packed import StripeIndex
from stripe_kernels.registry import Config, Pass, Problem

PIXELS = 256  # of a block
WGRAD_PIXELS = 128
CHUNK = 16  # most channels of a patch
MAX_ROWS = 376  # of a patch: with the rest of the shared memory this stays within SHARED_BYTES
FILTERS = 32  # of an fprop block: their sums live in shared memory
CHANNELS = 16  # of a dgrad thread
SLAB = 64  # stripes of one step
WARPS, STRIPES = 8, 8  # of a wgrad block, of each of its warps
PATCH, POSITION = 0, 1  # first integer of a config; the second is the number of splits

Index = npt.NDArray[np.int64]


def _chunk(channels: int) -> int:
    """A power of two: lanes follow channels where these are contiguous."""
    return next(c for c in (4, 8, CHUNK) if c >= channels or c == CHUNK)


@lru_cache(maxsize=512)
def walked(problem: Problem, which: Pass, mode: int) -> Walked:
    if mode == POSITION:
        return position_walk(problem.shape, PIXELS)
    if which == "dgrad":
        return dgrad_walk(problem.shape, PIXELS, MAX_ROWS)
    return fprop_walk(
        problem.shape,
        WGRAD_PIXELS if which == "wgrad" else PIXELS,
        MAX_ROWS // 2 if which == "wgrad" else MAX_ROWS,
    )


def layout_of(problem: Problem, which: Pass, config: Config) -> Layout:
    """The layout of one pass; wgrad's blocks of stripes are counted when its tables are built."""
    mode, splits = config
    s, (walk, _) = problem.shape, walked(problem, which, mode)
    pitch = walk.rows | 1  # odd: neighbouring channels of a row lie in different banks
    if which == "wgrad":
        return Layout(walk, s.groups, s.group_c, s.group_k, STRIPES * WARPS, 1, 32, pitch, 0, splits)
    channels_in, channels_out = (s.group_c, s.group_k) if which == "fprop" else (s.group_k, s.group_c)
    tile = min(FILTERS, channels_out) if which == "fprop" else CHANNELS
    return Layout(
        walk,
        s.groups,
        channels_in,
        channels_out,
        tile,
        -(-channels_out // tile),
        _chunk(channels_in),
        pitch,
        SLAB,
        splits,
    )


class FfmaFprop(CudaRunner):
    """An entry is one tap of a step: row of the tap, and its live filters of the tile in the lists."""

    def __init__(self, native: Any, problem: Problem, config: Config) -> None:
        s, layout = problem.shape, layout_of(problem, "fprop", config)
        _, classes = walked(problem, "fprop", config[0])
        self.layout = layout
        self.chunks = -(-s.group_c // layout.chunk)
        index = StripeIndex.of(problem.skeleton, s.groups)
        tables = Tables(classes=[v for c in classes for v in c.offset])
        stripes: list[int] = []
        seen: dict[Any, tuple[int, int, int]] = {}  # steps with like weights and entries share them

        for group in range(s.groups):
            for first, last in pieces(s.group_k, layout.tile_out):
                live = {}
                for tap in range(s.taps):
                    begin, end = index.tap_ptr[group * s.taps + tap : group * s.taps + tap + 2]
                    mine = [j for j in range(begin, end) if first <= index.filter[j] < last]
                    live[tap] = [(int(index.filter[j]) - first, int(index.row[j])) for j in mine]
                for pixel_class in classes:
                    start = tables.step_count
                    for load in pixel_class.loads:
                        work = [(row, *stripe) for tap, row in load.taps for stripe in live[tap]]
                        for chunk in range(self.chunks if work else 0):
                            for begin, end in pieces(len(work), SLAB):
                                part = tuple(work[begin:end])
                                if (part, chunk) not in seen:
                                    seen[part, chunk] = self._add_entries(tables, stripes, part, chunk)
                                entries, entries_end, weights = seen[part, chunk]
                                tables.add_step(
                                    load.origin,
                                    chunk * layout.chunk,
                                    begin == 0,
                                    (entries, entries_end),
                                    weights,
                                    len(part),
                                )
                    tables.add_item(start, layout.splits)
        self.size = s.output_size
        super().__init__(native, "fprop_ffma", problem, layout, tables, stripes=np.asarray(stripes, np.int64))

    def _add_entries(
        self, tables: Tables, stripes: list[int], part: tuple[Any, ...], chunk: int
    ) -> tuple[int, int, int]:
        begin, weights = len(tables.entries) // 4, len(stripes)
        for row in dict.fromkeys(row for row, _, _ in part):
            filters = [k for r, k, _ in part if r == row]
            tables.entries += [row, len(tables.lists), len(filters), 0]
            tables.lists += filters
        stripes += [row * self.chunks + chunk for _, _, row in part]
        return begin, len(tables.entries) // 4, weights

    def pack(self, weight: Tensor) -> Tensor:  # [A, C/groups] -> [stripes of all steps, chunk]
        padding = self.chunks * self.layout.chunk - weight.shape[1]
        rows = torch.nn.functional.pad(weight.detach(), (0, padding)).view(-1, self.layout.chunk)
        return rows[self.arrays.on(weight.device)["stripes"]].contiguous()

    def __call__(
        self,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        act: str,
    ) -> Tensor:
        y = torch.empty(self.size, dtype=self.dtype, device=x.device, memory_format=self.format)
        return self.launch(x, packed, y, None, (bias, scale, residual, act), (self.shape.K, y.stride(1)))


class FfmaDgrad(CudaRunner):
    """A step's entries are places in the lists: for each of its stripes, where its filter and tap lie in
    the patch."""

    def __init__(self, native: Any, problem: Problem, config: Config) -> None:
        s, layout = problem.shape, layout_of(problem, "dgrad", config)
        _, classes = walked(problem, "dgrad", config[0])
        self.layout = layout
        index = StripeIndex.of(problem.skeleton, s.groups)
        tables = Tables(classes=[v for c in classes for v in c.offset])
        stripes: list[int] = []
        for group in range(s.groups):
            ranges = [
                range(*index.tap_ptr[group * s.taps + t : group * s.taps + t + 2]) for t in range(s.taps)
            ]
            steps: list[list[tuple[Any, ...]]] = []  # alike for every tile of channels, but for the weights
            for pixel_class in classes:
                steps.append([])
                for load in pixel_class.loads:
                    for k0 in range(0, s.group_k, layout.chunk):
                        work = [
                            ((int(index.filter[j]) - k0) * layout.pitch + row, int(index.row[j]))
                            for tap, row in load.taps
                            for j in ranges[tap]
                            if k0 <= index.filter[j] < k0 + layout.chunk
                        ]
                        for begin, end in pieces(len(work), SLAB):
                            at = len(tables.lists)
                            tables.lists += [where for where, _ in work[begin:end]]
                            steps[-1].append(
                                (load.origin, k0, begin == 0, (at, at + end - begin), work[begin:end])
                            )
            for tile in range(layout.tiles_out):
                for of_class in steps:
                    start = tables.step_count
                    for origin, k0, fresh, entries, work in of_class:
                        tables.add_step(origin, k0, fresh, entries, len(stripes), len(work))
                        stripes += [row * layout.tiles_out + tile for _, row in work]
                    tables.add_item(start, layout.splits)
        self.size = s.input_size
        super().__init__(native, "dgrad_ffma", problem, layout, tables, stripes=np.asarray(stripes, np.int64))

    def pack(self, weight: Tensor) -> Tensor:  # [A, C/groups] -> [stripes of all steps, 16 channels]
        padding = self.layout.tiles_out * CHANNELS - weight.shape[1]
        rows = torch.nn.functional.pad(weight.detach(), (0, padding)).view(-1, CHANNELS)
        return rows[self.arrays.on(weight.device)["stripes"]].contiguous()

    def __call__(self, dy: Tensor, packed: Tensor) -> Tensor:
        dx = torch.empty(self.size, dtype=self.dtype, device=dy.device, memory_format=self.format)
        return self.launch(dy, packed, dx)


class FfmaWgrad(CudaRunner):
    """A block has eight warps of up to eight stripes, each warp of one tap, all of one load."""

    def __init__(self, native: Any, problem: Problem, config: Config) -> None:
        s, layout = problem.shape, layout_of(problem, "wgrad", config)
        _, (pixels,) = walked(problem, "wgrad", config[0])
        index = StripeIndex.of(problem.skeleton, s.groups)
        tables = Tables(classes=list(pixels.offset))
        for group in range(s.groups):
            for load in pixels.loads:
                warps = []
                for tap, row in load.taps:
                    begin, end = index.tap_ptr[group * s.taps + tap : group * s.taps + tap + 2]
                    slots = [
                        (int(index.row[j]), group * s.group_k + int(index.filter[j]))
                        for j in range(begin, end)
                    ]
                    warps += [(row, slots[a:b]) for a, b in pieces(len(slots), STRIPES)]
                for a, b in pieces(len(warps), WARPS):
                    block = [*warps[a:b], *[(0, [])] * (WARPS - (b - a))]
                    tables.items += [group, *load.origin, 0]
                    tables.entries += [row for row, _ in block]
                    for _, slots in block:
                        padded = [*slots, *[(-1, 0)] * (STRIPES - len(slots))]
                        tables.lists += [v for slot in padded for v in slot]
        self.blocks = len(tables.items) // 4
        layout = replace(layout, tiles_out=max(1, self.blocks))
        self.stripes = problem.skeleton.stripes
        super().__init__(native, "wgrad_ffma", problem, layout, tables)

    def __call__(self, dy: Tensor, x: Tensor) -> Tensor:
        dw = torch.empty(self.stripes, self.shape.group_c, dtype=self.dtype, device=x.device)
        return self.launch(x, dy, dw, dy.stride()) if self.blocks else dw


RUNNERS = {"fprop": FfmaFprop, "dgrad": FfmaDgrad, "wgrad": FfmaWgrad}
