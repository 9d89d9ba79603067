"""Random graphs of the operations the passes know, half the filters dead: rewriting changes no function."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stripe_kernels import freeze
from stripe_kernels.compile.optimize import compact, in_channels_last
from tests.compile.test_compact import assert_same
from tests.compile.zoo import lively

ACTIVATIONS = (F.relu, F.relu6, F.silu, F.hardswish, torch.sigmoid, F.leaky_relu, lambda x: x * 0.5 + 0.3)
STEPS = "conv conv conv conv norm act act sum product cat pool gate slope border"
BORDERS = (nn.ZeroPad2d(1), nn.ConstantPad2d(1, 0.3), nn.ReflectionPad2d(1))


class Random(nn.Module):
    """A drawn list of steps over a stack of maps; all maps keep one size, so that any two may meet."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, tuple[int, ...], int]] = []  # what, which maps, layer or function
        channels = [3]
        for _ in range(rng.randint(6, 14)):
            what = rng.choice(STEPS.split())
            one = rng.randrange(max(0, len(channels) - 3), len(channels))
            twins = [i for i, c in enumerate(channels) if c == channels[one] and i != one]
            c = channels[one]
            if what == "conv":
                channels.append(self.conv(rng, c))
                self.steps.append((what, (one,), len(self.layers) - 1))
            elif what in ("norm", "slope"):
                slopes = rng.choice((1, c))
                self.layers.append(nn.BatchNorm2d(c) if what == "norm" else nn.PReLU(slopes, rng.random()))
                self.steps.append((what, (one,), len(self.layers) - 1))
                channels.append(c)
            elif what == "gate":
                self.layers.append(nn.Sequential(nn.Linear(c, 4), nn.ReLU(), nn.Linear(4, c)))
                self.steps.append((what, (one,), len(self.layers) - 1))
                channels.append(c)
            elif what in ("sum", "product"):
                if twins:
                    self.steps.append((what, (one, rng.choice(twins)), 0))
                    channels.append(c)
            elif what == "cat":
                other = rng.randrange(len(channels))
                self.steps.append((what, (one, other), 0))
                channels.append(c + channels[other])
            else:
                self.steps.append((what, (one,), rng.randrange(len(ACTIVATIONS) if what == "act" else 3)))
                channels.append(c)
        self.last = nn.Conv2d(channels[-1], 5, 3, padding=rng.randrange(2))
        self.head = nn.Linear(sum(channels[-2:]), 4)

    def conv(self, rng: random.Random, c: int) -> int:
        size = rng.choice(((1, 1), (3, 3), (3, 1), (5, 3)))
        padding = (size[0] // 2, size[1] // 2)
        groups = rng.choice((1, 1, 1, c, 2 if c % 2 == 0 else 1))
        k = c if groups == c else rng.choice((4, 6, 8))
        mode = rng.choice(("zeros", "zeros", "zeros", "reflect", "circular"))
        bias = mode != "reflect" and rng.random() < 0.8
        settings = {"padding": padding, "groups": groups, "bias": bias, "padding_mode": mode}
        self.layers.append(nn.Conv2d(c, k, size, **settings))
        return k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = [x]
        for what, which, index in self.steps:
            a, b = maps[which[0]], maps[which[-1]]
            if what in ("conv", "norm", "slope"):
                y = self.layers[index](a)
            elif what == "act":
                y = ACTIVATIONS[index](a)
            elif what == "sum":
                y = a + b
            elif what == "product":
                y = a * b
            elif what == "cat":
                y = torch.cat([a, b], 1)
            elif what == "gate":
                gate = torch.sigmoid(self.layers[index](a.mean((2, 3))))
                y = a * gate.view(a.size(0), -1, 1, 1)
            elif what == "border":
                y = BORDERS[index](a) if index else F.pad(a, (1, 1, 1, 1), value=0.2)
                y = F.max_pool2d(y, 3, 1)
            else:
                pools = (F.max_pool2d, F.avg_pool2d, F.max_pool2d)
                y = pools[index](a, 3, 1, 0 if index == 1 else 1)
                y = F.interpolate(y, size=x.shape[2:]) if index == 1 else y
            maps.append(y)
        flat = torch.flatten(F.adaptive_avg_pool2d(torch.cat(maps[-2:], 1), 1), 1)
        return self.last(maps[-1]), self.head(flat)


@pytest.mark.parametrize("seed", range(40))
def test_rewriting_never_changes_the_function(seed: int) -> None:
    torch.manual_seed(seed)
    model = lively(Random(seed))
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            live = torch.rand(m.out_channels, *m.kernel_size) < 0.4
            live[torch.rand(m.out_channels) < 0.5] = False
            m.weight.data.mul_(live[:, None])
    x = torch.randn(2, 3, 7, 6)
    network = compact(freeze(model), (x,))
    inputs = [x, torch.randn(3, 3, 9, 12), torch.randn(16, 3, 7, 6)]
    assert_same(model, network, inputs)
    assert_same(model, in_channels_last(network), inputs[:2])
