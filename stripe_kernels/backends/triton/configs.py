"""The configurations worth measuring, with predicted seconds.

stripe_kernels/roofline.py applied to the work each configuration executes, its idle slots included. No
prediction here was compared with a measurement: tune() replaces them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from stripe_kernels.backends.triton.dgrad import DgradConfig
from stripe_kernels.backends.triton.fprop import FpropConfig
from stripe_kernels.backends.triton.schedule import DgradSchedule, FpropSchedule, WgradSchedule
from stripe_kernels.backends.triton.wgrad import WgradConfig
from stripe_kernels.registry import Config, Pass, Problem
from stripe_kernels.roofline import SMS, gpu_seconds, item_size

_MMA_SHARE = 0.6  # of the GEMM rate: an estimate
_MOST_SPLITS = 64
# A value gathered filter by filter from channels_last costs a 32-byte sector; consecutive pixels cost their
# own bytes.
_SECTOR = 32

_FPROP = (
    FpropConfig(64, 16, 64, 4, 4),
    FpropConfig(64, 32, 64, 4, 4),
    FpropConfig(128, 32, 64, 4, 4),
    FpropConfig(128, 64, 64, 8, 3),
    FpropConfig(256, 16, 64, 8, 3),
    FpropConfig(256, 32, 64, 8, 3),
)
_DGRAD = (
    DgradConfig(128, 64, 16, 0, 0, 4, 4),
    DgradConfig(128, 64, 32, 0, 0, 4, 3),
    DgradConfig(128, 128, 32, 0, 0, 8, 3),
    DgradConfig(128, 64, 16, 1, 0, 4, 4),
    DgradConfig(128, 128, 32, 1, 0, 8, 3),
    DgradConfig(64, 64, 32, 1, 0, 4, 3),
)
_WGRAD = (
    WgradConfig(16, 64, 64, 1, 0, 4, 3),
    WgradConfig(32, 64, 64, 1, 0, 4, 3),
    WgradConfig(64, 64, 64, 1, 0, 4, 3),
    WgradConfig(64, 128, 32, 1, 0, 8, 3),
    WgradConfig(128, 128, 32, 1, 0, 8, 3),
)


def power_of_two(value: int) -> int:
    """The smallest power of two that holds `value`, at least tl.dot's 16."""
    return max(16, 1 << max(0, value - 1).bit_length())


@lru_cache(maxsize=1)
def _shared_memory() -> int:
    """Bytes a block may have on the current device; Hopper's where there is none."""
    if not torch.cuda.is_available():
        return 227 * 1024
    return getattr(torch.cuda.get_device_properties(), "shared_memory_per_block_optin", 99 * 1024)


def _fits(problem: Problem, rows: int, columns: int, depth: int, stages: int) -> bool:
    """Whether every stage's two operand tiles fit shared memory: what the compiled kernels take at most."""
    return stages * (rows + columns) * depth * item_size(problem.dtype) <= _shared_memory()


def _seconds(
    problem: Problem, macs: float, loaded: float, programs: int, *, launches: int = 1, extra: float = 0.0
) -> float:
    """Activations and weights move once, and `extra` bytes besides."""
    s = problem.shape
    values = s.N * (s.H * s.W * s.C + s.P * s.Q * s.K) + problem.skeleton.stripes * s.group_c
    return gpu_seconds(
        problem.dtype,
        macs=macs,
        moved=values * item_size(problem.dtype) + extra,
        loaded=loaded,
        share=_MMA_SHARE,
        programs=programs,
        launches=launches,
    )


def _depth(problem: Problem, block: int, extent: int) -> int:
    """A reduction block: half as deep for float32, which then keeps its registers, no deeper than the
    extent needs."""
    return min(max(16, block // 2) if problem.dtype == "float32" else block, power_of_two(extent))


def fprop(problem: Problem) -> Mapping[Config, float]:
    s, size = problem.shape, item_size(problem.dtype)
    found: dict[Config, float] = {}
    for config in _FPROP:
        if config.block_n > power_of_two(s.group_k):
            continue
        config = config._replace(block_c=_depth(problem, config.block_c, s.group_c))
        if not _fits(problem, config.block_m, config.block_n, config.block_c, config.stages):
            continue
        plan = FpropSchedule.of(problem.skeleton, s, config.block_n)
        blocks = -(-s.N * s.P * s.Q // config.block_m)
        depth = -(-s.group_c // config.block_c) * config.block_c
        macs = blocks * config.block_m * plan.row.size * depth
        loaded = macs * (1 / config.block_m + 1 / config.block_n) * size
        found[tuple(config)] = _seconds(problem, macs, loaded, blocks * len(plan.group))
    return found


def _gather_cost(problem: Problem, planar: bool) -> tuple[float, float]:
    """Bytes of one gathered value of dy, and bytes of copying dy first."""
    s, size = problem.shape, item_size(problem.dtype)
    copy = 2.0 * s.N * s.K * s.P * s.Q * size if planar else 0.0
    return (_SECTOR if problem.channels_last and not planar else size), copy


def dgrad(problem: Problem) -> Mapping[Config, float]:
    s, size = problem.shape, item_size(problem.dtype)
    u, v = s.stride
    found: dict[Config, float] = {}
    for config in _planar_too(problem, _DGRAD):
        if config.block_k > power_of_two(s.group_k):
            continue
        config = config._replace(block_n=min(config.block_n, power_of_two(s.group_c)))
        if not _fits(problem, config.block_m, config.block_n, config.block_k, config.stages):
            continue
        plan = DgradSchedule.of(problem.skeleton, s, config.block_k, bool(config.aligned))
        blocks = -(-s.N * -(-s.H // u) * -(-s.W // v) // config.block_m)
        c_blocks = -(-s.group_c // config.block_n)
        macs = blocks * config.block_m * plan.row.size * c_blocks * config.block_n
        value, copy = (size, 0.0) if config.aligned else _gather_cost(problem, bool(config.planar))
        loaded = macs * (size / config.block_m + value / config.block_n)
        programs = blocks * len(plan.origin) * c_blocks
        found[tuple(config)] = _seconds(
            problem, macs, loaded, programs, launches=1 + config.planar, extra=copy
        )
    return found


def wgrad(problem: Problem) -> Mapping[Config, float]:
    s, size = problem.shape, item_size(problem.dtype)
    pixels = s.N * s.P * s.Q
    found: dict[Config, float] = {}
    for config in _planar_too(problem, _WGRAD):
        if config.block_k > power_of_two(s.group_k):
            continue
        config = config._replace(
            block_n=min(config.block_n, power_of_two(s.group_c)),
            block_m=_depth(problem, config.block_m, pixels),
        )
        if not _fits(problem, config.block_k, config.block_n, config.block_m, config.stages):
            continue
        plan = WgradSchedule.of(problem.skeleton, s, config.block_k)
        c_blocks = -(-s.group_c // config.block_n)
        steps = -(-pixels // config.block_m)
        whole = len(plan.group) * c_blocks
        # Two waves, but at least four steps of pixels each.
        splits = max(1, min(_MOST_SPLITS, -(-2 * SMS // max(1, whole)), steps // 4))
        config = config._replace(splits=splits)
        macs = steps * config.block_m * plan.row.size * c_blocks * config.block_n
        value, copy = _gather_cost(problem, bool(config.planar))
        loaded = macs * (size / config.block_k + value / config.block_n)
        parts = 8.0 * splits * problem.skeleton.stripes * s.group_c if splits > 1 else 0.0
        launches = 1 + (splits > 1) + config.planar
        found[tuple(config)] = _seconds(
            problem, macs, loaded, whole * splits, launches=launches, extra=copy + parts
        )
    return found


def _planar_too(problem: Problem, configs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Gathering configurations once more on a planar copy of dy, where dy is not planar already."""
    if not problem.channels_last:
        return configs
    return configs + tuple(c._replace(planar=1) for c in configs if not getattr(c, "aligned", 0))


_PASSES = {"fprop": fprop, "dgrad": dgrad, "wgrad": wgrad}


def candidates(problem: Problem, which: Pass) -> Mapping[Config, float]:
    """{configuration: predicted seconds}; equal configurations of small problems appear once."""
    return _PASSES[which](problem)
