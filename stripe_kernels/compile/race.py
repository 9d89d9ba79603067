"""race: two calls timed in turn, and how sure the ratio of their times is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stripe_kernels.compile.tune import repeats_of, sample

_SIGMAS = 1.96  # of a normal distribution: 95 %
_LEAST = 9  # rounds; the interval of fewer would be all of them
CLEARLY = 0.97  # of the time: the gain must exceed what a race gets wrong
_PATIENCE = 8  # times as long


@dataclass(frozen=True)
class Ratio:
    """Time of one over time of the other: the median over rounds, and a 95 % interval of that median."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Ratio:
        """Of one ratio a round, at least 9. The interval's ends are order statistics: no distribution is assumed."""
        if len(ratios) < _LEAST:
            raise ValueError(f"an interval takes {_LEAST} rounds or more, got {len(ratios)}")
        ordered, n = sorted(ratios), len(ratios)
        rank = math.floor(n / 2 - _SIGMAS * math.sqrt(n) / 2)
        return cls(ordered[n // 2], ordered[rank], ordered[n - 1 - rank])

    @property
    def faster(self) -> bool:
        """Whether the whole interval lies below 1: the gain is not what chance gives."""
        return self.high < 1.0

    @property
    def speed_up(self) -> str:
        """For a person: how many times as fast the one is as the other."""
        return f"{1 / self.median:.2f}x [{1 / self.high:.2f}, {1 / self.low:.2f}]"

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def race(
    one: Callable[[], Any], other: Callable[[], Any], seconds: float, device: torch.device | None = None
) -> Ratio:
    """Both calls in every round, in an order that alternates; for `seconds`, and at least 9 rounds.

    8 times as long where the median speaks for `one` and a scatter of rounds (a disturbed machine) leaves
    it open: a clear gain is not to be lost by bad luck.
    """
    calls = (one, other)
    for call in (*calls, *calls):
        call()
    repeats = [repeats_of(sample(call, 1, device), device) for call in calls]
    ratios: list[float] = []
    start, allowed = time.perf_counter(), seconds
    while True:
        times = [0.0, 0.0]
        for i in (0, 1) if len(ratios) % 2 else (1, 0):
            times[i] = sample(calls[i], repeats[i], device)
        ratios.append(times[0] / times[1])
        if len(ratios) < _LEAST or time.perf_counter() - start < allowed:
            continue
        found = Ratio.of(ratios)
        if found.faster or found.median > CLEARLY or allowed >= _PATIENCE * seconds:
            return found
        allowed = _PATIENCE * seconds  # two looks, not one a round: each gives luck another chance
