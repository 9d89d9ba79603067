"""The convolution problem in the field's letters: input N C H W, filters K R S, output P Q."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import SupportsIndex

IntPair = tuple[int, int]


def as_int(value: SupportsIndex, name: str, wanted: str = "an int") -> int:
    """The int that `value` is, numpy's among them; TypeError for a bool and whatever else is none."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} must be {wanted}, got {value!r}")


def pair(value: int | tuple[int, ...] | list[int], name: str, least: int) -> IntPair:
    """An int or a pair of ints, each at least `least`; ValueError or TypeError otherwise."""
    wanted = "an int or a pair of ints"
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(values) not in (1, 2):
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    first, last = (as_int(v, name, wanted) for v in (values[0], values[-1]))
    if min(first, last) < least:
        raise ValueError(f"{name} must be at least {least} in each direction, got {value!r}")
    return first, last


def resolve_padding(
    padding: str | int | tuple[int, ...], kernel_size: IntPair, stride: IntPair, dilation: IntPair
) -> tuple[int, int, int, int]:
    """Padding as (top, left, bottom, right), from an int, a pair, "valid" or "same" (as torch splits it)."""
    if isinstance(padding, str):
        if padding == "valid":
            return 0, 0, 0, 0
        if padding != "same":
            raise ValueError(f"padding must be 'same', 'valid', an int or a pair of ints, got {padding!r}")
        if stride != (1, 1):
            raise ValueError(f"padding='same' is not supported for strided convolutions, got stride {stride}")
        total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        return total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2
    top, left = pair(padding, "padding", 0)
    return top, left, top, left


@dataclass(frozen=True)
class ConvShape:
    """One convolution's sizes. `padding` is (top, left, bottom, right) in pixels; `groups` divides C and K."""

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: IntPair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: IntPair = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        if self.groups < 1 or self.C % self.groups or self.K % self.groups:
            raise ValueError(
                f"groups={self.groups} must divide C={self.C} input channels and K={self.K} filters"
            )
        for extent, padded, tap, name in (
            (
                self.H,
                self.H + self.padding[0] + self.padding[2],
                self.dilation[0] * (self.R - 1) + 1,
                "height",
            ),
            (
                self.W,
                self.W + self.padding[1] + self.padding[3],
                self.dilation[1] * (self.S - 1) + 1,
                "width",
            ),
        ):
            if extent and padded < tap:
                raise RuntimeError(
                    f"the filter is larger than the padded input: {name} {extent} + padding = {padded} < {tap} "
                    f"(filter {self.R}x{self.S}, dilation {self.dilation})"
                )
            if extent < 1:
                raise RuntimeError(
                    f"the input has {name} 0: [N, C, H, W] = {[self.N, self.C, self.H, self.W]}"
                )

    @property
    def P(self) -> int:
        return (
            self.H + self.padding[0] + self.padding[2] - self.dilation[0] * (self.R - 1) - 1
        ) // self.stride[0] + 1

    @property
    def Q(self) -> int:
        return (
            self.W + self.padding[1] + self.padding[3] - self.dilation[1] * (self.S - 1) - 1
        ) // self.stride[1] + 1

    @property
    def taps(self) -> int:
        return self.R * self.S

    @property
    def group_c(self) -> int:
        return self.C // self.groups

    @property
    def group_k(self) -> int:
        return self.K // self.groups

    @property
    def input_size(self) -> tuple[int, int, int, int]:
        return self.N, self.C, self.H, self.W

    @property
    def output_size(self) -> tuple[int, int, int, int]:
        return self.N, self.K, self.P, self.Q

    def tap(self, r: int, s: int) -> int:
        """Number of the tap in row r, column s of the filter."""
        return r * self.S + s

    def idle_column(self) -> bool:
        """Whether a stride beyond 1 leaves a column of the filter that meets the image in no output pixel: 1x3 on
        one pixel with padding 1 and stride 2."""
        shape = self.W, self.Q, self.stride[1], self.padding[1]
        return self.stride[1] > 1 and not all(_inside(*shape, c * self.dilation[1]) for c in range(self.S))

    def macs(self, stripes: int) -> int:
        """Multiply-adds of `stripes` live stripes, out-of-image taps counted (as is usual)."""
        return self.N * self.P * self.Q * stripes * self.group_c

    def taps_inside(self) -> float:
        """Taps of an output pixel that fall inside the image, on average: 3x3 on 4x4 with padding 1 has 6.25 of 9."""

        def reach(size: int, out: int, taps: int, stride: int, pad: int, dilation: int) -> float:
            return sum(_inside(size, out, stride, pad, t * dilation) for t in range(taps)) / max(out, 1)

        rows = reach(self.H, self.P, self.R, self.stride[0], self.padding[0], self.dilation[0])
        return rows * reach(self.W, self.Q, self.S, self.stride[1], self.padding[1], self.dilation[1])


def _inside(size: int, out: int, stride: int, pad: int, offset: int) -> int:
    """How many i in [0, out) have i * stride + offset - pad in [0, size); arithmetic, since `out` may be anything."""
    start = pad - offset
    first, end = -(-start // stride), -(-(start + size) // stride)
    return max(0, min(end, out) - max(first, 0))
