"""MobileNetV2 (Sandler et al., arXiv 1801.04381), ImageNet form."""

from __future__ import annotations

from torch import Tensor, nn

STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _conv(c: int, k: int, size: int, stride: int = 1, groups: int = 1, relu: bool = True) -> list[nn.Module]:
    layers = [nn.Conv2d(c, k, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(k)]
    return [*layers, nn.ReLU6(inplace=True)] if relu else layers


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 projection without activation; a shortcut where the shape stays."""

    def __init__(self, c: int, k: int, stride: int, expansion: int):
        super().__init__()
        wide = c * expansion
        expand = _conv(c, wide, 1) if expansion > 1 else []
        self.body = nn.Sequential(
            *expand, *_conv(wide, wide, 3, stride, wide), *_conv(wide, k, 1, relu=False)
        )
        self.shortcut = stride == 1 and c == k

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.shortcut else self.body(x)


class MobileNetV2(nn.Module):
    """x [N, in_channels, H, W] -> [N, classes]."""

    def __init__(self, classes: int = 1000, in_channels: int = 3, width: float = 1.0):
        super().__init__()

        def planes(c: int) -> int:
            return max(8, int(c * width + 4) // 8 * 8)

        channels = planes(32)
        layers = _conv(in_channels, channels, 3, 2)
        for expansion, c, depth, stride in STAGES:
            for i in range(depth):
                layers.append(InvertedResidual(channels, planes(c), 1 if i else stride, expansion))
                channels = planes(c)
        last = max(1280, planes(1280))
        self.features = nn.Sequential(*layers, *_conv(channels, last, 1))
        self.pool, self.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))
