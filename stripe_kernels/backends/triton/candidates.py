"""The configurations worth measuring, with predicted seconds (stripe_kernels/roofline.py; never measured)."""

from __future__ import annotations

from collections.abc import Mapping

from stripe_kernels.backends.triton.schedule import FpropSchedule
from stripe_kernels.registry import Config, Pass, Problem
from stripe_kernels.roofline import gpu_seconds, item_size

_MMA_SHARE = 0.6  # of the GEMM rate: an estimate

# block_m, block_n, block_c, warps, stages
_FPROP = (
    (64, 16, 64, 4, 4),
    (64, 32, 64, 4, 4),
    (128, 32, 64, 4, 4),
    (128, 64, 64, 4, 4),
    (256, 16, 64, 8, 3),
    (256, 32, 64, 8, 3),
    (128, 128, 64, 8, 3),
)


def power_of_two(value: int, least: int = 16) -> int:
    """The smallest power of two that holds `value`, at least tl.dot's 16."""
    return max(least, 1 << max(0, value - 1).bit_length())


def _moved(problem: Problem) -> float:
    s = problem.shape
    values = s.N * (s.H * s.W * s.C + s.P * s.Q * s.K) + problem.skeleton.stripes * s.group_c
    return float(values * item_size(problem.dtype))


def _seconds(problem: Problem, macs: float, block_m: int, block_n: int, programs: int, launches: int = 1, moved: float = 0.0) -> float:
    """Each multiply-add of a block_m x block_n tile costs 1/block_m + 1/block_n loaded values."""
    loaded = macs * (1 / block_m + 1 / block_n) * item_size(problem.dtype)
    return gpu_seconds(
        problem.dtype, macs=macs, moved=_moved(problem) + moved, loaded=loaded, share=_MMA_SHARE, programs=programs,
        launches=launches,
    )  # fmt: skip


def fprop(problem: Problem) -> Mapping[Config, float]:
    s = problem.shape
    pixels = s.N * s.P * s.Q
    found: dict[Config, float] = {}
    for block_m, block_n, block_c, warps, stages in _FPROP:
        if block_n > power_of_two(s.group_k):
            continue
        block_c = min(block_c // (2 if problem.dtype == "float32" else 1), power_of_two(s.group_c))
        plan = FpropSchedule.of(problem.skeleton, s, block_n)
        blocks = -(-pixels // block_m)
        macs = blocks * block_m * plan.row.size * -(-s.group_c // block_c) * block_c
        programs = blocks * len(plan.group)
        found[block_m, block_n, block_c, warps, stages] = _seconds(problem, macs, block_m, block_n, programs)
    return found


def candidates(problem: Problem, which: Pass) -> Mapping[Config, float]:
    return {"fprop": fprop}[which](problem)
