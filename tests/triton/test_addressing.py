"""Tensors whose offsets pass 2^31: memory is reserved and, but for a few pages, never touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stripe_kernels import backends, registry
from stripe_kernels.backends.triton.launch import INTERPRETED, wide
from stripe_kernels.stripe_op import StripeOp
from stripe_kernels.testing import Case, Operands, budgets, case

backends.load()
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.skipif(
        not INTERPRETED, reason="the interpreter's memory is the host's, which may be reserved freely"
    ),
]
FAR = 2**30 + 24  # elements from image to image: twice that needs more than 32 bits, no stride does
CASE = case("far images", N=3, C=3, H=4, W=5, K=6, padding=(1, 0), density=0.5)


def far_apart(t: Tensor) -> Tensor:
    """The same values with the images FAR elements apart."""
    storage = torch.empty(FAR * (len(t) - 1) + t[0].numel(), dtype=t.dtype)
    apart = storage.as_strided(t.shape, (FAR, *t.stride()[1:]))
    return apart.copy_(t)


def far_operands(case: Case) -> Operands:
    near = case.operands(torch.float16)
    return near._replace(x=far_apart(near.x), dy=far_apart(near.dy), residual=far_apart(near.residual))


@pytest.fixture(scope="module")
def operands() -> Operands:
    return far_operands(CASE)


def test_width_is_decided_by_the_farthest_element(operands: Operands) -> None:
    assert wide(operands.x)
    assert wide(None, operands.weight, operands.x)
    assert not wide(None, operands.weight)
    assert not wide(operands.x[:2])


@pytest.mark.parametrize("kernel", ["triton", "stripe_gemm"])
def test_far_images(kernel: str, operands: Operands) -> None:
    budget = budgets(CASE, operands)
    op = StripeOp.of(*CASE.arguments, kernel)
    problem = op.problem(CASE.shape.input_size, torch.float16, operands.x.device, False)
    found = registry.find(kernel)
    config = (3, 1) if kernel == "stripe_gemm" else None

    def build(which: registry.Pass):  # type: ignore[no-untyped-def]
        return found.build(problem, which, config or next(iter(found.candidates(problem, which))))

    fprop, dgrad, wgrad = build("fprop"), build("dgrad"), build("wgrad")
    budget.y.check(fprop(operands.x, fprop.pack(operands.weight), None, None, None, "none"))
    budget.dx.check(dgrad(operands.dy, dgrad.pack(operands.weight)))
    budget.dw.check(wgrad(operands.dy, operands.x))
    near = CASE.operands(torch.float16)
    zero = torch.zeros_like(operands.weight)
    y = fprop(operands.x, fprop.pack(zero), None, None, operands.residual, "none")
    assert torch.equal(y, near.residual)
