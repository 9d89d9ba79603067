"""Tiles of consecutive pixels and the patches they read, against a walk over every pixel."""

from __future__ import annotations

from itertools import islice, product

import numpy as np
import pytest

from stripe_kernels.backends.cuda_tiles import patches_of
from stripe_kernels.geometry import IntPair
from stripe_kernels.phases import phases
from stripe_kernels.testing import CASES, Case


def walked(
    taps: tuple[IntPair, ...], written: tuple[int, int, int], read: IntPair, pixels: int
) -> tuple[list[int], list[int]]:
    low, counts = [], []
    every = product(*map(range, written))
    while tile := list(islice(every, pixels)):
        met = [
            (n * read[0] + i - tap[0]) * read[1] + j - tap[1]
            for n, i, j in tile
            for tap in taps
            if 0 <= i - tap[0] < read[0] and 0 <= j - tap[1] < read[1]
        ]
        low.append(min(met, default=0))
        counts.append(max(met) - min(met) + 1 if met else 0)
    return low, counts


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_patches_of_lopsided_problems(case: Case) -> None:
    """As dgrad, fprop and wgrad ask for them."""
    s = case.shape
    for phase in phases(case.skeleton, s):
        taps = tuple((tap.i, tap.j) for tap in phase.taps)
        turned = tuple((-i, -j) for i, j in taps)
        for pixels in (7, 32, 128):
            for asked in (
                (taps, (s.N, phase.rows, phase.columns), (s.P, s.Q), pixels),
                (turned, (s.N, s.P, s.Q), (s.H, s.W), pixels),
                (tuple(sorted(taps)), (s.N, s.H, s.W), (s.P, s.Q), pixels),
            ):
                low, counts = patches_of(*asked)
                assert (low.tolist(), counts.tolist()) == walked(*asked), asked


def test_patches_of_tiles_that_meet_nothing() -> None:
    """No tap, no image, taps beside the map on every side, and a tile that lies between two rows of a tap."""
    for taps, written, read in (
        ((), (2, 3, 5), (3, 5)),
        (((0, 0),), (0, 3, 5), (3, 5)),
        (((9, 0), (-9, 0), (0, 9), (0, -9)), (2, 3, 5), (3, 5)),
        (((0, 3),), (2, 3, 5), (3, 5)),
        (((1, -2), (-2, 1)), (3, 4, 6), (2, 3)),
    ):
        for pixels in (1, 2, 4):
            low, counts = patches_of(taps, written, read, pixels)
            assert (low.tolist(), counts.tolist()) == walked(taps, written, read, pixels)
            assert low.dtype == counts.dtype == np.int64
