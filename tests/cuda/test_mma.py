"""The tensor-core kernels, run on the CPU, against the float64 oracle."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from stripe_kernels.backends.cuda_columns import BANDS, STRIPES, WHOLE
from stripe_kernels.backends.cuda_mma import PATCH, POSITION, MmaFprop, round_to_tf32
from stripe_kernels.backends.cuda_mma_grad import MmaDgrad, MmaWgrad
from stripe_kernels.registry import PASSES, Pass
from stripe_kernels.testing import Case, budgets, case
from tests.cuda import emulated
from tests.cuda.problems import check, check_epilogue, problem_of, run

# Channels of a group come in pieces of 16 bytes; the rest is as lopsided as can be.
PROBLEMS = (
    case("lopsided", N=3, C=8, H=9, W=7, K=11, R=3, S=2, stride=(2, 1), padding=(1, 0), dilation=(2, 1)),
    case("grouped", N=3, C=48, H=5, W=6, K=14, groups=2),
    case("grouped lopsided", N=2, C=16, H=11, W=6, K=6, R=2, stride=(1, 2), padding=(0, 2), groups=2),
    case("strided", N=2, C=40, H=8, W=5, K=10, stride=(2, 2)),
    case("stride beyond the filter", N=2, C=8, H=11, W=13, K=5, R=2, S=2, stride=(3, 4), padding=(0, 1)),
    case("pointwise strided", N=2, C=24, H=8, W=7, K=9, R=1, S=1, stride=(2, 3), padding=(0, 0)),
    case("uneven padding", N=2, C=8, H=6, W=9, K=7, R=4, S=2, padding=(1, 0, 2, 1)),
    case("taps far apart", N=1, C=8, H=30, W=31, K=5, padding=(24, 24), dilation=(24, 24)),
    case("column filter", N=2, C=8, H=17, W=4, K=9, R=5, S=1, padding=(2, 0), stride=(2, 1)),
    case("two tiles of filters", N=1, C=8, H=6, W=5, K=150, density=0.2),
    case("several chunks", N=1, C=136, H=5, W=5, K=20, density=0.3),
    case("several blocks", N=1, C=8, H=19, W=17, K=9),
    case("one filter", N=1, C=16, H=5, W=4, K=1, density=0.7),
    case("dead filters", N=2, C=8, H=6, W=7, K=10, pattern="dead filters", density=0.7),
    case("full", N=1, C=16, H=6, W=7, K=20, pattern="full"),
    case("empty", N=2, C=8, H=6, W=7, K=9, pattern="empty"),
    case("no image", N=0, C=8, H=6, W=5, K=7),
    case("one pixel", N=5, C=32, H=1, W=1, K=9),
)
# dgrad reads, and wgrad reads both, in 16-byte pieces of a group's filters.
WIDE = tuple(
    replace(c, shape=replace(c.shape, K=-(-c.shape.K // (8 * c.shape.groups)) * 8 * c.shape.groups))
    for c in PROBLEMS
)
RUNNERS = {"fprop": MmaFprop, "dgrad": MmaDgrad, "wgrad": MmaWgrad}
DTYPES = (torch.bfloat16, torch.float16)


def check_mma(
    native: ModuleType, c: Case, which: Pass, dtype: torch.dtype, config: tuple[int, ...]
) -> torch.Tensor:
    runner = RUNNERS[which](native, problem_of(c, "channels_last", dtype), config)
    return check(runner, c, which, dtype, "channels_last", f"mma {config}")


@pytest.mark.parametrize("c", PROBLEMS, ids=lambda c: c.name)
def test_fprop_within_the_budget(native: ModuleType, c: Case) -> None:
    configs = ((PATCH, WHOLE, 1), (PATCH, BANDS, 3), (POSITION, STRIPES, 1), (PATCH, STRIPES, 2))
    for dtype, config in zip(DTYPES * 2, configs, strict=True):
        check_mma(native, c, "fprop", dtype, config)


@pytest.mark.parametrize("which", ["fprop", "dgrad"])
def test_tf32_is_exact_on_rounded_operands(native: ModuleType, which: Pass) -> None:
    """Products of values rounded to tf32 are exact in float32: what is left are the errors of its sums."""
    for c in (WIDE[0], WIDE[3]):
        o = c.operands(layout="channels_last")
        x, weight, dy = (
            round_to_tf32(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            for t in (o.x, o.weight[..., None, None], o.dy)
        )
        o = o._replace(x=x, weight=weight[..., 0, 0], dy=dy)
        runner = RUNNERS[which](
            native, problem_of(c, "channels_last"), (PATCH, BANDS, 1) if which == "fprop" else (1,)
        )
        budgets(c, o).of(which).check(run(runner, which, o), f"tf32 {which} of {c}:")


@pytest.mark.parametrize("which", PASSES)
def test_no_barrier_is_missing(native: ModuleType, which: Pass) -> None:
    """The bits do not depend on the order in which threads run between two barriers."""
    c = next(c for c in WIDE if c.name == "several chunks")
    config = (PATCH, BANDS, 2) if which == "fprop" else (2,)
    forwards = check_mma(native, c, which, torch.bfloat16, config)
    with emulated.backwards(native):
        assert torch.equal(check_mma(native, c, which, torch.bfloat16, config), forwards)


@pytest.mark.parametrize("splits", [1, 2])
def test_epilogue(native: ModuleType, splits: int) -> None:
    c = case("several chunks", N=1, C=136, H=5, W=5, K=19, density=0.3)
    runner = MmaFprop(native, problem_of(c, "channels_last", torch.bfloat16), (PATCH, BANDS, splits))
    check_epilogue(runner, c, c.operands(torch.bfloat16, "channels_last"), f"{splits} splits")


def test_misaligned_and_sliced_inputs_are_copied(native: ModuleType) -> None:
    c = WIDE[0]
    o = c.operands(torch.bfloat16, "channels_last")
    runner = MmaFprop(native, problem_of(c, "channels_last", torch.bfloat16), (PATCH, WHOLE, 1))
    packed = runner.pack(o.weight)
    expected = runner(o.x, packed, None, None, None, "none")
    n, channels, h, w = o.x.shape
    storage = torch.empty(o.x.numel() + 1, dtype=o.x.dtype)
    shifted = storage[1:].view(n, h, w, channels).permute(0, 3, 1, 2).copy_(o.x)
    assert shifted.data_ptr() % 16
    for x in (shifted, o.x.contiguous()):
        assert torch.equal(runner(x, packed, None, None, None, "none"), expected)


def test_a_residual_that_begins_between_two_pairs_is_copied(native: ModuleType) -> None:
    """A GPU stops at a pair that is not aligned to its size; a CPU does not, so the pointer is looked at."""
    c = WIDE[0]
    o = c.operands(torch.bfloat16, "channels_last")
    runner = MmaFprop(native, problem_of(c, "channels_last", torch.bfloat16), (PATCH, WHOLE, 1))
    seen = []

    class Spy:
        kernel = runner.kernel

        def run(self, *arguments: object) -> None:
            seen.append(arguments[-2])
            self.kernel.run(*arguments)

    runner.kernel = Spy()
    n, channels, h, w = o.residual.shape
    storage = torch.empty(o.residual.numel() + 1, dtype=o.residual.dtype)
    shifted = storage[1:].view(n, h, w, channels).permute(0, 3, 1, 2).copy_(o.residual)
    packed = runner.pack(o.weight)
    expected, found = (runner(o.x, packed, None, None, r, "none") for r in (o.residual, shifted))
    assert torch.equal(found, expected)
    assert shifted.data_ptr() % 16
    assert seen[1] % 16 == 0


@pytest.mark.parametrize("c", WIDE, ids=lambda c: c.name)
@pytest.mark.parametrize("which", ["dgrad", "wgrad"])
def test_gradients_within_the_budget(native: ModuleType, which: Pass, c: Case) -> None:
    for dtype, splits in zip(DTYPES, (1, 3), strict=True):
        check_mma(native, c, which, dtype, (splits,))
