"""The networks of the recipes, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from iessp.attach import nearest
from iessp.factory import make
from iessp.models.mobilenet import MobileNetV2
from iessp.models.resnet import cifar_resnet, imagenet_resnet
from iessp.models.vgg import VGG

MODELS: dict[str, Callable[..., nn.Module]] = {
    "vgg16": VGG,
    "vgg10": partial(VGG, stages=4),
    **{f"resnet{depth}": partial(cifar_resnet, depth) for depth in (20, 32, 56, 110)},
    **{f"resnet{depth}": partial(imagenet_resnet, depth) for depth in (18, 34, 50)},
    "mobilenetv2": MobileNetV2,
}


def own(name: str) -> bool:
    """Whether `name` is of a user's factory and none of MODELS."""
    return ":" in name or name.endswith(".py")


def build(name: str, classes: int, in_channels: int = 3, width: float = 1.0) -> nn.Module:
    """A freshly initialised network taking [N, in_channels, H, W]; raises ValueError for an unknown name
    or a width that is not positive.

    A user's own (`own`, see `iessp.factory`) has one width, and its classes and channels are its own affair.
    """
    if not width > 0:
        raise ValueError(f"width must be positive, got {width}")
    if own(name):
        if width != 1.0:
            raise ValueError(f"{name} has one width, got {width}: only the built-in networks have others")
        return make(name)[0]
    if name not in MODELS:
        raise ValueError(nearest("model", name, MODELS))
    return MODELS[name](classes=classes, in_channels=in_channels, width=width)


__all__ = ["MODELS", "build", "own"]
