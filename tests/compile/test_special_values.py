"""NaN, infinities and denormals through whole networks in one native call: lists of calls and batch lanes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stripe_kernels import freeze
from stripe_kernels.compile.optimize import compact
from stripe_kernels.compile.resident import resident
from stripe_kernels.testing import list_and_calls

IMAGES = 19  # a block of lanes and a part of one
SKELETONS = {
    "0": torch.rand(12, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.3,
    "2": torch.rand(7, 3, 3, generator=torch.Generator().manual_seed(2)) < 0.3,
}


def network(between: nn.Module) -> nn.Module:
    """Two stripe convolutions, the first strided, with something between."""
    torch.manual_seed(3)
    body = nn.Sequential(
        nn.Conv2d(5, 12, 3, stride=(2, 1), padding=1), between, nn.Conv2d(12, 7, 3, padding=1)
    )
    return freeze(body.eval(), dict(SKELETONS))


def executors(model: nn.Module, x: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    # By name: "auto" may take torch's dense convolution, in which a NaN meets the zeros of dead stripes.
    _cpu = pytest.importorskip("stripe_kernels._cpu")
    native = f"cpu_pixels_{_cpu.isas()[0]}"
    made: dict[str, Callable[[Tensor], Tensor]] = dict(list_and_calls(model, x, native))
    made["lanes"] = resident(compact(model, (x,)).body, (x,), 2)
    return made


def readers(mask: Tensor, between: nn.Module) -> Tensor:
    """Which results a bad value of x [N, C, H, W] reaches: a live stripe reads all channels of its pixel."""

    def read(mask: Tensor, live: Tensor, stride: tuple[int, int]) -> Tensor:
        pixels = mask.any(1, keepdim=True).double()
        return F.conv2d(pixels, live[:, None].double(), stride=stride, padding=1) > 0

    first = read(mask, SKELETONS["0"], (2, 1))
    if isinstance(between, nn.MaxPool2d):
        first = between(first.double()) > 0
    return read(first, SKELETONS["2"], (1, 1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["list", "calls", "lanes"])
def test_a_special_value_reaches_exactly_its_readers(name: str, value: float) -> None:
    # Maxima hide infinities, as in torch.
    hiding = (nn.MaxPool2d(3, 2, 1), nn.ReLU()) if value != value else ()
    for between in (nn.Identity(), *hiding):
        x = torch.randn(IMAGES, 5, 9, 8)
        run = executors(network(between), x)[name]
        with torch.inference_mode():
            clean = run(x)
            for position in ((0, 0, 0, 0), (IMAGES - 1, 4, 8, 7), (7, 2, 4, 3)):
                bent = x.clone()
                bent[position] = value
                y = run(bent)
                mask = readers(~bent.isfinite(), between)
                assert torch.equal(~y.isfinite(), mask), f"{between} {position}"
                assert torch.equal(y[~mask], clean[~mask]), "other results keep their bits"
                assert mask.any()


@pytest.mark.parametrize("name", ["list", "calls", "lanes"])
def test_denormals_are_kept(name: str) -> None:
    model = network(nn.ReLU())
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1 if p.dim() > 1 else 0)
    x = torch.randint(1, 5, (IMAGES, 5, 9, 8)) * torch.finfo(torch.float32).smallest_normal / 4096
    run = executors(model, x)[name]
    with torch.inference_mode():
        y = run(x)
    first = F.conv2d(
        x.double(), SKELETONS["0"][:, None].double().expand(-1, 5, -1, -1), stride=(2, 1), padding=1
    )
    expected = F.conv2d(first, SKELETONS["2"][:, None].double().expand(-1, 12, -1, -1), padding=1)
    assert 0 < expected.max() < torch.finfo(torch.float32).smallest_normal
    assert torch.equal(y.double(), expected), "sums of multiples of the smallest are exact"
