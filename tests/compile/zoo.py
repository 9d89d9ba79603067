"""Small networks with the shapes real ones have; masks that leave dead filters with lively constants."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import iessp
from iessp.models import build
from stripe_kernels import freeze
from stripe_kernels.compile import to_dense


def conv_bn(
    c: int, k: int, size: int = 3, act: type[nn.Module] | None = nn.ReLU, **kwargs: int
) -> nn.Sequential:
    """Convolution, norm, activation."""
    layers = [nn.Conv2d(c, k, size, padding=size // 2, bias=False, **kwargs), nn.BatchNorm2d(k)]
    return nn.Sequential(*layers, *([act()] if act else []))


class ClassicVGG(nn.Module):
    """Biases instead of norms, three linear layers over a flattened 2x3 map."""

    def __init__(self) -> None:
        super().__init__()
        relu = nn.ReLU(inplace=True)
        self.features = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), relu, nn.MaxPool2d(2),
            nn.Conv2d(12, 16, 3, padding=1), relu,
            nn.Conv2d(16, 20, 3, padding=1), relu, nn.MaxPool2d(2, ceil_mode=True),
        )  # fmt: skip
        self.head = nn.Sequential(
            nn.Linear(20 * 2 * 3, 24), relu, nn.Dropout(), nn.Linear(24, 24), nn.SiLU(), nn.Linear(24, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.head(x.view(x.size(0), -1))


class DenseNet(nn.Module):
    """Norm and activation before the convolution, outputs concatenated; a transition between two blocks."""

    def __init__(self, growth: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1, bias=False)
        self.blocks, c = nn.ModuleList(), 10
        for depth in (3, 2):
            layers = nn.ModuleList()
            for _ in range(depth):
                bottleneck = [
                    nn.BatchNorm2d(c),
                    nn.ReLU(),
                    nn.Conv2d(c, 16, 1, bias=False),
                    nn.BatchNorm2d(16),
                ]
                layers.append(
                    nn.Sequential(*bottleneck, nn.ReLU(), nn.Conv2d(16, growth, 3, padding=1, bias=False))
                )
                c += growth
            transition = nn.Sequential(
                nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c // 2, 1, bias=False), nn.AvgPool2d(2)
            )
            c //= 2
            self.blocks.append(nn.ModuleDict({"layers": layers, "transition": transition}))
        self.norm, self.head = nn.BatchNorm2d(c), nn.Linear(c, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            for layer in block["layers"]:
                x = torch.cat([x, layer(x)], 1)
            x = block["transition"](x)
        return self.head(F.adaptive_avg_pool2d(F.relu(self.norm(x)), 1).flatten(1))


class UNet(nn.Module):
    """Down, up by interpolation and by a transposed convolution, skips by concatenation; a map goes out."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = conv_bn(3, 10), conv_bn(10, 14), conv_bn(14, 18)
        self.pool, self.up = nn.MaxPool2d(2), nn.ConvTranspose2d(18, 8, 2, stride=2)
        self.four, self.five, self.out = conv_bn(8 + 14, 12), conv_bn(12 + 10, 9), nn.Conv2d(9, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.one(x)
        b = self.two(self.pool(a))
        c = self.three(self.pool(b))
        d = self.four(torch.cat((self.up(c), b), dim=1))
        d = F.interpolate(d, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(self.five(torch.cat([d, a], 1)))


class YoloNeck(nn.Module):
    """SiLU blocks, CSP splits, upsampling to the size of another map, three maps going out."""

    def __init__(self) -> None:
        super().__init__()
        self.p3, self.p4, self.p5 = (
            conv_bn(c, k, 3, nn.SiLU, stride=2) for c, k in ((3, 8), (8, 12), (12, 16))
        )
        self.reduce, self.lateral = conv_bn(16, 12, 1, nn.SiLU), conv_bn(24, 12, 3, nn.SiLU)
        self.left, self.right, self.join = (
            conv_bn(12, 6, 1, nn.SiLU),
            conv_bn(6, 6, 3, nn.SiLU),
            conv_bn(12, 10, 1, nn.SiLU),
        )
        self.down = conv_bn(10, 12, 3, nn.SiLU, stride=2)
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.heads = nn.ModuleList(nn.Conv2d(c, 7, 1) for c in (8, 10, 24))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        p3 = self.p3(x)
        p4 = self.p4(p3)
        p5 = self.reduce(self.pool(self.p5(p4)))
        up = self.lateral(torch.cat([F.interpolate(p5, size=p4.shape[2:], mode="nearest"), p4], 1))
        first, second = up.chunk(2, 1)
        csp = self.join(torch.cat([second + self.right(first), self.left(up)], 1))
        return self.heads[0](p3), self.heads[1](csp), self.heads[2](torch.cat([self.down(csp), p5], 1))


class SqueezeExcite(nn.Module):
    """A residual block whose body is gated by a squeeze, once of 1x1 convolutions, once of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv_bn(3, 12, 3, nn.Hardswish), conv_bn(12, 16, 3, nn.Hardswish)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1), nn.Hardsigmoid()
        )
        self.project = conv_bn(16, 12, 3, None)
        self.squeeze, self.excite = nn.Linear(12, 6), nn.Linear(6, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.body(x)
        x = x + self.project(y * self.gate(y))
        b, c, _, _ = x.size()
        s = self.excite(F.relu(self.squeeze(x.mean((2, 3))))).sigmoid().view(b, c, 1, 1)
        return self.head((x * s).mean([2, 3]))


class Lopsided(nn.Module):
    """Strides (2, 1), dilation, rectangles, "same", other padding modes, groups, a shared convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(1, 0))
        self.two = nn.Conv2d(8, 8, 3, padding="same", dilation=(2, 1))
        self.shared = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.three = nn.Conv2d(12, 6, (1, 3), padding=(0, 1), padding_mode="circular")
        self.norm = nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.two(F.relu(self.one(x))))
        y = self.shared(x)
        y += x
        y = F.relu6(self.shared(F.silu(y)))
        y = F.leaky_relu(self.norm(self.depthwise(F.relu(self.grouped(y)))))
        return self.three(F.avg_pool2d(y, 2) * 0.5 + 1)


class InPlace(nn.Module):
    """A tensor overwritten by an activation and read again afterwards, through a module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        y = self.two(self.relu(x))
        self.relu(y)
        return x + y


class Cross(nn.Module):
    """Parts of a map in a list that grows, one of them written in place; named arguments; what split returns joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = conv_bn(3, 12), conv_bn(6, 6, 3, nn.SiLU), conv_bn(6, 6, 3, nn.SiLU)
        self.join, self.relu = nn.Conv2d(24, 10, 1), nn.ReLU()
        self.last = nn.Conv2d(10, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.stem(x).chunk(2, 1))
        parts.extend(layer(parts[-1]) for layer in (self.one, self.two))
        mean = parts[0]
        mean += 1
        mean *= 0.5
        x = self.relu(input=self.join(input=torch.cat(tensors=parts, dim=1)))
        height = width = x.shape[2]
        height //= 2
        x = torch.cat(x.split(5, 1), 1)
        return F.interpolate(self.last(x), size=(height, width))


class Reader(nn.Module):
    """A text line's columns through a recurrent layer, whose tuple is taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn(3, 12), conv_bn(12, 10))
        self.columns = nn.LSTM(10, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, (h, _) = self.columns(self.features(x).mean(2).transpose(1, 2))
        return self.head(y), h[-1]


Net = Callable[[], nn.Module]
NETS: dict[str, tuple[Net, tuple[int, int]]] = {
    "vgg16": (lambda: build("vgg16", classes=10, width=0.25), (32, 32)),
    "resnet18": (lambda: build("resnet18", classes=10, width=0.25), (48, 40)),
    "resnet20": (lambda: build("resnet20", classes=10), (16, 20)),
    "resnet50": (lambda: build("resnet50", classes=10, width=0.125), (33, 35)),
    "resnet56": (lambda: build("resnet56", classes=10, width=0.5), (16, 16)),
    "mobilenetv2": (lambda: build("mobilenetv2", classes=10, width=0.5), (40, 33)),
    "classic_vgg": (ClassicVGG, (8, 11)),
    "densenet": (DenseNet, (17, 12)),
    "unet": (UNet, (12, 20)),
    "yolo_neck": (YoloNeck, (32, 24)),
    "squeeze_excite": (SqueezeExcite, (9, 11)),
    "lopsided": (Lopsided, (15, 14)),
    "in_place": (InPlace, (7, 9)),
    "cross": (Cross, (8, 9)),
    "reader": (Reader, (9, 14)),
}


def lively(model: nn.Module) -> nn.Module:
    """Norms and biases with a life of their own: their constants survive a dead filter. Evaluation mode."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(0.1, 0.5)
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
        elif isinstance(m, nn.Conv2d) and m.bias is not None:
            m.bias.data.normal_(0.1, 0.5)
    return model.eval()


def learned(name: str, budget: float = 0.4) -> tuple[nn.Module, nn.Module, Tensor]:
    """As `masked`, with skeletons that gates learned in a few steps: unlike random ones they kill whole filters."""
    torch.manual_seed(0)
    make, size = NETS[name]
    gated = iessp.attach(lively(make()).train())
    gates = iessp.gates(gated)
    for gate in gates.values():
        gate.phase = "learn"
    steps = torch.optim.SGD(gated.parameters(), lr=0.02)
    for _ in range(3):
        x, wanted = torch.randn(4, 3, *size), torch.arange(4)
        steps.zero_grad()
        F.cross_entropy(gated(x), wanted).backward()
        steps.step()
    iessp.settle(gated, budget)
    frozen = iessp.freeze(gated.eval())
    model = lively(make())
    plain = to_dense(frozen)
    model.load_state_dict(plain.state_dict())
    return model.eval(), frozen, torch.randn(2, 3, *size)


def masked(
    name: str, density: float, dead: float = 0.3, seed: int = 0
) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network with random stripes zeroed and a share of its filters dead, the same frozen, and an input."""
    torch.manual_seed(seed)
    make, size = NETS[name]
    model = lively(make())
    skeletons: dict[str, Tensor] = {}
    for module_name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            live = torch.rand(m.out_channels, *m.kernel_size) < density
            live[torch.rand(m.out_channels) < dead] = False
            m.weight.data.mul_(live[:, None])
            skeletons[module_name] = live
    return model, freeze(model, skeletons), torch.randn(2, 3, *size)


def small() -> tuple[nn.Module, Tensor]:
    """Two frozen convolutions and their input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2)).eval()
    skeletons = {
        n: torch.rand(m.out_channels, 3, 3) < 0.4
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    }
    return freeze(model, skeletons), torch.randn(2, 4, 9, 8)
