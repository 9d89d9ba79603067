"""Interleaved timing: every round times each contestant once, and each round starts with another one.

Slow drift (heat, a neighbour) then hits all alike, and the ratio of two contestants is taken inside a
round, where it cancels. Medians, because disturbances only ever add time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ROUNDS = (5, 200)
UNTIMED = 2  # rounds before the first that counts: plans, packed weights, a heap grown to its size
MEASURE = 5e-3  # seconds a measurement lasts at least, by repeating its call
LONG = 5e-3  # calls longer than this need no untimed call before them
# Seconds of untimed calls that a team of threads gets. On some virtual machines Linux wakes a sleeping team on one core
# and parts it at timer ticks, 4 to 20 ms later: the first call after a pause took 8 ms, not 1, whoever's.
PARTED = 30e-3
RESAMPLES = 2000


@dataclass(frozen=True)
class Sample:
    """Seconds a call, one for each round; `repeats` calls made one measurement."""

    seconds: npt.NDArray[np.float64]  # [n]
    repeats: int

    @property
    def n(self) -> int:
        return len(self.seconds)

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.percentile(self.seconds, (25, 75))
        return float(low), float(high)

    @property
    def spread(self) -> float:
        """Interquartile range / median."""
        low, high = self.quartiles
        return (high - low) / self.median


@dataclass(frozen=True)
class Ratio:
    """How many times faster one contestant is than another: the median over rounds, and its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, base: Sample, other: Sample) -> Ratio:
        """base / other, paired by round; the interval is a percentile bootstrap of the median over rounds."""
        if base.n != other.n:
            raise ValueError(f"paired samples have one length, got {base.n} and {other.n} rounds")
        paired = base.seconds / other.seconds
        draws = np.random.default_rng(0).integers(len(paired), size=(RESAMPLES, len(paired)))
        low, high = np.percentile(np.median(paired[draws], axis=1), (2.5, 97.5))
        return cls(float(np.median(paired)), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def settle(slice_seconds: float = 1e-3, quiet: int = 6, limit: float = 0.1) -> None:
    """Sleeps until this process has used no CPU for `quiet` slices, so that no contestant shares its cores.

    Thread pools spin before they sleep: after a parallel call libgomp's burned a core for up to 10 ms, ONNX Runtime's
    for 22 (measured), which a fixed wait of 1 ms would charge to whoever comes next. The clock of a process may see
    its other threads at timer ticks only, 4 ms apart where Linux has 250 a second: quiet slices have to span one.
    """
    deadline = time.perf_counter() + limit
    idle = 0
    while idle < quiet and time.perf_counter() < deadline:
        before = time.process_time()
        time.sleep(slice_seconds)
        idle = idle + 1 if time.process_time() - before < 0.2 * slice_seconds else 0


def _measure(call: Callable[[], object], repeats: int, warm: float | None) -> float:
    settle()
    start = time.perf_counter()
    while warm is not None:
        call()  # wakes the threads and brings the operands back into the cache
        if time.perf_counter() - start >= warm:
            break
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def interleave(
    calls: Mapping[str, Callable[[], object]], budget: float, team: bool = False
) -> dict[str, Sample]:
    """Times the calls against each other for about `budget` seconds in all, within ROUNDS rounds.

    team: they run on several threads.
    """
    names = list(calls)
    if not names:
        return {}
    once: dict[str, float] = {}
    for name in names:
        calls[name]()
        once[name] = _measure(calls[name], 1, PARTED if team else None)
        if once[name] < LONG and not team:
            once[name] = min(once[name], _measure(calls[name], 1, 0.0))
    warm = {name: PARTED if team else 0.0 if t < LONG else None for name, t in once.items()}
    repeats = {name: max(1, round(MEASURE / t)) for name, t in once.items()}
    a_round = sum(
        2e-3 + once[n] * repeats[n] + max(warm[n] or 0.0, once[n] * (once[n] < LONG)) for n in names
    )
    rounds = int(np.clip(budget / a_round, *ROUNDS))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(UNTIMED + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds = _measure(calls[name], repeats[name], warm[name])
            if turn >= UNTIMED:
                times[name].append(seconds)
    return {name: Sample(np.array(times[name]), repeats[name]) for name in names}
