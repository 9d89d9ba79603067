"""Patches and columns of the kernel that multiplies all stripes (csrc/cuda/fprop_sm90.cu). Torch-free.

A patch is a grid of input pixels of one phase of the stride; its product with a stripe of tap t, shifted by the tap's
offset, lands on *places*: grid positions that are output pixels or belong to nobody. A value outside the grid's rows
wraps around to a neighbouring row, so the grid needs margins wide enough that what wraps lands on nobody: one column
for a 3-tap axis whose tile is the whole axis (zeros outside the image need no place of their own), two for a tile in
the middle. Weights are taken to be finite: a zero beside the image may meet a place it does not belong to.

A bundle is a run of filters whose stripes fill a block of columns: they are multiplied together, and each filter's
own are added up where they lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from stripe_kernels.backends.cuda_walk import Walk
from stripe_kernels.geometry import ConvShape, IntPair
from stripe_kernels.phases import Phase, phases
from stripe_kernels.skeleton import FilterSkeleton

MOST = 256  # pixels of a box in each direction
MOST_FILTERS = 128  # of a bundle
MOST_PARTS = 8  # of a group's filters: every part loads its patch anew
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


def reads_zeros(patch: Patch, live: list[Phase], pad: int, guard: int) -> bool:
    """Whether a tap that reads beside the patch finds a zero without looking: products of a column lie one pixel after
    the other, `pad` zeros behind the last, and before the first the previous column's (or `guard` zeros). live: the
    phases that have stripes. Where a group has several, the previous column may be of another one: no."""
    if len(live) > len({phase.group for phase in live}):
        return False
    (images, th, tw), (gh, gw) = patch.walk.tile, patch.walk.patch
    n, i, j = (a.ravel() for a in np.indices((images, th, tw)))
    for phase in live:
        h, w = np.indices((gh, gw)).reshape(2, -1)
        h, w = h + patch.vertical.origin[phase.h0], w + patch.horizontal.origin[phase.w0]
        # Of a map that is not whole in the tile another tile may have pixels anywhere in the grid.
        whole = th == patch.walk.out[0], tw == patch.walk.out[1]
        outside = (h < 0) | (h >= phase.rows) if whole[0] else np.zeros(gh * gw, bool)
        outside = outside | ((w < 0) | (w >= phase.columns) if whole[1] else False)
        last = int(np.flatnonzero(~np.tile(outside, images)).max(initial=-1))
        for tap in phase.taps:
            row = (n * gh + i) * gw + j + patch.offset(phase, tap.i, tap.j)
            low, high = int(row.min()), int(row.max())
            if low < -guard or low < last + 1 - patch.rows - pad or high >= patch.rows + pad:
                return False
    return True


Column = tuple[int, int, int]  # filter within its group, pixels its tap is away, row of the packed weight


@dataclass(frozen=True, eq=False)
class Bundle:
    """Filters [first, first + count) of a group and all of their stripes: of each phase at most a block of columns, in
    the order of the filters."""

    first: int
    count: int
    columns: tuple[tuple[Phase, tuple[Column, ...]], ...]


def _cut(counts: np.ndarray, first: int, width: int) -> int:
    """The filter behind a bundle that begins with `first`: as many as have room, but a multiple of 8 or 4 (16 or 8
    bytes of y) where that leaves no more than a tenth of the columns unused. counts: [phases, filters]."""
    sums = counts[:, first : first + MOST_FILTERS].cumsum(1).max(0)
    fit = int(np.searchsorted(sums, width, side="right"))
    assert fit > 0, "a filter has more stripes than a block columns"
    last = first + fit
    if last == counts.shape[1]:
        return last
    for step, least in ((8, 0.92 * width), (4, 0.86 * width)):
        even = last // step * step
        if even > first and sums[even - first - 1] >= least:
            return even
    return last


def bundles_of(of_group: list[Phase], patch: Patch, group_k: int, width: int) -> list[Bundle]:
    """All filters of a group, in their order. of_group: its phases that have pixels."""
    columns: list[list[list[Column]]] = []  # of each phase and filter
    for phase in of_group:
        mine: list[list[Column]] = [[] for _ in range(group_k)]
        for tap in phase.taps:
            away = patch.offset(phase, tap.i, tap.j)
            for k, row in zip(tap.filters.tolist(), tap.row.tolist(), strict=True):
                mine[k].append((k, away, row))
        columns.append(mine)
    counts = np.array([[len(c) for c in mine] for mine in columns], np.int64).reshape(len(columns), group_k)
    bundles, first = [], 0
    while first < group_k:
        last = _cut(counts, first, width)
        found = [
            (phase, tuple(c for k in range(first, last) for c in mine[k]))
            for phase, mine in zip(of_group, columns, strict=True)
        ]
        live = [(phase, c) for phase, c in found if c]
        bundles.append(Bundle(first, last - first, tuple(live or found[:1])))
        first = last
    return bundles


@dataclass(frozen=True, eq=False)
class StripeTile:
    """Consecutive bundles of a group, which one block of threads computes for a patch."""

    group: int
    bundles: tuple[Bundle, ...]

    @property
    def blocks(self) -> int:
        return sum(len(b.columns) for b in self.bundles)


@lru_cache(maxsize=512)
def stripe_tiles(
    skeleton: FilterSkeleton, s: ConvShape, most_rows: int, width: int, processors: int, load: float
) -> tuple[StripeTile, ...]:
    """As many tiles of filters a group as keep `processors` multiprocessors evenly busy, those with most blocks first.
    load: what a patch costs to load, in blocks."""
    patch = patch_of(skeleton, s, most_rows)
    assert patch is not None
    groups = [
        (
            g,
            bundles_of(
                [p for p in phases(skeleton, s) if p.group == g and p.pixels], patch, s.group_k, width
            ),
        )
        for g in range(s.groups)
    ]
    shortest = min(len(bundles) for _, bundles in groups)
    best: tuple[float, list[StripeTile]] | None = None
    for parts in range(1, min(shortest, MOST_PARTS) + 1):
        tiles = [
            StripeTile(g, tuple(bundles[len(bundles) * i // parts : len(bundles) * (i + 1) // parts]))
            for g, bundles in groups
            for i in range(parts)
        ]
        items = len(tiles) * patch.walk.blocks
        cost = -(-items // processors) * (max(t.blocks for t in tiles) + load)
        if best is None or cost < 0.98 * best[0]:
            best = (cost, tiles)
    assert best is not None
    return tuple(sorted(best[1], key=lambda t: -t.blocks))
