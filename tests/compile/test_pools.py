"""Max pools of a call list against torch's, bit for bit: rows on both sides of whole vectors, borders, NaN."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stripe_kernels.backends.cpu_calls import CallList

WINDOWS = [(2, 2, 0), (3, 2, 1), (3, 1, 1), (2, 1, 0), (3, 3, 0), (5, 2, 2)]  # kernel, stride, padding


WIDTHS = [2, 4, 5, 6, 7, 8, 9, 15, 16, 17, 18, 31, 32, 33, 34, 35, 47, 64, 65, 66, 112]
CASES = [(width, window) for width in WIDTHS for window in WINDOWS if width + 2 * window[2] >= window[0]]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("width", "window"), CASES)
@pytest.mark.parametrize("height", [8, 9])
def test_max_pool(
    width: int, height: int, window: tuple[int, int, int], memory_format: torch.memory_format
) -> None:
    x = torch.randn(2, 17, height, width, generator=torch.Generator().manual_seed(width))
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.02] = torch.nan
    x = x.to(memory_format=memory_format)
    expected = F.max_pool2d(x, *window)
    kernel, stride, padding = window
    calls = CallList(threads=2)
    given, returned = calls.given(x), calls.returned(torch.full_like(expected, torch.nan))
    calls.max_pool(
        (kernel, kernel, stride, stride, padding, padding), x.shape, expected.shape, given, returned
    )
    (y,) = calls.finish()(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
