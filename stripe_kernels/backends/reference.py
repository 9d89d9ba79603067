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

    def pack(self, weight: Tensor) -> Tensor:
        return weight

    def pad(self, x: Tensor) -> Tensor:
        top, left, bottom, right = self.shape.padding
        return F.pad(x, (left, right, top, bottom))

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
        y = masked_conv2d(self.pad(x), self.dense(packed), live, None, s.stride, 0, s.dilation, s.groups)
        y = y if scale is None else y * scale[:, None, None]
        y = y if bias is None else y + bias[:, None, None]
        y = y if residual is None else y + residual
        activations = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}
        return activations[act](y) if act != "none" else y


class ReferenceDgrad(_Reference):
    def __call__(self, dy: Tensor, packed: Tensor) -> Tensor:
        s = self.shape
        top, left, bottom, right = s.padding
        size = (s.N, s.C, s.H + top + bottom, s.W + left + right)
        padded: Tensor = conv2d_input(size, self.dense(packed), dy, s.stride, 0, s.dilation, s.groups)
        return padded[:, :, top : top + s.H, left : left + s.W].contiguous(memory_format=self.format)


class ReferenceWgrad(_Reference):
    def __call__(self, dy: Tensor, x: Tensor) -> Tensor:
        s, x, stride = self.shape, self.pad(x), self.shape.stride
        if s.taps == 1:  # torch's own strided one can corrupt the heap: see dense.py
            x, stride = x[:, :, :: stride[0], :: stride[1]].contiguous(memory_format=self.format), (1, 1)
        dense: Tensor = conv2d_weight(x, (s.K, s.group_c, s.R, s.S), dy, stride, 0, s.dilation, s.groups)
        return dense.permute(0, 2, 3, 1)[self.live.to(dense.device)]


_RUNNERS = {"fprop": ReferenceFprop, "dgrad": ReferenceDgrad, "wgrad": ReferenceWgrad}


def _candidates(problem: Problem, which: Pass) -> dict[Config, float]:
    return {(): 1.0}


def _build(problem: Problem, which: Pass, config: Config) -> _Reference:
    return _RUNNERS[which](problem)


register(Kernel("reference", lambda problem, which: None, _candidates, _build, automatic=False))
