"""The packed format: lossless, and its index arrays name every live stripe once, in the kernels' order."""

from __future__ import annotations

import numpy as np
import pytest

from stripe_kernels.packed import PackedStripes, StripeIndex
from stripe_kernels.testing import CASES

CASE = pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)


def dense_weight(case) -> np.ndarray:
    s = case.shape
    return np.random.default_rng(1).standard_normal((s.K, s.group_c, s.R, s.S)).astype(np.float32)


@CASE
def test_unpack_reverses_pack(case) -> None:
    weight, skeleton = dense_weight(case), case.skeleton
    packed = PackedStripes.pack(weight, skeleton)
    assert packed.values.shape == (skeleton.stripes, case.shape.group_c)
    expected = np.where(skeleton.live[:, None], weight, 0)
    assert np.array_equal(packed.unpack(), expected)
    again = PackedStripes.pack(packed.unpack(), skeleton)
    assert np.array_equal(again.values, packed.values)


def test_dead_stripes_have_no_say() -> None:
    case = CASES["lopsided"]
    weight, skeleton = dense_weight(case), case.skeleton
    spoiled = np.where(skeleton.live[:, None], weight, np.nan)
    assert np.array_equal(
        PackedStripes.pack(spoiled, skeleton).unpack(), PackedStripes.pack(weight, skeleton).unpack()
    )


@CASE
def test_values_follow_nonzero_order(case) -> None:
    weight, skeleton = dense_weight(case), case.skeleton
    packed = PackedStripes.pack(weight, skeleton)
    for row, (k, r, s) in enumerate(zip(*np.nonzero(skeleton.live), strict=True)):
        assert np.array_equal(packed.values[row], weight[k, :, r, s])


@CASE
def test_the_index_names_every_stripe_once(case) -> None:
    s, skeleton = case.shape, case.skeleton
    index = StripeIndex.of(skeleton, s.groups)
    stripes = list(zip(*np.nonzero(skeleton.live), strict=True))
    assert index.tap_ptr.shape == (s.groups * s.taps + 1,)
    assert sorted(index.row.tolist()) == list(range(len(stripes)))
    seen = []
    for group in range(s.groups):
        for tap in range(s.taps):
            i = group * s.taps + tap
            begin, end = index.tap_ptr[i], index.tap_ptr[i + 1]
            filters = index.filter[begin:end].tolist()
            assert filters == sorted(set(filters))
            for row, filter_in_group in zip(index.row[begin:end], filters, strict=True):
                assert stripes[row] == (group * s.group_k + filter_in_group, tap // s.S, tap % s.S)
                seen.append(row)
    assert len(seen) == len(stripes)
    assert {a.dtype for a in (index.tap_ptr, index.filter, index.row)} == {np.dtype(np.int32)}


def test_one_index_a_skeleton() -> None:
    skeleton = CASES["grouped"].skeleton
    assert StripeIndex.of(skeleton, 2) is StripeIndex.of(CASES["grouped"].skeleton, 2)


@pytest.mark.parametrize("groups", [0, 3, -1])
def test_groups_must_divide_the_filters(groups) -> None:
    with pytest.raises(ValueError, match=rf"groups={groups}.*K=14"):
        StripeIndex.of(CASES["grouped"].skeleton, groups)


def test_a_weight_of_another_shape_is_refused_with_both_sizes() -> None:
    with pytest.raises(ValueError, match=r"\[11, 3, 2\].*\[11, 5, 2, 3\]"):
        PackedStripes.pack(np.zeros((11, 5, 2, 3), np.float32), CASES["lopsided"].skeleton)


def test_values_of_another_count_are_refused() -> None:
    skeleton = CASES["lopsided"].skeleton
    with pytest.raises(ValueError, match=rf"A={skeleton.stripes}.*\[{skeleton.stripes + 1}, 4\]"):
        PackedStripes(np.zeros((skeleton.stripes + 1, 4), np.float32), skeleton)
