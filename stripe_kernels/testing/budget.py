"""How far a result may lie from the oracle: twice as far as torch's own in the same dtype, and two units.

The budget of a result: its largest error is at most twice the largest torch makes in the same dtype, plus two
units in the last place of the largest expected value; its root mean square error likewise.

Of few results the largest error is luck, torch's as well as a kernel's: a sum of 450 products has been 12 times as
far off in one order as in another that is no worse on average. A kernel beyond the budget of one draw of the
operands' values is there judged by 64 draws (`Trial`), its errors on all of them against torch's on all of them.
That is no wider a budget: the ratio stays, and what is compared is better known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stripe_kernels.registry import PASSES, Pass
from stripe_kernels.testing.cases import Case, Operands
from stripe_kernels.testing.oracle import Results, asked, evaluate, evaluate_wider

DRAWS = 64  # of values, by which few results are judged
_FEW = 1000  # results


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance from |value| to the next number of `dtype`."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(abs(value), info.tiny)))


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt()) if t.numel() else 0.0


@dataclass(frozen=True)
class Budget:
    """How far a result in `dtype` may lie from `expected` (float64): largest and root mean square error."""

    expected: Tensor
    dtype: torch.dtype
    largest: float
    rms: float

    @classmethod
    def of(cls, expected: Tensor, *torch_results: Tensor) -> Budget:
        """From the oracle and from what torch computes in the result's own dtype, in one or several ways."""
        dtype = torch_results[0].dtype
        errors = [t.double() - expected for t in torch_results]
        largest, rms = max(map(_largest, errors)), max(map(_rms, errors))
        allowed = (2 * largest + 2 * ulp(_largest(expected), dtype), 2 * rms + 2 * ulp(_rms(expected), dtype))
        return cls(expected, dtype, *allowed)

    @property
    def few(self) -> bool:
        """Whether one draw says little: of few results, or of equal ones, as equal images give."""
        return self.expected.numel() > 0 and len(self.expected.unique()) < _FEW

    def mismatch(self, actual: Tensor) -> str | None:
        """None where there is an error to measure: the shape and dtype are right, and no value is NaN."""
        if actual.shape != self.expected.shape or actual.dtype != self.dtype:
            shapes = list(actual.shape), list(self.expected.shape)
            return f"is {shapes[0]} {actual.dtype}, expected {shapes[1]} {self.dtype}"
        nan = self._error(actual).isnan().nonzero()
        return f"has {len(nan)} NaN of {actual.numel()}, the first at {nan[0].tolist()}" if len(nan) else None

    def failure(self, actual: Tensor) -> str | None:
        """None within the budget, otherwise what is wrong, with the numbers."""
        mismatch = self.mismatch(actual)
        if mismatch:
            return mismatch
        error = self._error(actual)
        largest, rms = _largest(error), _rms(error)
        if largest > self.largest:
            where = (error == error.max()).nonzero()[0].tolist()
            return (
                f"is off by {largest:.3e} at {where} ({actual[tuple(where)].item():.6g}, expected "
                f"{self.expected[tuple(where)].item():.6g}); the budget is {self.largest:.3e}"
            )
        return f"has RMS error {rms:.3e}; the budget is {self.rms:.3e}" if rms > self.rms else None

    def check(self, actual: Tensor, what: str = "the result") -> None:
        """AssertionError with the numbers where the budget is exceeded."""
        failure = self.failure(actual)
        if failure:
            raise AssertionError(f"{what} {failure}")

    def _error(self, actual: Tensor) -> Tensor:
        return (actual.detach().to(self.expected.device).double() - self.expected).abs()


class Trial(NamedTuple):
    """A kernel's result on one draw of values, and its budget."""

    budget: Budget
    result: Tensor


def failure_of_draws(trials: Iterable[Trial]) -> str | None:
    """What is wrong with results on several draws of the same problem, taken together; None if nothing is."""
    largest, allowed, squares, rms_allowed = [0.0], [0.0], [], []
    for budget, result in trials:
        mismatch = budget.mismatch(result)
        if mismatch:
            return mismatch
        error = budget._error(result)
        largest.append(_largest(error))
        allowed.append(budget.largest)
        squares.append(_rms(error) ** 2)
        rms_allowed.append(budget.rms**2)
    n = max(1, len(squares))
    if max(largest) > max(allowed):
        return f"is off by {max(largest):.3e} in {n} draws of values; the budget is {max(allowed):.3e}"
    rms, most = math.sqrt(sum(squares) / n), math.sqrt(sum(rms_allowed) / n)
    return f"has RMS error {rms:.3e} in {n} draws of values; the budget is {most:.3e}" if rms > most else None


def failure(trial: Callable[[int], Trial]) -> str | None:
    """What is wrong with a kernel that `trial` runs on the values of a draw: draw 0 alone, or of few results
    that are beyond its budget, 64 draws."""
    first = trial(0)
    found = first.budget.failure(first.result)
    if found is None or not first.budget.few:
        return found
    return failure_of_draws([first, *(trial(draw) for draw in range(1, DRAWS))])


class Budgets(NamedTuple):
    y: Budget
    dx: Budget
    dw: Budget

    def of(self, which: Pass) -> Budget:
        return self[PASSES.index(which)]


def budgets(problem: Case, operands: Operands, only: Pass | None = None) -> Budgets:
    """The budgets of the three passes, without an epilogue; with `only`, of that pass alone.

    oneDNN adds in another order for each memory format, and either is better at times (channels_last by 4 in
    a wgrad of 1e5 pixels, contiguous by 4 in a fprop of 175 products): the worse counts.
    """
    wider = operands.x.dtype == torch.float64
    exact = (
        evaluate_wider(problem, operands) if wider else evaluate(problem, operands, torch.float64, only=only)
    )
    formats, dtype = (torch.contiguous_format, torch.channels_last), operands.x.dtype
    # For some shapes torch's own bfloat16 is wrong, crashes or corrupts memory (2.13, found by generated problems):
    # float32's result, rounded once, stands in for it; and for float16 where that crashes, with AVX512-FP16.
    crashes = dtype == torch.float16 and operands.x.device.type == "cpu" and problem.shape.idle_column()
    computed = torch.float32 if dtype == torch.bfloat16 or crashes else dtype
    own = [evaluate(problem, operands, computed, f, only=only) for f in formats]
    if computed != dtype:
        own = [Results(*(t.to(dtype) for t in results)) for results in own]
    exact = asked(exact, only)
    return Budgets(*(Budget.of(expected, *(r[i] for r in own)) for i, expected in enumerate(exact)))
