"""StripeOp: one layer's settings, and the runners of the shapes it has seen.

What a runner depends on beyond them is read off the tensor that it is made for: sizes, strides, dtype, device, and
torch's switches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from stripe_kernels import backends
from stripe_kernels.geometry import ConvShape
from stripe_kernels.plan import Plan, make_plan
from stripe_kernels.registry import Pass, Problem
from stripe_kernels.skeleton import FilterSkeleton

_RUNNERS_KEPT = 64  # shapes a layer remembers
_OPS_KEPT = 1024  # layers' settings, with their runners, beyond those that modules hold


class StripeOp:
    """One layer's settings: skeleton, stride, padding (top, left, bottom, right), dilation, groups, kernel.

    Shapes seen so far keep their runner here; equal settings share one object (`StripeOp.of`).
    """

    def __init__(
        self,
        skeleton: str,
        stride: tuple[int, int],
        padding: tuple[int, int, int, int],
        dilation: tuple[int, int],
        groups: int,
        kernel: str,
    ) -> None:
        if min(*stride, *dilation) < 1 or min(padding) < 0:
            raise ValueError(
                "stride and dilation must be at least 1 and padding at least 0, got "
                f"stride {stride}, dilation {dilation}, padding {padding}"
            )
        self.arguments = (skeleton, stride, padding, dilation, groups, kernel)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.groups, self.kernel = groups, kernel
        self._runners: dict[Any, Any] = {}
        # All that the checks and the plan of a call look at -> its runner.
        self.checked: dict[Any, Any] = {}
        self.forgotten: dict[Any, Any] = {}  # gets an entry, and a successor, when the runners are dropped

    @cached_property
    def skeleton(self) -> FilterSkeleton:
        """Read on first use: torch.compile traces the constructor."""
        return FilterSkeleton.from_text(self.arguments[0])

    @staticmethod
    @lru_cache(maxsize=_OPS_KEPT)
    def of(*arguments: Any) -> StripeOp:
        return StripeOp(*arguments)

    @staticmethod
    def of_operator(arguments: Sequence[Any]) -> StripeOp:
        """From the last six arguments of an operator, which come as lists where `of` takes tuples."""
        skeleton, stride, padding, dilation, groups, kernel = arguments
        return StripeOp.of(skeleton, tuple(stride), tuple(padding), tuple(dilation), groups, kernel)

    def shape(self, n: int, c: int, h: int, w: int) -> ConvShape:
        k, r, s = self.skeleton.shape
        return ConvShape(n, c, h, w, k, r, s, self.stride, self.padding, self.dilation, self.groups)

    def problem(
        self, size: tuple[int, ...], dtype: torch.dtype, device: torch.device, channels_last: bool,
        threads: int | None = None,
    ) -> Problem:  # fmt: skip
        """threads: of the CPU; torch's number unless it is given."""
        shape = self.shape(*(int(v) for v in size))
        threads = (threads or torch.get_num_threads()) if device.type == "cpu" else 1
        tf32 = tf32_allowed(device, dtype)
        return Problem(shape, self.skeleton, str(dtype)[6:], device.type, channels_last, threads, tf32)

    def plan(self, which: Pass, problem: Problem) -> Plan:
        backends.load()
        return make_plan(problem, which, self.kernel)

    def runner(
        self, which: Pass, size: tuple[int, ...], like: Tensor, threads: int | None = None
    ) -> Callable[..., Tensor]:
        """The runner for an input of `size` [N, C, H, W] in the dtype, device and memory format of `like`."""
        key = (which, size, threads, *signature(like))
        runner: Callable[..., Tensor] | None = self._runners.get(key)
        if runner is None:
            problem = self.problem(size, like.dtype, like.device, is_channels_last(like), threads)
            runner = self.plan(which, problem).build()
            # Other threads may be doing the same: a list of the keys is made in one step, an iteration would not be.
            for oldest in list(self._runners)[: 1 - _RUNNERS_KEPT]:
                self._runners.pop(oldest, None)
            self._runners[key] = runner
        return runner

    def remember(self, key: Any, runner: Any) -> Any:
        """The runner, kept for calls like one that was checked."""
        if len(self.checked) >= 3 * _RUNNERS_KEPT:
            self.checked.clear()
        self.checked[key] = runner
        return runner

    def forget(self) -> None:
        """Drops the runners, so that the next call plans anew (after tuning)."""
        self._runners.clear()
        self.checked.clear()
        self.forgotten[None] = None
        self.forgotten = {}


def tf32_allowed(device: torch.device, dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether float32 may be rounded to tf32 on a GPU, by torch's switches: in convolutions, in products."""
    if device.type != "cuda" or dtype != torch.float32:
        return False, False
    conv = getattr(torch.backends.cudnn, "conv", None)
    if conv is None:  # torch before 2.9
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    # Read as the newer switches: torch refuses to read an older one after a newer one was written.
    return conv.fp32_precision == "tf32", torch.backends.cuda.matmul.fp32_precision == "tf32"


def is_channels_last(t: Tensor) -> bool:
    """True where torch's convolution of `t` gives a channels_last output: as Tensor::suggest_memory_format,
    from the order of the strides, so slices count."""
    if t.dim() != 4 or t.stride(1) == 0:
        return False
    sizes, strides, least = t.shape, t.stride(), 0
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * max(sizes[d], 1)
    return True


def signature(t: Tensor) -> tuple[Any, ...]:
    """Of the tensor that a plan is made for: what the plan looks at, the switches included."""
    device, dtype = t.device, t.dtype
    tf32 = t.is_cuda and tf32_allowed(device, dtype)
    return t.shape, t.stride(), dtype, device, torch.get_num_threads(), tf32
