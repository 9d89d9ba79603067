"""The strict float32 kernels, run on the CPU, against the float64 oracle."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from stripe_kernels.backends import cuda_ffma
from stripe_kernels.backends.cuda_ffma import PATCH, POSITION, RUNNERS
from stripe_kernels.registry import PASSES, Pass
from stripe_kernels.testing import CASES, LAYOUTS, Case, case
from tests.cuda import emulated
from tests.cuda.problems import check, problem_of, run

# Several blocks, chunks, slabs and tiles of channels; taps so far apart that each loads its own pixels.
LARGE = case("several of everything", N=2, C=37, H=19, W=17, K=70, density=0.3)
FAR = case("taps far apart", N=1, C=3, H=30, W=31, K=5, padding=(24, 24), dilation=(24, 24))
PROBLEMS = (*CASES.values(), LARGE, FAR)


def check_ffma(
    native: ModuleType, c: Case, which: Pass, layout: str, config: tuple[int, int]
) -> torch.Tensor:
    runner = RUNNERS[which](native, problem_of(c, layout), config)
    return check(runner, c, which, torch.float32, layout, str(config))


@pytest.mark.parametrize("c", PROBLEMS, ids=lambda c: c.name)
@pytest.mark.parametrize("which", PASSES)
def test_within_the_budget(native: ModuleType, which: Pass, c: Case) -> None:
    # The two large ones in two layouts: "expanded" leaves a handful of different sums of 1e3 products, and as
    # budget twice torch's luck with these few (measured: 7 times torch's error, 6 units in the last place).
    for layout in LAYOUTS if c.name in CASES else ("contiguous", "channels_last"):
        check_ffma(native, c, which, layout, (PATCH, 1))
    for layout in ("contiguous", "channels_last"):
        check_ffma(native, c, which, layout, (PATCH, 3))
        if which == "fprop":
            check_ffma(native, c, which, layout, (POSITION, 1))
            check_ffma(native, c, which, layout, (POSITION, 4))


@pytest.mark.parametrize("which", PASSES)
def test_no_barrier_is_missing(native: ModuleType, which: Pass) -> None:
    """The bits do not depend on the order in which threads run between two barriers."""
    for c in (LARGE, FAR):
        forwards = check_ffma(native, c, which, "channels_last", (PATCH, 2))
        with emulated.backwards(native):
            assert torch.equal(check_ffma(native, c, which, "channels_last", (PATCH, 2)), forwards)


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu", "hardswish"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("splits", [1, 2])
def test_epilogue(native: ModuleType, splits: int, layout: str, activation: str) -> None:
    c = CASES["grouped"]
    o = c.operands(layout=layout)
    runner = cuda_ffma.FfmaFprop(native, problem_of(c, layout), (PATCH, splits))
    packed = runner.pack(o.weight)
    conv = run(runner, "fprop", o).double()
    functions = {**vars(torch.nn.functional), "none": lambda t: t}
    for bias, scale, residual in (
        (o.bias, o.scale, o.residual),
        (None, o.scale, None),
        (o.bias, None, o.residual.contiguous()),
    ):
        z = conv if scale is None else conv * scale.double()[:, None, None]
        z = z if bias is None else z + bias.double()[:, None, None]
        z = z if residual is None else z + residual.double()
        y = runner(o.x, packed, bias, scale, residual, activation)
        torch.testing.assert_close(y.double(), functions[activation](z), rtol=1e-6, atol=1e-6)


def test_nan_reaches_its_readers_alone(native: ModuleType) -> None:
    c = CASES["one image"]
    o = c.operands()
    x = o.x.clone()
    x[0, 3, 6, 5] = torch.nan
    expected = torch.nn.functional.conv2d(
        x, torch.zeros(23, 19, 3, 3).permute(0, 2, 3, 1).masked_scatter(
            torch.from_numpy(c.skeleton.live.copy())[..., None].expand(-1, -1, -1, 19), o.weight
        ).permute(0, 3, 1, 2), padding=1,
    )  # fmt: skip
    reads = torch.nn.functional.conv2d(
        x.isnan().float(),
        torch.from_numpy(c.skeleton.live.copy())[:, None].expand(-1, 19, -1, -1).float(),
        padding=1,
    )
    assert expected.isnan().any()
    runner = cuda_ffma.FfmaFprop(native, problem_of(c, "contiguous"), (PATCH, 1))
    y = runner(x, runner.pack(o.weight), None, None, None, "none")
    assert torch.equal(y.isnan(), reads > 0)
