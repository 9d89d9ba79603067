"""ConvShape: sizes as torch computes them, and one message for each constraint."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from stripe_kernels.geometry import ConvShape, pair, resolve_padding
from stripe_kernels.testing import CASES


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_output_size_is_torchs(case) -> None:
    s = case.shape
    top, left, bottom, right = s.padding
    x = F.pad(torch.empty(s.input_size, device="meta"), (left, right, top, bottom))
    weight = torch.empty(s.K, s.group_c, s.R, s.S, device="meta")
    y = F.conv2d(x, weight, None, s.stride, 0, s.dilation, s.groups)
    assert s.output_size == tuple(y.shape)


positive = st.integers(1, 6)
pairs = st.tuples(positive, positive)


@settings(deadline=None, max_examples=300)
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    pairs,
    pairs,
    st.tuples(st.integers(0, 6), st.integers(0, 6)),
    pairs,
)
def test_a_size_is_refused_exactly_when_torch_refuses_it(size, taps, stride, padding, dilation) -> None:
    def ours() -> tuple[int, ...]:
        return ConvShape(1, 1, *size, 1, *taps, stride, (*padding, *padding), dilation).output_size

    x, weight = torch.zeros(1, 1, *size), torch.zeros(1, 1, *taps)
    try:
        expected = tuple(F.conv2d(x, weight, None, stride, padding, dilation).shape)
    except RuntimeError:
        with pytest.raises(RuntimeError, match=r"larger than the padded input.*\d"):
            ours()
    else:
        assert ours() == expected


@pytest.mark.parametrize("taps", [(1, 1), (2, 2), (3, 3), (4, 3), (5, 2)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 3)])
def test_same_padding_is_torchs(taps, dilation) -> None:
    top, left, bottom, right = resolve_padding("same", taps, (1, 1), dilation)
    x, weight = torch.randn(1, 1, 13, 11), torch.randn(1, 1, *taps)
    expected = F.conv2d(x, weight, padding="same", dilation=dilation)
    actual = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, dilation=dilation)
    torch.testing.assert_close(actual, expected)


def test_valid_padding_is_none() -> None:
    assert resolve_padding("valid", (3, 3), (2, 1), (1, 1)) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("padding", "stride", "error"),
    [("same", (2, 1), "strided"), ("full", (1, 1), "'full'"), (-1, (1, 1), "-1"), ((0, -2), (1, 1), "-2")],
)
def test_wrong_padding_is_named(padding, stride, error) -> None:
    with pytest.raises(ValueError, match=error):
        resolve_padding(padding, (3, 3), stride, (1, 1))


@pytest.mark.parametrize("value", [1.5, (1, 2, 3), "3", (1, None), True, (), None, np.True_])
def test_what_is_no_pair_of_ints_is_a_type_error(value) -> None:
    with pytest.raises(TypeError, match="stride"):
        pair(value, "stride", 1)


@pytest.mark.parametrize("value", [0, (1, 0), (-3, 2)])
def test_a_pair_below_its_least_value_is_a_value_error(value) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        pair(value, "stride", 1)


def test_numpys_integers_become_ints() -> None:
    numbers = pair((np.int64(2), np.uint8(1)), "stride", 1)
    assert numbers == (2, 1)
    assert [type(n) for n in numbers] == [int, int]


def test_one_number_serves_both_directions() -> None:
    assert pair(2, "stride", 1) == pair((2,), "stride", 1) == pair([2, 2], "stride", 1) == (2, 2)


@pytest.mark.parametrize("groups", [0, 2, 4, -1])
def test_groups_must_divide_channels_and_filters(groups) -> None:
    with pytest.raises(ValueError, match=rf"groups={groups}.*C=6.*K=3"):
        ConvShape(1, 6, 4, 4, 3, 1, 1, groups=groups)


@pytest.mark.parametrize("size", [(0, 4), (4, 0)])
def test_an_empty_map_is_refused_with_its_sizes(size) -> None:
    with pytest.raises(RuntimeError, match=r"\[2, 3, \d, \d\]"):
        ConvShape(2, 3, *size, 4, 1, 1)


def test_taps_are_numbered_row_by_row() -> None:
    shape = ConvShape(1, 1, 9, 9, 1, 2, 3)
    assert [shape.tap(r, s) for r in range(2) for s in range(3)] == list(range(shape.taps))


def test_macs_count_the_live_stripes() -> None:
    shape = CASES["grouped"].shape
    assert shape.macs(10) == shape.N * shape.P * shape.Q * 10 * shape.C // shape.groups


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_taps_inside_the_image_are_counted(name: str, stride: int) -> None:
    s = dataclasses.replace(CASES[name].shape, stride=(1, stride))
    top, left, bottom, right = s.padding
    image = F.pad(torch.ones(1, 1, s.H, s.W), (left, right, top, bottom))
    met = F.conv2d(image, torch.ones(1, 1, s.R, s.S), None, s.stride, 0, s.dilation)
    assert s.taps_inside() == pytest.approx(float(met.mean()))


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_an_idle_column_is_one_no_output_pixel_reads(name: str, stride: int) -> None:
    s = dataclasses.replace(CASES[name].shape, stride=(1, stride))
    _, left, _, right = s.padding
    row = F.pad(torch.ones(1, 1, 1, s.W), (left, right))
    read = F.conv2d(row, torch.eye(s.S).view(s.S, 1, 1, s.S), None, (1, stride), 0, (1, s.dilation[1]))
    assert s.idle_column() == (stride > 1 and bool((read.amax((0, 2, 3)) == 0).any()))
