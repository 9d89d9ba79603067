"""FilterSkeleton: which stripes live."""

from __future__ import annotations

import base64
import hashlib
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt


class FilterSkeleton:
    """An immutable bool [K, R, S]: stripe (k, r, s) is the C-vector weight[k, :, r, s]; True means it lives.

    It is host data: hashable, comparable, and carried through operators as `text`. Its repr draws every tap's share of
    live filters.
    """

    def __init__(self, live: npt.ArrayLike) -> None:
        array = np.asarray(live)
        if array.dtype != np.bool_:
            raise TypeError(f"a skeleton is bool [K, R, S], got dtype {array.dtype}")
        if array.ndim != 3 or min(array.shape) < 1:
            raise ValueError(
                f"a skeleton is bool [K, R, S] with no empty side, got shape {list(array.shape)}"
            )
        self.live = array.copy(order="C")  # its own: the caller's array stays writable and may change
        self.live.setflags(write=False)
        #: A short exact form, "KxRxS:" and the packed bits in base64. Made here: torch.compile cannot trace a lock.
        self.text = (
            "x".join(map(str, array.shape))
            + ":"
            + base64.b64encode(np.packbits(self.live).tobytes()).decode()
        )

    @classmethod
    def full(cls, filters: int, rows: int, columns: int) -> FilterSkeleton:
        return cls(np.ones((filters, rows, columns), np.bool_))

    @staticmethod
    @lru_cache(maxsize=1024)
    def from_text(text: str) -> FilterSkeleton:
        """The skeleton that wrote `text`; ValueError when it is malformed."""
        try:
            sizes, bits = text.split(":")
            filters, rows, columns = (int(n) for n in sizes.split("x"))
            raw = np.frombuffer(base64.b64decode(bits, validate=True), np.uint8)
        except ValueError as error:
            raise ValueError(f"not a skeleton: {text[:40]!r}") from error
        count = filters * rows * columns
        if min(filters, rows, columns) < 1 or raw.size != (count + 7) // 8:
            raise ValueError(f"skeleton {sizes} needs {(count + 7) // 8} bytes of bits, got {raw.size}")
        return FilterSkeleton(
            np.unpackbits(raw, count=count).astype(np.bool_).reshape(filters, rows, columns)
        )

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits that name this skeleton in caches and files."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @property
    def shape(self) -> tuple[int, int, int]:
        filters, rows, columns = self.live.shape
        return filters, rows, columns

    @cached_property
    def stripes(self) -> int:
        """A: the number of live stripes."""
        return int(self.live.sum())

    @property
    def density(self) -> float:
        """Live stripes / all stripes."""
        return self.stripes / self.live.size

    @cached_property
    def filters_per_tap(self) -> npt.NDArray[np.int64]:
        """Live filters of every tap [R, S]."""
        count: npt.NDArray[np.int64] = self.live.sum(0)
        return count

    @cached_property
    def dead_filters(self) -> npt.NDArray[np.int64]:
        """Indices of the filters with no live stripe: their output is a constant."""
        return np.flatnonzero(~self.live.any((1, 2)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FilterSkeleton) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        filters, rows, columns = self.shape
        shades = " .:-=+*#%@"
        share = self.filters_per_tap / filters
        lines = ["".join(shades[min(9, int(v * 10))] * 2 for v in row) for row in share]
        head = (
            f"FilterSkeleton({filters}x{rows}x{columns}, {self.stripes} of {self.live.size} stripes live, "
            f"density {self.density:.3f}, {len(self.dead_filters)} dead filters)"
        )
        return head + "".join(f"\n  |{line}|" for line in lines)
