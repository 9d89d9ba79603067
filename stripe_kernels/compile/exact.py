"""exact: whether a rewritten network computes what its model does, by the model's own error against float64."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_CHECKED_VALUES = 1 << 20  # input values of the random batch that outputs are compared on
_TIES = 2e-5  # share of whole numbers that may be others: an argmax falls either way where two values are one
_NORMS: dict[str, Callable[[Tensor], float]] = {
    "largest": lambda t: float(t.abs().max()),
    "root mean square": lambda t: float(t.square().mean().sqrt()),
}


def check_exact(original: nn.Module, network: nn.Module, example: tuple[Tensor, ...]) -> None:
    """Raises ValueError where the network's outputs are not the original's within the bounds `optimize` states."""
    # float64 has nothing to be compared with but itself: its error is float32's, scaled.
    scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    # By dtype of an output and by norm: of our errors, theirs, what theirs are at the least, and the values.
    norms: dict[tuple[torch.dtype, str], list[list[float]]] = {}
    for inputs in (example, _noise_for(original, example)):
        theirs, ours = _leaves(original, inputs), _leaves(network, inputs)
        exact = _leaves_in(torch.float64, original, inputs)
        scaled = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in theirs)
        narrow = _leaves_in(torch.float32, original, inputs) if scaled else exact
        for e, t, n, o in zip(exact, theirs, narrow, ours, strict=True):
            if _kind(o) != _kind(t):
                raise ValueError(f"an output is {_kind(o)} instead of {_kind(t)}")
            if not isinstance(t, Tensor) or not t.numel():
                continue
            if e.shape != t.shape:
                raise ValueError(f"rounding decides whether an output is {list(t.shape)} or {list(e.shape)}")
            if t.is_floating_point():
                ours_and_theirs = (o.double() - e, t.double() - e, (n.double() - e) * scale, e)
                for what, norm in _NORMS.items():
                    norms.setdefault((t.dtype, what), []).append([norm(v) for v in ours_and_theirs])
            elif (others := int(((o != t) & (o != e)).sum())) > _TIES * t.numel():
                raise ValueError(f"{others} of {t.numel()} values of an output in {t.dtype} would be others")
    for (dtype, what), found in norms.items():
        # torch's max is NaN where there is one, which Python's would pass over.
        error, their_error, least, largest = torch.tensor(found, dtype=torch.float64).amax(0).tolist()
        budget = 2 * max(their_error, least) + 2 * torch.finfo(dtype).eps * largest
        if not math.isfinite(budget):
            raise ValueError(f"its own output in {dtype} is not finite, so there is nothing to compare with")
        if not error <= budget:
            raise ValueError(
                f"its {what} error against float64 would be {error:.3g}, more than {budget:.3g} "
                f"(twice the {max(their_error, least):.3g} of the model given, and 2 ulp)"
            )


def _kind(leaf: Any) -> str:
    """What of an output has to be the same to the letter."""
    return f"{leaf.dtype} {list(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)


def _leaves(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Any]:
    """What a model returns: tensors, and whatever else is in its tuples, dicts and dataclasses."""
    with torch.inference_mode():
        return _flat(model(*(x.clone() for x in inputs)))  # a model may write to its inputs


def _flat(output: Any) -> list[Any]:
    found: list[Any] = []
    for part in tree_leaves(output, is_leaf=dataclasses.is_dataclass):
        if dataclasses.is_dataclass(part):
            found += _flat([getattr(part, field.name) for field in dataclasses.fields(part)])
        else:
            found.append(_real(part) if isinstance(part, Tensor) else part)
    return found


def _real(output: Tensor) -> Tensor:
    """A dense tensor without complex numbers."""
    dense = output if output.layout == torch.strided else output.to_dense()
    return torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense


def _leaves_in(dtype: torch.dtype, model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Any]:
    """The same as a copy of the model returns that computes in `dtype`."""
    copied = copy.deepcopy(model).to(dtype)
    try:
        with _Computing(dtype):
            return _leaves(copied, tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs))
    except Exception as error:  # whatever a model says to another dtype
        reason = str(error).partition("\n")[0]
        raise ValueError(f"its outputs cannot be compared with {dtype}'s: {reason}") from error


class _Computing(TorchDispatchMode):
    """Everything in one dtype, whatever a model casts to, makes of integers or keeps beside its parameters."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(self._cast, (args, kwargs or {}))
        return tree_map(self._cast, func(*args, **kwargs))

    def _cast(self, value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return self.dtype if value.is_floating_point else value
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _noise_for(model: nn.Module, example: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Random inputs like the example; where all are images of one batch in a batch so large, if the model takes it,
    that its largest error is no accident."""
    images = all(x.dim() == 4 and len(x) == len(example[0]) for x in example)
    largest = max((x.numel() for x in example), default=0)
    if images and largest:
        batch = max(1, min(8, _CHECKED_VALUES * len(example[0]) // largest))
        inputs = tuple(_noise_like(x, (batch, *x.shape[1:]), i) for i, x in enumerate(example))
        try:
            _leaves(model, inputs)
        except (RuntimeError, AssertionError, ValueError, IndexError):
            pass  # it has the example's batch in its code
        else:
            return inputs
    return tuple(_noise_like(x, tuple(x.shape), i) for i, x in enumerate(example))


def _noise_like(x: Tensor, size: tuple[int, ...], seed: int) -> Tensor:
    """Values of the same kind: of integers those that x has; a single number stays, it may be a temperature."""
    if x.numel() < 2:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    if not x.is_floating_point():
        chosen = torch.randint(x.numel(), size, generator=generator, device=x.device)
        return x.flatten()[chosen] if x.dim() == 4 else x
    noise = torch.randn(size, generator=generator, device=x.device)
    return (noise * x.float().std() + x.float().mean()).to(x.dtype).contiguous()
