"""Which blocks the Triton kernels run: flat int32 arrays, computed once per skeleton and shape. numpy only.

    fprop  a filter tile computes `width` filters and executes the union of their taps
    dgrad  a reduction entry is one tap and up to `depth` filters that keep it, listed per (group, phase)
    wgrad  an output entry is one tap and up to `height` filters that keep it

    stem   a block of `width` consecutive filters reduces over the channels of the taps that one of them keeps

A slot without a stripe holds the row A, a row of zeros appended to the packed values, or the filter -1,
which is masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from stripe_kernels.geometry import ConvShape
from stripe_kernels.packed import Int32Array
from stripe_kernels.phases import PhaseTap, phases, tap_offset
from stripe_kernels.skeleton import FilterSkeleton

BoolArray = npt.NDArray[np.bool_]

STEM_BITS = 30  # rows and columns of a filter: bits of a word, and one that stays free

# Weight of a tap the tile must newly execute against one it executes already. No value wins on every
# skeleton: all are tried.
_AVERSIONS = (0.5, 1.0, 2.0)


def _int32(values: object) -> Int32Array:
    return np.ascontiguousarray(values, dtype=np.int32)


def _pointers(counts: list[int]) -> Int32Array:
    return _int32(np.concatenate(([0], np.cumsum(counts))))


def cluster(live: BoolArray, width: int) -> list[Int32Array]:
    """Filters [K, taps] in tiles of at most `width`, so that few (tile, tap) pairs are executed; longest
    tile first.

    Greedy: a tile starts with the filter of most taps and takes the one that shares most taps with it and
    adds fewest. Or in Gray's order of their tap masks, where neighbours differ in few taps: better for parts of
    filters, which have few masks.
    """

    def greedy(aversion: float) -> list[Int32Array]:
        left = np.arange(len(live))
        tiles = []
        while left.size:
            members = [int(left[live[left].sum(1).argmax()])]
            left = left[left != members[0]]
            union = live[members[0]].copy()
            while left.size and len(members) < width:
                taps = live[left]
                score = taps[:, union].sum(1) - aversion * taps[:, ~union].sum(1)
                best = int(left[score.argmax()])
                members.append(best)
                union |= live[best]
                left = left[left != best]
            tiles.append(_int32(sorted(members)))
        return tiles

    def executed(tiles: list[Int32Array]) -> int:
        return sum(int(live[tile].any(0).sum()) for tile in tiles)

    def in_grays_order() -> list[Int32Array]:
        ranks = np.bitwise_xor.accumulate(
            live[:, ::-1], axis=1
        )  # the binary number whose Gray code is the mask
        order = np.lexsort(ranks.T[::-1])
        return [_int32(np.sort(order[first : first + width])) for first in range(0, len(order), width)]

    best = min((*(greedy(aversion) for aversion in _AVERSIONS), in_grays_order()), key=executed)
    return sorted(best, key=lambda tile: -int(live[tile].any(0).sum()))


@lru_cache(maxsize=1024)
def filter_tiles(
    skeleton: FilterSkeleton, groups: int, width: int, split: bool
) -> tuple[tuple[tuple[Int32Array, BoolArray], ...], ...]:
    """The tiles of every group: their filters, numbered within it, and the taps [filters, taps] each computes
    there. With `split` a filter's kernel rows are parts of their own, which may lie in different tiles: 512 filters
    of density .24 / .1 in tiles of 64 execute .31 / .15 of the dense work so, and .72 / .38 whole. 512 filters take
    about 40 ms a width: kept for every size of the input."""
    k, r, s = skeleton.shape
    live = skeleton.live.reshape(groups, k // groups, r, s)
    found = []
    for group in live:
        if split:
            parts = np.zeros((len(group), r, r, s), np.bool_)
            parts[:, np.arange(r), np.arange(r)] = group
            filters, rows = np.nonzero(group.any(2))
            columns = parts[filters, rows].reshape(-1, r * s)
        else:
            filters, columns = np.arange(len(group)), group.reshape(-1, r * s)
        found.append(tuple((_int32(filters[tile]), columns[tile]) for tile in cluster(columns, width)))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class FpropSchedule:
    """Filter tiles of `width` filters, and for each the list of taps it executes. With `split` a filter appears once
    for each of its kernel rows with a live stripe, and a dead one nowhere."""

    filters: Int32Array  # [tiles, width]: output channel, -1 where the tile is not full
    group: Int32Array  # [tiles]
    entry_ptr: Int32Array  # [tiles + 1]: entries of tile i are [entry_ptr[i], entry_ptr[i + 1])
    offset: Int32Array  # [entries, 3]: input pixel (h, w) read by output pixel (0, 0), and its number
    tap: Int32Array  # [numbers, 2]: the input pixel by its number
    row: Int32Array  # [entries, width]: row of the packed values, A for zeros

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(skeleton: FilterSkeleton, s: ConvShape, width: int, split: bool = False) -> FpropSchedule:
        live = skeleton.live.reshape(s.K, s.taps)
        row_of = np.full(live.shape, skeleton.stripes)
        row_of[live] = np.arange(skeleton.stripes)
        number = {int(t): i for i, t in enumerate(np.flatnonzero(live.any(0)))}
        filters, groups, counts, offsets, rows = [], [], [], [], []
        for group, tiles in enumerate(filter_tiles(skeleton, s.groups, width, split)):
            for tile, computed in tiles:
                members = tile + group * s.group_k
                taps = np.flatnonzero(computed.any(0))
                short = width - len(members)
                filters.append(np.pad(members, (0, short), constant_values=-1))
                groups.append(group)
                counts.append(len(taps))
                offsets += [(*tap_offset(s, int(t)), number[int(t)]) for t in taps]
                of_tap = np.where(computed, row_of[members], skeleton.stripes)[:, taps].T
                rows.append(np.pad(of_tap, ((0, 0), (0, short)), constant_values=skeleton.stripes))
        return FpropSchedule(
            _int32(filters).reshape(-1, width),
            _int32(groups),
            _pointers(counts),
            _int32(offsets).reshape(-1, 3),
            _int32([tap_offset(s, t) for t in number]).reshape(-1, 2),
            _int32(np.concatenate([np.empty((0, width)), *rows])),
        )


@dataclass(frozen=True, eq=False)
class StemSchedule:
    """Blocks of `width` consecutive filters of a group. Each has its slots, one for every channel of every tap that a
    filter of it keeps, in steps of `depth`."""

    step_ptr: Int32Array  # [blocks + 1]: steps of block i are [step_ptr[i], step_ptr[i + 1])
    slot: Int32Array  # [slots, 4]: rows and columns from the filter's corner, channel, the bits of its row and column
    value: Int32Array  # [slots, width]: of the packed values, C/g times A for zero

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(skeleton: FilterSkeleton, s: ConvShape, width: int, depth: int) -> StemSchedule:
        live = skeleton.live.reshape(s.groups, s.group_k, s.taps)
        row_of = np.full(live.shape, skeleton.stripes)
        row_of[live] = np.arange(skeleton.stripes)
        channels = np.arange(s.group_c)
        nothing = np.array([0, 0, 0, 1 << STEM_BITS])  # a bit that no pixel has
        counts, slots, values = [], [np.empty((0, 4))], [np.empty((0, width))]
        for of_group, rows in zip(live, row_of, strict=True):
            for first in range(0, s.group_k, width):
                taps = np.flatnonzero(of_group[first : first + width].any(0))
                r, c = np.repeat(taps, s.group_c), np.tile(channels, len(taps))
                steps = -(-len(c) // depth)
                slot = np.tile(nothing, (steps * depth, 1))
                bits = (1 << r // s.S) | (1 << (s.R + r % s.S))
                slot[: len(c)] = np.stack([r // s.S * s.dilation[0], r % s.S * s.dilation[1], c, bits], 1)
                value = np.full((steps * depth, width), skeleton.stripes * s.group_c)
                members = rows[first : first + width]
                value[: len(c), : len(members)] = np.where(
                    members[:, r] < skeleton.stripes,
                    members[:, r] * s.group_c + c,
                    skeleton.stripes * s.group_c,
                ).T
                counts.append(steps)
                slots.append(slot)
                values.append(value)
        return StemSchedule(_pointers(counts), _int32(np.concatenate(slots)), _int32(np.concatenate(values)))


def _chunks(tap: PhaseTap, size: int) -> list[tuple[Int32Array, Int32Array]]:
    """(filters, rows) of a tap's stripes, `size` at a time."""
    cuts = range(size, len(tap.filters), size)
    return list(zip(np.split(tap.filters, cuts), np.split(tap.row, cuts), strict=True))


def _blocks(tap: PhaseTap, size: int, group_k: int, absent: int) -> list[tuple[Int32Array, Int32Array]]:
    """(filters, rows) of the aligned blocks of `size` filters with a live stripe; row `absent` for the dead
    ones."""
    row_of = np.full(group_k, absent)
    row_of[tap.filters] = tap.row
    firsts = np.unique(tap.filters // size) * size
    spans = [np.arange(first, min(first + size, group_k)) for first in firsts]
    return [(_int32(span), _int32(row_of[span])) for span in spans]


def _padded(parts: list[Int32Array], size: int, value: int) -> Int32Array:
    """[len(parts), size], short parts filled up with `value`."""
    return _int32([np.pad(p, (0, size - len(p)), constant_values=value) for p in parts]).reshape(-1, size)


@dataclass(frozen=True, eq=False)
class DgradSchedule:
    """Reduction lists. With stride (u, v), input pixel (h0 + u*i, w0 + v*j) meets only taps whose offset
    differs from (h0, w0) by a multiple of the stride: one list for each group and each of the u*v phases
    (h0, w0)."""

    origin: Int32Array  # [lists, 3]: group, h0, w0
    entry_ptr: Int32Array  # [lists + 1]
    offset: (
        Int32Array  # [entries, 3]: output pixel that input pixel i = j = 0 of the phase meets, and its number
    )
    tap: Int32Array  # [numbers, 2]: the output pixel by its number
    filters: Int32Array  # [entries, depth]: within the group, -1 where an entry is not full
    row: Int32Array  # [entries, depth]: row of the packed values, A for zeros

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(skeleton: FilterSkeleton, s: ConvShape, depth: int, aligned: bool) -> DgradSchedule:
        """aligned: entries are blocks of consecutive filters, so that dy is read in whole vectors and dead
        stripes of a block are executed; otherwise an entry gathers live filters only."""
        counts: list[int] = []
        offsets: list[tuple[int, int, int]] = []
        parts: list[tuple[Int32Array, Int32Array]] = []
        every = phases(skeleton, s)
        numbers = {
            pq: t for t, pq in enumerate(sorted({(-tap.i, -tap.j) for phase in every for tap in phase.taps}))
        }
        for phase in every:
            before = len(parts)
            for tap in phase.taps:
                found = _blocks(tap, depth, s.group_k, skeleton.stripes) if aligned else _chunks(tap, depth)
                parts += found
                offsets += [(-tap.i, -tap.j, numbers[-tap.i, -tap.j])] * len(found)
            counts.append(len(parts) - before)
        return DgradSchedule(
            _int32([(phase.group, phase.h0, phase.w0) for phase in every]),
            _pointers(counts),
            _int32(offsets).reshape(-1, 3),
            _int32(list(numbers)).reshape(-1, 2),
            _padded([filters for filters, _ in parts], depth, -1),
            _padded([rows for _, rows in parts], depth, skeleton.stripes),
        )


@dataclass(frozen=True, eq=False)
class WgradSchedule:
    """Output entries: one tap and up to `height` of its live filters."""

    group: Int32Array  # [entries]
    offset: Int32Array  # [entries, 2]: input pixel (h, w) read by output pixel (0, 0)
    filters: Int32Array  # [entries, height]: output channel, -1 where an entry is not full
    row: Int32Array  # [entries, height]: row of the result, -1 likewise

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(skeleton: FilterSkeleton, s: ConvShape, height: int) -> WgradSchedule:
        groups: list[int] = []
        offsets: list[tuple[int, int]] = []
        parts: list[tuple[Int32Array, Int32Array]] = []
        for phase in phases(skeleton, s):
            for tap in phase.taps:
                found = _chunks(tap, height)
                parts += [(filters + phase.group * s.group_k, row) for filters, row in found]
                offsets += [(tap.h, tap.w)] * len(found)
                groups += [phase.group] * len(found)
        return WgradSchedule(
            _int32(groups),
            _int32(offsets).reshape(-1, 2),
            _padded([filters for filters, _ in parts], height, -1),
            _padded([row for _, row in parts], height, -1),
        )
