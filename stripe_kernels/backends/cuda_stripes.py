"""Patches and columns of the kernel that multiplies all stripes (csrc/cuda/fprop_sm90.cu). Torch-free.

A patch is a grid of input pixels of one phase of the stride: what a tile of output pixels reads, halo included, but
nothing beside the image where the tile is the whole map along an axis.

A bundle is a run of filters; its stripes, tap by tap and filled up to eights (octets), are the columns of blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from stripe_kernels.backends.cuda_walk import Walk
from stripe_kernels.geometry import ConvShape, IntPair
from stripe_kernels.phases import Phase, phases
from stripe_kernels.skeleton import FilterSkeleton

MOST = 256  # pixels of a box in each direction
OCTET = 8  # columns of one tap
BUNDLES = (64, 32, 16, 8)  # filters of a bundle: as many as y's columns, or fewer for more blocks of threads
MOST_PARTS = 64  # of a group's filters: every part loads its patch anew
Offsets = tuple[
    int, ...
]  # of the taps of one phase along one axis: pixel p of the output reads pixel p + offset


@dataclass(frozen=True)
class Axis:
    """One direction of a patch. `origin[phase]` is its first pixel, counted from the tile's first output pixel."""

    tile: int
    extent: int
    origin: dict[int, int]


def _axis(tile: int, out: int, offsets: dict[int, Offsets], size: dict[int, int]) -> Axis:
    """The smallest extent that holds a tile and every pixel of the image that it reads."""
    origin, extent = {}, tile
    for phase, taps in offsets.items():
        first, last = min(taps), tile - 1 + max(taps)
        if tile == out:  # the image's own border is not in the patch
            first, last = min(max(first, 0), max(size[phase] - 1, 0)), min(last, size[phase] - 1)
        origin[phase] = first
        extent = max(extent, last - first + 1)
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

    def offset(self, phase: Phase, i: int, j: int) -> int:
        """Rows from an output pixel's own place in the grid to the pixel that tap (i, j) reads."""
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
    """The tile with fewest blocks that has at most `most_rows` pixels, as has its grid; None when not even one output
    pixel has room."""
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


@dataclass(frozen=True, eq=False)
class Octet:
    """At most eight stripes of one tap: (filter within its group, row of the packed weight)."""

    tap: int  # of the phase's
    columns: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Bundle:
    """Filters [first, first + count) of a group, and the blocks that hold all of their stripes: a phase each, and at
    most `width` / 8 octets. There is a block even where nothing lives: the epilogue makes something of zero."""

    first: int
    count: int
    blocks: tuple[tuple[Phase, tuple[Octet, ...]], ...]


def bundles_of(of_group: list[Phase], group_k: int, width: int, filters: int) -> list[Bundle]:
    """All filters of a group, in their order. of_group: its phases that have pixels."""
    most, bundles = width // OCTET, []
    for first in range(0, group_k, filters):
        last = min(first + filters, group_k)
        blocks: list[tuple[Phase, tuple[Octet, ...]]] = []
        for phase in of_group:
            octets = []
            for number, tap in enumerate(phase.taps):
                low, high = (int(n) for n in tap.filters.searchsorted((first, last)))
                mine = list(zip(tap.filters[low:high].tolist(), tap.row[low:high].tolist(), strict=True))
                octets += [Octet(number, tuple(mine[i : i + OCTET])) for i in range(0, len(mine), OCTET)]
            blocks += [(phase, tuple(octets[i : i + most])) for i in range(0, len(octets), most)]
        bundles.append(Bundle(first, last - first, tuple(blocks or [(of_group[0], ())])))
    return bundles


@dataclass(frozen=True, eq=False)
class StripeTile:
    """Consecutive bundles of a group, which one block of threads computes for a patch."""

    group: int
    bundles: tuple[Bundle, ...]

    @property
    def blocks(self) -> int:
        return sum(len(b.blocks) for b in self.bundles)


@lru_cache(maxsize=512)
def stripe_tiles(
    skeleton: FilterSkeleton, s: ConvShape, most_rows: int, width: int, processors: int, load: float
) -> tuple[StripeTile, ...]:
    """As many tiles of filters a group as keep `processors` multiprocessors evenly busy, those with most blocks first.
    load: what a patch costs to load, in blocks."""
    patch = patch_of(skeleton, s, most_rows)
    assert patch is not None
    best: tuple[float, list[StripeTile]] | None = None
    for filters in BUNDLES:
        if filters < BUNDLES[0] and filters >= s.group_k:
            continue
        groups = [
            (
                g,
                bundles_of(
                    [p for p in phases(skeleton, s) if p.group == g and p.pixels], s.group_k, width, filters
                ),
            )
            for g in range(s.groups)
        ]
        for parts in range(1, min(len(groups[0][1]), MOST_PARTS) + 1):
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
