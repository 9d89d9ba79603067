"""Inputs in every layout, outputs in torch's; nothing outside the tensors is read or written."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stripe_kernels import ops, registry
from stripe_kernels.registry import PASSES
from stripe_kernels.stripe_op import StripeOp
from stripe_kernels.testing import CASES, DTYPES, LAYOUTS
from tests.guarded import guarded
from tests.passes import KERNELS, NATIVE, budgets_of, operands_of, problem_of, run

_empty = torch.empty_strided
NAMES = (
    "lopsided",
    "grouped",
    "one channel",
    "one filter",
    "tiny map",
    "pointwise",
    "uneven padding",
    "no image",
)
SOME = [CASES[name] for name in NAMES]


def torch_convolution(case, x: Tensor, dtype: torch.dtype) -> Tensor:
    """nn.Conv2d's with a contiguous weight: what decides the output's strides."""
    s = case.shape
    top, left, bottom, right = s.padding
    weight = torch.randn(s.K, s.group_c, s.R, s.S).to(dtype)
    padding = (top, left)
    if (top, left) != (bottom, right):
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    return F.conv2d(x, weight, None, s.stride, padding, s.dilation, s.groups)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_output_has_torchs_strides(kernel: str, layout: str) -> None:
    for case in SOME:
        for dtype in (torch.float32, torch.bfloat16):
            operands = operands_of(case, dtype, layout)
            with torch.no_grad():
                y = ops.fprop(StripeOp.of(*case.arguments, kernel), operands.x, operands.weight)
            expected = torch_convolution(case, operands.x, dtype)
            assert y.stride() == expected.stride(), f"{case.name} {dtype} x strides {operands.x.stride()}"


@pytest.mark.parametrize("kernel", ["dense", "reference"])
def test_float64_has_torchs_strides_too(kernel: str) -> None:
    for case in SOME:
        for layout in LAYOUTS:
            operands = operands_of(case, torch.float64, layout)
            with torch.no_grad():
                y = ops.fprop(StripeOp.of(*case.arguments, kernel), operands.x, operands.weight)
            assert y.stride() == torch_convolution(case, operands.x, torch.float64).stride(), (
                f"{case.name} {layout}"
            )


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_weights_layout_has_no_say(kernel: str) -> None:
    case = CASES["lopsided"]
    operands = operands_of(case, torch.float32, "contiguous")
    weight = operands.weight
    views = (
        weight.t().contiguous().t(),
        torch.stack([weight, weight], 1)[:, 1],
        torch.cat([weight, weight], 1)[:, 5:],
    )
    op = StripeOp.of(*case.arguments, kernel)
    with torch.no_grad():
        expected = ops.fprop(op, operands.x, weight)
        for view in views:
            assert torch.equal(ops.fprop(op, operands.x, view), expected)
    gradient = ops.dgrad(op, operands.dy, weight, operands.x.shape[2:])
    for view in views:
        assert torch.equal(ops.dgrad(op, operands.dy, view, operands.x.shape[2:]), gradient)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_gradients_layout_is_its_own(kernel: str) -> None:
    """dy comes as it comes: expanded from a sum, permuted from a loss, whatever the layout of x."""
    for case in (CASES["lopsided"], CASES["batch of a prime"]):
        op = StripeOp.of(*case.arguments, kernel)
        plain = operands_of(case, torch.float32, "contiguous")
        dense = torch.ones(case.shape.output_size)
        for layout in LAYOUTS:
            x = LAYOUTS[layout](plain.x)
            for dy, same in (
                (LAYOUTS["permuted"](plain.dy), plain.dy),
                (dense[:1, :1, :1, :1].expand(dense.shape), dense),
            ):
                expected = ops.wgrad(op, same, x.contiguous())
                torch.testing.assert_close(ops.wgrad(op, dy, x), expected, atol=1e-4, rtol=1e-5)
                gradient = ops.dgrad(op, same, plain.weight, x.shape[2:])
                actual = ops.dgrad(op, dy, plain.weight, x.shape[2:])
                torch.testing.assert_close(actual, gradient, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("kernel", NATIVE)
def test_nothing_outside_the_tensors_is_touched(kernel: str, which) -> None:
    """Inputs, packed weights and outputs each end, then begin, at a page that may not be touched."""
    found = registry.find(kernel)
    for case in (
        CASES[n]
        for n in ("lopsided", "grouped", "many channels", "wide row", "batch of vectors", "pointwise")
    ):
        for dtype in DTYPES:
            for layout in ("contiguous", "channels_last", "sliced"):
                operands = operands_of(case, dtype, layout)
                problem = problem_of(case, operands, which)
                expected = getattr(
                    budgets_of(case, dtype, layout), {"fprop": "y", "dgrad": "dx", "wgrad": "dw"}[which]
                )
                for config in found.candidates(problem, which):
                    runner = found.build(problem, which, config)
                    for end in (False, True):
                        with ExitStack() as stack:

                            def page(
                                t: Tensor, writable: bool = False, end: bool = end, stack: ExitStack = stack
                            ) -> Tensor:
                                return stack.enter_context(guarded(t, end, writable))

                            inputs = operands._replace(
                                x=page(operands.x), weight=page(operands.weight), dy=page(operands.dy)
                            )
                            with mock.patch(
                                "torch.empty_strided",
                                lambda *a, **k: page(_empty(*a, **k).fill_(torch.nan), True),
                            ):
                                result = run(runner, which, inputs).clone()
                        expected.check(result, f"{kernel} {which} {case.name} {dtype} {layout} {config}")


@pytest.mark.parametrize(
    ("end", "offset", "survives"), [(True, 8, True), (True, 12, False), (False, 0, True), (False, -4, False)]
)
def test_the_guard_kills(end: bool, offset: int, survives: bool) -> None:
    """The test above means something: one element too far does end a process."""
    with guarded(torch.zeros(3), end) as t:
        child = os.fork()
        if child == 0:
            faulthandler.disable()
            _ = ctypes.c_float.from_address(t.data_ptr() + offset).value
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert (status == 0) == survives
    assert survives or os.WTERMSIG(status) == signal.SIGSEGV


@pytest.mark.parametrize("kernel", KERNELS)
def test_overlapping_input_is_read_like_any_other(kernel: str) -> None:
    case = CASES["lopsided"]
    n, c, h, w = case.shape.input_size
    x = torch.randn(200)[: c + h * w].as_strided((n, c, h, w), (0, 1, w, 1))
    op = StripeOp.of(*case.arguments, kernel)
    weight = operands_of(case, torch.float32, "contiguous").weight
    with torch.no_grad():
        torch.testing.assert_close(ops.fprop(op, x, weight), ops.fprop(op, x.contiguous(), weight))
