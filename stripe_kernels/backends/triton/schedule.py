"""Which blocks the Triton kernels run: flat int32 arrays, computed once per skeleton and shape. numpy only.

    fprop  a filter tile computes `width` filters and executes the union of their taps: filters with like tap lists share one
    dgrad  a reduction entry is one tap and up to `depth` of the filters that keep it, listed per (group, input phase)
    wgrad  an output entry is one tap and up to `height` of the filters that keep it

A slot without a stripe holds the row A, a row of zeros appended to the packed values, or the filter -1, which is masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from stripe_kernels.geometry import ConvShape
from stripe_kernels.packed import StripeIndex
from stripe_kernels.skeleton import FilterSkeleton

Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

# Weight of a tap the tile must newly execute against one it executes already. No value wins on every skeleton: all are tried.
_AVERSIONS = (0.5, 1.0, 2.0)


def _int32(values: object) -> Int32Array:
    return np.ascontiguousarray(values, dtype=np.int32)


def _pointers(counts: list[int]) -> Int32Array:
    return _int32(np.concatenate(([0], np.cumsum(counts))))


def tap_offset(s: ConvShape, tap: int) -> tuple[int, int]:
    """Input pixel that output pixel (0, 0) reads through a tap."""
    return tap // s.S * s.dilation[0] - s.padding[0], tap % s.S * s.dilation[1] - s.padding[1]


def cluster(live: BoolArray, width: int) -> list[Int32Array]:
    """Filters [K, taps] in tiles of at most `width`, so that few (tile, tap) pairs are executed; longest tile first.

    Greedy: a tile starts with the filter of most taps and takes the one that shares most taps with it and adds fewest.
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

    best = min((greedy(aversion) for aversion in _AVERSIONS), key=executed)
    return sorted(best, key=lambda tile: -int(live[tile].any(0).sum()))


@dataclass(frozen=True, eq=False)
class FpropSchedule:
    """Filter tiles of `width` filters, and for each the list of taps it executes."""

    filters: Int32Array  # [tiles, width]: output channel, -1 where the tile is not full
    group: Int32Array  # [tiles]
    entry_ptr: Int32Array  # [tiles + 1]: entries of tile i are [entry_ptr[i], entry_ptr[i + 1])
    offset: Int32Array  # [entries, 2]: input pixel (h, w) read by output pixel (0, 0)
    row: Int32Array  # [entries, width]: row of the packed values, A for zeros

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(skeleton: FilterSkeleton, s: ConvShape, width: int) -> FpropSchedule:
        live = skeleton.live.reshape(s.K, s.taps)
        row_of = np.full(live.shape, skeleton.stripes)
        row_of[live] = np.arange(skeleton.stripes)
        filters, groups, counts, offsets, rows = [], [], [], [], []
        for group in range(s.groups):
            for tile in cluster(live[group * s.group_k : (group + 1) * s.group_k], width):
                members = tile + group * s.group_k
                taps = np.flatnonzero(live[members].any(0))
                filters.append(np.pad(members, (0, width - len(members)), constant_values=-1))
                groups.append(group)
                counts.append(len(taps))
                offsets += [tap_offset(s, int(t)) for t in taps]
                of_tap = row_of[members][:, taps].T
                rows.append(np.pad(of_tap, ((0, 0), (0, width - len(members))), constant_values=skeleton.stripes))
        return FpropSchedule(
            _int32(filters), _int32(groups), _pointers(counts), _int32(offsets).reshape(-1, 2), _int32(np.concatenate(rows))
        )

    @property
    def entries(self) -> int:
        return len(self.offset)

    def fill(self, skeleton: FilterSkeleton) -> float:
        """Live stripes / executed stripes; 1 when nothing is executed."""
        return skeleton.stripes / max(1, self.row.size) if self.row.size else 1.0


@lru_cache(maxsize=1024)
def filters_by_tap(skeleton: FilterSkeleton, groups: int) -> tuple[tuple[tuple[int, int, Int32Array, Int32Array], ...], ...]:
    """For every group its live taps: (group, tap, filters within the group, rows of the packed values)."""
    index = StripeIndex.of(skeleton, groups)
    found = []
    for group in range(groups):
        taps = []
        for tap in range(index.taps):
            first, last = index.tap_ptr[group * index.taps + tap], index.tap_ptr[group * index.taps + tap + 1]
            if last > first:
                taps.append((group, tap, index.filter[first:last], index.row[first:last]))
        found.append(tuple(taps))
    return tuple(found)
