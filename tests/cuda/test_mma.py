"""The tensor-core kernels, run on the CPU, against the float64 oracle."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from stripe_kernels.backends.cuda_mma import PATCH, POSITION, RUNNERS
from stripe_kernels.registry import Pass
from stripe_kernels.testing import Case, case
from tests.cuda.problems import check, problem_of

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
DTYPES = (torch.bfloat16, torch.float16)


def check_mma(native: ModuleType, c: Case, which: Pass, dtype: torch.dtype, config: tuple[int, ...]) -> torch.Tensor:
    runner = RUNNERS[which](native, problem_of(c, "channels_last", dtype), config)
    return check(runner, c, which, dtype, "channels_last", f"mma {config}")


@pytest.mark.parametrize("c", PROBLEMS, ids=lambda c: c.name)
def test_fprop_within_the_budget(native: ModuleType, c: Case) -> None:
    for dtype, config in zip(DTYPES * 2, ((PATCH, 0, 1), (PATCH, 1, 3), (POSITION, 1, 1), (POSITION, 0, 2)), strict=True):
        check_mma(native, c, "fprop", dtype, config)
