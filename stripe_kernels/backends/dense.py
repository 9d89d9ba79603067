"""torch's own convolution on the scattered filter: the candidate no other kernel may be slower than.

It runs in the tensor's dtype on any device; its packed form is the dense filter, kept between calls like
any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stripe_kernels.epilogue import apply_epilogue
from stripe_kernels.indices import IndexArrays
from stripe_kernels.registry import Config, Kernel, Pass, Problem, provided, register
from stripe_kernels.roofline import gpu_seconds, item_size, math_type

# Multiply-adds/s of one core for many pixels, by what torch says the CPU has: Zen 4, a Xeon of 2023 or later (its cores
# begin two vectors a cycle), Zen 3. The Xeon is a sixth slower on contiguous tensors.
_CPU_MACS = {
    "AVX512": {"fprop": 50.6e9, "dgrad": 50.6e9, "wgrad": 50.6e9},
    "AVX512 twice": {"fprop": 90e9, "dgrad": 80e9, "wgrad": 77e9},
    "AVX2": {"fprop": 40e9, "dgrad": 37e9, "wgrad": 29e9},
}
# What the out-of-image taps cost oneDNN, as a factor of those inside. With AVX2 it lost 2 to 20 times what counting the
# others alone gives on maps of 1x1 to 4x4: 234 layers and passes, channels of 16 to 1024; these lie low on purpose, and
# so do the Xeon's: 34 layers, where wgrad of 1x1 to 4x4 takes up to 10 times as long, N = 1 more.
_CPU_OUTSIDE = {
    "AVX512": {"fprop": 0.0, "dgrad": 0.0, "wgrad": 0.0},
    "AVX512 twice": {"fprop": 0.3, "dgrad": 1.0, "wgrad": 2.0},
    "AVX2": {"fprop": 1.0, "dgrad": 1.0, "wgrad": 2.0},
}
# Pixels that a pass takes longer than its multiply-adds say.
_CPU_EXTRA = {
    "AVX512": {"fprop": 29, "dgrad": 29, "wgrad": 29},
    "AVX512 twice": {"fprop": 29, "dgrad": 29, "wgrad": 29},
    "AVX2": {"fprop": 29, "dgrad": 29, "wgrad": 12},
}
_CONTIGUOUS = {"AVX512 twice": 0.86}  # of fprop's rate
_STRIDED = {"AVX512 twice": 1.2e9}  # values of x in NCHW a second that fprop with strides takes beyond that
_CHANNELS = {"AVX512 twice": 24}  # that the rate takes; elsewhere 8
_CALL = {"AVX512 twice": 12e-6}  # seconds of torch's around the arithmetic; elsewhere 6
# oneDNN fprop in bfloat16 in AMX, one core of a Xeon of 2024: multiply-adds, weights in a form of its own, values of x
# and of y a second. Of 486 layers, formats and batches of 1 to 32 half took .94 to 1.30 times as long.
_AMX_MACS, _AMX_WEIGHTS = 9e11, 1e10
_AMX_MOVED = {"contiguous": (2.4e9, 0.93e9), "channels_last": (16e9, 9e9)}
_DEPTHWISE_MACS = {"fprop": 10e9, "dgrad": 6e9, "wgrad": 6e9}  # loops of their own, bound by memory
_CUDNN_SHARE = 0.75  # of the GEMM rate on a GPU: an estimate


Call = tuple[Callable[..., Any], tuple[Any, ...]]


class _Dense:
    """What the three passes share: the scatter and the padding torch's convolution does not take."""

    def __init__(self, problem: Problem) -> None:
        self.shape = problem.shape
        # Positions rather than a mask: indexing by a mask would wait for the device.
        self.arrays = IndexArrays(live=np.flatnonzero(problem.skeleton.live))
        self.format = torch.channels_last if problem.channels_last else torch.contiguous_format
        top, left, bottom, right = problem.shape.padding
        # torch pads both sides alike; "same" with an even filter needs one pixel more on one of them.
        self.padding = (min(top, bottom), min(left, right))
        extra = (
            left - self.padding[1],
            right - self.padding[1],
            top - self.padding[0],
            bottom - self.padding[0],
        )
        self.uneven = extra  # left, right, top, bottom, as F.pad takes them

    def pack(self, weight: Tensor) -> Tensor:  # [A, C/groups] -> [K, C/groups, R, S]
        s = self.shape
        dense = weight.new_zeros(s.K * s.taps, s.group_c)
        dense.index_copy_(0, self.arrays.on(weight.device)["live"], weight.detach())
        return dense.view(s.K, s.R, s.S, s.group_c).permute(0, 3, 1, 2).clone(memory_format=self.format)

    def pad(self, x: Tensor) -> Tensor:
        return F.pad(x, self.uneven) if any(self.uneven) else x

    def gradients(self, dy: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, ...]:
        s = self.shape
        found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            dy, x, weight, None, s.stride, self.padding, s.dilation, False, [0, 0], s.groups, mask
        )
        return found


class DenseFprop(_Dense):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        # On a GPU torch adds a bias, adds a residual and activates in a pass each: Triton does in one.
        self.epilogue = provided("epilogue") if problem.device == "cuda" else None

    def __call__(
        self,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        act: str,
    ) -> Tensor:
        early = bias if scale is None and self.epilogue is None else None
        convolve, rest = self.call(packed, early)
        y = convolve(self.pad(x), *rest)
        return (self.epilogue or apply_epilogue)(y, None if early is not None else bias, scale, residual, act)

    def call(self, packed: Tensor, bias: Tensor | None) -> Call:
        """torch's function of a padded x, and what follows x."""
        s = self.shape
        return torch.conv2d, (packed, bias, s.stride, self.padding, s.dilation, s.groups)

    def short_call(self, packed: Tensor, bias: Tensor | None) -> Call | None:
        """`call` where it is all there is to do but an epilogue."""
        return None if any(self.uneven) or self.epilogue else self.call(packed, bias)


class OneDnnFprop(DenseFprop):
    """fprop with a filter kept in a form of oneDNN's own, as torch.compile's frozen networks keep theirs.

    torch.conv2d turns the filter into that form in every call, which takes up to three quarters of a call in bfloat16
    (AMX, one image, 512 channels on 4x4: 1,207 us in place of 333).
    """

    def pack_to_keep(self, weight: Tensor) -> Tensor:
        s, (left, right, top, bottom) = self.shape, self.uneven
        size = [s.N, s.C, s.H + top + bottom, s.W + left + right]
        filters: Tensor = torch.ops.aten.mkldnn_reorder_conv2d_weight(
            self.pack(weight).to_mkldnn(), self.padding, s.stride, s.dilation, s.groups, size
        )
        return filters

    def call(self, packed: Tensor, bias: Tensor | None) -> Call:
        if not packed.is_mkldnn:  # for one call
            return super().call(packed, bias)
        s = self.shape
        rest = (packed, bias, self.padding, s.stride, s.dilation, s.groups)
        # Either gives y one memory format, whatever x has.
        if self.format == torch.channels_last:
            return torch.ops.mkldnn._convolution_pointwise.default, (*rest, "none", [], "")
        return torch.mkldnn_convolution, rest


class DenseDgrad(_Dense):
    def __call__(self, dy: Tensor, packed: Tensor) -> Tensor:
        x = torch.empty(self.shape.input_size, dtype=dy.dtype, device=dy.device, memory_format=self.format)
        padded = self.pad(x)
        dx = self.gradients(dy, padded, packed, [True, False, False])[0]
        left, _, top, _ = self.uneven
        inner = dx[:, :, top : top + self.shape.H, left : left + self.shape.W]
        return inner.contiguous(memory_format=self.format)


class DenseWgrad(_Dense):
    def __call__(self, dy: Tensor, x: Tensor) -> Tensor:
        s, x = self.shape, self.pad(x)
        weight = x.new_empty(s.K, s.group_c, s.R, s.S)
        if s.taps == 1 and s.stride != (1, 1) and x.device.type == "cpu":
            # oneDNN's writes beyond its memory for a strided 1x1 in channels_last with AVX2 (torch 2.13, found by
            # generated problems): what it reads, at stride 1, is the same problem.
            x = F.pad(x, (self.padding[1], self.padding[1], self.padding[0], self.padding[0]))
            x = x[:, :, :: s.stride[0], :: s.stride[1]].contiguous(memory_format=self.format)
            dw: Tensor = torch.ops.aten.convolution_backward(
                dy, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], s.groups, [False, True, False]
            )[1]
        else:
            dw = self.gradients(dy, x, weight, [False, True, False])[1]
        rows = dw.permute(0, 2, 3, 1).reshape(-1, s.group_c)
        return rows.index_select(0, self.arrays.on(dw.device)["live"])


_RUNNERS = {"fprop": DenseFprop, "dgrad": DenseDgrad, "wgrad": DenseWgrad}


def _keeps_filters(problem: Problem) -> bool:
    """Whether OneDnnFprop pays: in half precision. In float32 its form gains less, and a contiguous batch of 32 took a
    quarter longer (64 channels on 32x32); depthwise filters are small, and took up to a tenth longer."""
    asked = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}.get(
        problem.dtype
    )
    s = problem.shape
    return (
        problem.device == "cpu"
        and asked is not None
        and getattr(torch.ops.mkldnn, asked, bool)()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and hasattr(torch.ops.aten, "mkldnn_reorder_conv2d_weight")
        and hasattr(torch, "mkldnn_convolution")
        and not s.group_c == s.group_k == 1
        and min(*s.input_size, *s.output_size) > 0
    )


def predict(problem: Problem, which: Pass) -> float:
    """Seconds for oneDNN or cuDNN, from the multiply-adds.

    oneDNN's share of peak falls with the pixels M a filter sees: about M / (M + 29) (measured, fp32, N * P * Q
    from 4 to 32768), less in fprop of 1x1 and AVX2's wgrad. On a GPU the roofline's estimate: measured times were
    .7 to 1.0 of it on an H100.
    """
    s = problem.shape
    if problem.device == "cuda":
        executed = s.macs(s.K * s.taps)
        values = s.N * (s.C * s.H * s.W + s.K * s.P * s.Q) + s.K * s.taps * s.group_c
        programs = -(-s.N * s.P * s.Q // 128) * -(-s.K // 128)
        moved = values * item_size(problem.dtype)
        math = math_type(problem.dtype, problem.tf32[0])
        return gpu_seconds(math, macs=executed, moved=moved, share=_CUDNN_SHARE, programs=programs)
    pixels = s.N * s.P * s.Q
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and (provided("multiply-adds a cycle") or 0) > 1.5:
        capability = "AVX512 twice"
    capability = capability if capability in _CPU_MACS else "AVX2"
    inside = s.taps_inside()
    macs = pixels * s.K * s.group_c * (inside + _CPU_OUTSIDE[capability][which] * (s.taps - inside))
    extra = 12 if s.taps == 1 and which == "fprop" else _CPU_EXTRA[capability][which]
    rate = _CPU_MACS[capability][which] * problem.threads * pixels / (pixels + extra)
    if problem.dtype == "bfloat16" and which == "fprop" and _has_amx() and not s.group_c == s.group_k == 1:
        return _predict_amx(problem)
    if which == "fprop" and not problem.channels_last:
        rate *= _CONTIGUOUS.get(capability, 1.0)
    if problem.dtype == "bfloat16" and _has_amx():
        rate *= 8 if which == "dgrad" else 6  # five layers of 128 and 256 channels, batch 8: within a third
    elif problem.dtype == "bfloat16":
        rate *= 2  # oneDNN's dot products of bf16 pairs, where the CPU has them; where not, this errs towards dense
    if problem.dtype == "float16" and not problem.channels_last:
        rate /= 20  # contiguous halves fall back to plain loops: 70 times slower than our kernels (measured, d = 1)
    if s.group_c == s.group_k == 1:
        return 10e-6 + macs / (_DEPTHWISE_MACS[which] * problem.threads)
    # Three channels by 7x7 taps run at the full rate, by 3x3 at half of it; dgrad is not so clever.
    channels = _CHANNELS.get(capability, 8)
    depth = max(s.group_c / channels, s.group_c * s.taps / 48 if which != "dgrad" else 0.0)
    narrow = min(1.0, depth) * min(1.0, s.group_k / channels)
    seconds = macs / max(rate * max(narrow, 0.02), 1.0)
    if which == "fprop" and s.stride != (1, 1) and not problem.channels_last and capability in _STRIDED:
        seconds += s.N * s.C * s.H * s.W / _STRIDED[capability] / problem.threads
    return _CALL.get(capability, 6e-6) + seconds


def _has_amx() -> bool:
    known = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(known and known())


def _predict_amx(problem: Problem) -> float:
    s = problem.shape
    weights = s.K * s.taps * s.group_c
    read, written = _AMX_MOVED["channels_last" if problem.channels_last else "contiguous"]
    moved = s.N * (s.C * s.H * s.W / read + s.K * s.P * s.Q / written)
    work = s.N * s.P * s.Q * weights / _AMX_MACS + weights / _AMX_WEIGHTS
    return 30e-6 + (work + moved) / problem.threads


def _candidates(problem: Problem, which: Pass) -> dict[Config, float]:
    return {(): predict(problem, which)}


def _refuse(problem: Problem, which: Pass) -> str | None:
    return problem.wrong_in_torch()


def _build(problem: Problem, which: Pass, config: Config) -> _Dense:
    if which == "fprop" and _keeps_filters(problem):
        return OneDnnFprop(problem)
    return _RUNNERS[which](problem)


register(Kernel("dense", _refuse, _candidates, _build))
