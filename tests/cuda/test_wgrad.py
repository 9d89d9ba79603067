"""wgrad on Hopper's own instructions, run on the CPU, against the float64 oracle: copies and products at once and as
late as they may, threads in both orders."""

from __future__ import annotations

from itertools import cycle
from types import ModuleType

import numpy as np
import pytest
import torch

from stripe_kernels.backends.cuda_wgrad import (
    EIGHT,
    STRIPES,
    WgmmaWgrad,
    blocks_of,
    layout_of,
    splits_of,
)
from stripe_kernels.phases import phases
from stripe_kernels.registry import Config
from stripe_kernels.testing import Case, case
from tests.cuda import emulated
from tests.cuda.problems import check, problem_of, run
from tests.cuda.test_mma import WIDE
from tests.cuda.test_wgmma import Built

# Several blocks of stripes and of channels, more tiles than stages, an odd number of them.
EVERYTHING = case("several of everything", N=3, C=200, H=13, W=17, K=144, density=0.5)
GROUPS = case("three groups", N=3, C=72, H=7, W=6, K=48, groups=3, density=0.7)
PROBLEMS = (
    *(c for c in WIDE if c.shape.stride == (1, 1) and c.name != "taps far apart"), EVERYTHING, GROUPS,
    case("five by four", N=2, C=16, H=11, W=9, K=24, R=5, S=4, padding=(2, 1)),
    case("no padding", N=4, C=24, H=9, W=8, K=16, padding=(0, 0)),
    case("dilated", N=2, C=16, H=12, W=10, K=16, padding=(2, 3), dilation=(2, 3)),
    case("padding wider than the map", N=2, C=8, H=2, W=1, K=8, R=5, S=4, padding=(4, 5), density=0.5),
    case("one row", N=2, C=8, H=1, W=40, K=16, R=1, S=3, padding=(0, 1)),
    case("few stripes of many filters", N=2, C=64, H=8, W=8, K=520, density=0.02),
    case("one image of many tiles", N=1, C=72, H=40, W=33, K=128, density=0.1),
)  # fmt: skip
SHAPES = ((128, 64, 64), (64, 128, 128), (64, 64, 64), (128, 256, 64))


def fitting(c: Case, shape: tuple[int, int, int], splits: int) -> Config | None:
    """This shape with as many shares as there are tiles, at most `splits`; None where a block has no room."""
    pixels = c.shape.N * c.shape.H * c.shape.W
    config = (*shape, max(1, min(splits, -(-pixels // shape[2]))))
    return config if layout_of(problem_of(c, "channels_last", torch.bfloat16), config) else None


def check_wgrad(native: ModuleType, c: Case, dtype: torch.dtype, config: Config) -> torch.Tensor:
    runner = WgmmaWgrad(native, problem_of(c, "channels_last", dtype), config)
    return check(runner, c, "wgrad", dtype, "channels_last", f"wgmma {config}")


@pytest.mark.parametrize("c", PROBLEMS, ids=lambda c: c.name)
def test_within_the_budget(native: ModuleType, c: Case) -> None:
    dtypes, count = cycle((torch.bfloat16, torch.float16)), 0
    for shape, splits, dtype in zip(SHAPES, (1, 3, 2, 1), dtypes, strict=False):
        config = fitting(c, shape, splits)
        if config is None:
            continue
        at_once = check_wgrad(native, c, dtype, config)
        with emulated.late(native):
            assert torch.equal(check_wgrad(native, c, dtype, config), at_once)
        count += 1
    assert count >= 2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_wait_is_missing(native: ModuleType, shape: tuple[int, int, int]) -> None:
    """The bits depend neither on the order of threads nor on when copies and products happen."""
    config = fitting(EVERYTHING, shape, 2)
    assert config is not None
    first = check_wgrad(native, EVERYTHING, torch.bfloat16, config)
    with emulated.backwards(native):
        assert torch.equal(check_wgrad(native, EVERYTHING, torch.bfloat16, config), first)
        with emulated.late(native):
            assert torch.equal(check_wgrad(native, EVERYTHING, torch.bfloat16, config), first)
        with emulated.greedy(native):
            assert torch.equal(check_wgrad(native, EVERYTHING, torch.bfloat16, config), first)


def test_nan_of_dy_stays_with_its_filter_and_of_x_with_its_channel(native: ModuleType) -> None:
    o = GROUPS.operands(torch.bfloat16, "channels_last")
    filters = np.nonzero(GROUPS.skeleton.live)[0]
    for config in ((128, 64, 64, 2), (64, 64, 64, 1)):
        runner = WgmmaWgrad(native, problem_of(GROUPS, "channels_last", torch.bfloat16), config)
        dy, x = o.dy.clone(), o.x.clone()
        dy[1, 17, 3, 2] = torch.nan  # in the middle: every tap meets it
        assert torch.equal(
            run(runner, "wgrad", o._replace(dy=dy)).isnan().all(1), torch.from_numpy(filters == 17)
        )
        assert torch.equal(
            run(runner, "wgrad", o._replace(dy=dy)).isnan().any(1), torch.from_numpy(filters == 17)
        )
        x[2, 24 + 5, 2, 3] = torch.nan  # of the second group
        found = run(runner, "wgrad", o._replace(x=x)).isnan()
        mine = torch.zeros_like(found)
        mine[:, 5] = torch.from_numpy(filters // 16 == 1)
        assert torch.equal(found, mine)


@pytest.mark.parametrize("filters", [64, 128, 256])
@pytest.mark.parametrize("c", PROBLEMS, ids=lambda c: c.name)
def test_blocks_hold_every_stripe_once(c: Case, filters: int) -> None:
    place = {}
    for phase in phases(c.skeleton, c.shape):
        for tap in phase.taps:
            for k, row in zip(tap.filters.tolist(), tap.row.tolist(), strict=True):
                place[row] = (phase.group, k, (tap.i, tap.j))
    seen: list[int] = []
    for block in blocks_of(c.skeleton, c.shape, filters):
        assert 0 < len(block.rows) <= STRIPES
        assert len(block.rows) % 64 == 0
        assert 0 <= block.filters.min() <= block.filters.max() < filters
        live = block.rows >= 0
        for k, tap, row in np.stack([block.filters, block.taps, block.rows], 1)[live].tolist():
            assert place[row] == (block.group, block.first + k, block.offsets[tap])
            seen.append(row)
    assert sorted(seen) == sorted(place)


@pytest.mark.parametrize("density", [0.1, 0.24, 0.5])
def test_eights_gather_from_different_banks_and_few_taps(density: float) -> None:
    c = case("banks", N=1, C=8, H=14, W=14, K=512, density=density)
    taps, reads = [], []
    for block in blocks_of(c.skeleton, c.shape, 128):
        parity = np.array([(i * c.shape.Q + j) % 2 for i, j in block.offsets])[block.taps]
        bank = (block.filters // 8 % 2 ^ parity) * 4 + block.filters // 2 % 4
        word = block.filters // 2 + 1000 * block.taps
        for own, words in zip(bank.reshape(-1, EIGHT), word.reshape(-1, EIGHT), strict=True):
            reads.append(max(len(set(words[own == b].tolist())) for b in own))
        taps += [len(set(eight)) for eight in block.taps.reshape(-1, EIGHT).tolist()]
    assert np.mean(taps) < 3.2
    assert np.mean(reads) < 1.4


def test_shares_fill_the_multiprocessors() -> None:
    assert splits_of(32, 98) == {1, 4}
    assert splits_of(1, 6272) == {1, 8, 132}
    assert splits_of(24, 3) == {1, 3}
    assert 4 in splits_of(99, 98)  # three waves of four shares


def test_tables_that_lead_elsewhere_are_refused(native: ModuleType) -> None:
    c = case("two tiles", N=2, C=16, H=9, W=8, K=80, density=0.3)
    built = Built(native, problem_of(c, "channels_last", torch.bfloat16), (64, 64, 64, 2), WgmmaWgrad)
    tables = built.tables
    stripe, tap = built.entries, built.lists
    live = np.flatnonzero(np.array(tables[stripe + 2 : tap : 4]) >= 0).tolist()
    for reason, changed in (
        ("a patch lies in dy", {"items_2": -1}),
        ("a patch lies in dy", {"items_3": 1 << 20}),
        ("a tile begins at its first pixel", {"items_1": 1}),
        ("a tile begins at its first pixel", {"items_5": 9}),
        ("a tap stays in its patch", {"items_2": tables[built.items + 2] + 1}),
        ("a tap stays in its patch", {"items_3": tables[built.items + 3] - 1}),
        ("a tap stays in its patch", {"lists_0": tables[tap] - 1}),
        ("a block's group exists, its pixels are all", {"steps_0": 1}),
        ("a block's group exists, its pixels are all", {"steps_3": 10}),
        ("a block has taps, aligned", {"steps_5": 1}),
        ("a block has taps, aligned", {"steps_6": 10}),
        ("stripes follow each other", {"steps_7": 192}),
        ("stripes follow each other", {"steps_10": 193}),
        ("stripes follow each other", {"steps_10": 256}),
        ("a stripe has a warpgroup", {"steps_10": 64}),
        ("an index lies in its section", {"steps_5": 2**31 - 2}),
        ("a filter lies in its pixel", {"entries_0": tables[stripe] + 1}),
        ("a filter lies in its pixel", {"entries_0": 128}),
        ("a filter lies in its pixel", {"entries_0": tables[stripe] + built.layout[-10]}),
        ("a stripe's tap exists", {"entries_1": 9}),
        ("every row of dw has one stripe", {f"entries_{live[0] * 4 + 2}": -1}),
        ("every row of dw has one stripe", {f"entries_{live[0] * 4 + 2}": tables[stripe + live[1] * 4 + 2]}),
        ("filters lie in their group", {"steps_9": 80}),
        ("every share has a tile", {"layout_8": 4}),
        ("two to 64 stages", {"layout_9": 1}),
        ("a patch and its zeros have room", {"layout_10": 1000}),
        ("16 bits tell places in a patch, and there are few taps", {"layout_10": 1 << 17}),
    ):
        assert built.refusal(**changed) == reason, changed
