"""The native CUDA kernels (csrc/cuda): which problems they take, in which configurations, and what each should cost.

Costs are nominal H100 figures, none of them measured on a GPU yet: they order the candidates until tune() measures them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stripe_kernels.backends import cuda_ffma
from stripe_kernels.registry import Config, Kernel, Pass, Problem, register

try:
    from stripe_kernels import _cuda
except ImportError as error:
    raise ImportError(
        f"the extension stripe_kernels._cuda is not built or does not load ({error}); with nvcc installed run: pip install -e ."
    ) from error

MULTIPROCESSORS = 132
LAUNCH = 4e-6  # seconds
BYTES = 2.5e12  # a second
FFMA = 30e12  # multiply-adds of all lanes a second, half of them useful


def _unfit(problem: Problem, dtypes: tuple[str, ...]) -> str | None:
    """Reasons that hold for every kernel here."""
    if problem.device != "cuda":
        return f"runs on CUDA devices, not on {problem.device}"
    if problem.dtype not in dtypes:
        return f"takes {', '.join(dtypes)}, not {problem.dtype}"
    s = problem.shape
    if max(s.H, s.P) * max(s.stride) + max(s.padding) >= 2**30 or max(s.W, s.Q) * max(s.stride) >= 2**30:
        return f"an extent of {s} exceeds 2^30"
    if s.N * s.P * s.Q >= 2**31 or s.N * s.H * s.W >= 2**31:
        return f"{s} has more than 2^31 pixels"
    return None


def _refuse_ffma(problem: Problem, which: Pass) -> str | None:
    reason = _unfit(problem, ("float32",))
    if reason:
        return reason
    layout = cuda_ffma.layout_of(problem, which, (cuda_ffma.PATCH, 1))
    if layout.groups * layout.tiles_out > 65535 or layout.walk.classes > 1024:
        return f"{layout.groups} groups of {layout.tiles_out} blocks in {layout.walk.classes} phases exceed the grid"
    return None


def _ffma_candidates(problem: Problem, which: Pass) -> Mapping[Config, float]:
    s = problem.shape
    modes = [cuda_ffma.PATCH]
    if which == "fprop" and s.P * s.Q <= 64 and s.N >= cuda_ffma.PIXELS // 4:
        modes.append(cuda_ffma.POSITION)
    found = {}
    for mode in modes:
        layout = cuda_ffma.layout_of(problem, which, (mode, 1))
        if which == "wgrad":
            stripe_blocks = -(-problem.skeleton.stripes // (cuda_ffma.WARPS * cuda_ffma.STRIPES))
            blocks, most = max(1, stripe_blocks * -(-s.group_c // 64)), layout.walk.blocks
        else:
            blocks = layout.walk.blocks * layout.walk.classes * s.groups * layout.tiles_out
            most = -(-layout.group_in // layout.chunk)
        fill = max(1, min(most, 32, 2 * MULTIPROCESSORS // max(1, blocks)))
        for splits in dict.fromkeys((1, fill)):
            found[mode, splits] = _ffma_seconds(problem, which, blocks * splits, splits)
    return found


def _ffma_seconds(problem: Problem, which: Pass, blocks: int, splits: int) -> float:
    s = problem.shape
    busy = min(1.0, blocks / MULTIPROCESSORS)
    traffic = 4 * (s.N * s.C * s.H * s.W + s.N * s.K * s.P * s.Q * (1 if splits == 1 else 2 * splits + 1))
    return LAUNCH * (1 if splits == 1 else 2) + max(s.macs(problem.skeleton.stripes) / (FFMA * 0.5 * busy), traffic / BYTES)


def _build_ffma(problem: Problem, which: Pass, config: Config) -> Any:
    return cuda_ffma.RUNNERS[which](_cuda, problem, config)


register(Kernel("cuda_ffma", _refuse_ffma, _ffma_candidates, _build_ffma))
