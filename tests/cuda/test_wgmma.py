"""The kernel of Hopper's own instructions, run on the CPU, against the float64 oracle: copies and products at once and
as late as they may, threads in both orders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import cycle, product
from types import ModuleType

import numpy as np
import pytest
import torch

from stripe_kernels import list_kernels, registry
from stripe_kernels.backends.cuda_runner import CudaRunner
from stripe_kernels.backends.cuda_stripes import (
    OCTET,
    Patch,
    StripeTile,
    bundles_of,
    patch_of,
    stripe_tiles,
)
from stripe_kernels.backends.cuda_wgmma import (
    CONFIGS,
    TABLE_BYTES,
    TAPS,
    WgmmaFprop,
    chunks_of,
    room,
    tiles_of,
)
from stripe_kernels.geometry import ConvShape
from stripe_kernels.phases import phases
from stripe_kernels.registry import Config, Problem
from stripe_kernels.skeleton import FilterSkeleton
from stripe_kernels.testing import Case, case
from tests.cuda import emulated
from tests.cuda.problems import ONE_IMAGE, check, check_epilogue, problem_of, with_nans
from tests.cuda.test_layouts import SHAPES
from tests.cuda.test_layouts import problem as random_problem
from tests.cuda.test_mma import PROBLEMS as MMA_PROBLEMS

# Two blocks of the grid share everything: several items each, blocks and tiles of filters, more chunks than stages.
EVERYTHING = case("several of everything", N=3, C=136, H=13, W=17, K=150, density=0.3)
# Every filter tile goes to another multiprocessor.
BUNDLES = case("several bundles a tile", N=1, C=520, H=4, W=5, K=650, density=0.3)
# More tiles of pixels than multiprocessors: a block of threads has all filters, and several bundles of them.
MANY = case("many tiles", N=34, C=8, H=20, W=20, K=72, R=1, S=2, density=0.5)
DEEP = case("more chunks than stages", N=1, C=648, H=5, W=5, K=40, density=0.4)
PROBLEMS = (
    *MMA_PROBLEMS, EVERYTHING, BUNDLES, MANY, DEEP,
    case("four phases", N=2, C=16, H=11, W=9, K=20, R=5, S=4, stride=(2, 2), padding=(2, 1)),
    case("phases nobody reads", N=3, C=8, H=8, W=7, K=9, R=1, S=1, stride=(2, 2), padding=(0, 0)),
    case("three rows apart", N=2, C=24, H=14, W=6, K=9, stride=(3, 1), dilation=(1, 2), padding=(2, 2)),
    case("padding wider than the map", N=2, C=8, H=2, W=1, K=8, R=5, S=4, padding=(4, 5), density=0.5),
    case("one row", N=2, C=8, H=1, W=40, K=9, R=1, S=3, padding=(0, 1)),
)  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ThreeTaps(Case):
    """Every filter lives at the same three taps, so that the blocks of a phase are full to the last column."""

    @property
    def skeleton(self) -> FilterSkeleton:
        live = np.zeros((self.shape.K, self.shape.R, self.shape.S), bool)
        live[:, 0, 0] = live[:, 1, 0] = live[:, 1, 1] = True
        return FilterSkeleton(live)


# A tap beside the patch of one phase once found the last column of another.
PHASES_IN_FULL_BLOCKS = (
    ThreeTaps("stride 3", ConvShape(1, 8, 10, 14, 64, 5, 2, (3, 1), (1, 1, 2, 0))),
    ThreeTaps("stride 4", ConvShape(2, 8, 6, 13, 64, 4, 3, (4, 1), (1, 2, 0, 1))),
)


@pytest.mark.parametrize("c", PHASES_IN_FULL_BLOCKS, ids=lambda c: c.name)
def test_phases_do_not_read_each_other(native: ModuleType, c: Case) -> None:
    for config in CONFIGS:
        if not refused(problem_of(c, "channels_last", torch.bfloat16), config):
            check_wgmma(native, c, torch.bfloat16, config)


def refused(problem: Problem, config: Config) -> bool:
    u, v = problem.shape.stride
    return u * v > 4 or room(problem, config) is None


def check_wgmma(native: ModuleType, c: Case, dtype: torch.dtype, config: Config) -> torch.Tensor:
    runner = WgmmaFprop(native, problem_of(c, "channels_last", dtype), config)
    return check(runner, c, "fprop", dtype, "channels_last", f"wgmma {config}")


@pytest.mark.parametrize("c", PROBLEMS, ids=lambda c: c.name)
def test_within_the_budget(native: ModuleType, c: Case) -> None:
    ran = 0
    for dtype, config in zip(cycle(DTYPES), CONFIGS, strict=False):
        if refused(problem_of(c, "channels_last", dtype), config):
            continue
        at_once = check_wgmma(native, c, dtype, config)
        with emulated.late(native):
            assert torch.equal(check_wgmma(native, c, dtype, config), at_once)
        ran += 1
    strides = c.shape.stride[0] * c.shape.stride[1]
    assert ran or strides > 4 or c.name == "taps far apart"


def test_a_tile_has_several_bundles() -> None:
    """And, elsewhere, more chunks than the ring has stages."""

    def tiles(c: Case) -> list[tuple[StripeTile, ...]]:
        problem = problem_of(c, "channels_last", torch.bfloat16)
        return [tiles_of(problem, config)[1] for config in CONFIGS if room(problem, config)]

    assert any(len(tile.bundles) >= 2 for found in tiles(MANY) for tile in found)
    problem = problem_of(DEEP, "channels_last", torch.bfloat16)
    layouts = [tiles_of(problem, config)[2] for config in CONFIGS if room(problem, config)]
    assert any(layout.slab < chunks_of(problem) for layout in layouts)


def test_the_tiles_of_most_blocks_are_first() -> None:
    """Filters live ever longer from group to group, and in the last third of a group."""
    shape = ConvShape(8, 32, 16, 16, 768, 3, 3, padding=(1, 1, 1, 1), groups=2)
    live = np.random.default_rng(0).random((768, 3, 3)) < np.linspace(0.05, 0.9, 768)[:, None, None]
    for width, rows in CONFIGS:
        tiles = stripe_tiles(FilterSkeleton(live), shape, rows, width, 132, 0.2)
        blocks = [tile.blocks for tile in tiles]
        assert blocks == sorted(blocks, reverse=True)
        assert len(set(blocks)) > 2
        assert {tile.group for tile in tiles} == {0, 1}


def test_no_wait_is_missing(native: ModuleType) -> None:
    """The bits depend neither on the order of threads nor on when copies and products happen."""
    for c, config in product((EVERYTHING, BUNDLES, DEEP, PROBLEMS[1]), CONFIGS[:3]):
        if refused(problem_of(c, "channels_last", torch.bfloat16), config):
            continue
        first = check_wgmma(native, c, torch.bfloat16, config)
        with emulated.backwards(native):
            assert torch.equal(check_wgmma(native, c, torch.bfloat16, config), first)
            with emulated.late(native):
                assert torch.equal(check_wgmma(native, c, torch.bfloat16, config), first)
            with emulated.greedy(native):  # the second warpgroup as far ahead as it may
                assert torch.equal(check_wgmma(native, c, torch.bfloat16, config), first)


# Bit 31 is a tap's too.
EVERY_BIT = case("32 taps", N=2, C=8, H=5, W=9, K=13, R=4, S=8, padding=(2, 3), density=0.5)
LONG_TABLES = case("tables beyond shared memory", N=1, C=160, H=3, W=3, K=60, groups=20, density=0.7)


@pytest.mark.parametrize("c", [EVERY_BIT, LONG_TABLES], ids=lambda c: c.name)
def test_at_the_limits(native: ModuleType, c: Case) -> None:
    problem = problem_of(c, "channels_last", torch.bfloat16)
    tables = Built(native, problem, CONFIGS[-1])
    read = tables.entries - tables.items + tables.classes - tables.lists
    taps = max(len(p.taps) for p in phases(c.skeleton, c.shape))
    assert taps == TAPS if c is EVERY_BIT else 4 * read > TABLE_BYTES
    with emulated.late(native):
        check_wgmma(native, c, torch.bfloat16, CONFIGS[-1])


class Built:
    """The integers that a runner hands to the binding, and where the sections of its tables start."""

    def __init__(
        self, native: ModuleType, problem: Problem, config: Config, runner: type[CudaRunner] = WgmmaFprop
    ) -> None:
        self.native = native
        runner(self, problem, config)
        self.items, self.steps, self.entries, self.lists, self.classes, _ = self.layout[-6:]

    def Kernel(self, name: str, code: int, layout: list[int], tables: list[int]) -> object:
        self.name, self.code, self.layout, self.tables = name, code, layout, tables
        return self.native.Kernel(name, code, layout, tables)

    def refusal(self, **changed: int) -> str:
        """Of the tables with integers changed: section_number=value; "layout_number" counts from the layout's end."""
        layout, tables = list(self.layout), list(self.tables)
        for where, value in changed.items():
            section, _, number = where.partition("_")
            if section == "layout":
                layout[-int(number)] = value
            else:
                tables[getattr(self, section) + int(number)] = value
        with pytest.raises(ValueError, match="tables do not hold") as error:
            self.native.Kernel(self.name, self.code, layout, tables)
        return str(error.value).rpartition(": ")[2]


def test_tables_that_lead_elsewhere_are_refused(native: ModuleType) -> None:
    c = case("two tiles", N=2, C=16, H=6, W=5, K=20, density=0.3)
    built = Built(native, problem_of(c, "channels_last", torch.bfloat16), (64, 128))
    tables, record = built.tables, built.entries
    for reason, changed in (
        ("a group exists", {"items_2": 1}),
        ("segments exist", {"items_1": (built.entries - built.steps) // 8 + 1}),
        ("a phase has pixels", {"steps_2": -1}),
        ("a phase has pixels", {"steps_2": 1}),
        ("blocks exist", {"steps_4": 1000}),
        ("a bundle ends in its tile", {"steps_4": tables[built.steps + 4] - 1}),
        ("a phase has at most 32 taps, aligned", {"steps_6": 33}),
        ("a phase has at most 32 taps, aligned", {"steps_5": 1}),
        ("an index lies in its section", {"steps_5": 2 * (built.classes - built.lists)}),
        ("a tap stays in its patch", {"steps_0": tables[built.steps] + 1}),
        ("bundles follow each other", {"entries_0": 0}),
        ("a bundle has 1 to 64 filters", {"entries_3": 65}),
        ("filters lie in their group", {"entries_3": 21}),
        ("filters lie in their group", {"entries_2": -1}),
        ("an octet's tap is the phase's", {"entries_9": tables[record + 9] + 1}),
        ("an octet's tap is the phase's", {"entries_8": tables[record + 8] << 1}),
        ("an octet's tap is the phase's", {"entries_8": 3}),
        ("segments exist", {"items_0": tables[built.items + 1]}),
        ("filters lie in their group", {"entries_2": 2**31 - 8}),
        ("an index lies in its section", {"steps_5": 2**31 - 2}),
        ("two to 64 stages, one class, no splits", {"layout_9": 1}),
        ("two to 64 stages, one class, no splits", {"layout_9": 2**31 - 1}),
        ("two to 64 stages, one class, no splits", {"layout_11": 2**18}),
        ("a block has 128 rows, or 256 of 64 columns", {"layout_10": 64}),
    ):
        assert built.refusal(**changed) == reason, changed


def test_epilogue(native: ModuleType) -> None:
    c = case("several chunks", N=3, C=136, H=5, W=5, K=19, density=0.3)
    runner = WgmmaFprop(native, problem_of(c, "channels_last", torch.bfloat16), CONFIGS[0])
    check_epilogue(runner, c, c.operands(torch.bfloat16, "channels_last"))


def test_nan_reaches_the_readers_of_its_bundle(native: ModuleType) -> None:
    """Filters of a bundle share products: where one reads a NaN all of them have one."""
    x, weight, reads = with_nans(ONE_IMAGE)
    for config in CONFIGS:
        problem = problem_of(ONE_IMAGE, "channels_last", torch.bfloat16)
        runner = WgmmaFprop(native, problem, config)
        y = runner(x, runner.pack(weight), None, None, None, "none")
        for tile in tiles_of(problem, config)[1]:
            for b in tile.bundles:
                mine = slice(b.first, b.first + b.count)
                assert torch.equal(y[:, mine].isnan().any(1), reads[:, mine].any(1))


def lands(patch: Patch, skeleton: FilterSkeleton, s: ConvShape) -> None:
    """Every pixel of the image that a tap reads for a tile lies in the tile's patch, at the tap's offset."""
    w = patch.walk
    (_, th, tw), (gh, gw) = w.tile, w.patch
    for phase in phases(skeleton, s):
        if not phase.taps or not phase.pixels:
            continue
        top, left = patch.vertical.origin[phase.h0], patch.horizontal.origin[phase.w0]
        for tap in phase.taps:
            p, q = np.indices((s.P, s.Q))
            h, v = p + tap.i, q + tap.j
            inside = (h >= 0) & (h < phase.rows) & (v >= 0) & (v < phase.columns)
            a, b = h - (p // th * th + top), v - (q // tw * tw + left)
            assert ((a >= 0) & (a < gh) & (b >= 0) & (b < gw))[inside].all(), (s, tap)
            assert (a * gw + b == p % th * gw + q % tw + patch.offset(phase, tap.i, tap.j)).all()


@pytest.mark.parametrize("most", [64, 128, 256])
def test_every_pixel_read_lies_in_its_patch(most: int) -> None:
    cases = [(c.skeleton, c.shape) for c in PROBLEMS]
    cases += [(random_problem(s, "bfloat16").skeleton, s) for s in SHAPES]
    for skeleton, s in cases:
        patch = patch_of(skeleton, s, most)
        if patch is not None:
            assert patch.rows <= most
            assert np.prod(patch.walk.tile) <= most
            lands(patch, skeleton, s)


@pytest.mark.parametrize(("width", "filters"), [(64, 64), (96, 16), (192, 64)])
@pytest.mark.parametrize("c", PROBLEMS, ids=lambda c: c.name)
def test_bundles_hold_every_stripe_once(c: Case, width: int, filters: int) -> None:
    stripes: list[int] = []
    for g in range(c.shape.groups):
        live = [p for p in phases(c.skeleton, c.shape) if p.group == g and p.pixels]
        bundles = bundles_of(live, c.shape.group_k, width, filters)
        ends = [0, *(b.first + b.count for b in bundles)]
        assert [b.first for b in bundles] == ends[:-1]
        assert ends[-1] == c.shape.group_k
        for b in bundles:
            assert b.blocks  # a block even where nothing lives: it stores what the epilogue makes of zero
            assert b.count <= filters
            for phase, octets in b.blocks:
                assert len(octets) * OCTET <= width
                for octet in octets:
                    assert 0 < len(octet.columns) <= OCTET
                    tap = phase.taps[octet.tap]
                    of = dict(zip(tap.row.tolist(), tap.filters.tolist(), strict=True))
                    for k, row in octet.columns:
                        assert of[row] == k
                        assert b.first <= k < b.first + b.count
                        stripes.append(row)
    read = [row for p in phases(c.skeleton, c.shape) if p.pixels for row in p.row.tolist()]
    assert sorted(stripes) == sorted(read)


@pytest.mark.skipif("cuda_wgmma" not in list_kernels(), reason="stripe_kernels._cuda is not built")
def test_refusals_give_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = registry.find("cuda_wgmma")
    p = random_problem(SHAPES[0], "bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernel.refuse(p, "fprop") is None
    for wrong, which, reason in (
        (replace(p, device="cpu"), "fprop", "not on cpu"),
        (replace(p, dtype="float32"), "fprop", "not float32"),
        (
            random_problem(ConvShape(1, 8, 9, 9, 8, 3, 3, (2, 1)), "bfloat16"),
            "wgrad",
            "strides of 1, got (2, 1)",
        ),
        (random_problem(ConvShape(1, 8, 9, 9, 12, 3, 3), "bfloat16"), "wgrad", "K/groups in multiples of 8"),
        (random_problem(ConvShape(1, 8, 19, 19, 8, 11, 11), "bfloat16"), "wgrad", "more than 64 taps"),
        (replace(p, channels_last=False), "fprop", "channels_last"),
        (
            random_problem(ConvShape(1, 12, 5, 5, 9, 3, 3), "bfloat16"),
            "fprop",
            "multiples of 8 (16 bytes), got 12",
        ),
        (random_problem(ConvShape(1, 8, 9, 9, 9, 3, 3, (3, 2)), "bfloat16"), "fprop", "4 phases, got (3, 2)"),
        (random_problem(ConvShape(1, 2048, 9, 9, 9, 3, 3), "bfloat16"), "fprop", "bytes of shared memory"),
        (random_problem(ConvShape(1, 8, 9, 9, 12, 3, 3), "bfloat16"), "dgrad", "K/groups in multiples of 8"),
        (random_problem(ConvShape(1, 8, 9, 9, 2048, 3, 3), "bfloat16"), "dgrad", "2048 filters exceeds"),
        (random_problem(ConvShape(1, 8, 9, 9, 8, 7, 7), "bfloat16"), "dgrad", "more than 32 taps"),
    ):
        assert reason in kernel.refuse(wrong, which)
    assert (
        kernel.refuse(random_problem(ConvShape(1, 2048, 5, 5, 2048, 1, 1, groups=256), "bfloat16"), "wgrad")
        is None
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, reason in (((8, 0), "sm_90a alone"), ((10, 0), "10.0")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert reason in kernel.refuse(p, "fprop")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert kernel.refuse(p, "fprop") is None
    gather = registry.provided("native gather's refusal")
    assert gather(p, "fprop") is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "sm_80 and newer; this device has compute capability 7.5" in gather(p, "fprop")
