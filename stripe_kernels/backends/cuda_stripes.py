"""Patches and columns of the kernel that multiplies all stripes (csrc/cuda/fprop_sm90.cu). Torch-free.

A patch is a grid of input pixels of one phase of the stride; its product with a stripe of tap t, shifted by the tap's
offset, lands on *places*: grid positions that are output pixels or belong to nobody. A value outside the grid's rows
wraps around to a neighbouring row, so the grid needs margins wide enough that what wraps lands on nobody: one column
for a 3-tap axis whose tile is the whole axis (zeros outside the image need no place of their own), two for a tile in
the middle. Weights are taken to be finite: a zero beside the image may meet a place it does not belong to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from stripe_kernels.backends.cuda_walk import Walk
from stripe_kernels.geometry import ConvShape, IntPair
from stripe_kernels.packed import Int32Array
from stripe_kernels.phases import Phase, phases
from stripe_kernels.skeleton import FilterSkeleton

ROUND = 32  # columns merged between two barriers; a filter is there once
MOST = 256  # pixels of a box in each direction
NOWHERE = 1 << 29  # shift of a column that no stripe has
Offsets = tuple[
    int, ...
]  # of the taps of one phase along one axis: pixel p of the output reads pixel p + offset


@dataclass(frozen=True)
class Axis:
    """One direction of a patch. `origin[phase]` is its first pixel, counted from the tile's first output pixel."""

    tile: int
    extent: int
    origin: dict[int, int]


def _wraps(axis: Axis, offsets: dict[int, Offsets], size: dict[int, int], out: int) -> bool:
    """Whether a value would land on an output pixel that is not its own."""
    whole = axis.tile == out
    for phase, taps in offsets.items():
        first, last = axis.origin[phase], axis.origin[phase] + axis.extent - 1
        if whole:  # beside the image are zeros
            first, last = max(first, 0), min(last, size[phase] - 1)
        for offset in taps:
            low, high = first - offset, last - offset
            if low <= axis.tile - 1 - axis.extent or high >= axis.extent:
                return True
    return False


def _axis(tile: int, out: int, offsets: dict[int, Offsets], size: dict[int, int]) -> Axis:
    """The smallest extent that holds every pixel a tile reads, a place for each that it writes, and lets nothing wrap
    onto these."""
    whole = tile == out
    origin, extent = {}, tile
    for phase, taps in offsets.items():
        first, last = min(taps), tile - 1 + max(taps)
        if whole:
            first, last = max(first, 0), min(last, size[phase] - 1)
        origin[phase] = first
        extent = max(extent, last - first + 1)
    while _wraps(Axis(tile, extent, origin), offsets, size, out):
        extent += 1
    return Axis(tile, extent, origin)


@dataclass(frozen=True, eq=False)
class Patch:
    """Tile and grid of every block, in a Walk; origins by phase."""

    walk: Walk
    vertical: Axis
    horizontal: Axis

    @property
    def rows(self) -> int:
        return self.walk.rows

    @property
    def places(self) -> int:
        (n, h, w), (ph, pw) = self.walk.tile, self.walk.patch
        return ((n - 1) * ph + h - 1) * pw + w

    def offset(self, phase: Phase, i: int, j: int) -> int:
        """Places between a patch row and the output pixel it belongs to, for a tap that reads pixel (i, j)."""
        return (
            (i - self.vertical.origin[phase.h0]) * self.walk.patch[1] + j - self.horizontal.origin[phase.w0]
        )


def _offsets(found: Iterable[tuple[int, int]], none: int) -> dict[int, Offsets]:
    taps: dict[int, set[int]] = {}
    for phase, offset in found:
        taps.setdefault(phase, set()).add(offset)
    return {phase: tuple(sorted(t)) for phase, t in taps.items()} or {none: (0,)}


def _even(size: int, count: int) -> int:
    return -(-size // count)


@lru_cache(maxsize=512)
def patch_of(skeleton: FilterSkeleton, s: ConvShape, most_rows: int) -> Patch | None:
    """The tile with fewest blocks whose grid has at most `most_rows` pixels; None when not even one output pixel has
    room."""
    live = [p for p in phases(skeleton, s) if p.taps and p.pixels]
    vertical = _offsets(((p.h0, t.i) for p in live for t in p.taps), 0)
    horizontal = _offsets(((p.w0, t.j) for p in live for t in p.taps), 0)
    u, v = s.stride
    high = {h0: -(-(s.H - h0) // u) for h0 in range(u)}
    wide = {w0: -(-(s.W - w0) // v) for w0 in range(v)}
    best: tuple[tuple[int, int], IntPair, int, Axis, Axis] | None = None
    across = [_axis(w, s.Q, horizontal, wide) for w in _tiles(s.Q, most_rows)]
    for h in _tiles(s.P, most_rows):
        down = _axis(h, s.P, vertical, high)
        for axis in across:
            area = down.extent * axis.extent
            if area > most_rows or down.extent > MOST or axis.extent > MOST:
                continue
            whole = h == s.P and axis.tile == s.Q
            images = min(max(s.N, 1), most_rows // area, MOST) if whole else 1
            images = _even(max(s.N, 1), _even(max(s.N, 1), images))
            tiles = _even(max(s.N, 1), images) * _even(s.P, h) * _even(s.Q, axis.tile)
            key = (tiles, images * area)
            if best is None or key < best[0]:
                best = (key, (h, axis.tile), images, down, axis)
    if best is None:
        return None
    _, (h, w), images, down, axis = best
    walk = Walk(
        s.N, (images, h, w), (_even(s.N, images), _even(s.P, h), _even(s.Q, w)), (s.P, s.Q), (1, 1),
        (s.H, s.W), s.stride, (down.extent, axis.extent), (1, 1), (1, 1), 1,
    )  # fmt: skip
    return Patch(walk, down, axis)


def _tiles(size: int, most: int) -> Iterator[int]:
    """Sizes of tiles that share an axis evenly, the largest first."""
    last = 0
    for count in range(1, size + 1):
        tile = _even(size, count)
        if tile != last and tile <= most:
            yield tile
        last = tile


Column = tuple[int, int, int]  # filter within its tile, places its tap is away, row of the packed weight


def blocks_of(columns: list[Column], width: int) -> list[list[list[Column | None]]]:
    """Blocks of at most `width` columns in rounds of ROUND, no filter twice in a round. Consecutive stripes of a filter
    go to different rounds."""
    columns = sorted(columns)
    most = max((len(list(c)) for c in _by_filter(columns)), default=0)
    count = max(-(-len(columns) // ROUND), most)
    rounds = [_spread(columns[i::count]) for i in range(count)]
    per_block = width // ROUND
    return [rounds[i : i + per_block] for i in range(0, count, per_block)]


def _by_filter(columns: list[Column]) -> Iterator[list[Column]]:
    start = 0
    for i in range(1, len(columns) + 1):
        if i == len(columns) or columns[i][0] != columns[start][0]:
            yield columns[start:i]
            start = i


def _spread(columns: list[Column]) -> list[Column | None]:
    """A round in the order of its columns. The four lanes that hold columns 2t + i of eight should add to different
    banks: filters that differ modulo 4."""
    waiting: list[list[Column]] = [[c for c in columns if c[0] % 4 == bank] for bank in range(4)]
    placed: list[Column | None] = [None] * ROUND
    for quad in range(ROUND // 4):
        chosen = [w.pop() for w in waiting if w]
        while len(chosen) < 4 and any(waiting):
            chosen.append(max(waiting, key=len).pop())
        for t, column in enumerate(chosen):
            placed[quad // 2 * 8 + 2 * t + quad % 2] = column
    return placed


@dataclass(frozen=True, eq=False)
class StripeTile:
    """Filters [first, first + count) of a group, and of each phase with live stripes its blocks."""

    group: int
    first: int
    count: int
    segments: tuple[tuple[Phase, list[list[list[Column | None]]]], ...]

    @property
    def blocks(self) -> int:
        return sum(len(blocks) for _, blocks in self.segments)


def _tile(of_group: list[Phase], patch: Patch, first: int, count: int, width: int) -> StripeTile:
    segments = []
    for phase in of_group:
        columns = []
        for tap in phase.taps:
            inside = np.flatnonzero((tap.filters >= first) & (tap.filters < first + count))
            away = patch.offset(phase, tap.i, tap.j)
            filters: Int32Array = tap.filters[inside] - first
            columns += [(int(k), away, int(row)) for k, row in zip(filters, tap.row[inside], strict=True)]
        if columns:
            segments.append((phase, blocks_of(columns, width)))
    return StripeTile(of_group[0].group, first, count, tuple(segments))


@lru_cache(maxsize=512)
def stripe_tiles(
    skeleton: FilterSkeleton, s: ConvShape, most_rows: int, most_filters: int, width: int
) -> tuple[StripeTile, ...]:
    """Tiles of at most `most_filters` filters (even numbers: channels are stored in pairs), those with most blocks
    first: of a few sizes the one that needs fewest blocks."""
    patch = patch_of(skeleton, s, most_rows)
    assert patch is not None
    live = [p for p in phases(skeleton, s) if p.pixels]
    groups = [[p for p in live if p.group == g] for g in range(s.groups)]
    least = _even(s.group_k, most_filters)
    best: list[StripeTile] | None = None
    for count in range(least, min(least + 3, s.group_k + 1)):
        size = _even(s.group_k, count)
        size = min(most_filters, size + size % 2)
        tiles = [
            _tile(g, patch, first, min(size, s.group_k - first), width)
            for g in groups
            for first in range(0, s.group_k, size)
        ]
        if best is None or sum(t.blocks for t in tiles) < sum(t.blocks for t in best):
            best = tiles
    assert best is not None
    return tuple(sorted(best, key=lambda t: -t.blocks))
