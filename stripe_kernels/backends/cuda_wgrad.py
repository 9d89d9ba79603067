"""Layout, tables and runner of wgrad on Hopper's own instructions (csrc/cuda/wgrad_sm90.cu): strides of 1, channels
last, 16-byte pieces of channels and filters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stripe_kernels.backends.cuda_mma import dense_channels_last
from stripe_kernels.backends.cuda_runner import CudaRunner
from stripe_kernels.backends.cuda_tables import Layout, Tables
from stripe_kernels.backends.cuda_tiles import MOST_ROWS, SIDE, patches_of
from stripe_kernels.backends.cuda_walk import Walk
from stripe_kernels.backends.cuda_wgmma import CHUNK, PROCESSORS, ROW, SHARED_BYTES
from stripe_kernels.geometry import ConvShape, IntPair
from stripe_kernels.phases import phases
from stripe_kernels.registry import Config, Problem
from stripe_kernels.skeleton import FilterSkeleton

STRIPES = 192  # of a block
EIGHT = 8  # stripes that a warp gathers at once
PATCH_BYTES = 1 << 16  # most: lists hold places in 16 bits
MOST_TAPS = 64  # of a block
TAP_BYTES = 16
STAGES = (2, 8)  # of tiles on their way: least, and most
# Channels of a block, filters of its patch, pixels of a tile. A config has a fourth number: shares of the pixels.
SHAPES = tuple(
    (width, 64 * chunks, pixels) for width in (128, 64) for chunks in (1, 2, 4) for pixels in (64, 128)
)


@dataclass(frozen=True, eq=False)
class Block:
    """At most 192 stripes of consecutive filters of a group, in the order in which warps gather them, whole
    warpgroups: `filters` counted from `first`, `taps` numbers in `offsets`, `rows` of the packed weight (-1: none, and
    filter and tap are those of another stripe of its eight)."""

    group: int
    first: int
    offsets: tuple[IntPair, ...]
    filters: np.ndarray
    taps: np.ndarray
    rows: np.ndarray


def _eights(taps: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """[eights, 8] numbers of a block's stripes, which are sorted by tap, -1 where there is none: all eights of the
    warpgroups that they take, each of eight banks and few taps, but for the last ones, which hold what banks that are
    fuller than others have left."""
    count = -(-len(taps) // 64) * EIGHT
    full = np.bincount(bank, minlength=EIGHT)
    own = next(n for n in range(count, -1, -1) if np.maximum(full - n, 0).sum() <= EIGHT * (count - n))
    found, left = np.full((count, EIGHT), -1), []
    for number in range(EIGHT):
        mine = np.flatnonzero(bank == number)
        places = np.arange(min(own, len(mine)))
        kept = places * len(mine) // max(1, len(places))
        found[places * own // max(1, len(places)), number] = mine[kept]
        left += np.delete(mine, kept).tolist()
    found[own:].flat[: len(left)] = sorted(left)
    return found


@lru_cache(maxsize=256)
def blocks_of(skeleton: FilterSkeleton, s: ConvShape, filters: int) -> tuple[Block, ...]:
    """Blocks whose filters lie within `filters` consecutive ones."""
    found = []
    for phase in phases(skeleton, s):
        if not phase.taps:
            continue
        taps = np.repeat(np.arange(len(phase.taps)), [len(t.filters) for t in phase.taps])
        k, rows = np.concatenate([t.filters for t in phase.taps]), phase.row
        by_filter = np.lexsort((taps, k))
        taps, k, rows = taps[by_filter], k[by_filter], rows[by_filter]
        begin = 0
        while begin < len(k):
            first = int(k[begin]) // EIGHT * EIGHT  # a copy of dy begins at a multiple of 16 bytes
            end = min(begin + STRIPES, int(np.searchsorted(k, first + filters)))
            mine = np.argsort(taps[begin:end], kind="stable") + begin
            numbers, own = np.unique(taps[mine], return_inverse=True)
            offsets = tuple((phase.taps[n].i, phase.taps[n].j) for n in numbers)
            # Rows of the patch that four threads read at once are two apart: together they read pieces of 16 bytes of
            # one parity, whatever their filter, and the row's.
            parity = np.array([(i * s.Q + j) % 2 for i, j in offsets])[own]
            piece, word = (k[mine] - first) // 8 % 2 ^ parity, (k[mine] - first) // 2 % 4
            eights = _eights(own, piece * 4 + word)
            gathered = np.where(eights >= 0, eights, eights.max(1, keepdims=True).clip(0)).ravel()
            live = np.where(eights.ravel() >= 0, rows[mine][gathered], -1)
            found.append(Block(phase.group, first, offsets, k[mine][gathered] - first, own[gathered], live))
            begin = end
    return tuple(found)


@lru_cache(maxsize=128)
def tiles_of(skeleton: FilterSkeleton, s: ConvShape, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Of tiles of x the first pixel of dy that some tap meets, and count."""
    taps = {(t.i, t.j) for p in phases(skeleton, s) for t in p.taps}
    return patches_of(tuple(sorted(taps)), (s.N, s.H, s.W), (s.P, s.Q), pixels)


@lru_cache(maxsize=512)
def layout_of(problem: Problem, config: Config) -> Layout | None:
    """None where a block of sm_90 has too little shared memory, or there are too many taps, pixels or shares."""
    s, (width, filters, pixels, splits) = problem.shape, config
    if s.stride != (1, 1) or max(s.H, s.W) > SIDE:
        return None
    chunks = filters // CHUNK
    away = [t.i * s.Q + t.j for p in phases(problem.skeleton, s) for t in p.taps]
    # What a tile in the middle of a map spans, before anything is counted pixel by pixel.
    if away and s.H > s.R and chunks * ROW * min(max(away) - min(away), s.N * s.P * s.Q) > PATCH_BYTES:
        return None
    _, count = tiles_of(problem.skeleton, s, pixels)
    blocks = blocks_of(problem.skeleton, s, filters)
    most = max(1, int(count.max(initial=0)))
    boxes = -(-most // MOST_ROWS)
    box = most if boxes == 1 else -(-most // boxes // 8) * 8  # each begins where the swizzle does
    pitch = (-(-boxes * box // 8) * 8 + 8) * ROW  # zeros behind, a row for each of the swizzle's eight
    taps = max((len(b.offsets) for b in blocks), default=1)
    stage = pixels * width * 2 + chunks * pitch + taps * (pixels * 2 + 32) + 16
    stages = min(STAGES[1], (SHARED_BYTES - taps * TAP_BYTES - 1024) // stage)
    if chunks * pitch > PATCH_BYTES or taps > MOST_TAPS or stages < STAGES[0] or splits > max(1, len(count)):
        return None
    walk = Walk(
        s.N, (pixels, 1, 1), (len(count), 1, 1), (s.H, s.W), (1, 1), (s.P, s.Q), (1, 1),
        (1, taps), (1, box), (1, 1), 1,
    )  # fmt: skip
    return Layout(
        walk, s.groups, s.group_c, s.group_k, filters, max(1, len(blocks)), most, pitch, stages, splits, width
    )


def splits_of(blocks: int, tiles: int) -> set[int]:
    """Shares worth trying: none, those that give every multiprocessor a block, and the number below nine that leaves
    the fewest idle in the last wave."""
    most = max(1, tiles)
    waves = min(range(1, min(8, most) + 1), key=lambda n: (-(-blocks * n // PROCESSORS) / n, n))
    return {1, waves, max(1, min(most, PROCESSORS // max(1, blocks)))}


class WgmmaWgrad(CudaRunner):
    """Items are tiles of pixels, steps the blocks, entries their stripes, lists their taps."""

    def __init__(self, native: Any, problem: Problem, config: Config) -> None:
        s, layout = problem.shape, layout_of(problem, config)
        assert layout is not None
        _, filters, pixels, _ = config
        tables = Tables(classes=[0, 0])
        low, count = tiles_of(problem.skeleton, s, pixels)
        first = np.arange(len(low)) * pixels
        place = np.unravel_index(first, (max(1, s.N), s.H, s.W))
        tile = [np.zeros_like(first), first, low, count, *place, np.zeros_like(first)]
        tables.items += np.stack(tile, 1).ravel().tolist()
        blocks = blocks_of(problem.skeleton, s, filters)
        for number, block in enumerate(blocks):
            stripes, last = number * STRIPES, (number + 1) * STRIPES
            tables.steps += [
                block.group,
                0,
                0,
                s.H,
                s.W,
                len(tables.lists),
                len(block.offsets),
                stripes,
                last,
            ]
            tables.steps += [block.group * s.group_k + block.first, len(block.rows), 0]
            tables.lists += [v for offset in block.offsets for v in offset]
            at = block.filters // CHUNK * layout.pitch + block.filters % CHUNK * 2
            own = np.stack([at, block.taps, block.rows, np.zeros_like(at)], 1)
            none = np.tile([0, 0, -1, 0], (STRIPES - len(own), 1))
            tables.entries += np.concatenate([own, none]).ravel().tolist()
        self.stripes = problem.skeleton.stripes
        super().__init__(native, "wgrad_sm90", problem, layout, tables)

    def __call__(self, dy: Tensor, x: Tensor) -> Tensor:
        dw = torch.empty(self.stripes, self.shape.group_c, dtype=self.dtype, device=x.device)
        if not x.numel():
            return dw.zero_()
        dy = dense_channels_last(dy)
        return self.launch(dense_channels_last(x), dy, dw, dy.stride())
