"""What torch's optimizers do not look at: sizes of a weight that changed, and, fused ones, that they wrote to it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from stripe_kernels.snapshots import drop_snapshot

_resized: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weights that `resize` gave another size


def resize(weight: Tensor, size: tuple[int, ...]) -> None:
    """New memory of another size for a weight, which stays what its optimizers and its other layers hold.

    What optimizers keep beside it, moments of stripes that are gone, begins anew with their next step: torch's fused
    ones (2.13) would write past its end.
    """
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        weight.set_(weight.new_empty(size))  # type: ignore[call-overload]
    weight.grad = None
    _resized[weight] = True
    _watch_steps()


@lru_cache(maxsize=1)
def _watch_steps() -> None:
    """Only from the first resized weight on: a compiled step breaks its graph where this hook looks."""
    register_optimizer_step_pre_hook(_begin_anew)


def _weights(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from (weight for weight in group.get("params", ()) if isinstance(weight, Tensor))


def _begin_anew(optimizer: Optimizer, *_: object) -> None:
    for weight in _weights(optimizer):
        if weight in _resized and weight in optimizer.state:
            state = optimizer.state[weight]
            for name, kept in state.items():
                if isinstance(kept, Tensor) and kept.dim() and kept.shape != weight.shape:
                    state[name] = torch.zeros_like(weight, dtype=kept.dtype)


def _drop_stepped(optimizer: Optimizer, *_: object) -> None:
    for weight in _weights(optimizer):
        if weight.requires_grad or weight.grad is not None:
            drop_snapshot(weight)  # the form of a frozen one is kept while others train


register_optimizer_step_post_hook(_drop_stepped)
