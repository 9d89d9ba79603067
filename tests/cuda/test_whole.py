"""fprop on Hopper's own instructions of whole filters, tap by tap, run on the CPU, against the float64 oracle: copies
and products at once and as late as they may, threads in both orders."""

from __future__ import annotations

from itertools import product
from types import ModuleType

import numpy as np
import pytest
import torch

from stripe_kernels.backends.cuda_whole import CONFIGS, WholeFprop, layout_of, taps_by_tile, tiling_of
from stripe_kernels.registry import Config
from stripe_kernels.testing import Case, case
from tests.cuda import emulated
from tests.cuda.problems import ONE_IMAGE, check, check_epilogue, problem_of, with_nans
from tests.cuda.test_mma import PROBLEMS as MMA_PROBLEMS
from tests.cuda.test_wgmma import Built

FEW_PROCESSORS = 2
# More tiles than multiprocessors, more patches than buffers, blocks of another tile of filters.
EVERYTHING = case("several of everything", N=3, C=72, H=19, W=17, K=150, density=0.3)
FEW = case("more patches than buffers", N=5, C=128, H=16, W=13, K=40, density=0.2)
ROUND = case(
    "warpgroups in turns", N=5, C=16, H=15, W=16, K=16
)  # three blocks, two blocks, three blocks, ...
GROUPS = case("groups that share a chunk", N=3, C=48, H=5, W=6, K=144, groups=2)
PROBLEMS = (
    *(c for c in MMA_PROBLEMS if c.shape.stride == (1, 1)), EVERYTHING, FEW, ROUND, GROUPS,
    case("bands of columns", N=1, C=8, H=3, W=300, K=9),
    case("five by four", N=2, C=16, H=11, W=9, K=24, R=5, S=4, padding=(2, 1)),
    case("padding wider than the map", N=2, C=8, H=2, W=1, K=8, R=5, S=4, padding=(4, 5), density=0.5),
    case("no padding", N=2, C=16, H=9, W=70, K=70, padding=(0, 0)),
    case("dilated", N=2, C=24, H=14, W=16, K=9, dilation=(1, 4), padding=(1, 4)),
    case("one row", N=2, C=8, H=1, W=140, K=16, R=1, S=3, padding=(0, 1)),
    case("few live taps", N=2, C=136, H=6, W=7, K=130, density=0.01),
)  # fmt: skip
# Weights have no room, or the halo.
NO_ROOM = {
    64: {"taps far apart", "several chunks"},
    128: {
        *("taps far apart", "several chunks", "several of everything", "more patches than buffers"),
        *("five by four", "padding wider than the map", "few live taps"),
    },
}


def check_whole(native: ModuleType, c: Case, dtype: torch.dtype, config: Config) -> torch.Tensor:
    """On as many multiprocessors as the emulation has: tiles have several blocks there, and are many."""
    runner = WholeFprop(native, problem_of(c, "channels_last", dtype), config, FEW_PROCESSORS)
    return check(runner, c, "fprop", dtype, "channels_last", f"whole {config}")


def taken(c: Case, config: Config) -> bool:
    return tiling_of(problem_of(c, "channels_last", torch.bfloat16), config) is not None


@pytest.mark.parametrize("c", PROBLEMS, ids=lambda c: c.name)
def test_within_the_budget(native: ModuleType, c: Case) -> None:
    for config, dtype in zip(CONFIGS, (torch.bfloat16, torch.float16), strict=True):
        if not taken(c, config):
            assert c.name in NO_ROOM[config[0]]
            continue
        at_once = check_whole(native, c, dtype, config)
        with emulated.late(native):
            assert torch.equal(check_whole(native, c, dtype, config), at_once)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("c", [EVERYTHING, FEW, ROUND], ids=lambda c: c.name)
def test_no_wait_is_missing(native: ModuleType, c: Case, config: Config) -> None:
    """The bits depend neither on the order of threads nor on when copies and products happen."""
    if not taken(c, config):
        return
    first = check_whole(native, c, torch.bfloat16, config)
    with emulated.greedy(native):
        assert torch.equal(check_whole(native, c, torch.bfloat16, config), first)
    with emulated.backwards(native):
        assert torch.equal(check_whole(native, c, torch.bfloat16, config), first)
        with emulated.late(native):
            assert torch.equal(check_whole(native, c, torch.bfloat16, config), first)


def test_problems_have_all_kinds_of_tiles() -> None:
    kinds = set()
    for c in PROBLEMS:
        tiling = tiling_of(problem_of(c, "channels_last", torch.bfloat16), CONFIGS[0], FEW_PROCESSORS)
        if tiling is not None:
            kinds.add(("blocks", tiling.blocks))
            kinds.add(("bands", tiling.bands > 1))
            kinds.add(("whole rows", tiling.step % tiling.width == 0))
            kinds.add(("junk behind the blocks", tiling.step > 64 * tiling.blocks))
    assert kinds >= {("blocks", n) for n in (1, 2, 3)} | set(
        product(("bands", "whole rows", "junk behind the blocks"), (False, True))
    )


def test_layers_it_is_for_have_room() -> None:
    """Blocks that are computed beside those that hold positions, and patches in flight."""
    for channels, side, waste in (
        (64, 112, 1.05),
        (64, 56, 1.05),
        (64, 32, 1.13),
        (128, 28, 1.15),
        (128, 16, 1.26),
    ):
        c = case("layer", N=128, C=channels, H=side, W=side, K=channels)
        tiling = tiling_of(problem_of(c, "channels_last", torch.bfloat16), CONFIGS[0])
        assert tiling is not None
        positions = (side - 1) * tiling.width + tiling.columns
        first = np.arange(tiling.tiles) * tiling.step
        count = np.minimum(positions - first, min(tiling.step, 64 * tiling.blocks))
        assert 64 * tiling.bands * (-(-count // 64)).sum() <= waste * side**2, c
        assert tiling.buffers > channels // 64, c


@pytest.mark.parametrize("c", PROBLEMS, ids=lambda c: c.name)
def test_taps_hold_every_stripe_once(c: Case) -> None:
    problem = problem_of(c, "channels_last", torch.bfloat16)
    for (filters,) in CONFIGS:
        tiles, s = taps_by_tile(problem, filters), c.shape
        of_group = len(tiles) // s.groups
        rows = []
        for number, taps in enumerate(tiles):
            first = number % of_group * filters
            for tap in taps:
                mine = tap.row[(tap.filters >= first) & (tap.filters < first + filters)]
                assert len(mine), "a tap that no filter of the tile keeps"
                rows += mine.tolist()
        assert sorted(rows) == list(range(c.skeleton.stripes))


def test_epilogue(native: ModuleType) -> None:
    for c in (
        case("a filter more than a tile", N=3, C=40, H=5, W=5, K=129, density=0.3),
        case("whole pieces", N=2, C=64, H=9, W=13, K=72, density=0.3),
        case("an odd number of filters", N=2, C=8, H=9, W=13, K=35, density=0.3),
    ):
        for config in CONFIGS:
            runner = WholeFprop(native, problem_of(c, "channels_last", torch.bfloat16), config)
            check_epilogue(runner, c, c.operands(torch.bfloat16, "channels_last"), str(config))


def test_infinity_stays_in_its_group(native: ModuleType) -> None:
    o = GROUPS.operands(torch.bfloat16, "channels_last")
    x = o.x.clone()
    x[:, 24:, 2, 3] = torch.inf
    for config in CONFIGS:
        runner = WholeFprop(native, problem_of(GROUPS, "channels_last", torch.bfloat16), config)
        y = runner(x, runner.pack(o.weight), None, None, None, "none")
        assert y[:, :72].isfinite().all()
        assert not y[:, 72:].isfinite().all()


def test_nan_stays_with_its_tile_of_filters(native: ModuleType) -> None:
    """Where a filter of a tile reads a NaN all of them have one, at that pixel, and no further."""
    x, weight, reads = with_nans(ONE_IMAGE)
    for config in CONFIGS:
        runner = WholeFprop(native, problem_of(ONE_IMAGE, "channels_last", torch.bfloat16), config)
        found = runner(x, runner.pack(weight), None, None, None, "none").isnan()
        for first in range(0, 83, config[0]):
            mine = slice(first, first + config[0])
            assert (found[:, mine] == reads[:, mine].any(1, keepdim=True)).all()


def test_filters_without_a_stripe_read_nothing(native: ModuleType) -> None:
    c = case("empty", N=2, C=8, H=6, W=7, K=9, pattern="empty")
    o = c.operands(torch.bfloat16, "channels_last")
    for config in CONFIGS:
        runner = WholeFprop(native, problem_of(c, "channels_last", torch.bfloat16), config)
        x = torch.full_like(o.x, torch.nan)
        assert (runner(x, runner.pack(o.weight), None, None, None, "none") == 0).all()


def test_what_does_not_fit_is_left_to_others() -> None:
    for c in (
        case("strided", N=1, C=8, H=9, W=9, K=9, stride=(2, 1)),
        case("many channels", N=1, C=256, H=9, W=9, K=64, density=0.5),
        case("far apart", N=1, C=8, H=90, W=90, K=9, dilation=(40, 40), padding=(40, 40)),
    ):
        assert not any(
            layout_of(problem_of(c, "channels_last", torch.bfloat16), config) for config in CONFIGS
        )


def test_tables_that_lead_elsewhere_are_refused(native: ModuleType) -> None:
    c = case("two tiles", N=3, C=16, H=9, W=8, K=83, density=0.3)
    built = Built(native, problem_of(c, "channels_last", torch.bfloat16), CONFIGS[0], WholeFprop)
    tables = built.tables
    last = tables[built.items + 1] - 1
    for reason, changed in (
        ("taps follow each other and have room", {"items_0": 1}),
        ("taps follow each other and have room", {"items_1": 10}),
        ("taps follow each other and have room", {"items_5": tables[built.items + 4] - 1}),
        ("tiles of filters follow each other", {"items_2": 8}),
        ("tiles of filters follow each other", {"items_3": 63}),
        ("tiles of filters follow each other", {"items_7": 20}),
        ("a tap stays in its patch", {"entries_0": -1}),
        ("a tap stays in its patch", {f"entries_{last}": tables[built.entries + last] + 64}),
        ("taps follow each other and have room", {"layout_9": 1}),
        ("weights and a patch fit shared memory", {"layout_9": 1 << 20}),
        ("weights and a patch fit shared memory", {"layout_10": 1024}),
        ("a tile has 64 or 128 filters", {"layout_7": 96}),
    ):
        assert built.refusal(**changed) == reason, changed
