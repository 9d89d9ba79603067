"""The configurations worth measuring, with predicted seconds.

stripe_kernels/roofline.py applied to the work each configuration executes, its idle slots included. No
prediction here was compared with a measurement: tune() replaces them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from stripe_kernels.backends.triton.dgrad import DgradConfig
from stripe_kernels.backends.triton.fprop import FpropConfig
from stripe_kernels.backends.triton.schedule import (
    DgradSchedule,
    FpropSchedule,
    StemSchedule,
    WgradSchedule,
)
from stripe_kernels.backends.triton.stem import StemConfig
from stripe_kernels.backends.triton.wgrad import WgradConfig
from stripe_kernels.packed import Int32Array
from stripe_kernels.registry import Config, Pass, Problem
from stripe_kernels.roofline import SMS, gpu_seconds, item_size, math_type

_MMA_SHARE = 0.6  # of the GEMM rate, for tiles of 64 columns and more: an estimate
# wgmma reads its 64 rows from shared memory anew in every instruction: with fewer columns that read is its time.
_FULL_WIDTH = 64
_CACHE = 24 << 20  # bytes of parts a chunk should stay under, as in backends/gemm.py
_MOST_SPLITS = 64
_SECTOR = 32  # bytes, the least that L2 hands out

_FPROP = (
    FpropConfig(128, 32, 64, 0, 4, 4),
    FpropConfig(256, 16, 64, 0, 8, 3),
    FpropConfig(256, 32, 64, 0, 8, 3),
    FpropConfig(128, 64, 64, 0, 8, 3),
    FpropConfig(64, 32, 64, 0, 4, 4),
    FpropConfig(128, 64, 64, 1, 8, 3),
    FpropConfig(128, 128, 64, 1, 8, 3),
    FpropConfig(128, 32, 64, 1, 4, 4),
)
_DGRAD = (
    DgradConfig(128, 64, 32, 0, 0, 4, 3),
    DgradConfig(128, 128, 32, 0, 0, 8, 3),
    DgradConfig(128, 256, 32, 0, 0, 8, 3),
    DgradConfig(128, 128, 64, 0, 0, 8, 3),
    DgradConfig(64, 64, 32, 0, 0, 4, 3),
    DgradConfig(128, 64, 16, 1, 0, 4, 4),
    DgradConfig(128, 128, 32, 1, 0, 8, 3),
    DgradConfig(64, 64, 32, 1, 0, 4, 3),
)
_WGRAD = (
    WgradConfig(16, 64, 64, 1, 0, 4, 3),
    WgradConfig(32, 64, 64, 1, 0, 4, 3),
    WgradConfig(64, 64, 64, 1, 0, 4, 3),
    WgradConfig(64, 128, 64, 1, 0, 8, 3),
    WgradConfig(128, 128, 32, 1, 0, 8, 3),
    WgradConfig(64, 256, 32, 1, 0, 8, 3),
)
_STEM = (
    StemConfig(128, 64, 32, 8),
    StemConfig(128, 64, 32, 4),
    StemConfig(128, 64, 64, 8),
    StemConfig(128, 128, 32, 8),
    StemConfig(64, 64, 32, 4),
    StemConfig(32, 32, 32, 4),
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


def _spills(problem: Problem, sums: int, most: int) -> bool:
    """Strict float32 has no tensor cores, and a tile of more than `most` sums spilled: wgrad's of 64 x 64 664 bytes a
    thread, of 64 x 128 2 kB."""
    strict = problem.device == "cuda" and problem.dtype == "float32" and not problem.tf32[0]
    return strict and sums > most


def _seconds(
    problem: Problem,
    macs: float,
    width: int,
    loaded: float,
    programs: int,
    *,
    gathered: float = 0.0,
    launches: int = 1,
    extra: float = 0.0,
) -> float:
    """Activations and weights move once, and `extra` bytes besides. width: columns of a product."""
    s = problem.shape
    values = s.N * (s.H * s.W * s.C + s.P * s.Q * s.K) + problem.skeleton.stripes * s.group_c
    return gpu_seconds(
        math_type(problem.dtype, problem.tf32[0]),
        macs=macs,
        moved=values * item_size(problem.dtype) + extra,
        loaded=loaded,
        gathered=gathered,
        share=_MMA_SHARE * min(1.0, width / _FULL_WIDTH),
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
        if config.block_n > power_of_two(s.group_k) or (config.split and s.R == 1):
            continue
        if _spills(problem, config.block_m * config.block_n, 4096):
            continue
        config = config._replace(block_c=_depth(problem, config.block_c, s.group_c))
        if not _fits(problem, config.block_m, config.block_n, config.block_c, config.stages):
            continue
        plan = FpropSchedule.of(problem.skeleton, s, config.block_n, bool(config.split))
        tiles, pixels = len(plan.group), s.N * s.P * s.Q
        depth = -(-s.group_c // config.block_c) * config.block_c
        blocks = -(-pixels // config.block_m)
        macs = blocks * config.block_m * plan.row.size * depth
        loaded = macs * (1 / config.block_m + 1 / config.block_n) * size
        if not config.split:
            found[tuple(config)] = _seconds(problem, macs, config.block_n, loaded, blocks * tiles)
            continue
        image = tiles * config.block_n * s.P * s.Q * size
        chunks = max(1, -(-s.N // max(1, _CACHE // max(1, image))))
        config = config._replace(split=max(1, -(-s.N // chunks)))
        product = _seconds(problem, macs, config.block_n, loaded, blocks * tiles // chunks, launches=chunks)
        # The second stage reads the parts, and of a block of 16 filters as many as its filter of most has.
        parts = np.bincount(plan.filters[plan.filters >= 0], minlength=s.K)
        executed = 16 * float(np.add.reduce([b.max() for b in np.split(parts, range(16, s.K, 16))]))
        moved = float(s.N * image)
        found[tuple(config)] = product + gpu_seconds(
            problem.dtype, macs=0.0, moved=0.0, loaded=2 * moved, gathered=pixels * executed, launches=chunks
        )
    return found


def stem(problem: Problem) -> Mapping[Config, float]:
    s, size = problem.shape, item_size(problem.dtype)
    found: dict[Config, float] = {}
    for config in _STEM:
        config = config._replace(
            block_n=min(config.block_n, power_of_two(s.group_k)),
            block_l=min(config.block_l, power_of_two(s.group_c * s.taps)),
        )
        if _spills(problem, config.block_m * config.block_n, 4096):
            continue
        plan = StemSchedule.of(problem.skeleton, s, config.block_n, config.block_l)
        runs = -(-s.N * s.P * s.Q // config.block_m)
        gathered = float(runs * config.block_m * len(plan.slot))
        macs = gathered * config.block_n
        loaded = gathered * size + runs * plan.value.size * size
        programs = runs * (len(plan.step_ptr) - 1)
        found[tuple(config)] = _seconds(problem, macs, config.block_n, loaded, programs, gathered=gathered)
    return found


def _gather_cost(problem: Problem, planar: bool, filters: Int32Array) -> tuple[float, float]:
    """Bytes that a gathered value of dy costs on average, and bytes of copying dy first. Of channels_last a row of
    `filters` (-1: none) touches sectors of 32 bytes; consecutive pixels cost their own bytes."""
    s, size = problem.shape, item_size(problem.dtype)
    copy = 2.0 * s.N * s.K * s.P * s.Q * size if planar else 0.0
    if not problem.channels_last or planar:
        return size, copy
    sectors = np.sort(np.where(filters < 0, -1, filters * size // _SECTOR), axis=1)
    touched = (sectors[:, :1] >= 0).sum() + (np.diff(sectors, axis=1) > 0).sum()
    return _SECTOR * float(touched) / max(1, int((filters >= 0).sum())), copy


def dgrad(problem: Problem) -> Mapping[Config, float]:
    s, size = problem.shape, item_size(problem.dtype)
    u, v = s.stride
    found: dict[Config, float] = {}
    for config in _planar_too(problem, _DGRAD):
        if config.block_k > power_of_two(s.group_k):
            continue
        config = config._replace(block_n=min(config.block_n, power_of_two(s.group_c)))
        if _spills(problem, config.block_m * config.block_n, 4096):
            continue
        if not _fits(problem, config.block_m, config.block_n, config.block_k, config.stages):
            continue
        plan = DgradSchedule.of(problem.skeleton, s, config.block_k, bool(config.aligned))
        blocks = -(-s.N * -(-s.H // u) * -(-s.W // v) // config.block_m)
        c_blocks = -(-s.group_c // config.block_n)
        macs = blocks * config.block_m * plan.row.size * c_blocks * config.block_n
        value, copy = (
            (size, 0.0) if config.aligned else _gather_cost(problem, bool(config.planar), plan.filters)
        )
        loaded = macs * (size / config.block_m + value / config.block_n)
        gathered = 0.0 if config.aligned else macs / config.block_n
        programs = blocks * len(plan.origin) * c_blocks
        launches = 1 + config.planar
        found[tuple(config)] = _seconds(
            problem, macs, config.block_n, loaded, programs, gathered=gathered, launches=launches, extra=copy
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
        if _spills(problem, config.block_k * config.block_n, 2048):
            continue
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
        value, copy = _gather_cost(problem, bool(config.planar), plan.filters)
        loaded = macs * (size / config.block_k + value / config.block_n)
        parts = 8.0 * splits * problem.skeleton.stripes * s.group_c if splits > 1 else 0.0
        found[tuple(config)] = _seconds(
            problem,
            macs,
            config.block_k,
            loaded,
            whole * splits,
            gathered=macs / config.block_n,
            launches=1 + (splits > 1) + config.planar,
            extra=copy + parts,
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
