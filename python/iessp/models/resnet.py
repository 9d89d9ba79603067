"""ResNets (He et al., arXiv 1512.03385): the CIFAR form with 6n+2 layers and the ImageNet form."""

from __future__ import annotations

from torch import Tensor, nn


def _conv_bn(c: int, k: int, size: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(c, k, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(k)]


class Block(nn.Module):
    """relu(f(x) + shortcut(x)); `bottleneck` is 1x1, 3x3, 1x1 with four times the planes going out."""

    def __init__(self, c: int, planes: int, stride: int, bottleneck: bool):
        super().__init__()
        out = planes * (4 if bottleneck else 1)
        relu = nn.ReLU(inplace=True)
        if bottleneck:
            body = [
                *_conv_bn(c, planes, 1),
                relu,
                *_conv_bn(planes, planes, 3, stride),
                relu,
                *_conv_bn(planes, out, 1),
            ]
        else:
            body = [*_conv_bn(c, planes, 3, stride), relu, *_conv_bn(planes, planes, 3)]
        self.body = nn.Sequential(*body)
        same = stride == 1 and c == out
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv_bn(c, out, 1, stride))
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """x [N, in_channels, H, W] -> [N, classes]; a stem, stages of blocks that halve the map after the first,
    a mean, a linear."""

    def __init__(
        self, stem: nn.Module, channels: int, stages: list[tuple[int, int]], bottleneck: bool, classes: int
    ):
        super().__init__()
        blocks: list[nn.Module] = []
        for index, (planes, depth) in enumerate(stages):
            for i in range(depth):
                blocks.append(Block(channels, planes, 2 if index and not i else 1, bottleneck))
                channels = planes * (4 if bottleneck else 1)
        self.stem, self.blocks = stem, nn.Sequential(*blocks)
        self.pool, self.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.blocks(self.stem(x))).flatten(1))


def cifar_resnet(depth: int, classes: int = 10, in_channels: int = 3, width: float = 1.0) -> ResNet:
    """ResNet-20/32/56/110: three stages of (depth - 2) / 6 blocks on 32x32 images; projections where the
    shape changes."""
    planes = [max(1, round(width * c)) for c in (16, 32, 64)]
    stem = nn.Sequential(*_conv_bn(in_channels, planes[0], 3), nn.ReLU(inplace=True))
    return ResNet(stem, planes[0], [(p, (depth - 2) // 6) for p in planes], False, classes)


def imagenet_resnet(depth: int, classes: int = 1000, in_channels: int = 3, width: float = 1.0) -> ResNet:
    """ResNet-18/34/50 on 224x224 images."""
    depths = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}[depth]
    planes = [max(1, round(width * c)) for c in (64, 128, 256, 512)]
    stem = nn.Sequential(
        *_conv_bn(in_channels, planes[0], 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
    )
    return ResNet(stem, planes[0], list(zip(planes, depths, strict=True)), depth >= 50, classes)
