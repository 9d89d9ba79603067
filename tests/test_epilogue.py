"""activation(conv * scale + bias + residual), of every kernel: values, types, layouts, and its gradients."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stripe_kernels import ops, registry
from stripe_kernels.epilogue import ACTIVATIONS
from stripe_kernels.stripe_op import StripeOp
from stripe_kernels.testing import CASES, DTYPES, Budget, Case, evaluate, poisoned_memory
from tests.passes import KERNELS, operands_of, problem_of

TORCH = {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}
SOME = [
    CASES[n]
    for n in ("lopsided", "grouped", "dead filters", "batch of a prime", "empty", "no image", "wide row")
]


def finished(
    y: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None, act: str
) -> Tensor:
    """The epilogue as a reader would write it."""
    y = y if scale is None else y * scale[:, None, None]
    y = y if bias is None else y + bias[:, None, None]
    return TORCH[act](y if residual is None else y + residual)


@cache
def convolutions(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The exact convolution, and torch's in `dtype` in both memory formats."""
    operands = operands_of(case, dtype, "contiguous")
    formats = torch.contiguous_format, torch.channels_last
    own = (evaluate(case, operands, dtype, f).y for f in formats)
    return evaluate(case, operands, torch.float64).y, *own


def budget_of(case: Case, dtype: torch.dtype, terms: tuple[Tensor | None, ...], act: str) -> Budget:
    exact, *own = convolutions(case, dtype)
    doubles = (None if t is None else t.double() for t in terms)
    return Budget.of(finished(exact, *doubles, act), *(finished(y, *terms, act) for y in own))


@pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_combination_of_terms(kernel: str, case) -> None:
    for dtype in DTYPES:
        operands = operands_of(case, dtype, "contiguous")
        op = StripeOp.of(*case.arguments, kernel)
        choices = itertools.product((None, operands.bias), (None, operands.scale), (None, operands.residual))
        for terms, act in itertools.product(choices, ACTIVATIONS):
            with poisoned_memory(), torch.no_grad():
                y = ops.fprop(op, operands.x, operands.weight, *terms, act)
            given = [
                name for name, t in zip(("bias", "scale", "residual"), terms, strict=True) if t is not None
            ]
            budget_of(case, dtype, terms, act).check(y, f"{kernel} {case.name} {dtype} {given} {act}:")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", ["channels_last", "permuted", "sliced", "expanded", "offset"])
def test_the_residuals_layout_is_its_own(kernel: str, layout: str) -> None:
    for case in (CASES["lopsided"], CASES["batch of a prime"]):
        operands = operands_of(case, torch.float32, "contiguous")
        residual = case.operands(layout=layout).residual
        op = StripeOp.of(*case.arguments, kernel)
        for x in (operands.x, operands.x.contiguous(memory_format=torch.channels_last)):
            with torch.no_grad():
                y = ops.fprop(op, x, operands.weight, None, None, residual, "relu")
            what = f"{kernel} {case.name} {layout}"
            budget_of(case, x.dtype, (None, None, residual), "relu").check(y, what)


@pytest.mark.parametrize("kernel", KERNELS)
def test_strided_vectors(kernel: str) -> None:
    case = CASES["lopsided"]
    operands = case.operands()
    wide = torch.full((case.shape.K * 2,), torch.nan)
    bias, scale = wide.clone()[1::2], wide.clone()[::2]
    bias.copy_(operands.bias)
    scale.copy_(operands.scale)
    with torch.no_grad():
        y = ops.fprop(StripeOp.of(*case.arguments, kernel), operands.x, operands.weight, bias, scale)
    budget_of(case, torch.float32, (bias, scale, None), "none").check(y)


@pytest.mark.parametrize("kernel", KERNELS)
def test_inputs_are_only_read(kernel: str) -> None:
    case = CASES["lopsided"]
    operands = case.operands()
    before = [t.clone() for t in operands]
    with torch.no_grad():
        x, weight, _, bias, scale, residual = operands
        ops.fprop(StripeOp.of(*case.arguments, kernel), x, weight, bias, scale, residual, "relu")
    assert all(torch.equal(a, b) for a, b in zip(before, operands, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation: str) -> None:
    case = CASES["grouped lopsided"]
    op = StripeOp.of(*case.arguments, "reference")
    x, weight, _, bias, scale, residual = (t.requires_grad_() for t in case.operands(torch.float64))
    terms = (x, weight, bias, scale, residual)
    assert torch.autograd.gradcheck(
        lambda *t: ops.fprop(op, *t, activation), terms, nondet_tol=1e-12, fast_mode=True
    )


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_second_gradients(activation: str) -> None:
    case = CASES["grouped lopsided"].batch(1)
    op = StripeOp.of(*case.arguments, "reference")
    x, weight, _, bias, scale, residual = (t.requires_grad_() for t in case.operands(torch.float64))
    terms = (x, weight, bias, scale, residual)
    assert torch.autograd.gradgradcheck(
        lambda *t: ops.fprop(op, *t, activation), terms, nondet_tol=1e-12, fast_mode=True
    )


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish"])
def test_the_slope_at_the_kinks_is_torchs(activation: str) -> None:
    case = CASES["pointwise"]
    op = StripeOp.of(*case.arguments, "reference")
    x, weight = torch.zeros(case.shape.input_size), torch.zeros(case.skeleton.stripes, case.shape.C)
    for value in (-3.0, 0.0, 3.0, 6.0):
        residual = torch.full(case.shape.output_size, value)
        ours, expected = residual.clone().requires_grad_(), residual.clone().requires_grad_()
        ops.fprop(op, x, weight, residual=ours, activation=activation).sum().backward()
        TORCH[activation](expected).sum().backward()
        assert torch.equal(ours.grad, expected.grad), value


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_kernels_gradients_with_an_epilogue(kernel: str, activation: str) -> None:
    case = CASES["lopsided"]
    operands = case.operands()

    def gradients(dtype: torch.dtype, fprop) -> list[Tensor]:
        x, weight, dy, *terms = (t.detach().to(dtype, copy=True) for t in operands)
        leaves = [t.requires_grad_() for t in (x, weight, *terms)]
        return list(torch.autograd.grad(fprop(*leaves), leaves, dy))

    def plain(x, weight, bias, scale, residual):
        return ops.fprop(
            StripeOp.of(*case.arguments, "reference"), x, weight, bias, scale, residual, activation
        )

    def ours(x, weight, bias, scale, residual):
        return ops.fprop(StripeOp.of(*case.arguments, kernel), x, weight, bias, scale, residual, activation)

    exact, own = gradients(torch.float64, plain), gradients(torch.float32, plain)
    names = ("dx", "dw", "dbias", "dscale", "dresidual")
    for name, actual, e, o in zip(names, gradients(torch.float32, ours), exact, own, strict=True):
        Budget.of(e, o).check(actual, f"{kernel} {activation} {name}")


def test_an_unknown_activation_is_named() -> None:
    case = CASES["lopsided"]
    operands = case.operands()
    for kernel in KERNELS:
        with pytest.raises(ValueError, match=r"activation must be one of.*'gelu'"):
            ops.fprop(StripeOp.of(*case.arguments, kernel), operands.x, operands.weight, activation="gelu")


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_has_every_activation(kernel: str) -> None:
    """The runners take any name of ACTIVATIONS: none of them has to know the list of another."""
    case = CASES["lopsided"]
    operands = case.operands()
    problem = problem_of(case, operands, "fprop")
    found = registry.find(kernel)
    runner = found.build(problem, "fprop", next(iter(found.candidates(problem, "fprop"))))
    for activation in ACTIVATIONS:
        assert (
            runner(operands.x, runner.pack(operands.weight), None, None, None, activation).shape
            == case.shape.output_size
        )
