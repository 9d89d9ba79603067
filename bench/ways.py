"""The ways to run one network that compete: in torch, compiled, optimized, and in the inference runtimes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import stripe_kernels
from bench import runtimes
from bench.contestants import FORMATS
from bench.job import Entrant, Kind, checked_images
from stripe_kernels import FilterSkeleton, freeze
from stripe_kernels.testing import Budget

_RIVALS_ERROR = 1e-3  # of the largest output: what any float32 run of these networks keeps, in any order


def laid_out(model: nn.Module, memory_format: str) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=FORMATS[memory_format])


def conv_macs(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Multiply-adds of every convolution for one image like those of x, by module name."""
    work: dict[str, int] = {}

    def count(name: str, conv: nn.Conv2d, y: Tensor) -> None:
        work[name] = conv.weight.numel() * y[0, 0].numel()

    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    handles = [m.register_forward_hook(lambda m, _, y, n=n: count(n, m, y)) for n, m in convolutions.items()]
    with torch.inference_mode():
        model(x)
    for handle in handles:
        handle.remove()
    return work


class Ways:
    """Entrants of `model` on x [N, C, H, W], in evaluation mode, and of networks that compute the same.

    Outputs are checked on a few images with the model in float64 and the errors that torch makes, in both memory
    formats and in `others` too: networks that differ from it by roundings.
    """

    def __init__(self, model: nn.Module, x: Tensor, threads: int, *others: nn.Module) -> None:
        self.model, self.x, self.threads = model, x, threads
        self.images = checked_images(x.shape[0])
        some = x[self.images]
        with torch.inference_mode():
            self.exact = copy.deepcopy(model).double()(some.double())
            outputs = [
                laid_out(m, f)(some.contiguous(memory_format=FORMATS[f]))
                for m in (model, *others)
                for f in FORMATS
            ]
        self.budget = Budget.of(self.exact, *outputs)

    def wrong(self, y: Tensor, strict: bool = True) -> str | None:
        """What is wrong with an output, or None; strict: by the budget of our own. A rival only has to be right."""
        if y.shape[0] != self.x.shape[0] or not torch.isfinite(y).all():
            return f"has shape {list(y.shape)} or values that are not finite"
        if strict:
            return self.budget.failure(y[self.images])
        error = float((y[self.images].double() - self.exact).abs().max() / self.exact.abs().max())
        return None if error < _RIVALS_ERROR else f"is off by {error:.1e} of the largest output"

    def eager(self, kind: Kind, share: float, network: Callable[[], nn.Module], fmt: str) -> Entrant:
        """A network in one memory format; share: of all multiply-adds, those it has to do."""
        call = torch.inference_mode()(partial(laid_out(network(), fmt), self._given(fmt)))
        return Entrant(kind, call, lambda: self.wrong(call()), share)

    def compiled(self, fmt: str) -> Entrant:
        """The model by torch.compile with frozen weights."""
        torch.compiler.reset()
        network = torch.compile(laid_out(self.model, fmt), options={"freezing": True})
        call = torch.no_grad()(partial(network, self._given(fmt)))
        return Entrant("dense", call, lambda: self.wrong(call(), strict=False), 1.0)

    def optimized(self, share: float, skeletons: Mapping[str, FilterSkeleton | Tensor]) -> Entrant:
        """The model frozen and optimized."""
        with TemporaryDirectory() as folder:  # the user's cache stays as it is
            network = stripe_kernels.optimize(freeze(self.model, skeletons), self.x, folder=folder)
        call = torch.inference_mode()(partial(network, self.x))
        return Entrant("stripe", call, lambda: self.wrong(call()), share)

    def runtime(self, kind: Kind, share: float, name: str) -> Entrant:
        """The model in an inference runtime."""
        runtimes.require(name)
        call = runtimes.network_call(name, self._onnx, self.x, self.threads)
        return Entrant(kind, call, lambda: self.wrong(torch.as_tensor(call()), strict=False), share)

    @cached_property
    def _onnx(self) -> bytes:
        return runtimes.network(self.model, self.x)

    def _given(self, fmt: str) -> Tensor:
        return self.x.contiguous(memory_format=FORMATS[fmt])
