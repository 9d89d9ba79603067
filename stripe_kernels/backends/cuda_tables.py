"""The flat int32 tables a CUDA kernel reads, and the layout that goes with them (csrc/cuda/params.h).
Torch-free."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from stripe_kernels.backends.cuda_walk import Walk
from stripe_kernels.packed import Int32Array

SHARED_BYTES = (
    99 * 1024
)  # the most a block gets on every chip from sm_80 on, sm_86 and sm_120 included; two fit in an SM of an H100
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}


@dataclass(frozen=True)
class Layout:
    """The integers of sk::cuda::Layout, in its order, without the sections of the tables and the dtype."""

    walk: Walk
    groups: int
    group_in: int
    group_out: int
    tile_out: int
    tiles_out: int
    chunk: int
    pitch: int
    slab: int
    splits: int
    width: int = 0

    def integers(self, sections: Iterable[int] = (0,) * 5, dtype: int = 0) -> list[int]:
        own = (self.groups, self.group_in, self.group_out, self.tile_out, self.tiles_out)
        return [
            *self.walk.integers(),
            *own,
            self.chunk,
            self.pitch,
            self.slab,
            self.splits,
            self.width,
            *sections,
            dtype,
        ]


def one_array(*sections: Int32Array) -> tuple[Int32Array, list[int]]:
    """Flat sections in one array, and where each starts in it: at multiples of four, for vector loads."""
    starts, parts, at = [], [], 0
    for section in sections:
        gap = -at % 4
        starts.append(at + gap)
        parts += [np.zeros(gap, np.int32), section]
        at += gap + len(section)
    return np.concatenate(parts), starts


@dataclass
class Tables:
    """Five sections, filled by the kernels' own builders: items (begin and end of a block's steps), steps,
    entries (what a step executes), lists (what entries point at) and classes (offset of an output
    pixel)."""

    items: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    lists: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)

    def flat(self) -> tuple[Int32Array, list[int]]:
        sections = (self.items, self.steps, self.entries, self.lists, self.classes)
        return one_array(*(np.asarray(section, np.int32) for section in sections))

    @property
    def step_count(self) -> int:
        return len(self.steps) // 8

    def add_step(
        self,
        origin: tuple[int, int],
        channel: int,
        fresh: bool,
        entries: tuple[int, int],
        weights: int,
        units: int,
    ) -> None:
        self.steps += [*origin, channel, int(fresh), *entries, weights, units]

    def add_item(self, first: int, splits: int) -> None:
        """A block's steps from number `first` to the last, shared out among `splits` blocks where patches
        begin."""
        fresh = [i for i in range(first, self.step_count) if self.steps[8 * i + 3]]
        cuts = [
            fresh[len(fresh) * j // splits] if fresh and j < splits else self.step_count
            for j in range(splits + 1)
        ]
        if fresh:
            cuts[0] = first
        for begin, end in itertools.pairwise(cuts):
            self.items += [begin, end]


def pieces(count: int, most: int) -> list[tuple[int, int]]:
    """[0, count) in consecutive ranges of at most `most`."""
    return [(i, min(i + most, count)) for i in range(0, count, most)]
