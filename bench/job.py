"""A job: one layer, batch, skeleton, dtype, pass and number of threads; its operands, oracle and work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.layers import Layer, LayerCase
from stripe_kernels import FilterSkeleton
from stripe_kernels.testing import Budgets, Case, Operands, budgets

Pass = Literal["fprop", "dgrad", "wgrad", "step"]
PASSES: tuple[Pass, ...] = ("fprop", "dgrad", "wgrad", "step")
Kind = Literal["stripe", "dense", "slim", "paper"]


class Refused(Exception):
    """A contestant cannot run this job; the message is the reason."""


@dataclass(frozen=True)
class Entrant:
    """A contestant made ready for one job.

    check() gives None or what is wrong with its result. macs: multiply-adds it has to do inside the image.
    """

    kind: Kind
    call: Callable[[], object]
    check: Callable[[], str | None]
    macs: float


def checked_images(batch: int, most: int = 4) -> list[int]:
    """The images an oracle looks at, first and last among them: y and dx of an image depend on it alone."""
    return sorted({round(i) for i in np.linspace(0, batch - 1, most)})


def scattered(weight: Tensor, skeleton: Tensor) -> Tensor:
    """Live stripes [A, C/groups] as a dense filter [K, C/groups, R, S] with zeros."""
    dense = weight.new_zeros(*skeleton.shape, weight.shape[1])
    dense[skeleton] = weight
    return dense.permute(0, 3, 1, 2).contiguous()


class Oracle:
    """Error budgets of one convolution (stripe_kernels.testing), computed when first asked for.

    y and dx are compared on `checked_images` and searched everywhere for values that are not finite; dw is
    compared as a whole.
    """

    def __init__(self, case: Case, operands: Operands) -> None:
        self.case, self.operands = case, operands
        self.images = checked_images(case.shape.N)

    @cached_property
    def _sampled(self) -> Budgets:
        o = self.operands
        some = Operands(o.x[self.images], o.weight, o.dy[self.images], o.bias, o.scale, o.residual[:0])
        return budgets(self.case.batch(len(self.images)), some)

    @cached_property
    def _whole(self) -> Budgets:
        return budgets(self.case, self.operands)

    def wrong(
        self, y: Tensor | None = None, dx: Tensor | None = None, dw: Tensor | None = None
    ) -> str | None:
        """What is wrong with y [N, K, P, Q], dx [N, C, H, W], dw [A, C/groups]; None within their budgets."""
        shape = self.case.shape
        for name, t, size in (("y", y, shape.output_size), ("dx", dx, shape.input_size)):
            if t is None:
                continue
            if tuple(t.shape) != size:
                return f"{name} is {list(t.shape)}, expected {list(size)}"
            if not torch.isfinite(t).all():
                return f"{name} has {int((~torch.isfinite(t)).sum())} values that are not finite"
            failure = getattr(self._sampled, name).failure(t[self.images])
            if failure:
                return f"{name} {failure}"
        failure = None if dw is None else self._whole.dw.failure(dw)
        return f"dw {failure}" if failure else None

    @cached_property
    def _any_order(self) -> tuple[Tensor, Tensor]:
        """y in float64, and how far from it float32 sums can be: |error| <= n u sum |x w| in any order, with
        n products and u half a unit in the last place (Higham, Accuracy and Stability, 3.1)."""
        o, live = self.operands, torch.from_numpy(self.case.skeleton.live.copy())
        shape = self.case.shape
        x, dense = o.x[self.images].double(), scattered(o.weight.double(), live)
        sizes = (None, shape.stride, shape.padding[:2], shape.dilation, shape.groups)
        exact = F.conv2d(x, dense, *sizes)
        products = shape.taps * shape.group_c
        bound = products * torch.finfo(torch.float32).eps / 2 * F.conv2d(x.abs(), dense.abs(), *sizes)
        return exact, bound + torch.finfo(o.x.dtype).eps * exact.abs()

    def far(self, y: Tensor) -> str | None:
        """As `wrong`, for a rival's y: it has to be a convolution, in any order of summation. To turn it away
        for missing the budget that our own kernels keep would take the fastest out of the comparison."""
        if tuple(y.shape) != self.case.shape.output_size:
            return f"y is {list(y.shape)}, expected {list(self.case.shape.output_size)}"
        exact, bound = self._any_order
        over = ((y[self.images].double() - exact).abs() / bound.clamp_min(1e-300)).max()
        if not torch.isfinite(y).all() or not over <= 1:
            return f"y is off by {over:.3g} times what any order of summation allows"
        return None


@dataclass(frozen=True)
class Job:
    layer: Layer
    batch: int
    live: FilterSkeleton
    source: str  # of the skeleton
    which: Pass
    dtype: torch.dtype
    threads: int

    @cached_property
    def case(self) -> LayerCase:
        return self.layer.case(self.batch, self.live)

    @cached_property
    def operands(self) -> Operands:
        return self.case.operands(self.dtype)

    @cached_property
    def oracle(self) -> Oracle:
        return Oracle(self.case, self.operands)

    @cached_property
    def skeleton(self) -> Tensor:  # bool [K, R, S]
        return torch.from_numpy(self.live.live.copy())

    @cached_property
    def dense_weight(self) -> Tensor:  # [K, C/groups, R, S], zero where dead
        return scattered(self.operands.weight, self.skeleton)

    @property
    def passes(self) -> int:
        return 3 if self.which == "step" else 1

    @cached_property
    def macs(self) -> float:
        """Multiply-adds of live stripes that fall inside the image, of all passes of the job."""
        return self._inside(self.live.filters_per_tap)

    @cached_property
    def dense_macs(self) -> float:
        """The same for a dense filter: what oneDNN does, which skips the padding too."""
        return self._inside(np.full(self.live.shape[1:], self.live.shape[0]))

    @cached_property
    def bytes(self) -> float:
        """Bytes that move if everything moves once: a pass's two inputs and its output, live stripes only."""
        s, item = self.case.shape, torch.finfo(self.dtype).bits // 8
        x, y = s.N * s.C * s.H * s.W, s.N * s.K * s.P * s.Q
        return item * (x + y + self.live.stripes * s.group_c) * self.passes

    def _inside(self, filters_per_tap: np.ndarray) -> float:
        s = self.case.shape

        def outputs_reading(size: int, out: int, taps: int, stride: int, pad: int) -> np.ndarray:
            """For each tap, how many output positions read inside the image through it."""
            at = np.arange(out)[None] * stride + np.arange(taps)[:, None] - pad
            return ((at >= 0) & (at < size)).sum(1)

        rows = outputs_reading(s.H, s.P, s.R, s.stride[0], s.padding[0])
        cols = outputs_reading(s.W, s.Q, s.S, s.stride[1], s.padding[1])
        return float((filters_per_tap * rows[:, None] * cols).sum()) * s.N * s.group_c * self.passes
