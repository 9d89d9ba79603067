"""The native CPU kernels: one name per lane mode and instruction set, e.g. cpu_batch_avx512 (see csrc/cpu)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from stripe_kernels.backends import cpu_cost, cpu_cycles, cpu_tiling
from stripe_kernels.geometry import ConvShape
from stripe_kernels.packed import StripeIndex
from stripe_kernels.registry import Config, Kernel, Pass, Problem, provide, register
from stripe_kernels.skeleton import FilterSkeleton

try:
    from stripe_kernels import _cpu as _cpu
except ImportError as error:
    raise ImportError(
        f"the extension stripe_kernels._cpu is not built or does not load ({error}); run: pip install -e ."
    ) from error

if not hasattr(_cpu, "FpropMatrix"):
    raise ImportError("the extension stripe_kernels._cpu is older than this code; run: pip install -e .")

_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
_ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2, "silu": 3, "hardswish": 4}
_NO_STRIDES = (0, 0, 0, 0)


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _layout(size: tuple[int, ...], channels_last: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Size and strides for torch.empty_strided, which takes .7 us where torch.empty with its keywords takes 1.6."""
    strides, step = [0] * len(size), 1
    for d in (1, 3, 2, 0) if channels_last else reversed(range(len(size))):
        strides[d] = step
        step *= size[d] if channels_last else max(size[d], 1)  # as torch's where a size is 0
    return size, tuple(strides)


def native_layer(skeleton: FilterSkeleton, s: ConvShape) -> tuple[list[int], list[int], list[int], list[int]]:
    """What every native layer is made from: sizes, and the live stripes tap by tap."""
    index = StripeIndex.of(skeleton, s.groups)
    sizes = [s.N, s.C, s.H, s.W, s.K, s.R, s.S, s.P, s.Q]
    sizes += [*s.stride, *s.padding[:2], *s.dilation, s.groups]
    return sizes, index.tap_ptr.tolist(), index.filter.tolist(), index.row.tolist()


class _Runner:
    """What the passes share: the native object, and the output's layout."""

    def __init__(self, problem: Problem) -> None:
        self.threads = problem.threads
        self.dtype = getattr(torch, problem.dtype)
        self.code = _DTYPES[problem.dtype]
        self.channels_last = problem.channels_last
        self.shape = problem.shape
        self.arguments = native_layer(problem.skeleton, problem.shape)


class _WeightRunner(_Runner):
    """A pass that reads the weight."""

    native: Any

    def pack(self, weight: Tensor) -> Tensor:
        """The kernel's own form of a weight [A, C/groups] of the problem's dtype."""
        if not weight.is_contiguous():
            weight = weight.detach().contiguous()
        packed = torch.empty_strided(*self.packed_layout, dtype=torch.float32)
        self.native.pack_weight(weight.data_ptr(), self.code, packed.data_ptr())
        return packed

    @cached_property
    def packed_layout(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return _layout((int(self.native.packed_floats),))


class CpuFprop(_WeightRunner):
    def __init__(self, problem: Problem, config: Config, isa: str) -> None:
        super().__init__(problem)
        whole = _cpu.FpropMatrix if _cpu.bf16_channels(isa) > 2 else _cpu.Fprop
        make = {1: _cpu.FpropTaps, 2: _cpu.FpropFilters}.get(len(config), whole)
        self.native = make(*self.arguments, list(config), isa)
        self.output = _layout(self.shape.output_size, self.channels_last)
        self.run = self.native.run

    def __call__(
        self,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        act: str,
    ) -> Tensor:
        y = torch.empty_strided(*self.output, dtype=self.dtype)
        bias, scale = _float(bias), _float(scale)
        self.run(
            self.threads, x.data_ptr(), self.code, x.stride(), packed.data_ptr(), y.data_ptr(), self.code, y.stride(),
            0 if scale is None else scale.data_ptr(), 0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(), _NO_STRIDES if residual is None else residual.stride(),
            _ACTIVATIONS[act],
        )  # fmt: skip
        return y


class CpuDgrad(_WeightRunner):
    def __init__(self, problem: Problem, config: Config, isa: str) -> None:
        super().__init__(problem)
        self.native = _cpu.Dgrad(*self.arguments, list(config), isa)
        self.output = _layout(self.shape.input_size, self.channels_last)

    def __call__(self, dy: Tensor, packed: Tensor) -> Tensor:
        dx = torch.empty_strided(*self.output, dtype=self.dtype)
        self.native.run(
            self.threads,
            dy.data_ptr(),
            self.code,
            dy.stride(),
            packed.data_ptr(),
            dx.data_ptr(),
            self.code,
            dx.stride(),
        )
        return dx


class CpuWgrad(_Runner):
    def __init__(self, problem: Problem, chunk_pixels: int, isa: str) -> None:
        super().__init__(problem)
        self.native = _cpu.Wgrad(*self.arguments, chunk_pixels, isa)
        self.output = _layout((problem.skeleton.stripes, self.shape.group_c))

    def __call__(self, dy: Tensor, x: Tensor) -> Tensor:
        dw = torch.empty_strided(*self.output, dtype=self.dtype)
        self.native.run(
            self.threads,
            x.data_ptr(),
            self.code,
            x.stride(),
            dy.data_ptr(),
            self.code,
            dy.stride(),
            dw.data_ptr(),
            self.code,
        )
        return dw


def _refuse(problem: Problem, which: Pass) -> str | None:
    if problem.device != "cpu":
        return f"runs on the CPU, not on {problem.device}"
    if problem.dtype not in _DTYPES:
        return f"takes {', '.join(_DTYPES)}, not {problem.dtype}"
    s = problem.shape
    if max(s.N * s.P, (s.P + s.H) * s.stride[0], (s.Q + s.W) * s.stride[1]) >= 2**30:
        return f"an extent of {s} exceeds 2^30"
    return None


def _refuse_but(channels: int) -> Callable[[Problem, Pass], str | None]:
    """What an instruction set that multiplies so many bfloat16 channels at a time refuses on top."""

    def refuse(problem: Problem, which: Pass) -> str | None:
        if problem.dtype != "bfloat16":
            return f"multiplies bfloat16, not {problem.dtype}"
        if problem.shape.group_c % channels:
            return f"multiplies channels in {channels}s, and a group has {problem.shape.group_c}"
        return _refuse(problem, which)

    return refuse


def _candidates_of(
    mode: int, fprop: cpu_cycles.Cycles, gradients: cpu_cycles.Cycles, step: float
) -> Callable[[Problem, Pass], Mapping[Config, float]]:
    def candidates(problem: Problem, which: Pass) -> Mapping[Config, float]:
        cost = fprop if which == "fprop" else gradients
        if which == "wgrad":
            return {(): cpu_cost.predict_wgrad(problem, cost)}
        # Lanes along filters and pairs of filters exist for fprop; their names' dgrad runs along pixels.
        loops = cpu_tiling.PIXELS if which == "dgrad" and mode in cpu_tiling.FPROP_ONLY else mode
        tilings = cpu_tiling.tilings(problem, which, loops, cost)
        return {
            t: cpu_cost.predict(problem, which, t, cost, step if which == "fprop" else 1.0) for t in tilings
        }

    return candidates


def _builder(isa: str, cost: cpu_cycles.Cycles) -> Callable[[Problem, Pass, Config], _Runner]:
    def build(problem: Problem, which: Pass, config: Config) -> _Runner:
        if which == "wgrad":
            return CpuWgrad(problem, cpu_tiling.wgrad_pixels(problem, cost), isa)
        return CpuFprop(problem, config, isa) if which == "fprop" else CpuDgrad(problem, config, isa)

    return build


# Measured once a set: the kernels and `dense` are ranked by one value.
_rate = cache(_cpu.multiply_adds_a_cycle)


def _speed(isa: str) -> tuple[cpu_cycles.Cycles, cpu_cycles.Cycles, float]:
    """What this machine takes with an instruction set, in fprop and in the other passes, and fprop's instructions for a
    multiply-add in units of float32's: one half where a pair of bfloat16 channels takes as long as one float."""
    channels, lanes = _cpu.bf16_channels(isa), _cpu.lanes(isa)
    floats = next(
        i for i in _cpu.isas() if not _cpu.bf16_channels(i) and (i == isa or _cpu.lanes(i) == lanes)
    )
    rate = _rate(floats)
    cost = cpu_cycles.cycles(lanes, rate)
    if channels > 2:
        return cpu_cycles.AMX, cost, 1.0
    return cost, cost, 0.5 * rate / _rate(isa) if channels else 1.0


_best = next(i for i in _cpu.isas() if not _cpu.bf16_channels(i))
if _cpu.lanes(_best) == 16:
    provide("multiply-adds a cycle", _rate(_best))
for _isa in _cpu.isas():
    _channels = _cpu.bf16_channels(_isa)
    _speeds = _speed(_isa)
    for _name, _mode in cpu_tiling.MODES.items():
        if _channels and _mode in cpu_tiling.FPROP_ONLY:
            continue  # no loops over bfloat16
        if _channels > 2 and _mode == cpu_tiling.GATHER:
            continue  # pixels are aligned there too: an im2col by taps won 5 % at most and lost 25 %
        register(
            Kernel(
                f"cpu_{_name}_{_isa}",
                _refuse_but(_channels) if _channels else _refuse,
                _candidates_of(_mode, *_speeds),
                _builder(_isa, _speeds[1]),
                automatic=_channels > 0 or _isa == _cpu.isas()[0],
            )
        )
