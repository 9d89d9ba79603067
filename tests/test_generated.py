"""A thousand generated problems; `python -m tests.generate --count 20000` runs more of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stripe_kernels.testing import CASES, case
from tests.generate import Generated, problems, shrink

SHARDS, EACH = 20, 50


@pytest.mark.parametrize("shard", range(SHARDS))
def test_generated_problems(shard: int) -> None:
    for problem in problems(EACH, seed=1000 + shard):
        failure = problem.failure()
        assert not failure, f"{shrink(problem)!r}: the result {failure}"


def test_a_problem_is_made_again_by_its_line() -> None:
    for problem in problems(20, seed=1):
        again = eval(repr(problem), {"Generated": Generated, "case": case})
        assert again == problem
        assert torch.equal(again.case.operands().x, problem.case.operands().x)


def test_failures_shrink(monkeypatch) -> None:
    """A fault that needs a stride and two filters shrinks to just that."""

    def failure(self: Generated) -> str | None:
        return "is wrong" if self.case.shape.stride[0] > 1 and self.case.shape.K > 1 else None

    monkeypatch.setattr(Generated, "failure", failure)
    large = dataclasses.replace(CASES["grouped lopsided"], name="")
    large = dataclasses.replace(large, shape=dataclasses.replace(large.shape, stride=(2, 1)))
    small = shrink(Generated("dense", "fprop", "float16", "sliced", 3, large, 5)).case.shape
    assert (small.N, small.C, small.H, small.W, small.K, small.R, small.S) == (1, 1, 1, 1, 2, 1, 1)
