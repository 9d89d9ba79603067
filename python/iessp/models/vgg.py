"""VGG-16 with batch normalisation, CIFAR form (Simonyan & Zisserman, arXiv 1409.1556; one linear layer, no
biases before BN)."""

from __future__ import annotations

from torch import Tensor, nn

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """Thirteen 3x3 convolutions in five stages, pooled between; x [N, in_channels, H, W] with H, W >= 16 ->
    [N, classes].

    Without its last pooling layer (a global mean stands in for it) it also takes 16x16 images; MACs at 32x32
    are the usual 313 M. stages: only the first so many; with four, 16x16 images end in maps of 2x2, as 32x32 images
    do with five.
    """

    def __init__(
        self, classes: int = 10, in_channels: int = 3, width: float = 1.0, stages: int = len(STAGES)
    ):
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for stage in STAGES[:stages]:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for planes in (max(1, round(width * c)) for c in stage):
                layers += [
                    nn.Conv2d(channels, planes, 3, padding=1, bias=False),
                    nn.BatchNorm2d(planes),
                    nn.ReLU(inplace=True),
                ]
                channels = planes
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))
