"""Layouts, tables and runner of fprop on Hopper's own instructions (csrc/cuda/fprop_sm90.cu): channels last, 16-byte
pieces of channels."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stripe_kernels.backends.cuda_mma import dense_channels_last, empty_channels_last
from stripe_kernels.backends.cuda_runner import CudaRunner
from stripe_kernels.backends.cuda_stripes import (
    Patch,
    StripeTile,
    patch_of,
    reads_zeros,
    stripe_tiles,
)
from stripe_kernels.backends.cuda_tables import Layout, Tables
from stripe_kernels.phases import phases
from stripe_kernels.registry import Config, Problem

SHARED_BYTES = 227 * 1024  # of a block of sm_90
PROCESSORS = 132
CHUNK = 64  # channels
ROW = 128  # bytes: a chunk of a pixel or a stripe
PHASES = 4  # of the stride
STAGES = (2, 8)  # of the ring of weights: least, and most
TABLE_BYTES = (130 + 2 * 128 + 2) * 4  # of a bundle, but for its places
PAD, GUARD = 8, 64  # zeros behind and before the products of a column
STAGE_PITCH = 18  # values of a pixel that wait to be stored
CONFIGS = ((96, 128), (64, 256), (64, 128), (128, 64))  # columns of a block, most pixels of a patch


def chunks_of(problem: Problem) -> int:
    return -(-problem.shape.group_c // CHUNK)


def rows_of(config: Config, patch: Patch) -> int:
    """Rows of the accumulators."""
    width, most = config
    return most if width != 64 else 64 if patch.rows <= 64 else 128 if patch.rows <= 128 else 256


def slots_of(problem: Problem) -> int:
    """Most phases of a group that a bundle has stripes of."""
    live = [p.group for p in phases(problem.skeleton, problem.shape) if p.taps and p.pixels]
    return max((live.count(g) for g in set(live)), default=1)


@lru_cache(maxsize=512)
def room(problem: Problem, config: Config) -> int | None:
    """Stages of the ring; None where a block of sm_90 has too little shared memory, or a filter too many stripes."""
    width, s = config[0], problem.shape
    patch = patch_of(problem.skeleton, s, config[1])
    if patch is None or problem.skeleton.live.reshape(s.K, -1).sum(1).max(initial=0) > width:
        return None
    rows, chunks = rows_of(config, patch), chunks_of(problem)
    columns = slots_of(problem) * width
    products, table = 2 * (GUARD + columns * (rows + PAD)) * 2, 2 * (TABLE_BYTES + 8 * columns)
    stage = -(-2 * rows * STAGE_PITCH * 2 // 8) * 8
    fixed = chunks * rows * ROW + products + table + stage + 2 * rows * 8 + (2 * chunks + 2) * 8 + 1024
    stages = min(STAGES[1], (SHARED_BYTES - fixed) // (width * ROW + 16))
    return stages if stages >= STAGES[0] else None


def tiles_of(problem: Problem, config: Config) -> tuple[Patch, tuple[StripeTile, ...], Layout]:
    width, most = config
    s, stages = problem.shape, room(problem, config)
    patch = patch_of(problem.skeleton, s, most)
    assert patch is not None
    assert stages is not None
    # A patch comes from the second-level cache at some 40 bytes a cycle, half of it while the last block is multiplied.
    rows = rows_of(config, patch)
    load = (patch.rows * ROW / 80) / (rows * width * CHUNK / 2048)
    tiles = stripe_tiles(problem.skeleton, s, most, width, PROCESSORS, load)
    live = [p for p in phases(problem.skeleton, s) if p.taps and p.pixels]
    zeros = reads_zeros(patch, live, rows - patch.rows + PAD, GUARD)
    layout = Layout(
        patch.walk, s.groups, s.group_c, s.group_k, s.group_k, len(tiles) // s.groups, 1 if zeros else 2,
        slots_of(problem), stages, 1, width,
    )  # fmt: skip
    return patch, tiles, layout


class WgmmaFprop(CudaRunner):
    """Items are tiles of filters, steps their segments, entries the blocks, lists the places of every filter's
    stripes."""

    def __init__(self, native: Any, problem: Problem, config: Config) -> None:
        s = problem.shape
        patch, tiles, layout = tiles_of(problem, config)
        self.width, self.chunks = config[0], chunks_of(problem)
        pitch = rows_of(config, patch) + PAD
        dead = problem.skeleton.stripes
        rows: list[int] = []  # of the packed weight, by block and column
        places: list[int] = []
        starts: list[int] = []
        tables = Tables(classes=[0, 0])
        for tile in tiles:
            first, before = len(tables.steps) // 8, None
            for bundle in tile.bundles:
                mine: dict[int, list[tuple[int, int]]] = {}  # of each filter
                stripes = sum(len(columns) for _, columns in bundle.columns)
                for slot, (phase, columns) in enumerate(bundle.columns):
                    block = len(tables.entries) // 8
                    if phase is not before or len(bundle.columns) > 1:
                        origin = patch.vertical.origin[phase.h0], patch.horizontal.origin[phase.w0]
                        number = phase.h0 * s.stride[1] + phase.w0
                        tables.steps += [*origin, number, block, block + 1, 0, 0, 0]
                    tables.steps[-4] = block + 1
                    before = phase if len(bundle.columns) == 1 else None
                    for column, (k, away, row) in enumerate(columns):
                        mine.setdefault(k, []).append(((slot * self.width + column) * pitch + away, away))
                        rows.append(row)
                    rows += [dead] * (self.width - len(columns))
                    channel = tile.group * s.group_k + bundle.first
                    last = int(slot == len(bundle.columns) - 1)
                    tables.entries += [int(slot == 0), last, slot, channel, bundle.count]
                    tables.entries += [len(starts), len(places) // 2, stripes]
                for k in range(bundle.first, bundle.first + bundle.count + 1):
                    starts.append(len(places) // 2)
                    for place in mine.get(k, ()):
                        places += place
            tables.items += [first, len(tables.steps) // 8, tile.group, 0]
        tables.lists = places + starts
        for entry in range(5, len(tables.entries), 8):
            tables.entries[entry] += len(places)
        super().__init__(native, "fprop_sm90", problem, layout, tables, rows=np.asarray(rows, np.int64))

    def pack(
        self, weight: Tensor
    ) -> Tensor:  # [A, C/groups] -> [block, chunk, column, 64 channels, swizzled]
        channels = self.chunks * CHUNK
        # One row of zeros for columns without a stripe, zeros behind the channels.
        padded = torch.nn.functional.pad(weight.detach(), (0, channels - weight.shape[1], 0, 1))
        rows = padded[self.arrays.on(weight.device)["rows"]]
        pieces = rows.view(-1, self.width, self.chunks, 8, 8).transpose(1, 2)
        column = torch.arange(self.width, device=weight.device)[:, None]
        place = torch.arange(8, device=weight.device)
        return pieces[:, :, column, place ^ column % 8].contiguous()

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
