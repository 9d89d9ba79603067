"""Costs and connections that one probing pass finds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iessp.models import MODELS, build
from iessp.network import probe


@pytest.mark.parametrize(
    ("name", "size", "classes", "millions"),
    [
        ("vgg16", 32, 10, 313.20),  # the IESSP paper's baseline
        ("resnet20", 32, 10, 40.81),
        ("resnet56", 32, 10, 125.75),
        ("resnet18", 224, 1000, 1813.56),  # 1814.07 with the linear layer
        ("mobilenetv2", 224, 1000, 299.49),  # 300.8 with it
    ],
)
def test_macs_are_those_of_the_papers(name: str, size: int, classes: int, millions: float) -> None:
    network = probe(build(name, classes), torch.zeros(1, 3, size, size))
    assert network.macs / 1e6 == pytest.approx(millions, abs=0.01)


def test_all_models_build_and_run() -> None:
    for name in MODELS:
        model = build(name, classes=5, in_channels=1, width=0.25).eval()
        assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 5)


def test_producers_follow_what_ran() -> None:
    network = probe(build("resnet20", 10), torch.zeros(1, 3, 32, 32))
    first, second = "blocks.0.body.0", "blocks.0.body.3"
    assert network["stem.0"].producers == ()
    assert network[first].producers == ("stem.0",)
    assert network[second].producers == (first,)
    # A channel at a residual add lives if any of its producers does.
    assert set(network["blocks.1.body.0"].producers) == {"stem.0", second}
    assert set(network["blocks.3.shortcut.0"].producers) >= {"stem.0", second}


def test_channels_that_mix_have_no_producers() -> None:
    class Cat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    assert probe(Cat(), torch.zeros(1, 3, 9, 9))["c"].producers == ()


def strided(x: Tensor) -> Tensor:
    """The shortcut of ResNets without projections."""
    return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))


@pytest.mark.parametrize(
    "join",
    [
        lambda x, y, net: y + x,
        lambda x, y, net: nn.functional.avg_pool2d(y, 2) + strided(net.first(x)),
        lambda x, y, net: y + net.up(net.first(x)),
        lambda x, y, net: y * net.one(x).sigmoid(),
        lambda x, y, net: checkpoint(nn.Sequential(net.same, nn.ReLU()), y, use_reentrant=True),
    ],
    ids=["input", "sliced", "transposed", "broadcast", "checkpointed"],
)
def test_channels_that_anything_else_adds_to_have_no_producers(join: Callable[..., Tensor]) -> None:
    """Those of a convolution alone would count a channel as gone that still carries the other's values."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.same, self.last = (nn.Conv2d(8, k, 3, padding=1) for k in (4, 8, 8))
            self.main, self.one = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 1, 1)
            self.up = nn.ConvTranspose2d(4, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(join(x, self.main(x), self))

    assert probe(Net(), torch.zeros(1, 8, 8, 8))["last"].producers == ()


def test_a_module_used_twice_costs_twice_and_the_model_is_left_as_it_was() -> None:
    conv, norm = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)
    model = nn.Sequential(conv, norm, conv).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    network = probe(model, torch.ones(1, 4, 5, 6))
    assert network.macs == 2 * (4 * 9) * 2 * (5 * 6)
    assert model.training
    assert norm.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert conv.weight.grad is None


def test_models_of_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.embedding = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Embedding(7, 4)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.b(self.a(x) * self.embedding(t)[:, :, None, None])

    network = probe(Two(), (torch.zeros(1, 3, 9, 9), torch.tensor([3])))
    assert network.macs == 4 * 9 * (3 * 49 + 4 * 25)
    assert network["b"].producers == ("a",)


def test_an_input_given_by_name_is_refused() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(input=x)

    with pytest.raises(ValueError, match="conv is given its input by name: give it by position"):
        probe(Named(), torch.zeros(1, 3, 9, 9))


def test_a_model_without_convolutions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no nn\.Conv2d ran in Linear on an input of shape \(1, 4\)"):
        probe(nn.Linear(4, 4), torch.zeros(1, 4))
