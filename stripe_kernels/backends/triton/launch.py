"""What every Triton launch shares: index arrays on the device, the current device, addressing width and
precision."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from stripe_kernels.registry import Pass, Problem

DTYPES = ("float32", "bfloat16", "float16")


@triton.jit
def _probe() -> None:
    pass


# Decided when the kernels were decorated; from then on the environment has no say.
INTERPRETED = isinstance(_probe, InterpretedFunction)


def refuse(problem: Problem, which: Pass) -> str | None:
    """Why the Triton kernels cannot run this problem, or None."""
    if problem.device != "cuda" and not (problem.device == "cpu" and INTERPRETED):
        return f"runs on CUDA devices, not on {problem.device} (there in Triton's interpreter only)"
    if problem.dtype not in DTYPES:
        return f"takes {', '.join(DTYPES)}, not {problem.dtype}"
    return None


@lru_cache(maxsize=64)
def at_hand(device: torch.device) -> bool:
    """Whether Triton runs there: for what torch can do as well, and has to where no kernel was chosen by measurement.
    Triton builds its launchers with the machine's C compiler, and bfloat16 takes sm_80."""
    if device.type != "cuda":
        return True
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return compiler is not None and torch.cuda.get_device_capability(device) >= (8, 0)


_compiling = False


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Launches of this process compile their kernel and do nothing else: into Triton's cache on disk, from tensors
    of torch's "meta" device as well."""
    global _compiling
    before, _compiling = _compiling, True
    try:
        yield
    finally:
        _compiling = before


class Launch(NamedTuple):
    """One kernel launch, complete; ahead-of-time tests compile from the same object that runs."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int

    def run(self, device: torch.device) -> None:
        """On the current stream of `device`. No host synchronisation."""
        if min(self.grid) == 0:
            return
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if _compiling:
            self.kernel.warmup(grid=self.grid, **self.arguments, **options)
            return
        elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
            self.kernel[self.grid](**self.arguments, **options)


def with_zero_row(weight: Tensor) -> Tensor:
    """[A, C/g] -> [A + 1, C/g]: the last row stands for every dead stripe."""
    weight = weight.detach()
    return torch.cat([weight, weight.new_zeros(1, weight.shape[1])])


def to_tf32(weight: Tensor, precision: str) -> Tensor:
    """The nearest values that tf32 has, where products are tf32's. tl.dot cuts both operands off, cuDNN rounds them:
    of two operands cut off a product is half a unit too small on average, and so is a sum."""
    if precision != "tf32" or weight.dtype != torch.float32:
        return weight
    bits_ = weight.contiguous().view(torch.int32)
    nearest = (bits_ + (0xFFF + ((bits_ >> 13) & 1))) & ~0x1FFF
    return torch.where(weight.isfinite(), nearest.view(torch.float32), weight)


def span(t: Tensor | None) -> int:
    """Elements between the first and the last of a tensor."""
    return (
        0
        if t is None or not t.numel()
        else sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    )


def wide(*tensors: Tensor | None) -> bool:
    """True when an offset may not fit 32 bits."""
    return max(max(span(t), 0 if t is None else t.numel()) for t in tensors) >= 2**31 - 2**16


def precision(problem: Problem) -> str:
    """tl.dot's input_precision: float32 follows torch's switch for convolutions, other types have one way."""
    return "tf32" if problem.tf32[0] else "ieee"


def bits(taps: int) -> int:
    """Width of a word with a bit for each tap; 0 where there are too many."""
    return 32 if taps <= 31 else 64 if taps <= 63 else 0


def strides(prefix: str, t: Tensor | None, names: str) -> dict[str, int]:
    """Strides of a tensor as keyword arguments, {prefix}_{name}; zeros for None."""
    values = (0,) * len(names) if t is None else t.stride()
    return {f"{prefix}_{name}": value for name, value in zip(names, values, strict=True)}


def memory_format(problem: Problem) -> torch.memory_format:
    return torch.channels_last if problem.channels_last else torch.contiguous_format
