"""Layouts, tables and runner of fprop on Hopper's own instructions (csrc/cuda/fprop_sm90.cu): channels last, 16-byte
pieces of channels."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stripe_kernels.backends.cuda_mma import ChannelsLastFprop
from stripe_kernels.backends.cuda_stripes import (
    BUNDLES,
    OCTET,
    Patch,
    StripeTile,
    patch_of,
    stripe_tiles,
)
from stripe_kernels.backends.cuda_tables import Layout, Tables
from stripe_kernels.phases import phases
from stripe_kernels.registry import Config, Problem

SHARED_BYTES = 227 * 1024  # of a block of sm_90
PROCESSORS = 132
CHUNK = 64  # channels, or filters
ROW = 128  # bytes: a chunk of a pixel or a stripe
PHASES = 4  # of the stride
TAPS = 32  # of a phase: one bit each
STAGES = (2, 8)  # of the ring of weights: least, and most
TABLE_BYTES = 2048  # most that are copied to shared memory
PATCHES = 2  # of x at once, where they have room beside four stages
CONFIGS = (
    (64, 256),
    (96, 128),
    (192, 128),
    (128, 128),
    (64, 128),
)  # columns of a block, most pixels of a patch


def chunks_of(problem: Problem) -> int:
    return -(-problem.shape.group_c // CHUNK)


@lru_cache(maxsize=512)
def room(problem: Problem, config: Config) -> tuple[int, int] | None:
    """Patches of x and stages of the ring that a block of sm_90 has shared memory for; None where they are too few,
    or a phase of the stride has too many taps."""
    width, rows = config
    skeleton, s = problem.skeleton, problem.shape
    if patch_of(skeleton, s, rows) is None or any(len(p.taps) > TAPS for p in phases(skeleton, s)):
        return None
    planes = -(-width // CHUNK)
    patch, stage = chunks_of(problem) * (rows * ROW + 16), width * ROW + 16 + 32 + width
    fixed = planes * (rows + 1) * ROW + rows * 8 + TABLE_BYTES + ROW + 1024
    for patches in range(PATCHES, 0, -1):
        stages = min(STAGES[1], (SHARED_BYTES - fixed - patches * patch) // stage)
        if stages >= (4 if patches > 1 else STAGES[0]):
            return patches, stages
    return None


def tiles_of(problem: Problem, config: Config) -> tuple[Patch, tuple[StripeTile, ...], Layout]:
    width, rows = config
    s, found = problem.shape, room(problem, config)
    patch = patch_of(problem.skeleton, s, rows)
    assert patch is not None
    assert found is not None
    patches, stages = found
    # A patch comes from the second-level cache at some 40 bytes a cycle, where it is not loaded during the one before.
    load = (patch.rows * ROW / 40) / (rows * width * CHUNK / 2048) if patches == 1 else 0.2
    tiles = stripe_tiles(problem.skeleton, s, rows, width, PROCESSORS, load)
    layout = Layout(
        patch.walk, s.groups, s.group_c, s.group_k, s.group_k, len(tiles) // s.groups, patches, rows,
        stages, 1, width,
    )  # fmt: skip
    return patch, tiles, layout


def swizzled(pieces: Any) -> Any:
    """[..., column, piece, 8], an array or a tensor: piece p of column c at place p ^ (c % 8)."""
    arange = partial(torch.arange, device=pieces.device) if isinstance(pieces, Tensor) else np.arange
    column, place = arange(pieces.shape[-3])[:, None], arange(8)
    return pieces[..., column, place ^ column % 8, :]


class WgmmaFprop(ChannelsLastFprop):
    """Items are tiles of filters, steps their segments, entries the blocks with their octets, lists the taps of every
    segment."""

    def __init__(self, native: Any, problem: Problem, config: Config) -> None:
        s = problem.shape
        patch, tiles, layout = tiles_of(problem, config)
        self.width, self.chunks = config[0], chunks_of(problem)
        tables = Tables(classes=[0, 0])
        rows: list[int] = []  # of the packed weight, by block and column
        filters: list[int] = []  # of the bundle, by block and column
        taps: dict[Any, int] = {}  # where a phase's are in the lists
        for tile in tiles:
            first, before = len(tables.steps) // 8, None
            for bundle in tile.bundles:
                for number, (phase, octets) in enumerate(bundle.blocks):
                    block = len(tables.entries) // (8 + self.width // 4)
                    if phase not in taps:
                        taps[phase] = len(tables.lists)
                        tables.lists += [offset for tap in phase.taps for offset in (tap.i, tap.j)]
                    if phase is not before:
                        origin = (
                            patch.vertical.origin.get(phase.h0, 0),
                            patch.horizontal.origin.get(phase.w0, 0),
                        )
                        which = phase.h0 * s.stride[1] + phase.w0
                        tables.steps += [*origin, which, block, 0, taps[phase], len(phase.taps), 0]
                        before = phase
                    tables.steps[-4] = block + 1
                    last = int(number == len(bundle.blocks) - 1)
                    channel = tile.group * s.group_k + bundle.first
                    tables.entries += [int(number == 0), last, channel, bundle.count, 0, 0, 0, 0]
                    for octet in octets:
                        tap = phase.taps[octet.tap]
                        tables.entries += [_bit(octet.tap), patch.offset(phase, tap.i, tap.j)]
                        unused = OCTET - len(octet.columns)
                        rows += [row for _, row in octet.columns] + [problem.skeleton.stripes] * unused
                        filters += [k - bundle.first for k, _ in octet.columns] + [BUNDLES[0]] * unused
                    empty = self.width // OCTET - len(octets)
                    tables.entries += [0, 0] * empty
                    rows += [problem.skeleton.stripes] * empty * OCTET
                    filters += [BUNDLES[0]] * empty * OCTET
            tables.items += [first, len(tables.steps) // 8, tile.group, 0]
        ones = np.zeros((len(filters) // self.width, self.width, BUNDLES[0] + 1), np.int16)
        one = np.float16(1).view(np.int16) if problem.dtype == "float16" else 0x3F80  # bfloat16
        ones[(*np.indices(ones.shape[:2]), np.reshape(filters, ones.shape[:2]))] = one
        ones = ones[:, :, : BUNDLES[0]]
        if self.width % CHUNK == 0:  # [plane, filter, 64 columns]
            ones = ones.reshape(len(ones), -1, CHUNK, BUNDLES[0]).swapaxes(2, 3)
        super().__init__(
            native, "fprop_sm90", problem, layout, tables, rows=np.asarray(rows, np.int64),
            filters=swizzled(ones.reshape(len(ones), self.width, 8, 8)).reshape(len(ones), -1),
        )  # fmt: skip

    def pack(self, weight: Tensor) -> Tensor:
        """[A, C/groups] -> of every block [chunk, column, 64 channels], and a one where a column's filter is:
        [plane, 64 filters, 64 columns], or [column, 64 filters] where columns do not come in 64s; swizzled."""
        channels = self.chunks * CHUNK
        arrays = self.arrays.on(weight.device)
        # One row of zeros for columns without a stripe, zeros behind the channels.
        padded = torch.nn.functional.pad(weight.detach(), (0, channels - weight.shape[1], 0, 1))
        pieces = padded[arrays["rows"]].view(-1, self.width, self.chunks, 8, 8).transpose(1, 2)
        return torch.cat([swizzled(pieces).flatten(1), arrays["filters"].view(weight.dtype)], 1)


def _bit(number: int) -> int:
    """1 << number as an int32."""
    return (1 << number) - (1 << 32 if number == 31 else 0)
