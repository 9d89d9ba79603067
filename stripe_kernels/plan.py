"""Plan: which kernel runs one pass of one problem, in which configuration, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf
from typing import Any

from stripe_kernels import registry
from stripe_kernels.registry import Config, Pass, Problem

# Where "auto" believes predictions: device types whose cost models agree with measurements. A GPU's were 1.4 to 6
# times too fast on an H100: until tune() has measured a problem "auto" runs it dense there.
_PREDICTABLE = ("cpu",)
# Measured on a GPU, a kernel has to beat dense by this factor: the best of thirty medians is a lucky one.
GPU_MARGIN = 1.02
# Where a prediction decides, a kernel has to beat dense's by this factor: of 1,062 rows of real layers (fprop, batch 1
# and 4, d of .24 to 1, AVX2) 17 were slower than dense without it, one is with it, and the mean speed-up falls by 2 %.
PREDICTED_MARGIN = 1.25


@dataclass(frozen=True)
class Candidate:
    """One kernel in one configuration; `predicted` and `measured` are seconds a call, `refusal` why it cannot run."""

    kernel: str
    config: Config = ()
    predicted: float | None = None
    measured: float | None = None
    refusal: str | None = None

    def __str__(self) -> str:
        name = f"{self.kernel}{list(self.config) if self.config else ''}"
        if self.refusal:
            return f"{name:44s} refused: {self.refusal}"
        times = [
            f"{t * 1e6:10.1f} us" if t is not None else " " * 13 for t in (self.predicted, self.measured)
        ]
        return f"{name:44s} predicted {times[0]}  measured {times[1]}"


@dataclass(frozen=True)
class Plan:
    """The choice for one pass. Immutable; equal problems give equal plans until something is tuned."""

    problem: Problem
    which: Pass
    chosen: Candidate
    candidates: tuple[Candidate, ...]

    def build(self) -> Any:
        """The runner of the chosen kernel."""
        return registry.find(self.chosen.kernel).build(self.problem, self.which, self.chosen.config)

    def explain(self) -> str:
        """Every candidate, its predicted and measured time, and why it lost."""
        shape, skeleton = self.problem.shape, self.problem.skeleton
        head = (
            f"{self.which} of {list(shape.input_size)} -> {list(shape.output_size)}, filter {shape.R}x{shape.S}, "
            f"density {skeleton.density:.3f}, {self.problem.dtype} on {self.problem.device}, "
            f"{self.problem.threads} threads"
        )
        mark = [" ->" if c == self.chosen else "   " for c in self.candidates]
        lines = [head, *(f"{m} {c}" for m, c in zip(mark, self.candidates, strict=True))]
        if self.problem.device not in _PREDICTABLE and self.chosen.measured is None:
            lines.append(
                f"    not measured: predictions for {self.problem.device} are too rough to decide by, "
                "so auto is dense; tune() measures"
            )
        return "\n".join(lines)


# Measured choices: key -> candidates with their times, the oldest first. Filled by tune() and by loaded files.
_TUNED_KEPT = 4096
_tuned: dict[tuple[Problem, Pass], tuple[Candidate, ...]] = {}


def record(problem: Problem, which: Pass, measured: Iterable[Candidate]) -> None:
    """Keeps measured candidates; from now on "auto" takes the fastest of them for this problem."""
    _tuned.pop((problem, which), None)
    for oldest in list(_tuned)[: 1 - _TUNED_KEPT]:
        _tuned.pop(oldest, None)
    _tuned[problem, which] = tuple(measured)
    make_plan.cache_clear()


def recorded(problem: Problem, which: Pass) -> tuple[Candidate, ...]:
    """What `record` was given for this problem, or ()."""
    return _tuned.get((problem, which), ())


def records() -> tuple[tuple[Problem, Pass], ...]:
    """The problems that have measured choices in this process."""
    return tuple(_tuned)


def forget() -> None:
    """Drops every measured choice of this process."""
    _tuned.clear()
    make_plan.cache_clear()


def candidates(problem: Problem, which: Pass, names: Iterable[str] | None = None) -> tuple[Candidate, ...]:
    """Every registered kernel (or those named) in every configuration, predictions first to last, refusals last."""
    found: list[Candidate] = []
    refused: list[Candidate] = []
    for name in names if names is not None else registry.kernels():
        kernel = registry.find(name)
        reason = kernel.refuse(problem, which)
        if reason:
            refused.append(Candidate(name, refusal=reason))
        else:
            found += [Candidate(name, c, predicted=t) for c, t in kernel.candidates(problem, which).items()]
    return (*sorted(found, key=lambda c: c.predicted or 0.0), *refused)


@lru_cache(maxsize=4096)
def make_plan(problem: Problem, which: Pass, kernel: str = "auto") -> Plan:
    """The plan for one pass. A kernel named explicitly runs or RuntimeError says why it cannot."""
    if kernel == "auto":
        names = [name for name, k in registry.kernels().items() if k.automatic]
        every = candidates(problem, which, names)
    else:
        every = candidates(problem, which, [kernel])
    runnable = [c for c in every if c.refusal is None]
    if not runnable:
        reasons = "; ".join(f"{c.kernel}: {c.refusal}" for c in every)
        raise RuntimeError(f"no kernel runs {which} of {problem.shape}: {reasons}")
    times = {(c.kernel, c.config): c.measured for c in recorded(problem, which)}
    timed = [
        replace(c, measured=times[c.kernel, c.config]) for c in runnable if times.get((c.kernel, c.config))
    ]
    if timed:
        chosen = _chosen(timed, GPU_MARGIN if problem.device == "cuda" else 0.0)
        rest = [c for c in every if (c.kernel, c.config) not in times]
        return Plan(problem, which, chosen, (*sorted(timed, key=lambda c: c.measured or 0.0), *rest))
    margin = PREDICTED_MARGIN if problem.device in _PREDICTABLE else inf
    return Plan(problem, which, _chosen(runnable, margin), every)


def _chosen(found: list[Candidate], margin: float) -> Candidate:
    """The fastest, as measured or else predicted; dense keeps what others win by less than the margin."""

    def seconds(c: Candidate) -> float:
        return (c.predicted if c.measured is None else c.measured) or 0.0

    best = min(found, key=seconds)
    dense = next((c for c in found if c.kernel == "dense"), best)
    return dense if seconds(dense) <= margin * seconds(best) else best
