"""The oracle as a kernel one can force by name. Slow, exact, any dtype and device; never chosen automatically."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from stripe_kernels.reference import masked_conv2d, scatter_stripes
from stripe_kernels.registry import Config, Kernel, Pass, Problem, register


class _Reference:
    def __init__(self, problem: Problem) -> None:
        self.shape = problem.shape
        self.live = torch.from_numpy(problem.skeleton.live.copy())
        self.format = torch.channels_last if problem.channels_last else torch.contiguous_format
        top, left, bottom, right = problem.shape.padding
        # Padded by hand, torch takes other kernels for small maps: wgrad's sums were 3.4 times as far off.
        self.padding = (top, left) if (top, left) == (bottom, right) else (0, 0)

    def pack(self, weight: Tensor) -> Tensor:
        return weight

    def pad(self, x: Tensor) -> Tensor:
        """By what torch's own padding leaves over: all where two sides differ, else nothing."""
        top, left, bottom, right = self.shape.padding
        even = (top, left) == (bottom, right)
        return x if even else F.pad(x, (left, right, top, bottom))

    def dense(self, weight: Tensor) -> Tensor:
        return scatter_stripes(weight.detach(), self.live.to(weight.device)).clone(memory_format=self.format)


class ReferenceFprop(_Reference):
    def __call__(
        self,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        act: str,
    ) -> Tensor:
        s, live = self.shape, self.live.to(x.device)
        y = masked_conv2d(
            self.pad(x), self.dense(packed), live, None, s.stride, self.padding, s.dilation, s.groups
        )
        y = y if scale is None else y * scale[:, None, None]
        y = y if bias is None else y + bias[:, None, None]
        y = y if residual is None else y + residual
        activations = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}
        return activations[act](y) if act != "none" else y


class ReferenceDgrad(_Reference):
    def __call__(self, dy: Tensor, packed: Tensor) -> Tensor:
        s = self.shape
        top, left, bottom, right = (
            p - q for p, q in zip(s.padding, (*self.padding, *self.padding), strict=True)
        )
        size = (s.N, s.C, s.H + top + bottom, s.W + left + right)
        weight = self.dense(packed)
        padded: Tensor = conv2d_input(size, weight, dy, s.stride, self.padding, s.dilation, s.groups)
        return padded[:, :, top : top + s.H, left : left + s.W].contiguous(memory_format=self.format)


class ReferenceWgrad(_Reference):
    def __call__(self, dy: Tensor, x: Tensor) -> Tensor:
        s, x, stride, padding = self.shape, self.pad(x), self.shape.stride, self.padding
        if s.taps == 1 and stride != (1, 1):  # torch's own can corrupt the heap: see dense.py
            x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))[:, :, :: stride[0], :: stride[1]]
            x, stride, padding = x.contiguous(memory_format=self.format), (1, 1), (0, 0)
        size = (s.K, s.group_c, s.R, s.S)
        dense: Tensor = conv2d_weight(x, size, dy, stride, padding, s.dilation, s.groups)
        return dense.permute(0, 2, 3, 1)[self.live.to(dense.device)]


_RUNNERS = {"fprop": ReferenceFprop, "dgrad": ReferenceDgrad, "wgrad": ReferenceWgrad}


def _candidates(problem: Problem, which: Pass) -> dict[Config, float]:
    return {(): 1.0}


def _refuse(problem: Problem, which: Pass) -> str | None:
    return problem.wrong_in_torch()


def _build(problem: Problem, which: Pass, config: Config) -> _Reference:
    return _RUNNERS[which](problem)


register(Kernel("reference", _refuse, _candidates, _build, automatic=False))
