"""Problems for the emulated kernels, and one pass of one checked against its budget."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from stripe_kernels.registry import Pass, Problem
from stripe_kernels.testing import (
    Budget,
    Budgets,
    Case,
    Operands,
    Trial,
    budgets,
    case,
    failure,
    poisoned_memory,
)

ONE_IMAGE = case("one image", N=2, C=24, H=9, W=8, K=83)


@lru_cache(maxsize=64)
def operands_of(c: Case, dtype: torch.dtype, layout: str) -> Operands:
    return c.operands(dtype, layout)


@lru_cache(maxsize=64)
def budgets_of(c: Case, dtype: torch.dtype, layout: str) -> Budgets:
    return budgets(c, operands_of(c, dtype, layout))


def problem_of(c: Case, layout: str, dtype: torch.dtype = torch.float32) -> Problem:
    return Problem(c.shape, c.skeleton, str(dtype)[6:], "cuda", layout == "channels_last", 1)


def run(runner: Any, which: Pass, o: Operands) -> Tensor:
    """y, dx or dw into memory full of NaN, without an epilogue."""
    with poisoned_memory():
        if which == "wgrad":
            return runner(o.dy, o.x)
        packed = runner.pack(o.weight)
        return runner(o.dy, packed) if which == "dgrad" else runner(o.x, packed, None, None, None, "none")


def check(runner: Any, c: Case, which: Pass, dtype: torch.dtype, layout: str, what: str) -> Tensor:
    result = run(runner, which, operands_of(c, dtype, layout))

    def trial(draw: int) -> Trial:
        if draw == 0:
            return Trial(budgets_of(c, dtype, layout).of(which), result)
        drawn = c.operands(dtype, layout, draw=draw)
        return Trial(budgets(c, drawn, which).of(which), run(runner, which, drawn))

    found = failure(trial)
    assert found is None, f"{what} {which} of {c}, {dtype}, {layout}: the result {found}"
    return result


def with_nans(c: Case) -> tuple[Tensor, Tensor, Tensor]:
    """x with three values that are NaN, a weight, and whether each y reads one of them: a live tap meets its pixel."""
    o = c.operands(torch.bfloat16, "channels_last")
    x = o.x.clone()
    for n, h, w in ((0, 6, 5), (0, 0, 7), (1, 8, 0)):
        x[n, 3, h, w] = torch.nan
    taps = torch.from_numpy(c.skeleton.live.copy())[:, None].expand(-1, c.shape.C, -1, -1).float()
    return x, o.weight, torch.nn.functional.conv2d(x.isnan().float(), taps, padding=1) > 0


def check_epilogue(runner: Any, c: Case, o: Operands, what: str = "") -> None:
    """In float32 after the sums, rounded once: against the float64 epilogue of the float32 convolution."""
    packed, conv = runner.pack(o.weight), budgets(c, o).y.expected
    for bias, scale, residual, activation in (
        (o.bias, o.scale, o.residual, "relu"),
        (None, o.scale, None, "silu"),
        (o.bias, None, o.residual.contiguous(), "hardswish"),
    ):
        z = conv if scale is None else conv * scale.double()[:, None, None]
        z = z if bias is None else z + bias.double()[:, None, None]
        z = getattr(torch.nn.functional, activation)(z if residual is None else z + residual.double())
        y = runner(o.x, packed, bias, scale, residual, activation)
        Budget.of(z, z.to(torch.bfloat16)).check(y, f"{activation} {what}")
