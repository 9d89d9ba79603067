"""dgrad on Hopper's own instructions, run on the CPU, against the float64 oracle: copies and products at once and as
late as they may, threads in both orders."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from stripe_kernels.backends.cuda_gather import CONFIGS, WgmmaDgrad, lists_of
from stripe_kernels.phases import phases
from stripe_kernels.registry import Config
from stripe_kernels.testing import Case, case
from tests.cuda import emulated
from tests.cuda.problems import check, problem_of
from tests.cuda.test_mma import WIDE

# Several tiles of pixels and of channels, more steps than stages.
EVERYTHING = case("several of everything", N=3, C=200, H=13, W=17, K=72, density=0.5)
PROBLEMS = (
    *WIDE, EVERYTHING,
    case("four phases", N=2, C=16, H=11, W=9, K=24, R=5, S=4, stride=(2, 2), padding=(2, 1)),
    case("phases nobody reads", N=3, C=8, H=8, W=7, K=16, R=1, S=1, stride=(2, 2), padding=(0, 0)),
    case("padding wider than the map", N=2, C=8, H=2, W=1, K=8, R=5, S=4, padding=(4, 5), density=0.5),
    case("one row", N=2, C=8, H=1, W=40, K=16, R=1, S=3, padding=(0, 1)),
)  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16, torch.bfloat16)


def check_dgrad(native: ModuleType, c: Case, dtype: torch.dtype, config: Config) -> torch.Tensor:
    runner = WgmmaDgrad(native, problem_of(c, "channels_last", dtype), config)
    return check(runner, c, "dgrad", dtype, "channels_last", f"wgmma {config}")


@pytest.mark.parametrize("c", PROBLEMS, ids=lambda c: c.name)
def test_within_the_budget(native: ModuleType, c: Case) -> None:
    for dtype, config in zip(DTYPES, CONFIGS, strict=True):
        at_once = check_dgrad(native, c, dtype, config)
        with emulated.late(native):
            assert torch.equal(check_dgrad(native, c, dtype, config), at_once)


def test_no_wait_is_missing(native: ModuleType) -> None:
    """The bits depend neither on the order of threads nor on when copies and products happen."""
    for config in CONFIGS[1:]:
        first = check_dgrad(native, EVERYTHING, torch.bfloat16, config)
        with emulated.backwards(native):
            assert torch.equal(check_dgrad(native, EVERYTHING, torch.bfloat16, config), first)
            with emulated.late(native):
                assert torch.equal(check_dgrad(native, EVERYTHING, torch.bfloat16, config), first)
            with emulated.greedy(native):
                assert torch.equal(check_dgrad(native, EVERYTHING, torch.bfloat16, config), first)


@pytest.mark.parametrize("c", PROBLEMS, ids=lambda c: c.name)
def test_lists_hold_every_stripe_once_and_eights_one_tap(c: Case) -> None:
    for phase in phases(c.skeleton, c.shape):
        lists = lists_of(phase)
        live = lists.rows >= 0
        assert sorted(lists.rows[live].tolist()) == sorted(phase.row.tolist())
        assert len(lists.taps) % 8 == 0
        assert len(lists.taps) > 0
        for filters, rows, tap in zip(lists.filters, lists.rows, lists.taps, strict=True):
            if (rows >= 0).any():
                mine = phase.taps[tap]
                of = dict(zip(mine.row.tolist(), mine.filters.tolist(), strict=True))
                assert all(of[r] == k for r, k in zip(rows.tolist(), filters.tolist(), strict=True) if r >= 0)
                assert set(filters.tolist()) <= set(mine.filters.tolist())
            assert (tap >= 0) == (rows >= 0).any()


def test_four_threads_gather_from_different_banks() -> None:
    c = case("banks", N=1, C=8, H=5, W=5, K=256, density=0.5)
    (phase,) = phases(c.skeleton, c.shape)
    lists = lists_of(phase)
    whole = lists.filters[(lists.rows >= 0).all(1)]
    banks = np.sort(whole[:, [[0, 2, 4, 6], [1, 3, 5, 7]]] // 2 % 4, -1)
    assert (banks == np.arange(4)).all(-1).mean() > 0.9
