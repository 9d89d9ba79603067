"""Host-side schedules: every stripe once, every filter once, offsets by definition. No kernel runs here."""

from __future__ import annotations

import numpy as np
import pytest

from bench.skeletons import iid
from stripe_kernels.backends.triton.schedule import DgradSchedule, FpropSchedule, WgradSchedule, cluster
from stripe_kernels.geometry import ConvShape
from stripe_kernels.phases import phases
from stripe_kernels.testing import CASES, Case

EVERY = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def definition(case: Case) -> dict[int, tuple[int, int, int, int]]:
    """Row of the packed values -> filter, group, and the input pixel its tap reads from output pixel (0,
    0)."""
    s = case.shape
    found = {}
    for row, (k, r, t) in enumerate(np.argwhere(case.skeleton.live)):
        h, w = r * s.dilation[0] - s.padding[0], t * s.dilation[1] - s.padding[1]
        found[row] = (int(k), int(k) // s.group_k, int(h), int(w))
    return found


@EVERY
def test_phases_hold_every_pixel_and_stripe_once(case: Case) -> None:
    s, expected = case.shape, definition(case)
    seen: dict[int, tuple[int, int, int, int]] = {}
    covered = np.zeros((s.groups, s.H, s.W), int)
    for phase in phases(case.skeleton, s):
        covered[phase.group, phase.h0 :: s.stride[0], phase.w0 :: s.stride[1]] += 1
        assert covered[phase.group, phase.h0 :: s.stride[0], phase.w0 :: s.stride[1]].shape == (
            phase.rows,
            phase.columns,
        )
        assert phase.stripes == len(phase.row)
        for tap in phase.taps:
            assert (tap.h, tap.w) == (phase.h0 + s.stride[0] * tap.i, phase.w0 + s.stride[1] * tap.j)
            assert (phase.row[tap.first : tap.last] == tap.row).all()
            for k, row in zip(tap.filters, tap.row, strict=True):
                assert int(row) not in seen
                seen[int(row)] = (int(k) + phase.group * s.group_k, phase.group, tap.h, tap.w)
    assert (covered == 1).all()
    assert seen == expected


@EVERY
@pytest.mark.parametrize("width", [16, 4])
@pytest.mark.parametrize("split", [False, True])
def test_fprop_tiles(case: Case, width: int, split: bool) -> None:
    s, expected = case.shape, definition(case)
    plan = FpropSchedule.of(case.skeleton, s, width, split)
    if split:
        rows = case.skeleton.live.any(2).sum(1)
        assert np.bincount(plan.filters[plan.filters >= 0], minlength=s.K).tolist() == rows.tolist()
    else:
        assert sorted(plan.filters[plan.filters >= 0].tolist()) == list(range(s.K))
    seen = {}
    for tile, group in enumerate(plan.group):
        entries = range(plan.entry_ptr[tile], plan.entry_ptr[tile + 1])
        taps = [tuple(plan.offset[entry, :2].tolist()) for entry in entries]
        assert len(set(taps)) == len(taps)
        for entry, (h, w) in zip(entries, taps, strict=True):
            assert plan.tap[plan.offset[entry, 2]].tolist() == [h, w]
            live = plan.row[entry] < case.skeleton.stripes
            assert live.any(), "a tap no filter of the tile keeps"
            for k, row in zip(plan.filters[tile][live], plan.row[entry][live], strict=True):
                assert int(row) not in seen
                seen[int(row)] = (int(k), int(group), h, w)
    assert seen == expected
    assert plan.entry_ptr[-1] == len(plan.row) == len(plan.offset)


@EVERY
@pytest.mark.parametrize("aligned", [False, True])
def test_dgrad_lists(case: Case, aligned: bool) -> None:
    s, expected = case.shape, definition(case)
    depth, u, v = 4, *s.stride
    plan = DgradSchedule.of(case.skeleton, s, depth, aligned)
    assert len(plan.origin) == s.groups * u * v
    seen = {}
    for i, (group, h0, w0) in enumerate(plan.origin.tolist()):
        for entry in range(plan.entry_ptr[i], plan.entry_ptr[i + 1]):
            p, q, number = plan.offset[entry].tolist()
            assert plan.tap[number].tolist() == [p, q]
            live = plan.row[entry] < case.skeleton.stripes
            assert live.any()
            assert (plan.filters[entry][live] >= 0).all()
            if aligned:
                first = plan.filters[entry][0]
                assert first % depth == 0
                present = plan.filters[entry] >= 0
                assert (plan.filters[entry][present] == first + np.arange(depth)[present]).all()
            else:
                assert (live == (plan.filters[entry] >= 0)).all(), "a gathered slot without a stripe"
            for k, row in zip(plan.filters[entry][live], plan.row[entry][live], strict=True):
                assert int(row) not in seen
                seen[int(row)] = (int(k) + group * s.group_k, group, h0 - u * p, w0 - v * q)
    assert seen == expected


@EVERY
def test_wgrad_entries(case: Case) -> None:
    plan = WgradSchedule.of(case.skeleton, case.shape, 4)
    seen = {}
    for group, offset, filters, rows in zip(plan.group, plan.offset, plan.filters, plan.row, strict=True):
        assert ((filters < 0) == (rows < 0)).all()
        for k, row in zip(filters[rows >= 0], rows[rows >= 0], strict=True):
            assert int(row) not in seen
            seen[int(row)] = (int(k), int(group), *offset.tolist())
    assert seen == definition(case)


def test_clustering_finds_filters_that_share_their_taps() -> None:
    """Four kinds of filters, shuffled: tiles of 16 hold one kind each, so nothing idle is executed."""
    rng = np.random.default_rng(0)
    kinds = np.eye(9, dtype=np.bool_)[:4] | np.eye(9, dtype=np.bool_)[4:8]
    live = kinds[rng.permutation(np.repeat(np.arange(4), 16))]
    tiles = cluster(live, 16)
    assert sorted(np.concatenate(tiles).tolist()) == list(range(64))
    assert [int(live[tile].any(0).sum()) for tile in tiles] == [2, 2, 2, 2]


@EVERY
@pytest.mark.parametrize("width", [16, 4])
@pytest.mark.parametrize("split", [False, True])
def test_the_longest_tile_of_a_group_is_first(case: Case, width: int, split: bool) -> None:
    plan = FpropSchedule.of(case.skeleton, case.shape, width, split)
    entries = np.diff(plan.entry_ptr)
    for group in range(case.shape.groups):
        own = entries[plan.group == group].tolist()
        assert own == sorted(own, reverse=True)


def test_lengths_of_tiles_differ() -> None:
    """So that the order above is one: filters of seven lengths, the longest in the middle."""
    live = np.zeros((28, 9), np.bool_)
    for k, taps in enumerate(np.repeat([2, 5, 7, 9, 8, 3, 1], 4)):
        live[k, :taps] = True
    assert [int(live[tile].any(0).sum()) for tile in cluster(live, 4)] == [9, 8, 7, 5, 3, 2, 1]


def test_clustering_executes_less_than_filters_in_their_order() -> None:
    live = np.random.default_rng(1).random((128, 9)) < 0.1
    clustered = sum(int(live[tile].any(0).sum()) for tile in cluster(live, 16))
    in_order = sum(int(live[k : k + 16].any(0).sum()) for k in range(0, 128, 16))
    assert clustered < 0.75 * in_order


def test_split_by_kernel_row_less_is_executed() -> None:
    """What DESIGN.md says of 512 filters in tiles of 64."""
    shape = ConvShape(1, 1, 3, 3, 512, 3, 3, padding=(1, 1, 1, 1))
    for density, whole, split in ((0.24, 0.71, 0.39), (0.1, 0.17, 0.22)):
        skeleton = iid((512, 3, 3), density, "x")
        shares = [FpropSchedule.of(skeleton, shape, 64, s).row.size / (512 * 9) for s in (False, True)]
        assert shares == pytest.approx([whole, split], abs=0.01)


def test_dead_filters_are_computed_and_cost_nothing() -> None:
    live = np.zeros((40, 9), np.bool_)
    live[:16] = True
    tiles = cluster(live, 16)
    assert sorted(np.concatenate(tiles).tolist()) == list(range(40))
    assert [int(live[tile].any(0).sum()) for tile in tiles] == [9, 0, 0]


def test_stride_larger_than_the_image_leaves_empty_phases() -> None:
    s = ConvShape(1, 1, 1, 1, 1, 1, 1, stride=(2, 2))
    case = Case("one pixel", s, pattern="full")
    assert [phase.pixels for phase in phases(case.skeleton, s)] == [1, 0, 0, 0]
