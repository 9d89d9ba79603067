"""Layouts of real networks' layers fit every chip, and refusals give their reason. Nothing is launched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from types import ModuleType

import numpy as np
import pytest

from stripe_kernels import list_kernels, registry
from stripe_kernels.backends import (
    cuda_cost,
    cuda_ffma,
    cuda_gather,
    cuda_mma,
    cuda_mma_grad,
    cuda_taps,
    cuda_wgmma,
    cuda_wgrad,
    cuda_whole,
)
from stripe_kernels.backends.cuda_columns import BLOCKS, PARTS, column_tiles
from stripe_kernels.backends.cuda_tables import DTYPES, SHARED_BYTES, Layout
from stripe_kernels.geometry import ConvShape
from stripe_kernels.registry import PASSES, Config, Pass, Problem
from stripe_kernels.skeleton import FilterSkeleton

SHAPES = [
    ConvShape(64, 64, 56, 56, 64, 3, 3, padding=(1, 1, 1, 1)),
    ConvShape(64, 64, 56, 56, 128, 3, 3, (2, 2), (1, 1, 1, 1)),
    ConvShape(1024, 128, 16, 16, 128, 3, 3, padding=(1, 1, 1, 1)),
    ConvShape(1024, 512, 2, 2, 512, 3, 3, padding=(1, 1, 1, 1)),
    ConvShape(1, 512, 7, 7, 512, 3, 3, padding=(1, 1, 1, 1)),
    ConvShape(8, 64, 112, 112, 64, 7, 7, (2, 2), (3, 3, 3, 3)),
    ConvShape(2, 64, 65, 65, 64, 3, 3, (1, 1), (12, 12, 12, 12), (12, 12)),
    ConvShape(4, 64, 33, 35, 64, 5, 3, (3, 1), (2, 0, 2, 0), (2, 3), groups=2),
    ConvShape(3, 24, 200, 1, 40, 9, 1, (1, 1), (4, 0, 4, 0)),
]


def problem(shape: ConvShape, dtype: str, density: float = 0.2) -> Problem:
    live = np.random.default_rng(0).random((shape.K, shape.R, shape.S)) < density
    return Problem(shape, FilterSkeleton(live), dtype, "cuda", True, 1)


def mma_layout(p: Problem, which: Pass, config: Config) -> Layout:
    if which == "fprop":
        return cuda_mma.fprop_layout(p, config)
    if which == "dgrad":
        return cuda_mma_grad.dgrad_layout(p, config)
    return cuda_mma_grad.wgrad_layout(p, config, len(cuda_mma_grad.wgrad_blocks(p)))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.C}x{s.H}x{s.W}-{s.K}x{s.R}x{s.S}")
@pytest.mark.parametrize("which", PASSES)
def test_every_candidate_fits_a_block_of_any_chip(native: ModuleType, which: Pass, shape: ConvShape) -> None:
    for dtype, code in DTYPES.items():
        p = problem(shape, dtype)
        layouts = {("mma", c): mma_layout(p, which, c) for c in cuda_cost.mma(p, which)}
        if dtype == "float32":
            layouts |= {("ffma", c): cuda_ffma.layout_of(p, which, c) for c in cuda_cost.ffma(p, which)}
        for (family, config), layout in layouts.items():
            used = native.shared_bytes(f"{which}_{family}", code, layout.integers())
            assert used <= SHARED_BYTES, f"{family} {config} in {dtype} needs {used} bytes"


def wgmma_layout(p: Problem, config: Config) -> Layout | None:
    return None if cuda_wgmma.room(p, config) is None else cuda_wgmma.tiles_of(p, config)[-1]


SM_90: dict[str, tuple[Iterable[Config], Callable[[Problem, Config], Layout | None]]] = {
    "fprop_sm90": (cuda_wgmma.CONFIGS, wgmma_layout),
    "fprop_taps_sm90": (cuda_taps.CONFIGS, cuda_taps.layout_of),
    "fprop_whole_sm90": (cuda_whole.CONFIGS, cuda_whole.layout_of),
    "dgrad_sm90": (cuda_gather.CONFIGS, cuda_gather.layout_of),
    "wgrad_sm90": ([(*shape, 1) for shape in cuda_wgrad.SHAPES], cuda_wgrad.layout_of),
}


@pytest.mark.parametrize("name", SM_90)
def test_every_candidate_fits_a_block_of_sm_90(native: ModuleType, name: str) -> None:
    configs, layout_of = SM_90[name]
    layouts = {
        (shape, config): layout_of(problem(shape, "bfloat16"), config)
        for shape, config in product(SHAPES, configs)
    }
    taken = {key: layout for key, layout in layouts.items() if layout is not None}
    assert {config for _, config in taken} == set(configs)
    for (shape, config), layout in taken.items():
        used = native.shared_bytes(name, DTYPES["bfloat16"], layout.integers())
        assert used <= cuda_wgmma.SHARED_BYTES, f"{config} needs {used} bytes for {shape}"


@pytest.mark.parametrize("how", [0, 1, 2])
def test_column_tiles_hold_every_stripe_once(how: int) -> None:
    for density in (0.0, 0.1, 0.6, 1.0):
        p = problem(ConvShape(1, 8, 5, 5, 150, 4, 3), "bfloat16", density)
        found = np.zeros((150, 12), np.int64)
        for tile in column_tiles(p.skeleton, 1, how)[0]:
            assert len(tile.columns) <= BLOCKS
            assert all(len(places) <= PARTS for places in tile.places())
            for block, union in zip(tile.columns, tile.unions, strict=True):
                for k, taps in block:
                    assert not (taps & ~union).any()
                    found[k] += taps
        assert (found == p.skeleton.live.reshape(150, 12)).all()


@pytest.mark.skipif("cuda_mma" not in list_kernels(), reason="stripe_kernels._cuda is not built")
def test_refusals_give_the_reason() -> None:
    p = problem(SHAPES[0], "bfloat16")
    mma, ffma = registry.find("cuda_mma"), registry.find("cuda_ffma")
    assert mma.refuse(p, "fprop") is None
    assert "not on cpu" in mma.refuse(replace(p, device="cpu"), "fprop")
    assert "not float32" in mma.refuse(replace(p, dtype="float32"), "fprop")
    assert "channels_last" in mma.refuse(replace(p, channels_last=False), "fprop")
    odd = problem(ConvShape(1, 12, 5, 5, 9, 3, 3), "bfloat16")
    assert "multiples of 8 (16 bytes), got 12" in mma.refuse(odd, "fprop")
    assert "multiples of 8 (16 bytes), got 9" in mma.refuse(odd, "dgrad")
    assert "not bfloat16" in ffma.refuse(p, "fprop")
    tf32, single = registry.find("cuda_mma_tf32"), replace(p, dtype="float32")
    assert tf32.refuse(single, "fprop") is tf32.refuse(single, "dgrad") is None
    assert "fprop and dgrad" in tf32.refuse(single, "wgrad")
    assert ffma.refuse(replace(odd, dtype="float32", channels_last=False), "wgrad") is None
