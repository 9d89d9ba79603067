"""One pass of one case by one named kernel, checked against its budget: what all kernels' tests share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from stripe_kernels import list_kernels, registry
from stripe_kernels.registry import Config, Pass, Problem
from stripe_kernels.snapshots import kept_form
from stripe_kernels.stripe_op import StripeOp
from stripe_kernels.testing import CASES, Budgets, Case, Operands, Trial, budgets, failure, poisoned_memory

_SAMPLE = StripeOp.of(*CASES["lopsided"].arguments, "auto").problem(
    CASES["lopsided"].shape.input_size, torch.float32, torch.device("cpu"), False
)
# What runs on the CPU. Triton's interpreter does 1e7 multiply-adds a second: tests/triton has small problems.
KERNELS = [
    name
    for name in list_kernels()
    if not name.startswith("triton") and registry.find(name).refuse(_SAMPLE, "fprop") is None
]
NATIVE = [name for name in KERNELS if name.startswith("cpu_")]
# Native kernels that multiply several bfloat16 channels at a time and take nothing else, where the processor has them.
PAIRED = [name for name in list_kernels() if name.startswith("cpu_") and name.endswith(("bf16", "_amx"))]


@cache
def operands_of(case: Case, dtype: torch.dtype, layout: str) -> Operands:
    return case.operands(dtype, layout)


@cache
def budgets_of(case: Case, dtype: torch.dtype, layout: str) -> Budgets:
    return budgets(case, operands_of(case, dtype, layout))


def problem_of(case: Case, operands: Operands, which: Pass) -> Problem:
    like = operands.dy if which == "dgrad" else operands.x
    last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return StripeOp.of(*case.arguments, "auto").problem(case.shape.input_size, like.dtype, like.device, last)


def run(runner: Any, which: Pass, operands: Operands) -> Tensor:
    """y, dx or dw, without an epilogue, with the weight packed as inference keeps it."""
    if which == "wgrad":
        return runner(operands.dy, operands.x)
    packed = kept_form(runner, operands.weight)
    if which == "dgrad":
        return runner(operands.dy, packed)
    return runner(operands.x, packed, None, None, None, "none")


def spoil_scratch(runner: Any, which: Pass, operands: Operands) -> None:
    """Leaves NaN in the memory a kernel keeps between calls, so that reading what it did not write shows."""
    nan = torch.nan
    spoiled = operands._replace(x=torch.full_like(operands.x, nan), dy=torch.full_like(operands.dy, nan))
    run(runner, which, spoiled)


def configurations(kernel: registry.Kernel, problem: Problem, which: Pass, every: bool) -> Iterator[Config]:
    found = list(kernel.candidates(problem, which))
    assert found, f"{kernel.name} takes the problem and offers no configuration"
    yield from found if every else found[:1]


def check_pass(
    case: Case, name: str, which: Pass, dtype: torch.dtype, layout: str, every: bool = False
) -> None:
    """The result against its budget in the best or in every configuration; a refusal has to be heard."""
    operands = operands_of(case, dtype, layout)
    problem, kernel = problem_of(case, operands, which), registry.find(name)
    reason = kernel.refuse(problem, which)
    if reason:
        op = StripeOp.of(*case.arguments, name)
        with pytest.raises(RuntimeError, match="no kernel runs") as raised:
            op.plan(which, problem)
        assert reason in str(raised.value)
        return
    for config in configurations(kernel, problem, which, every):
        runner = kernel.build(problem, which, config)

        def trial(draw: int, runner: Any = runner) -> Trial:
            drawn = case.operands(dtype, layout, draw=draw) if draw else operands
            budget = budgets(case, drawn, which) if draw else budgets_of(case, dtype, layout)
            with poisoned_memory():
                spoil_scratch(runner, which, drawn)
                return Trial(budget.of(which), run(runner, which, drawn))

        found = failure(trial)
        what = f"{name}{list(config)} {which} of {case}, {dtype}, {layout}, {problem.threads} threads: the result"
        assert found is None, f"{what} {found}"
