"""ordinary: what a network computes besides its stripe layers, the convolutions and linear layers of torch.

Calls of modules only: arithmetic of functions, such as attention's products, is in no figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stripe_kernels import backends, plan
from stripe_kernels.compile.tune import evaluating, interleaved
from stripe_kernels.geometry import IntPair, pair, resolve_padding
from stripe_kernels.skeleton import FilterSkeleton
from stripe_kernels.stripe_op import StripeOp, is_channels_last

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


@dataclass(frozen=True)
class Call:
    """One call of an ordinary layer: `kind` is "convolution" or "linear layer"."""

    name: str
    layer: nn.Module
    x: Tensor
    macs: int

    @property
    def kind(self) -> str:
        return "linear layer" if isinstance(self.layer, nn.Linear) else "convolution"

    def predicted(self) -> float | None:
        """Seconds by the model of dense convolutions, in which a linear layer is one of 1x1; None where it has no word
        for the layer. The padding's values cost nothing, so its mode does not matter."""
        layer, x = self.layer, self.x
        size = tuple(x.shape)
        if isinstance(layer, nn.Linear):
            size = (max(x.numel() // layer.in_features, 1), layer.in_features, 1, 1)
            op = _dense(layer.out_features, (1, 1), (1, 1), (0, 0), (1, 1), 1)
        elif isinstance(layer, nn.Conv2d) and x.dim() == 4:
            kernel = pair(layer.kernel_size, "kernel_size", 1)
            stride, dilation = pair(layer.stride, "stride", 1), pair(layer.dilation, "dilation", 1)
            op = _dense(layer.out_channels, kernel, stride, layer.padding, dilation, layer.groups)
        else:
            return None
        problem = op.problem(size, x.dtype, x.device, is_channels_last(x))
        backends.load()
        return plan.candidates(problem, "fprop", ["dense"])[0].predicted

    def row(self, seconds: float | None) -> dict[str, Any]:
        """As of a stripe layer, with what there is to say of it."""
        predicted = self.predicted()
        expected = None if predicted is None else predicted * 1e3
        time = None if seconds is None else seconds * 1e3
        weight: Any = self.layer.weight
        return {
            "layer": self.name,
            "kind": self.kind,
            "input": list(self.x.shape),
            "filter": list(weight.shape),
            "macs": self.macs,
            "dense_macs": self.macs,
            "predicted_ms": expected,
            "measured_ms": time,
            "dense_ms": expected if time is None else time,
        }


def _dense(
    k: int, kernel: IntPair, stride: IntPair, padding: Any, dilation: IntPair, groups: int
) -> StripeOp:
    live = FilterSkeleton.full(k, *kernel).text
    return StripeOp.of(
        live, stride, resolve_padding(padding, kernel, stride, dilation), dilation, groups, "dense"
    )


class _Seen(TorchDispatchMode):
    """Has optimized networks call their layers, not one native list of them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def calls(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Call]:
    """Every such call in one run of the model, in order."""
    found: list[Call] = []

    def noted(name: str) -> Any:
        def hook(layer: Any, given: tuple[Tensor, ...], named: dict[str, Tensor], y: Tensor) -> None:
            # A transposed convolution meets each of its weights once a pixel of the input, others of the output.
            x = given[0] if given else named["input"]
            pixels = x if isinstance(layer, _TRANSPOSED) else y
            found.append(Call(name, layer, torch.randn_like(x), pixels.numel() * layer.weight[0].numel()))

        return hook

    handles = [
        module.register_forward_hook(noted(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, (*_CONVOLUTIONS, nn.Linear))
    ]
    try:
        with torch.inference_mode(), evaluating(model), _Seen():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def rows(model: nn.Module, inputs: tuple[Tensor, ...], seconds: float) -> list[dict[str, Any]]:
    """Rows of `explain`; with `seconds` each call is timed for its share of them."""
    found = calls(model, inputs)
    if not seconds:
        return [call.row(None) for call in found]
    with torch.inference_mode(), evaluating(model):
        times = [interleaved([partial(c.layer, c.x)], seconds / len(found), device=c.x.device) for c in found]
    return [call.row(time.median) for call, (time,) in zip(found, times, strict=True)]
