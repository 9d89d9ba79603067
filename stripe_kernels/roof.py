"""The roof of this machine: multiply-add rate and copy bandwidth; a time is stated as a share of either.

    share of peak = 2 * macs / (seconds * flops)        share of copy = bytes / (seconds * bandwidth)

The rate is that of torch.mm on large square matrices, about 97 % of what bare FMA instructions reach: a
share of 100 % is within reach, and a little more is no error. The bandwidth is that of copying more than
the caches hold, reads and writes counted: operands that stay in a cache can exceed it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

SIDE = 2048
COPY_BYTES = 256 * 2**20
REPEATS = 5


@dataclass(frozen=True)
class Roof:
    """FLOP/s of a multiply-add counted as two, and bytes/s read plus written."""

    dtype: str
    threads: int
    flops: float
    bandwidth: float

    @classmethod
    def probe(cls, dtype: torch.dtype, threads: int, side: int = SIDE, copied: int = COPY_BYTES) -> Roof:
        """Measures both with `threads` threads, a second or two. The best of a few runs, as befits a roof."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            math = torch.float32 if dtype == torch.float16 else dtype
            a, b = (torch.randn(side, side).to(math) for _ in range(2))
            out = torch.empty(side, side, dtype=math)
            mm = _fastest(lambda: torch.mm(a, b, out=out))
            source = torch.ones(copied // 4)
            target = torch.empty_like(source)
            copy = _fastest(lambda: target.copy_(source))
        finally:
            torch.set_num_threads(before)
        return cls(str(dtype)[6:], threads, 2 * side**3 / mm, 2 * copied / copy)

    def share_of_peak(self, macs: float, seconds: float) -> float:
        return 2 * macs / (seconds * self.flops)

    def share_of_copy(self, moved: float, seconds: float) -> float:
        return moved / (seconds * self.bandwidth)

    def __str__(self) -> str:
        return (
            f"roof, {self.threads} thread{'s' if self.threads > 1 else ''}, {self.dtype}: "
            f"{self.flops / 1e9:.0f} GFLOP/s (torch.mm), {self.bandwidth / 1e9:.1f} GB/s (copy)"
        )

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def _fastest(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
