"""fprop on Hopper's own instructions tap by tap, run on the CPU, against the float64 oracle: copies and products at
once and as late as they may, threads in both orders."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from stripe_kernels.backends.cuda_taps import CONFIGS, TapsFprop, layout_of, steps_by_tile
from stripe_kernels.registry import Config
from stripe_kernels.testing import Case, case
from tests.cuda import emulated
from tests.cuda.problems import ONE_IMAGE, check, check_epilogue, problem_of, with_nans
from tests.cuda.test_mma import WIDE
from tests.cuda.test_wgmma import Built

EVERYTHING = case("several of everything", N=3, C=200, H=13, W=17, K=200, density=0.5)
GROUPS = case("groups of whole chunks", N=3, C=128, H=5, W=6, K=144, groups=2)
PROBLEMS = (
    *(c for c in WIDE if c.shape.stride == (1, 1) and c.shape.groups == 1), EVERYTHING, GROUPS,
    case("groups of two chunks", N=1, C=256, H=4, W=5, K=16, groups=2),
    case("five by four", N=2, C=16, H=11, W=9, K=24, R=5, S=4, padding=(2, 1)),
    case("padding wider than the map", N=2, C=8, H=2, W=1, K=8, R=5, S=4, padding=(4, 5), density=0.5),
    case("one row", N=2, C=8, H=1, W=40, K=16, R=1, S=3, padding=(0, 1)),
)  # fmt: skip


def check_fprop(native: ModuleType, c: Case, dtype: torch.dtype, config: Config) -> torch.Tensor:
    runner = TapsFprop(native, problem_of(c, "channels_last", dtype), config)
    return check(runner, c, "fprop", dtype, "channels_last", f"taps {config}")


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("c", PROBLEMS, ids=lambda c: c.name)
def test_within_the_budget(native: ModuleType, c: Case, config: Config) -> None:
    dtype = torch.float16 if config[1] == 128 else torch.bfloat16
    at_once = check_fprop(native, c, dtype, config)
    with emulated.late(native):
        assert torch.equal(check_fprop(native, c, dtype, config), at_once)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_no_wait_is_missing(native: ModuleType, config: Config) -> None:
    """The bits depend neither on the order of threads nor on when copies and products happen."""
    first = check_fprop(native, EVERYTHING, torch.bfloat16, config)
    with emulated.backwards(native):
        assert torch.equal(check_fprop(native, EVERYTHING, torch.bfloat16, config), first)
        with emulated.late(native):
            assert torch.equal(check_fprop(native, EVERYTHING, torch.bfloat16, config), first)
        with emulated.greedy(native):
            assert torch.equal(check_fprop(native, EVERYTHING, torch.bfloat16, config), first)


def test_groups_that_share_a_chunk_are_left_to_others() -> None:
    for c in (24, 136, 192):
        p = problem_of(
            case("shared", N=1, C=2 * c, H=5, W=5, K=16, groups=2), "channels_last", torch.bfloat16
        )
        assert not any(layout_of(p, config) for config in CONFIGS)


def test_nan_stays_in_its_group(native: ModuleType) -> None:
    o = GROUPS.operands(torch.bfloat16, "channels_last")
    x = o.x.clone()
    x[:, 64:, 2, 3] = torch.inf
    for config in CONFIGS:
        runner = TapsFprop(native, problem_of(GROUPS, "channels_last", torch.bfloat16), config)
        y = runner(x, runner.pack(o.weight), None, None, None, "none")
        assert y[:, :72].isfinite().all()
        assert not y[:, 72:].isfinite().all()


@pytest.mark.parametrize("c", PROBLEMS, ids=lambda c: c.name)
def test_steps_hold_every_stripe_once(c: Case) -> None:
    problem = problem_of(c, "channels_last", torch.bfloat16)
    for config in CONFIGS:
        filters, serve, _ = config
        rows = []
        for phase, tiles in steps_by_tile(problem, config):
            for which, steps in enumerate(tiles):
                for step in steps:
                    for place, column in enumerate(step.columns):
                        if column is None:
                            continue
                        k, row = column
                        tap = phase.taps[step.tap]
                        of = dict(zip(tap.row.tolist(), tap.filters.tolist(), strict=True))
                        assert of[row] == which * filters + k
                        assert place // 16 in (k // serve, filters // serve)
                        rows.append(row)
        assert sorted(rows) == list(range(c.skeleton.stripes))


def test_epilogue(native: ModuleType) -> None:
    for c in (
        case("a filter more than a tile", N=3, C=136, H=5, W=5, K=129, density=0.3),
        case("whole pieces", N=2, C=64, H=9, W=13, K=72, density=0.3),
    ):
        for config in CONFIGS:
            runner = TapsFprop(native, problem_of(c, "channels_last", torch.bfloat16), config)
            check_epilogue(runner, c, c.operands(torch.bfloat16, "channels_last"), str(config))


def test_nan_stays_with_its_tile_of_filters(native: ModuleType) -> None:
    """Filters of a tile may share columns: a NaN that one reads may reach the others, at that pixel, and no further."""
    x, weight, reads = with_nans(ONE_IMAGE)
    for config in CONFIGS:
        runner = TapsFprop(native, problem_of(ONE_IMAGE, "channels_last", torch.bfloat16), config)
        found = runner(x, runner.pack(weight), None, None, None, "none").isnan()
        for first in range(0, 83, config[0]):
            mine = slice(first, first + config[0])
            assert (found[:, mine] | ~reads[:, mine]).all()
            assert not (found[:, mine].any(1) & ~reads[:, mine].any(1)).any()


def test_tables_that_lead_elsewhere_are_refused(native: ModuleType) -> None:
    c = case("two tiles", N=3, C=16, H=9, W=8, K=83, density=0.3)
    built = Built(native, problem_of(c, "channels_last", torch.bfloat16), CONFIGS[0], TapsFprop)
    tables = built.tables
    for reason, changed in (
        ("a tile's group exists", {"items_0": 1}),
        ("a tile begins at its first pixel", {"items_4": 3}),
        ("a tile begins at its first pixel", {"items_1": 1}),
        ("a patch lies in x", {"items_2": -1}),
        ("a patch lies in x", {"items_3": 1 << 20}),
        ("a patch lies in x", {"items_10": tables[built.items + 10] + 1}),
        ("a tap stays in its patch", {"items_2": tables[built.items + 2] + 1}),
        ("a tap stays in its patch", {"items_3": tables[built.items + 3] - 1}),
        ("a tile begins at its first pixel", {"items_5": 9}),
        ("a phase is its group's", {"steps_0": 1}),
        ("a phase is its group's", {"steps_3": 10}),
        ("steps follow each other and have room", {"steps_8": 1000}),
        ("steps follow each other and have room", {"steps_7": tables[built.steps + 8]}),
        ("steps follow each other and have room", {"steps_20": tables[built.steps + 20] + 1}),
        ("tiles of filters follow each other", {"steps_9": 8}),
        ("tiles of filters follow each other", {"steps_10": 60}),
        ("tiles of filters follow each other", {"steps_22": 20}),
        ("a patch and its zeros have room", {"layout_10": 1000}),
        ("a tile fits shared memory", {"layout_10": 2**31 - 1024}),
        ("a tap stays in its patch", {"entries_0": tables[built.entries] - 1}),
    ):
        assert built.refusal(**changed) == reason, changed
