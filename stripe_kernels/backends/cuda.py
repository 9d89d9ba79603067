"""The native CUDA kernels (csrc/cuda) and the problems they take.

cuda_ffma       float32, strict; exact at one filter or stripe, any strides
cuda_mma        bfloat16, float16 on tensor cores, channels last
cuda_mma_tf32   float32 operands rounded to tf32 on tensor cores, channels last; fprop, dgrad
cuda_wgmma      bfloat16, float16 on Hopper's own instructions, channels last
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from stripe_kernels.backends import (
    cuda_cost,
    cuda_ffma,
    cuda_gather,
    cuda_mma,
    cuda_mma_grad,
    cuda_stripe_gemm,
    cuda_taps,
    cuda_tiles,
    cuda_wgmma,
    cuda_wgrad,
    cuda_whole,
)
from stripe_kernels.backends.cuda_tables import Layout
from stripe_kernels.registry import Config, Kernel, Pass, Problem, provide, register

try:
    from stripe_kernels import _cuda
except ImportError as error:
    raise ImportError(
        f"the extension stripe_kernels._cuda is not built or does not load ({error}); "
        "with nvcc installed run: pip install -e ."
    ) from error

_GRID = 65535  # most blocks in y and z
_CLASSES = 1024
_MMA = {"fprop": cuda_mma.MmaFprop, "dgrad": cuda_mma_grad.MmaDgrad, "wgrad": cuda_mma_grad.MmaWgrad}


def _unfit(problem: Problem, dtypes: tuple[str, ...]) -> str | None:
    """Reasons that hold for every kernel here."""
    if problem.device != "cuda":
        return f"runs on CUDA devices, not on {problem.device}"
    if problem.dtype not in dtypes:
        return f"takes {', '.join(dtypes)}, not {problem.dtype}"
    s = problem.shape
    extents = [
        (side + pad) * step
        for side, pad, step in zip((s.H, s.W, s.P, s.Q), s.padding, s.stride * 2, strict=True)
    ]
    if max(extents) >= 2**30 or s.N * max(s.H * s.W, s.P * s.Q) >= 2**31:
        return f"{s} has more pixels than 32 bits number"
    if s.stride[0] * s.stride[1] > _CLASSES:
        return f"stride {s.stride} has more than {_CLASSES} phases"
    return None


def _too_many_blocks(layout: Layout) -> str | None:
    blocks = layout.groups * layout.tiles_out
    return f"{layout.groups} groups of {layout.tiles_out} blocks exceed {_GRID}" if blocks > _GRID else None


def _refuse_ffma(problem: Problem, which: Pass) -> str | None:
    reason = _unfit(problem, ("float32",))
    return reason or _too_many_blocks(cuda_ffma.layout_of(problem, which, (cuda_ffma.PATCH, 1)))


def _refuse_mma(dtypes: tuple[str, ...]) -> Any:
    def refuse(problem: Problem, which: Pass) -> str | None:
        reason = _unfit(problem, dtypes)
        if reason:
            return reason
        s = problem.shape
        if not problem.channels_last and max(s.H * s.W, s.P * s.Q) > 1:
            return "takes channels_last tensors"
        pieces = 16 // cuda_mma.SIZES[problem.dtype]
        if which != "dgrad" and s.group_c % pieces:
            return f"needs C/groups in multiples of {pieces} (16 bytes), got {s.group_c}"
        if which != "fprop" and s.group_k % pieces:
            return f"needs K/groups in multiples of {pieces} (16 bytes), got {s.group_k}"
        if which == "wgrad" and problem.dtype == "float32":
            return "computes fprop and dgrad: tensor cores cut wgrad's long sums off; stripe_gemm has wgrad in tf32"
        if which == "fprop":
            return _too_many_blocks(cuda_mma.fprop_layout(problem, (cuda_mma.PATCH, 0, 1)))
        return _too_many_blocks(cuda_mma_grad.dgrad_layout(problem, (1,))) if which == "dgrad" else None

    return refuse


def _chip(compiled: str, fits: Callable[[tuple[int, int]], bool]) -> str | None:
    """Why what is compiled for some chips does not run on the current device; None without one, where nothing runs
    anyway."""
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()
    if fits(capability):
        return None
    return f"is compiled for {compiled}; this device has compute capability {capability[0]}.{capability[1]}"


def _refuse_wgmma(problem: Problem, which: Pass) -> str | None:
    reason = _unfit(problem, ("bfloat16", "float16")) or _chip("sm_90a alone", lambda chip: chip == (9, 0))
    if reason:
        return reason
    s = problem.shape
    if not problem.channels_last and max(s.H * s.W, s.P * s.Q) > 1:
        return "takes channels_last tensors"
    if s.group_c % 8:
        return f"needs C/groups in multiples of 8 (16 bytes), got {s.group_c}"
    if which != "fprop" and s.group_k % 8:
        return f"needs K/groups in multiples of 8 (16 bytes), got {s.group_k}"
    if which == "wgrad":
        return _refuse_wgmma_wgrad(problem)
    if which == "dgrad":
        layouts = [cuda_gather.layout_of(problem, config) for config in cuda_gather.CONFIGS]
        if all(layout is None for layout in layouts):
            return (
                f"a patch with the halo of its taps and {s.group_k} filters exceeds {cuda_wgmma.SHARED_BYTES} bytes of "
                f"shared memory, or a phase has more than {cuda_tiles.TAPS} taps or {cuda_tiles.SIDE} pixels a side"
            )
        return next((reason for layout in layouts if layout and (reason := _too_many_blocks(layout))), None)
    if any(how.layout_of(problem, config) for how in (cuda_taps, cuda_whole) for config in how.CONFIGS):
        return None
    if s.stride[0] * s.stride[1] > cuda_wgmma.PHASES:
        return f"takes strides of at most {cuda_wgmma.PHASES} phases, got {s.stride}"
    if not any(cuda_wgmma.room(problem, config) for config in cuda_wgmma.CONFIGS):
        return (
            f"a patch with the halo of its taps and {s.group_c} channels exceeds {cuda_wgmma.SHARED_BYTES} bytes of "
            f"shared memory, and tap by tap too, or a phase has more than {cuda_wgmma.TAPS} taps"
        )
    return None


def _refuse_wgmma_wgrad(problem: Problem) -> str | None:
    if problem.shape.stride != (1, 1):
        return f"takes strides of 1, got {problem.shape.stride}"
    layouts = [cuda_wgrad.layout_of(problem, (*shape, 1)) for shape in cuda_wgrad.SHAPES]
    if all(layout is None for layout in layouts):
        return (
            f"a patch with the halo of its taps exceeds {cuda_wgrad.PATCH_BYTES} bytes, or there are more than "
            f"{cuda_wgrad.MOST_TAPS} taps or {cuda_tiles.SIDE} pixels a side"
        )
    blocks = max(layout.tiles_out for layout in layouts if layout)  # of all groups
    return f"{blocks} blocks of stripes exceed {_GRID}" if blocks > _GRID else None


def _build_wgmma(problem: Problem, which: Pass, config: Config) -> Any:
    if which == "dgrad":
        return cuda_gather.WgmmaDgrad(_cuda, problem, config)
    if which == "wgrad":
        return cuda_wgrad.WgmmaWgrad(_cuda, problem, config)
    if config in cuda_whole.CONFIGS:
        return cuda_whole.WholeFprop(_cuda, problem, config)
    runner = cuda_taps.TapsFprop if config in cuda_taps.CONFIGS else cuda_wgmma.WgmmaFprop
    return runner(_cuda, problem, config)


def _build_ffma(problem: Problem, which: Pass, config: Config) -> Any:
    return cuda_ffma.RUNNERS[which](_cuda, problem, config)


def _build_mma(problem: Problem, which: Pass, config: Config) -> Any:
    return _MMA[which](_cuda, problem, config)


def _refuse_gather(problem: Problem, which: Pass) -> str | None:
    reason = _chip("sm_80 and newer", lambda chip: chip >= (8, 0))
    return reason or cuda_stripe_gemm.refuse(problem, which)


# By name only, but for the one that a GPU's record (bench/records) has ahead of cuDNN.
register(Kernel("cuda_ffma", _refuse_ffma, cuda_cost.ffma, _build_ffma, automatic=False))
register(Kernel("cuda_mma", _refuse_mma(("bfloat16", "float16")), cuda_cost.mma, _build_mma, automatic=False))
register(Kernel("cuda_mma_tf32", _refuse_mma(("float32",)), cuda_cost.mma, _build_mma, automatic=False))
register(Kernel("cuda_wgmma", _refuse_wgmma, cuda_cost.wgmma, _build_wgmma))
provide("native gather", partial(cuda_stripe_gemm.CudaGather, _cuda))
provide("native gather's refusal", _refuse_gather)
