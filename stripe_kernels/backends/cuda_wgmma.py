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
    NOWHERE,
    Patch,
    StripeTile,
    patch_of,
    stripe_tiles,
)
from stripe_kernels.backends.cuda_tables import Layout, Tables
from stripe_kernels.registry import Config, Problem

SHARED_BYTES = 227 * 1024  # of a block of sm_90
CHUNK = 64  # channels
ROW = 128  # bytes: a chunk of a pixel or a stripe
PHASES = 4  # of the stride
STAGES = (3, 8)  # of the ring of weights: wanted, and most
CONFIGS = ((128, 128), (64, 256), (128, 64), (256, 64))  # columns of a block, most pixels of a patch


def chunks_of(problem: Problem) -> int:
    return -(-problem.shape.group_c // CHUNK)


def _rows(config: Config, patch: Patch) -> int:
    """Rows of the accumulators."""
    width, most = config
    return 64 if width == 128 and patch.rows <= 64 else most


def _pitch(filters: int) -> int:
    return -(-filters // 32) * 32 + 4  # neighbouring rows four banks apart


def _fixed_bytes(problem: Problem, config: Config, patch: Patch, filters: int) -> int:
    """Shared memory without the ring."""
    chunks = chunks_of(problem)
    sums = (patch.places * _pitch(filters) + 128) * 4
    return chunks * _rows(config, patch) * ROW + -(-sums // 8) * 8 + (2 * chunks + 4) * 8 + 1024


@lru_cache(maxsize=512)
def room(problem: Problem, config: Config) -> tuple[int, int] | None:
    """Most filters of a tile, and stages of the ring; None where a block of sm_90 has too little shared memory."""
    patch = patch_of(problem.skeleton, problem.shape, config[1])
    if patch is None:
        return None
    found = None
    group_k = problem.shape.group_k
    for filters in dict.fromkeys(min(f, group_k + group_k % 2) for f in (128, 96, 64, 32, 16)):
        left = SHARED_BYTES - _fixed_bytes(problem, config, patch, filters)
        stages = min(STAGES[1], left // (config[0] * ROW + 16))
        if stages >= STAGES[0]:
            return filters, stages
        if stages >= 2 and found is None:
            found = filters, stages
    return found


def tiles_of(problem: Problem, config: Config) -> tuple[Patch, tuple[StripeTile, ...], Layout]:
    width, most = config
    s, found, patch = (
        problem.shape,
        room(problem, config),
        patch_of(problem.skeleton, problem.shape, config[1]),
    )
    assert patch is not None
    assert found is not None
    filters, stages = found
    tiles = stripe_tiles(problem.skeleton, s, most, filters, width)
    layout = Layout(
        patch.walk, s.groups, s.group_c, s.group_k, max(t.count for t in tiles), len(tiles) // s.groups, CHUNK,
        _pitch(filters), stages, 1, width,
    )  # fmt: skip
    return patch, tiles, layout


class WgmmaFprop(CudaRunner):
    """Items are tiles of filters, steps their segments, entries the rounds of a block, lists the shifts of its
    columns."""

    def __init__(self, native: Any, problem: Problem, config: Config) -> None:
        s = problem.shape
        patch, tiles, layout = tiles_of(problem, config)
        self.width, self.chunks = config[0], chunks_of(problem)
        dead = problem.skeleton.stripes
        rows: list[int] = []  # of the packed weight, by block and column
        tables = Tables(classes=[0, 0])
        for tile in tiles:
            first = len(tables.steps) // 8
            for phase, blocks in tile.segments:
                begin = len(tables.entries)
                for rounds in blocks:
                    columns = [c for r in rounds for c in r]
                    columns += [None] * (self.width - len(columns))
                    rows += [dead if c is None else c[2] for c in columns]
                    tables.entries.append(len(rounds))
                    tables.lists += [NOWHERE if c is None else c[1] * layout.pitch - c[0] for c in columns]
                origin = patch.vertical.origin[phase.h0], patch.horizontal.origin[phase.w0]
                number = phase.h0 * s.stride[1] + phase.w0
                tables.steps += [*origin, number, begin, len(tables.entries), 0, 0, 0]
            channel = tile.group * s.group_k + tile.first
            tables.items += [
                channel,
                tile.count,
                first,
                len(tables.steps) // 8,
                tile.blocks,
                tile.group,
                0,
                0,
            ]
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
