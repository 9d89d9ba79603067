"""The native CUDA kernels (csrc/cuda) and the problems they take.

cuda_ffma       float32, strict; exact at one filter or stripe, any strides
cuda_mma        bfloat16, float16 on tensor cores, channels last
cuda_mma_tf32   float32 operands rounded to tf32 on tensor cores, channels last
"""

from __future__ import annotations

from typing import Any

from stripe_kernels.backends import cuda_cost, cuda_ffma, cuda_mma, cuda_mma_grad
from stripe_kernels.backends.cuda_tables import Layout
from stripe_kernels.registry import Config, Kernel, Pass, Problem, register

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
        if which == "fprop":
            return _too_many_blocks(cuda_mma.fprop_layout(problem, (cuda_mma.PATCH, 0, 1)))
        return _too_many_blocks(cuda_mma_grad.dgrad_layout(problem, (1,))) if which == "dgrad" else None

    return refuse


def _build_ffma(problem: Problem, which: Pass, config: Config) -> Any:
    return cuda_ffma.RUNNERS[which](_cuda, problem, config)


def _build_mma(problem: Problem, which: Pass, config: Config) -> Any:
    return _MMA[which](_cuda, problem, config)


# By name only until a record of a GPU says that they are right there, and how fast.
register(Kernel("cuda_ffma", _refuse_ffma, cuda_cost.ffma, _build_ffma, automatic=False))
register(Kernel("cuda_mma", _refuse_mma(("bfloat16", "float16")), cuda_cost.mma, _build_mma, automatic=False))
register(Kernel("cuda_mma_tf32", _refuse_mma(("float32",)), cuda_cost.mma, _build_mma, automatic=False))
