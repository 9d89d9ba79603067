"""FilterSkeleton: an immutable value, its text form, its statistics."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stripe_kernels import FilterSkeleton
from stripe_kernels.testing import CASES

skeletons = hnp.arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5)))


@settings(deadline=None)
@given(skeletons)
def test_text_is_exact(live) -> None:
    skeleton = FilterSkeleton(live)
    again = FilterSkeleton.from_text(skeleton.text)
    assert np.array_equal(again.live, live)
    assert again == skeleton
    assert hash(again) == hash(skeleton)
    assert again.digest == skeleton.digest


@settings(deadline=None)
@given(skeletons)
def test_statistics(live) -> None:
    skeleton = FilterSkeleton(live)
    assert skeleton.shape == live.shape
    assert skeleton.stripes == live.sum()
    assert skeleton.density == pytest.approx(live.mean())
    assert skeleton.filters_per_tap.tolist() == live.sum(0).tolist()
    assert skeleton.dead_filters.tolist() == [k for k in range(len(live)) if not live[k].any()]


def test_different_skeletons_differ() -> None:
    texts = {case.skeleton.text for case in CASES.values()}
    full = FilterSkeleton.full(4, 3, 3)
    other = full.live.copy()
    other[3, 2, 2] = False
    assert FilterSkeleton(other) != full
    assert FilterSkeleton(other).digest != full.digest
    assert FilterSkeleton.full(4, 9, 1) != full
    assert len(texts) > 20


def test_it_is_immutable_and_owns_its_bits() -> None:
    live = np.zeros((2, 3, 3), np.bool_)
    skeleton = FilterSkeleton(live.copy())
    with pytest.raises(ValueError, match="read-only"):
        skeleton.live[0, 0, 0] = True
    text = FilterSkeleton(live).text
    assert text == skeleton.text


def test_a_callers_array_stays_writable_and_has_no_say_later() -> None:
    live = np.zeros((2, 3, 3), np.bool_)
    skeleton = FilterSkeleton(live)
    live[0, 0, 0] = True
    assert skeleton.stripes == 0


def test_pickles() -> None:
    skeleton = CASES["lopsided"].skeleton
    assert pickle.loads(pickle.dumps(skeleton)) == skeleton


@pytest.mark.parametrize("live", [np.ones((2, 3, 3)), [[[1, 0]]], np.ones((1, 1, 1), np.uint8)])
def test_other_types_are_refused(live) -> None:
    with pytest.raises(TypeError, match="bool"):
        FilterSkeleton(live)


@pytest.mark.parametrize("size", [(3, 3), (2, 2, 3, 3), (0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_other_shapes_are_refused_with_their_sizes(size) -> None:
    with pytest.raises(ValueError, match=r"\[" + ", ".join(map(str, size))):
        FilterSkeleton(np.ones(size, np.bool_))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2x3x3",
        "2x3x3:",
        "2x3:AAAA",
        "2x3x3:AAA",
        "2x3x3:A!==",
        "axbxc:AAAA",
        "0x3x3:",
        "-2x-3x3:AAAA",
        "2x3x3:AAAAAAAA",
    ],
)
def test_malformed_text_is_a_value_error(text) -> None:
    with pytest.raises(ValueError, match="skeleton"):
        FilterSkeleton.from_text(text)


def test_the_drawing_shows_where_filters_live() -> None:
    live = np.zeros((10, 3, 3), np.bool_)
    live[:, 1, 1] = True
    live[0, 0, 0] = True
    drawing = repr(FilterSkeleton(live)).splitlines()
    assert "11 of 90 stripes live" in drawing[0]
    assert drawing[1:] == ["  |..    |", "  |  @@  |", "  |      |"]
