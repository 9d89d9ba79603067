"""Three fixed sources of skeletons: iid, iid among living filters, learned. The arguments alone decide.

A density asks for exactly round(d * K * R * S) live stripes, at least one.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

import stripe_kernels
from stripe_kernels import FilterSkeleton, StripeConv2d

DEAD_SHARE = 0.25  # of the filters, in skeletons of source "dead"
Size = tuple[int, int, int]  # K, R, S


def _spread(size: Size, stripes: int, alive: np.ndarray, rng: np.random.Generator) -> FilterSkeleton:
    """`stripes` live stripes among the filters `alive`: one for each filter first, then any."""
    taps = size[1] * size[2]
    live = np.zeros((size[0], taps), bool)
    first = rng.permutation(alive)[: min(stripes, len(alive))]
    live[first, rng.integers(taps, size=len(first))] = True
    open_stripes = np.flatnonzero(~live[alive].ravel())
    more = rng.choice(open_stripes, stripes - len(first), replace=False)
    live[alive[more // taps], more % taps] = True
    return FilterSkeleton(live.reshape(size))


def iid(size: Size, density: float, seed: str) -> FilterSkeleton:
    """Random stripes with no dead filter while there are at least K of them; below that (d < 1/(R*S)) the
    living filters have one stripe each."""
    return _spread(size, _stripes(size, density), np.arange(size[0]), _rng(seed))


def dead(size: Size, density: float, seed: str, share: float = DEAD_SHARE) -> FilterSkeleton:
    """As iid, with `share` of the filters dead and all stripes in the others; fewer are dead where that
    leaves too few stripes."""
    rng, stripes = _rng(seed), _stripes(size, density)
    living = max(size[0] - round(share * size[0]), -(-stripes // (size[1] * size[2])))
    return _spread(size, stripes, np.sort(rng.permutation(size[0])[:living]), rng)


GENERATORS: dict[str, Callable[[Size, float, str], FilterSkeleton]] = {"iid": iid, "dead": dead}


def learned(path: Path) -> dict[str, FilterSkeleton]:
    """Module name -> skeleton, of a network written by stripe_kernels.save."""
    network = stripe_kernels.load(path)
    found = {
        n: FilterSkeleton(m.skeleton.numpy())
        for n, m in network.named_modules()
        if isinstance(m, StripeConv2d)
    }
    if not found:
        raise ValueError(f"{path} has no StripeConv2d")
    return found


def _stripes(size: Size, density: float) -> int:
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}")
    return max(1, round(density * size[0] * size[1] * size[2]))


def _rng(seed: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(seed.encode()))
