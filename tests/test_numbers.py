"""NaN, infinities and denormals: a kernel exact at one filter carries them to exactly their readers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stripe_kernels import ops
from stripe_kernels.epilogue import ACTIVATIONS
from stripe_kernels.stripe_op import StripeOp
from stripe_kernels.testing import CASES, DTYPES, Case
from tests.passes import KERNELS, NATIVE, operands_of

NAMES = (
    "lopsided",
    "grouped",
    "strided",
    "wide padding",
    "batch of vectors",
    "pointwise strided",
    "uneven dilated",
    "many channels",
)
SOME = [CASES[name] for name in NAMES]
EXACT = [*NATIVE]  # every native kernel multiplies live stripes only


def readers(case: Case, which: str, position: tuple[int, ...]) -> Tensor:
    """Which results read the element at `position` of the first operand, by plain loops over live stripes."""
    s, live = case.shape, case.skeleton.live
    n, channel, row, col = position
    hit = torch.zeros(s.output_size if which == "fprop" else s.input_size, dtype=torch.bool)
    for k, r, c in zip(*live.nonzero(), strict=True):
        group = k // s.group_k
        for p in range(s.P):
            for q in range(s.Q):
                h = p * s.stride[0] + r * s.dilation[0] - s.padding[0]
                w = q * s.stride[1] + c * s.dilation[1] - s.padding[1]
                if not (0 <= h < s.H and 0 <= w < s.W):
                    continue
                if which == "fprop" and (h, w) == (row, col) and channel // s.group_c == group:
                    hit[n, k, p, q] = True
                if which == "dgrad" and (p, q, k) == (row, col, channel):
                    hit[n, group * s.group_c : (group + 1) * s.group_c, h, w] = True
    return hit


def stripes_reading(case: Case, position: tuple[int, ...]) -> Tensor:
    """[A]: the live stripes whose gradient reads dy at `position`."""
    s, (_, k, p, q) = case.shape, position
    filters, r, c = map(torch.from_numpy, case.skeleton.live.nonzero())
    h = p * s.stride[0] + r * s.dilation[0] - s.padding[0]
    w = q * s.stride[1] + c * s.dilation[1] - s.padding[1]
    return (filters == k) & (h >= 0) & (h < s.H) & (w >= 0) & (w < s.W)


def positions(size: tuple[int, ...]) -> list[tuple[int, ...]]:
    n, c, h, w = size
    return [
        (0, 0, 0, 0),
        (n - 1, c - 1, h - 1, w - 1),
        (n // 2, c // 2, h // 2, w // 2),
        (0, c - 1, 0, w - 1),
    ]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
@pytest.mark.parametrize("kernel", EXACT)
def test_a_special_value_reaches_exactly_its_readers(kernel: str, case, value: float) -> None:
    op = StripeOp.of(*case.arguments, kernel)
    for dtype in DTYPES:
        plain = operands_of(case, dtype, "contiguous")
        for position in positions(case.shape.input_size):
            x = plain.x.clone()
            x[position] = value
            with torch.no_grad():
                y = ops.fprop(op, x, plain.weight)
            assert torch.equal(~y.isfinite(), readers(case, "fprop", position)), f"{dtype} {position}"
        for position in positions(case.shape.output_size):
            dy = plain.dy.clone()
            dy[position] = value
            dx = ops.dgrad(op, dy, plain.weight, plain.x.shape[2:])
            assert torch.equal(~dx.isfinite(), readers(case, "dgrad", position)), f"{dtype} {position}"


@pytest.mark.parametrize("kernel", EXACT)
def test_a_nan_reaches_exactly_the_stripes_that_read_it(kernel: str) -> None:
    for case in SOME:
        s, plain = case.shape, operands_of(case, torch.float32, "contiguous")
        op = StripeOp.of(*case.arguments, kernel)
        for position in positions(s.output_size):
            dy = plain.dy.clone()
            dy[position] = torch.nan
            dw = ops.wgrad(op, dy, plain.x)
            expected = stripes_reading(case, position)[:, None].expand_as(dw)
            assert torch.equal(dw.isnan(), expected), f"{case.name} {position}"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kernel", KERNELS)
def test_readers_of_a_special_value_always_see_it(kernel: str, value: float) -> None:
    """Of every kernel, exact or not: neither a NaN nor an infinity is ever lost, forward or backward."""
    for case in SOME:
        plain, op = operands_of(case, torch.float32, "contiguous"), StripeOp.of(*case.arguments, kernel)
        with torch.no_grad():
            for position in positions(case.shape.input_size):
                x = plain.x.clone()
                x[position] = value
                y = ops.fprop(op, x, plain.weight)
                assert not y.isfinite()[readers(case, "fprop", position)].any()
            for position in positions(case.shape.output_size):
                dy = plain.dy.clone()
                dy[position] = value
                dx = ops.dgrad(op, dy, plain.weight, plain.x.shape[2:])
                assert not dx.isfinite()[readers(case, "dgrad", position)].any()
                dw = ops.wgrad(op, dy, plain.x)
                assert not dw.isfinite()[stripes_reading(case, position)].any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_dead_inputs_have_no_say_in_exact_kernels(kernel: str) -> None:
    """Pixels no tap reads (stride 4, filter 2x2) may hold anything."""
    case = CASES["rows never read"]
    plain = operands_of(case, torch.float32, "contiguous")
    x = torch.full_like(plain.x, torch.nan)
    for r in (0, 1):
        for c in (0, 1):
            x[:, :, r::4, c::4] = plain.x[:, :, r::4, c::4]
    op = StripeOp.of(*case.arguments, kernel)
    with torch.no_grad():
        torch.testing.assert_close(ops.fprop(op, x, plain.weight), ops.fprop(op, plain.x, plain.weight))


@pytest.mark.parametrize("kernel", NATIVE)  # oneDNN's, behind dense and reference, are zero in bfloat16
@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals_are_kept(kernel: str, dtype: torch.dtype) -> None:
    case = CASES["pointwise"]
    plain = operands_of(case, dtype, "contiguous")
    smallest = torch.finfo(dtype).smallest_normal
    x = (plain.x.float().sign() * smallest / 8).to(dtype)
    weight = torch.ones_like(plain.weight)
    op = StripeOp.of(*case.arguments, kernel)
    dense = torch.zeros(case.shape.K, case.shape.C)
    dense[case.skeleton.live[:, 0, 0]] = 1
    expected = torch.einsum("kc,nchw->nkhw", dense.double(), x.double())
    with torch.no_grad():
        actual = ops.fprop(op, x, weight).double()
    torch.testing.assert_close(
        actual, expected, atol=torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, rtol=0
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_rounding_and_overflow_of_narrow_types_are_torchs(kernel: str) -> None:
    """One product an output, so the result is one rounding: ties to even, overflow to infinity, signs."""
    skeleton_case = CASES["pointwise"]
    one = Case("one", skeleton_case.shape.__class__(1, 1, 1, 4096, 1, 1, 1), pattern="full")
    op = StripeOp.of(*one.arguments, kernel)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(4096).mul(torch.logspace(-12, 8, 4096)).to(dtype)
        x[:4] = torch.tensor([0.0, -0.0, torch.finfo(dtype).max, -torch.finfo(dtype).max])
        weight = torch.tensor([[1.37]]).to(dtype)
        with torch.no_grad():
            actual = ops.fprop(op, x.view(1, 1, 1, -1), weight).flatten()
        expected = (x.float() * weight.float().item()).to(dtype)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_special_values_are_torchs(kernel: str, activation: str) -> None:
    case = CASES["lopsided"]
    size = case.shape.output_size
    special = torch.tensor(
        [
            torch.nan,
            torch.inf,
            -torch.inf,
            0.0,
            -0.0,
            1e-40,
            -1e-40,
            88.0,
            -88.0,
            -104.0,
            1e30,
            -1e30,
            -1e38,
            3.0,
            -3.0,
            6.0,
        ]
    )
    residual = special.repeat(-(-torch.Size(size).numel() // len(special)))[: torch.Size(size).numel()].view(
        size
    )
    torch_activation = {
        "none": lambda t: t,
        "relu": F.relu,
        "relu6": F.relu6,
        "silu": F.silu,
        "hardswish": F.hardswish,
    }
    weight = torch.zeros(case.skeleton.stripes, case.shape.C)
    with torch.no_grad():
        y = ops.fprop(
            StripeOp.of(*case.arguments, kernel),
            torch.zeros(case.shape.input_size),
            weight,
            residual=residual,
            activation=activation,
        )
    torch.testing.assert_close(
        y, torch_activation[activation](residual), equal_nan=True, atol=1e-6, rtol=1e-6
    )
