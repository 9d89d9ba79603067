"""What is special about kernels in matrix registers (csrc/cpu/fprop_matrix.h): steps of 32 channels, tiles of filters
and of lanes that are not full, rows that begin at whole vectors."""

from __future__ import annotations

import pytest
import torch

from stripe_kernels import registry
from stripe_kernels.geometry import ConvShape
from stripe_kernels.stripe_op import StripeOp
from stripe_kernels.testing import Case
from tests.passes import PAIRED, check_pass

MATRIX = [name for name in PAIRED if name.endswith("_amx")]
pytestmark = pytest.mark.skipif(not MATRIX, reason="this processor has no matrix registers")

SHAPES = {
    #            N  C   H  W   K   R  S
    "one step": ConvShape(3, 32, 9, 7, 20, 3, 3, padding=(1, 1, 1, 1)),
    "one filter": ConvShape(1, 64, 5, 18, 1, 3, 3, padding=(1, 1, 1, 1)),
    "five vectors, strided": ConvShape(2, 64, 8, 67, 17, 3, 2, (2, 1), (1, 0, 1, 1)),
    "many filters": ConvShape(2, 96, 4, 16, 150, 1, 1),
    "both strides": ConvShape(2, 128, 13, 12, 33, 3, 3, (2, 2), (1, 1, 1, 1)),
    "grouped": ConvShape(17, 64, 4, 5, 34, 3, 3, padding=(1, 1, 1, 1), groups=2),
    "dilated": ConvShape(1, 32, 10, 20, 9, 3, 3, padding=(2, 2, 2, 2), dilation=(2, 2)),
    "mostly padding": ConvShape(18, 32, 2, 3, 16, 5, 5, padding=(4, 4, 4, 4)),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kernel", MATRIX)
def test_in_every_configuration(kernel: str, name: str, density: float, threads: int) -> None:
    torch.set_num_threads(threads)
    case = Case(name, SHAPES[name], density)
    for layout in ("contiguous", "channels_last"):
        check_pass(case, kernel, "fprop", torch.bfloat16, layout, every=True)


@pytest.mark.parametrize("kernel", MATRIX)
def test_a_nan_reaches_its_readers_only(kernel: str) -> None:
    """Lanes beside the image, filters that fill up a tile and channels of other groups are zeros no NaN meets."""
    for name in ("one step", "grouped", "five vectors, strided"):
        case = Case(name, SHAPES[name], 0.3)
        s, op = case.shape, StripeOp.of(*case.arguments, kernel)
        x, weight = (
            torch.ones(s.input_size).bfloat16(),
            torch.ones(case.skeleton.stripes, s.group_c).bfloat16(),
        )
        x[-1, -1, 2, 3] = torch.nan
        marked = torch.zeros(s.input_size)
        marked[-1, -1, 2, 3] = 1
        with torch.no_grad():
            runner = op.runner("fprop", s.input_size, x)
            y = runner(x, runner.pack(weight), None, None, None, "none")
            read = StripeOp.of(*case.arguments, "reference").runner("fprop", s.input_size, marked)
            reached = read(marked, read.pack(weight.float()), None, None, None, "none") > 0
        assert torch.equal(y.isnan(), reached)


@pytest.mark.parametrize("kernel", MATRIX)
def test_other_channels_and_types_are_refused(kernel: str) -> None:
    refuse = registry.find(kernel).refuse
    problem = Case("narrow", ConvShape(1, 48, 4, 4, 4, 3, 3))
    op = StripeOp.of(*problem.arguments, "auto")
    for dtype, reason in (
        (torch.bfloat16, "multiplies channels in 32s, and a group has 48"),
        (torch.float32, "multiplies bfloat16, not float32"),
    ):
        asked = op.problem(problem.shape.input_size, dtype, torch.device("cpu"), False)
        assert refuse(asked, "fprop") == reason
