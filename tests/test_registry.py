"""Kernels, and passes of them, that a process gives up."""

from __future__ import annotations

import pytest
import torch

from stripe_kernels import backends, registry
from stripe_kernels.plan import make_plan
from stripe_kernels.registry import Problem
from stripe_kernels.testing import CASES


def test_a_pass_is_withdrawn_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.load()
    monkeypatch.setattr(registry, "_kernels", dict(registry.kernels()))
    c = next(iter(CASES.values()))
    problem = Problem(c.shape, c.skeleton, str(torch.float32)[6:], "cpu", False, 1)
    registry.withdraw("stripe_gemm:wgrad")
    with pytest.raises(RuntimeError, match="wgrad was withdrawn"):
        make_plan(problem, "wgrad", "stripe_gemm")
    assert make_plan(problem, "dgrad", "stripe_gemm").chosen.kernel == "stripe_gemm"
    registry.withdraw("stripe_gemm")
    with pytest.raises(ValueError, match="no kernel 'stripe_gemm'"):
        make_plan(problem, "fprop", "stripe_gemm")
    registry.withdraw("stripe_gemm:dgrad")  # nothing is left to give up
