"""Kernels by name, made ready to run on a case's operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from stripe_kernels.registry import Pass
from stripe_kernels.testing.cases import LAYOUTS, Case, Operands


class Prepared(NamedTuple):
    """One configuration of a kernel made ready: a call on operands, and what it was predicted to take."""

    call: Callable[[Operands], Tensor]
    predicted: float  # seconds


def prepared(
    problem: Case, operands: Operands, which: Pass, kernel: str, repack: bool = False
) -> dict[str, Prepared]:
    """Every configuration of a kernel by name, "kernel[configuration]", the fastest prediction first.

    A call takes operands of the same sizes and layout and gives y, dx or dw. The weight is packed here, once;
    with `repack` in every call, as training does. RuntimeError with the reason where the kernel refuses.
    """
    from stripe_kernels import backends, registry
    from stripe_kernels.stripe_op import StripeOp, is_channels_last

    backends.load()
    like = operands.dy if which == "dgrad" else operands.x
    op = StripeOp.of(*problem.arguments, kernel)
    last = is_channels_last(like)
    asked = op.problem(problem.shape.input_size, like.dtype, like.device, last)
    chosen = registry.find(kernel)
    reason = chosen.refuse(asked, which)
    if reason:
        raise RuntimeError(f"{kernel} does not run {which} of {problem.name}: {reason}")

    def call(config: tuple[int, ...]) -> Callable[[Operands], Tensor]:
        runner = chosen.build(asked, which, config)
        if which == "wgrad":
            return lambda o: runner(o.dy, o.x)
        kept = None if repack else runner.pack(operands.weight)
        if which == "dgrad":
            return lambda o: runner(o.dy, runner.pack(o.weight) if kept is None else kept)
        return lambda o: runner(
            o.x, runner.pack(o.weight) if kept is None else kept, None, None, None, "none"
        )

    predicted = chosen.candidates(asked, which)
    configs = sorted(predicted, key=predicted.__getitem__)
    return {f"{kernel}{list(c) if c else ''}": Prepared(call(c), predicted[c]) for c in configs}


def withdraw(kernel: str) -> None:
    """Takes a kernel, or a pass of one ("cuda_wgmma:wgrad"), out of this process, as one that a check has lost."""
    from stripe_kernels import backends, registry

    backends.load()
    registry.withdraw(kernel)


def without_memory(problem: Case, dtype: torch.dtype, layout: str) -> Operands:
    """Operands of the case's sizes and layout on the "meta" device."""
    s = problem.shape

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    x, dy, residual = (LAYOUTS[layout](empty(*size)) for size in (s.input_size, s.output_size, s.output_size))
    weight = empty(problem.skeleton.stripes, s.group_c)
    return Operands(x, weight, dy, empty(s.K), empty(s.K), residual)


def predicted_on_gpu(
    problem: Case, operands: Operands, which: Pass, kernel: str, tf32: bool = False
) -> dict[tuple[int, ...], Prepared]:
    """A kernel's configurations on a GPU that need not be there, the fastest prediction first; {} where it refuses.
    Their calls launch nothing: they compile what they would launch, into Triton's cache on disk."""
    from stripe_kernels import backends, registry
    from stripe_kernels.stripe_op import StripeOp, is_channels_last

    backends.load()
    like = operands.dy if which == "dgrad" else operands.x
    op = StripeOp.of(*problem.arguments, kernel)
    found = op.problem(problem.shape.input_size, like.dtype, like.device, is_channels_last(like))
    asked, chosen = replace(found, device="cuda", tf32=(tf32, tf32)), registry.find(kernel)
    if chosen.refuse(asked, which):
        return {}

    def call(config: tuple[int, ...]) -> Callable[[Operands], Tensor]:
        def compile_all(o: Operands) -> Tensor:
            runner = chosen.build(asked, which, config)
            result: Tensor
            with registry.provided("compiling")(), torch.inference_mode():  # type: ignore[misc]
                if which == "wgrad":
                    result = runner(o.dy, o.x)
                elif which == "dgrad":
                    result = runner(o.dy, runner.pack(o.weight))
                else:
                    packed = runner.pack(o.weight)
                    result = runner(o.x, packed, None, None, None, "none")
                    if o.x.dtype == torch.bfloat16:  # what a network's layers have folded in
                        runner(o.x, packed, o.bias, None, None, "relu")
                        runner(o.x, packed, o.bias, None, o.residual, "relu")
            return result

        return compile_all

    times = chosen.candidates(asked, which)
    return {c: Prepared(call(c), times[c]) for c in sorted(times, key=times.__getitem__)}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin return NaN (integers: the largest), so that an unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def list_and_calls(model: nn.Module, x: Tensor, kernel: str = "auto") -> dict[str, nn.Module]:
    """The network `model` is compacted to, untuned and without lanes: "list" makes one native call of layers that
    follow each other, "calls" one for each, both bound to inputs like `x`. kernel: of every stripe layer."""
    from stripe_kernels import StripeConv2d, backends
    from stripe_kernels.compile.network import Network
    from stripe_kernels.compile.optimize import compact

    body = compact(model, (x,)).body
    for module in body.modules():
        if isinstance(module, StripeConv2d):
            module.kernel = kernel
    networks = {"list": Network(body), "calls": Network(body)}
    for name, network in networks.items():
        network.resident_from = None
        hidden = mock.patch.object(backends, "call_list", side_effect=ImportError)
        with torch.inference_mode(), hidden if name == "calls" else nullcontext():
            network(x)
    return dict(networks)
