"""The packed format: the live stripes of a filter, and flat arrays that say where each belongs.

    weight [K, C/g, R, S]          values [A, C/g]                tap_ptr [g*R*S + 1]
      filter 0: # . .              row 0: stripe (0, tap 0)       tap 0: 0 ......... filters 0, 2
                . # .     pack     row 1: stripe (0, tap 4)       tap 1: 2 ......... filter  1
      filter 1: . # .    ----->    row 2: stripe (1, tap 1)       tap 4: 3 ......... filters 0, 1, 2
                . # .              ...                            filter [A], row [A]: sorted by (group, tap, filter)

`values` keep the order skeleton.nonzero() gives, filter by filter, whatever a kernel does with them afterwards; the
index arrays list the same stripes tap by tap, which is the order kernels run in. Both exist once per skeleton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from stripe_kernels.skeleton import FilterSkeleton

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class StripeIndex:
    """Flat index arrays of one skeleton, for `groups` convolution groups of K/groups filters each."""

    groups: int
    taps: int
    tap_ptr: Int32Array  # [groups * taps + 1]: stripes of (group, tap) are [tap_ptr[i], tap_ptr[i + 1])
    filter: Int32Array  # [A]: filter within its group
    row: Int32Array  # [A]: row of the packed values

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(skeleton: FilterSkeleton, groups: int = 1) -> StripeIndex:
        """The index of a skeleton; cached. ValueError when groups does not divide its filters."""
        filters, rows, columns = skeleton.shape
        if groups < 1 or filters % groups:
            raise ValueError(f"groups={groups} must divide the skeleton's K={filters} filters")
        k, r, s = np.nonzero(skeleton.live)
        tap = r * columns + s
        group = k // (filters // groups)
        order = np.lexsort((k, tap, group))
        counts = np.bincount(group * rows * columns + tap, minlength=groups * rows * columns)
        tap_ptr = np.concatenate(([0], np.cumsum(counts)))
        arrays = (tap_ptr, (k % (filters // groups))[order], order)
        return StripeIndex(groups, rows * columns, *(np.ascontiguousarray(a, np.int32) for a in arrays))


@dataclass(frozen=True, eq=False)
class PackedStripes:
    """Live stripes of one filter: values [A, C/groups] in nonzero order, with the skeleton they belong to."""

    values: npt.NDArray[np.generic]
    skeleton: FilterSkeleton

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape[0] != self.skeleton.stripes:
            raise ValueError(
                f"packed values are [A, C/groups] with A={self.skeleton.stripes} live stripes, got "
                f"{list(self.values.shape)}"
            )

    @classmethod
    def pack(cls, weight: npt.NDArray[np.generic], skeleton: FilterSkeleton) -> PackedStripes:
        """From a dense weight [K, C/groups, R, S]; dead stripes' values have no say."""
        if weight.ndim != 4 or (weight.shape[0], *weight.shape[2:]) != skeleton.shape:
            raise ValueError(f"skeleton is {list(skeleton.shape)} but weight is {list(weight.shape)}")
        return cls(np.ascontiguousarray(weight.transpose(0, 2, 3, 1)[skeleton.live]), skeleton)

    def unpack(self) -> npt.NDArray[np.generic]:
        """The dense weight [K, C/groups, R, S], zero where a stripe is dead."""
        dense = np.zeros((*self.skeleton.shape, self.values.shape[1]), self.values.dtype)
        dense[self.skeleton.live] = self.values
        return np.ascontiguousarray(dense.transpose(0, 3, 1, 2))
