"""A layer's short way: a call like the two before it goes from `forward` to its kernel in native code, and so do the
gradients of such a call.

The checks of functional.py and ops.py take 5 us in a loop and 10 to 50 where the kernel has emptied the caches, since
each of their steps has to be fetched anew. csrc/bindings/guard.h asks the same questions in one place. It returns
NotImplemented where the answer is another, and the call takes the long way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from stripe_kernels import backends, eager, ops
from stripe_kernels.snapshots import drop_snapshot, dropped, packed_weight
from stripe_kernels.stripe_op import StripeOp

Front = Callable[[Tensor, Tensor | None, Tensor | None], Any]  # (x, weight, bias) -> y or NotImplemented
_BACKWARD_KEPT = 8  # kinds of backward calls that a front remembers


class ShortWay:
    """What a layer knows of its last call that came the long way, and the front for calls like it, if there is one.

    Not attributes of the layer: nn.Module takes 3 us to set one."""

    __slots__ = ("_frontless", "_seen", "front")

    def __init__(self) -> None:
        self.front: Front | None = None
        self._seen: Any = None  # what that call ran
        self._frontless: Any = None  # what calls without a front are known by

    def after(self, op: StripeOp, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """To be called with each y = conv(x, weight) + bias that came the long way: where it ran what the one before
        it ran, those that follow have a front."""
        seen, self._seen, self.front = self._seen, None, None
        training = torch.is_grad_enabled()
        if not x.is_cpu or x.dim() != 4 or weight.is_inference() or not (x.numel() and weight.numel()):
            return
        if training and not (weight.requires_grad and weight.is_leaf and (bias is None or bias.is_leaf)):
            return  # a frozen weight is packed once; one that is computed is no parameter of the layer's
        kind = x.shape, x.dtype
        if self._frontless is not None and self._frontless[0] is op.forgotten and self._frontless[1] == kind:
            return
        if (
            not (eager.nobody_listens() and eager.plain(x, weight, bias))
            or torch._C._is_any_autocast_enabled()
        ):
            return
        runner = ops.checked_runner(op, x, weight, bias, None, None, "none")
        packed = None if training else packed_weight(runner, weight)
        self._seen = runner, packed
        if seen is None or seen[0] is not runner or seen[1] is not packed:
            return
        if training:
            front = _training(op, runner, x, weight, bias)
        else:
            front = _inference(runner, packed, x, weight, bias, y, (dropped(weight), op.forgotten))
            if packed_weight(runner, weight) is not packed:
                return  # a weight that changed meanwhile may have been looked at after the change
        if front is None:
            self._frontless = op.forgotten, kind
        self.front = front


def _inference(
    runner: Any,
    packed: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    stale: tuple[Any, ...],
) -> Front | None:
    run: Any = runner
    rest: tuple[Any, ...] = packed, bias, None, None, "none"
    if backends.lists_take(runner) and (bias is None or bias.dtype == torch.float32):
        calls = backends.call_list(runner.threads)
        calls.fprop(runner, packed, bias, "none", calls.given(x), None, calls.returned(y))
        run, rest = calls.finish(keep=True), ()
    elif hasattr(runner, "short_call"):
        run, rest = runner.short_call(packed, bias) or (run, rest)
    return backends.guard(run, rest, _conditions(False, *stale), (x,), (weight, bias))  # type: ignore[no-any-return]


def _training(op: StripeOp, runner: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Front | None:
    if not backends.lists_take(runner) or not weight.is_contiguous():
        return None
    if bias is not None and bias.dtype != torch.float32:
        return None
    calls = backends.call_list(runner.threads)
    at = calls.given(x), calls.given(weight), None if bias is None else calls.given(bias)
    calls.packed_fprop(runner, calls.pack(runner, at[1]), at[2], at[0])
    rest = None, None, "none", op, Step(op, calls.finish(keep=True))
    conditions = _conditions(True, op.forgotten)
    if bias is None:
        return backends.guard(ops.record, (None, *rest), conditions, (x, weight), (None,))  # type: ignore[no-any-return]
    return backends.guard(ops.record, rest, conditions, (x, weight, bias), ())  # type: ignore[no-any-return]


class Step:
    """fprop of a layer that trains, and its derivatives, as native lists. Each packs the weight: optimizers write to
    it, torch's fused ones without leaving a mark."""

    def __init__(self, op: StripeOp, fprop: Callable[..., Sequence[Tensor]]) -> None:
        self._op, self._fprop = op, fprop
        self._backward: dict[Any, Any] = {}

    def fprop(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._fprop(x, weight)[0] if bias is None else self._fprop(x, weight, bias)[0]

    def gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor, x_too: bool, bias_too: bool
    ) -> tuple[Tensor | None, ...] | None:
        """Of x, weight and bias; None where they are to come the long way."""
        if is_compiling() or forward_ad._current_level >= 0:
            return None
        kind = x_too, dy.stride()
        backward = self._backward.get(kind)
        if backward is None:
            if len(self._backward) >= _BACKWARD_KEPT:
                self._backward.clear()
            self._backward[kind] = self._list(dy, x, weight, x_too) or _never
            return None
        found = backward(dy, x, weight)
        if found is NotImplemented:
            return None
        drop_snapshot(weight)
        dw, dx = found if x_too else (found, None)
        return dx, dw, dy.sum((0, 2, 3)) if bias_too else None

    def _list(self, dy: Tensor, x: Tensor, weight: Tensor, x_too: bool) -> Callable[..., Any] | None:
        """A front that returns dw and dx, or dw alone, of tensors like these."""
        if not eager.plain(dy, x, weight):
            return None
        size = tuple(x.shape)
        wgrad = self._op.runner("wgrad", size, x)
        dgrad = self._op.runner("dgrad", size, dy) if x_too else None
        if not backends.lists_take(wgrad) or (dgrad is not None and not backends.lists_take(dgrad)):
            return None
        calls = backends.call_list(wgrad.threads)  # type: ignore[attr-defined]
        at = calls.given(dy), calls.given(x), calls.given(weight)
        calls.wgrad(wgrad, at[1], at[0])
        if dgrad is not None:
            calls.dgrad(dgrad, calls.pack(dgrad, at[2]), at[0])
        run, conditions = calls.finish(keep=True), _conditions(False, self._op.forgotten)
        return backends.guard(run, (), conditions, (dy, x, weight), ())  # type: ignore[no-any-return]


def _never(*tensors: Tensor) -> Any:
    return NotImplemented


def _conditions(grad: bool, *stale: dict[Any, Any]) -> Any:
    """Of a guard (backends/cpu_calls.py): what it may take, while gradients are wanted or not."""
    return (
        eager.PLAIN_TYPES,
        (torch._C._is_any_autocast_enabled, *eager.LISTENERS),
        (Tensor.is_neg,),
        ((torch.is_grad_enabled, grad), (torch.get_num_threads, torch.get_num_threads())),
        stale,
    )
