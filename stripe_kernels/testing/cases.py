"""Named lopsided problems and their operands in every dtype and memory layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stripe_kernels.geometry import ConvShape
from stripe_kernels.skeleton import FilterSkeleton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that every kernel takes; a few take float64 too
PATTERNS = ("random", "full", "empty", "one stripe", "one tap", "dead filters", "borders")


def live_stripes(pattern: str, size: tuple[int, int, int], density: float, seed: int) -> FilterSkeleton:
    """Which stripes of [K, R, S] live; `density` has a say in the random patterns."""
    generator = np.random.default_rng(seed)
    k, r, s = np.indices(size)
    tap, taps = r * size[2] + s, size[1] * size[2]
    random = generator.random(size) < density
    live = {
        "random": random,
        "full": k >= 0,
        "empty": k < 0,
        "one stripe": k * taps + tap == generator.integers(math.prod(size)),
        "one tap": tap == generator.integers(taps),
        "dead filters": random & (k % 3 == 1),
        "borders": random & ((r != size[1] // 2) | (s != size[2] // 2)),
    }
    return FilterSkeleton(live[pattern])


class Operands(NamedTuple):
    """Tensors of one case: what the three passes read."""

    x: Tensor  # [N, C, H, W]
    weight: Tensor  # [A, C/groups]
    dy: Tensor  # [N, K, P, Q]
    bias: Tensor  # [K]
    scale: Tensor  # [K]
    residual: Tensor  # [N, K, P, Q]


@dataclass(frozen=True)
class Case:
    """One convolution and its skeleton, reproducible from this line alone."""

    name: str
    shape: ConvShape
    density: float = 0.4
    pattern: str = "random"
    seed: int = 0

    @property
    def skeleton(self) -> FilterSkeleton:
        size = (self.shape.K, self.shape.R, self.shape.S)
        return live_stripes(self.pattern, size, self.density, self.seed)

    @property
    def arguments(self) -> tuple[str, tuple[int, int], tuple[int, int, int, int], tuple[int, int], int]:
        """What StripeOp and the operators take before the kernel's name."""
        s = self.shape
        return self.skeleton.text, s.stride, s.padding, s.dilation, s.groups

    def operands(
        self,
        dtype: torch.dtype = torch.float32,
        layout: str = "contiguous",
        device: str = "cpu",
        draw: int = 0,
    ) -> Operands:
        """Normal values of variance 1, the weight's such that y has it too; maps lie in `layout`. Each `draw`
        has values of its own."""
        s = self.shape
        # The generator takes 32 bits; seeds of cases are small, so that draws of like cases do not coincide.
        generator = torch.Generator().manual_seed((self.seed + (draw << 16)) & 0xFFFFFFFF)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)

        stripes = self.skeleton.stripes
        fan_in = max(1.0, stripes / s.K) * s.group_c
        weight = normal(stripes, s.group_c) / math.sqrt(fan_in)
        x, dy, residual = (normal(*size) for size in (s.input_size, s.output_size, s.output_size))
        lay = LAYOUTS[layout]
        return Operands(lay(x), weight, lay(dy), normal(s.K), normal(s.K), lay(residual))

    def batch(self, images: int) -> Case:
        """The same case with another N."""
        return replace(self, shape=replace(self.shape, N=images))


def case(
    name: str,
    *,
    N: int = 3,
    C: int = 8,
    H: int = 7,
    W: int = 7,
    K: int = 8,
    R: int = 3,
    S: int = 3,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, ...] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    density: float = 0.4,
    pattern: str = "random",
    seed: int = 0,
) -> Case:
    """A case from its sizes. `padding` is (height, width) or (top, left, bottom, right)."""
    top, left, bottom, right = (*padding, *padding)[:4]
    shape = ConvShape(N, C, H, W, K, R, S, stride, (top, left, bottom, right), dilation, groups)
    return Case(name, shape, density, pattern, seed)


CASES: dict[str, Case] = {
    c.name: c
    for c in (
        case("lopsided", N=3, C=5, H=9, W=7, K=11, R=3, S=2, stride=(2, 1), padding=(1, 0), dilation=(2, 1)),
        case("grouped", N=5, C=6, H=7, W=10, K=14, padding=(1, 1), groups=2),
        case("grouped lopsided", N=2, C=10, H=11, W=6, K=6, R=2, stride=(1, 2), padding=(0, 2), groups=2),
        case("depthwise", N=2, C=7, H=9, W=8, K=14, groups=7),
        case("no image", N=0, C=5, H=6, W=5, K=7),
        case("one image", N=1, C=19, H=13, W=11, K=23, density=0.3),
        case("batch of a prime", N=19, C=17, H=5, W=3, K=13),
        case("batch of vectors", N=33, C=8, H=2, W=2, K=19),
        case("tiny map", N=5, C=33, H=1, W=2, K=9),
        case("pointwise", N=2, C=17, H=5, W=3, K=9, R=1, S=1, padding=(0, 0), density=0.6),
        case("pointwise strided", N=3, C=9, H=8, W=7, K=9, R=1, S=1, stride=(2, 3), padding=(0, 0)),
        case("strided", N=7, C=4, H=8, W=5, K=10, stride=(2, 2)),
        case("stride beyond the filter", N=2, C=3, H=11, W=13, K=5, R=2, S=2, stride=(3, 4), padding=(0, 1)),
        case("wide padding", N=2, C=3, H=4, W=3, K=6, R=2, stride=(3, 1), padding=(3, 4), dilation=(1, 2)),
        case("padding wider than the map", N=2, C=3, H=2, W=1, K=5, R=5, S=4, padding=(4, 5), density=0.5),
        case("uneven padding", N=2, C=6, H=6, W=9, K=7, R=4, S=2, padding=(1, 0, 2, 1)),
        case("uneven dilated", N=3, C=5, H=8, W=7, K=6, R=2, S=4, padding=(1, 4, 2, 5), dilation=(3, 3)),
        case("row filter", N=3, C=6, H=4, W=17, K=9, R=1, S=7, padding=(0, 3)),
        case("column filter", N=3, C=6, H=17, W=4, K=9, R=5, S=1, padding=(2, 0), stride=(2, 1)),
        case("filter as large as the map", N=4, C=6, H=5, W=4, K=9, R=5, S=4, padding=(0, 0)),
        case("dilated", N=2, C=7, H=12, W=9, K=8, padding=(2, 3), dilation=(2, 3)),
        case("narrower than the stride", N=9, C=3, H=7, W=1, K=5, R=2, S=2, stride=(2, 2)),
        case("rows never read", N=2, C=3, H=10, W=10, K=4, R=2, S=2, stride=(4, 4), padding=(0, 0)),
        case("one channel", N=3, C=1, H=9, W=9, K=17),
        case("one filter", N=3, C=9, H=9, W=6, K=1, density=0.7),
        case("wide row", N=1, C=3, H=3, W=211, K=5),
        case("many channels", N=2, C=130, H=7, W=6, K=67, density=0.15),
        case("full", N=2, C=8, H=6, W=7, K=9, pattern="full"),
        case("empty", N=2, C=8, H=6, W=7, K=9, pattern="empty"),
        case("empty, no image", N=0, C=8, H=6, W=7, K=9, pattern="empty"),
        case("one stripe", N=3, C=8, H=6, W=7, K=9, pattern="one stripe"),
        case("one tap", N=3, C=8, H=6, W=7, K=9, pattern="one tap"),
        case("one tap strided", N=3, C=8, H=6, W=7, K=9, pattern="one tap", stride=(2, 3), seed=3),
        case("dead filters", N=3, C=8, H=6, W=7, K=10, pattern="dead filters", density=0.7),
        case("borders only", N=17, C=8, H=3, W=3, K=10, pattern="borders", density=0.5),
    )
}  # fmt: skip


def _into(storage: Tensor, t: Tensor) -> Tensor:
    """t's values in the memory of `storage`, a view of t's shape."""
    return storage.copy_(t)


# The same values in the memory layouts a caller may bring; "expanded" repeats the first channel instead.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: _into(
        t.new_full((t.shape[0] + 1, t.shape[1] * 2 + 1, t.shape[2] + 3, t.shape[3] * 2 + 2), math.nan)[
            1:, 1::2, 2:-1, 1:-1:2
        ], t
    ),
    "channels_last sliced": lambda t: _into(
        t.new_full((t.shape[0], t.shape[2] + 1, t.shape[3] + 2, t.shape[1] + 3), math.nan)
        .permute(0, 3, 1, 2)[:, 2:-1, 1:, 1:-1], t
    ),
    "expanded": lambda t: t[:1, :1].expand(t.shape) if t.numel() else t,
    "offset": lambda t: _into(t.new_full((t.numel() + 1,), math.nan)[1:].view(t.shape), t),
}  # fmt: skip
