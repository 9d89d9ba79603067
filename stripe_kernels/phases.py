"""Live stripes by input phase: which taps meet which input pixels. Torch-free.

With stride (u, v) the input pixels (h0 + u*i, w0 + v*j) form the phase (h0, w0), an image of its own. A tap
reads one phase only: output pixel (p, q) reads phase pixel (i, j) = (p + tap.i, q + tap.j). Stride 1 has a
single phase, the whole image.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from stripe_kernels.geometry import ConvShape
from stripe_kernels.packed import Int32Array, StripeIndex
from stripe_kernels.skeleton import FilterSkeleton


def tap_offset(s: ConvShape, tap: int) -> tuple[int, int]:
    """Input pixel (h, w) that output pixel (0, 0) reads through a tap."""
    return tap // s.S * s.dilation[0] - s.padding[0], tap % s.S * s.dilation[1] - s.padding[1]


@dataclass(frozen=True, eq=False)
class PhaseTap:
    """The live stripes of one tap in one group: the phase's stripes [first, first + len(filters))."""

    h: int  # input pixel that output pixel (0, 0) reads
    w: int
    i: int  # the same pixel within its phase
    j: int
    first: int
    filters: Int32Array  # within the group, ascending
    row: Int32Array  # of the packed values

    @property
    def last(self) -> int:
        return self.first + len(self.filters)


@dataclass(frozen=True, eq=False)
class Phase:
    """One phase of one group: `rows` x `columns` pixels an image, and the stripes that read them, tap by
    tap."""

    group: int
    h0: int
    w0: int
    rows: int
    columns: int
    taps: tuple[PhaseTap, ...]

    @property
    def stripes(self) -> int:
        return self.taps[-1].last if self.taps else 0

    @property
    def row(self) -> Int32Array:
        """[stripes]: rows of the packed values."""
        return np.concatenate([np.empty(0, np.int32), *(tap.row for tap in self.taps)])

    @property
    def pixels(self) -> int:
        """Of one image."""
        return self.rows * self.columns


@lru_cache(maxsize=1024)
def phases(skeleton: FilterSkeleton, s: ConvShape) -> tuple[Phase, ...]:
    """Every phase of every group, also those no stripe reads: together they hold each input pixel and each
    stripe once."""
    index = StripeIndex.of(skeleton, s.groups)
    u, v = s.stride
    found = []
    for group in range(s.groups):
        taps: dict[tuple[int, int], list[PhaseTap]] = {}
        for tap in range(index.taps):
            first, last = (int(n) for n in index.tap_ptr[group * index.taps + tap :][:2])
            if first == last:
                continue
            h, w = tap_offset(s, tap)
            mine = taps.setdefault((h % u, w % v), [])
            before = mine[-1].last if mine else 0
            mine.append(
                PhaseTap(h, w, h // u, w // v, before, index.filter[first:last], index.row[first:last])
            )
        for h0, w0 in np.ndindex(u, v):
            rows, columns = max(0, -(-(s.H - h0) // u)), max(0, -(-(s.W - w0) // v))
            found.append(Phase(group, h0, w0, rows, columns, tuple(taps.get((h0, w0), ()))))
    return tuple(found)
