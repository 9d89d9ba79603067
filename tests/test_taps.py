"""What is special about kernels that take filters in pairs (csrc/cpu/fprop_taps.h): nothing crosses between them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stripe_kernels import FilterSkeleton, StripeConv2d
from stripe_kernels.testing import live_stripes
from tests.passes import NATIVE

TAPS = [name for name in NATIVE if name.startswith("cpu_taps")]


def layer(kernel: str, live: torch.Tensor, stride: int) -> tuple[StripeConv2d, nn.Conv2d]:
    k, r, s = live.shape
    dense = nn.Conv2d(3, k, (r, s), stride, (r // 2, s // 2), bias=False).eval()
    dense.weight.data.mul_(live[:, None])
    ours = StripeConv2d.from_conv2d(dense, FilterSkeleton(live.numpy())).eval()
    ours.kernel = kernel
    return ours, dense


@pytest.mark.parametrize("kernel", TAPS)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_nan_reaches_its_readers_only(kernel: str, stride: int) -> None:
    """A pixel of NaN: an output is NaN where a live tap of its own filter reads that pixel, and nowhere else."""
    live = torch.rand(7, 5, 3, generator=torch.Generator().manual_seed(0)) < 0.4
    ours, dense = layer(kernel, live, stride)
    x = torch.ones(2, 3, 13, 11)
    x[1, 2, 6, 5] = torch.nan
    marked = torch.zeros_like(x)
    marked[1, 2, 6, 5] = 1
    dense.weight.data = live[:, None].expand_as(dense.weight).float()
    with torch.no_grad():
        assert torch.equal(ours(x).isnan(), dense(marked) > 0)


@pytest.mark.parametrize("kernel", TAPS)
@pytest.mark.parametrize("filters", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", ["random", "one stripe", "apart", "the same"])
def test_pairs_of_every_kind(kernel: str, filters: int, kind: str) -> None:
    live = torch.zeros(filters, 3, 3, dtype=torch.bool)
    if kind == "random":
        live = torch.from_numpy(live_stripes("random", (filters, 3, 3), 0.4, 0).live.copy())
    elif kind == "one stripe":
        live[filters // 2, 2, 1] = True
    elif kind == "apart":
        for k in range(filters):
            live[k].view(-1)[k] = True
    else:
        live[:, :2] = True
    ours, dense = layer(kernel, live, 1)
    x = torch.randn(2, 3, 9, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), dense(x), rtol=1e-5, atol=1e-5)
