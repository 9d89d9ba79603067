"""Named layers: the convolutions of real networks, each shape once, and their names.

    vgg16/64-128@16x16               C-K@HxW of a 3x3 convolution with padding 1
    resnet18/64-128@56x56/2          stride 2
    resnet50/256-64@56x56k1          a 1x1 filter; k7x7 is the stem's
    mobilenetv2/96-96@112x112g96/2   groups

All of vgg16 are `vgg16/*`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import nn

from iessp.models import build
from stripe_kernels import FilterSkeleton
from stripe_kernels.testing import Case, case

# Networks of iessp by name: classes, input height and width.
NETWORKS = {
    "vgg16": (10, 32),
    "resnet56": (10, 32),
    "resnet18": (1000, 224),
    "resnet50": (1000, 224),
    "mobilenetv2": (1000, 224),
}
BATCHES = (1, 8, 32, 128)
DENSITIES = (1.0, 0.75, 0.5, 0.3, 0.24, 0.1, 0.05)

# The default of `python -m bench`: large and small maps, few and many channels.
QUICK = (
    "vgg16/64-64@32x32",
    "vgg16/256-256@8x8",
    "vgg16/512-512@2x2",
    "resnet18/128-128@28x28",
    "resnet18/256-256@14x14",
    "resnet56/32-32@16x16",
)
QUICK_BATCHES = (1, 32)
QUICK_DENSITIES = (0.5, 0.24, 0.1)


@dataclass(frozen=True)
class LayerCase(Case):
    """A case of stripe_kernels.testing with a skeleton from elsewhere."""

    live: FilterSkeleton = field(default_factory=lambda: FilterSkeleton.full(1, 1, 1))

    @property
    def skeleton(self) -> FilterSkeleton:
        return self.live


@dataclass(frozen=True)
class Layer:
    """One convolution shape, and which modules of its network have it. Padding is (height, width)."""

    network: str
    C: int
    K: int
    H: int
    W: int
    R: int = 3
    S: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)
    groups: int = 1
    modules: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        filters = {(3, 3): "", (1, 1): "k1"}.get((self.R, self.S), f"k{self.R}x{self.S}")
        groups = f"g{self.groups}" if self.groups > 1 else ""
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return f"{self.network}/{self.C}-{self.K}@{self.H}x{self.W}{filters}{groups}{stride}"

    @property
    def filter_size(self) -> tuple[int, int, int]:
        return self.K, self.R, self.S

    def case(self, batch: int, live: FilterSkeleton) -> LayerCase:
        """The layer as a test case for `batch` images."""
        base = case(
            self.name, N=batch, C=self.C, H=self.H, W=self.W, K=self.K, R=self.R, S=self.S,
            stride=(self.stride, self.stride), padding=self.padding, groups=self.groups,
        )  # fmt: skip
        return LayerCase(base.name, base.shape, live.density, "given", 0, live)


def _of_network(network: str) -> list[Layer]:
    """Every convolution shape of a network, in order; read off a pass over shapes alone."""
    classes, size = NETWORKS[network]
    with torch.device("meta"):
        model, x = build(network, classes).eval(), torch.empty(1, 3, size, size)
    found: dict[Layer, list[str]] = {}

    def record(name: str, conv: nn.Conv2d, x: torch.Tensor) -> None:
        (h, w), (r, s) = x.shape[2:], conv.kernel_size
        layer = Layer(
            network,
            conv.in_channels,
            conv.out_channels,
            h,
            w,
            r,
            s,
            conv.stride[0],
            conv.padding,
            conv.groups,
        )
        found.setdefault(layer, []).append(name)

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda m, args, name=name: record(name, m, args[0]))
    model(x)
    return [replace(layer, modules=tuple(names)) for layer, names in found.items()]


def _yolo() -> list[Layer]:
    """Convolutions of the kind one-stage detectors are made of, 640x640 input: strided 3x3 that halve the
    map, 3x3 inside bottlenecks, 1x1 that join branches; sizes in the manner of YOLOv5 and v8."""
    return [
        Layer("yolo", 32, 64, 320, 320, stride=2),
        Layer("yolo", 32, 32, 160, 160),
        Layer("yolo", 64, 128, 160, 160, stride=2),
        Layer("yolo", 64, 64, 80, 80),
        Layer("yolo", 128, 256, 80, 80, stride=2),
        Layer("yolo", 128, 128, 40, 40),
        Layer("yolo", 256, 512, 40, 40, stride=2),
        Layer("yolo", 256, 256, 20, 20),
        Layer("yolo", 512, 256, 20, 20, 1, 1, padding=(0, 0)),
        Layer("yolo", 192, 96, 80, 80),
    ]


@lru_cache(maxsize=1)
def layers() -> dict[str, Layer]:
    """Every named layer."""
    every = [layer for network in NETWORKS for layer in _of_network(network)] + _yolo()
    return {layer.name: layer for layer in every}


def select(patterns: Iterable[str]) -> list[Layer]:
    """Layers whose name fits one of the shell patterns; ValueError for a pattern that fits none."""
    chosen: dict[str, Layer] = {}
    for pattern in patterns:
        names = fnmatch.filter(layers(), pattern)
        if not names:
            raise ValueError(f"no layer is called {pattern!r}; there are {', '.join(layers())}")
        chosen |= {name: layers()[name] for name in names}
    return list(chosen.values())
