"""A layer's short way: in inference, a call like the two before it goes from `forward` to its kernel in native code.

The checks of functional.py and ops.py take 5 us in a loop and 10 to 50 where the kernel has emptied the caches, since
each of their steps has to be fetched anew. csrc/bindings/guard.h asks the same questions in one place. It returns
NotImplemented where the answer is another, and the call takes the long way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stripe_kernels import ops
from stripe_kernels.snapshots import dropped, packed_weight

Front = Callable[[Tensor, Tensor | None, Tensor | None], Any]  # (x, weight, bias) -> y or NotImplemented


class ShortWay:
    """What a layer knows of its last call that came the long way, and the front for calls like it, if there is one.

    Not attributes of the layer: nn.Module takes 3 us to set one."""

    __slots__ = ("_seen", "front")

    def __init__(self) -> None:
        self.front: Front | None = None
        self._seen: tuple[Any, Any] | None = None  # the runner and the packed weight of that call

    def after(self, op: ops.StripeOp, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """To be called with each y = conv(x, weight) + bias that came the long way: where it ran what the one before
        it ran, those that follow have a front."""
        seen, self._seen, self.front = self._seen, None, None
        if torch.is_grad_enabled() or not x.is_cpu or x.dim() != 4 or weight.is_inference():
            return
        if not (ops._nobody_listens() and ops._plain(x, weight, bias)) or torch._C._is_any_autocast_enabled():
            return
        runner = ops._checked_runner(op, x, weight, bias, None, None, "none")
        packed, stale = packed_weight(runner, weight), (dropped(weight), op.forgotten)
        self._seen = runner, packed
        if seen is None or seen[0] is not runner or seen[1] is not packed:
            return
        conditions = (
            ops.PLAIN_TYPES,
            (torch.is_grad_enabled, torch._C._is_any_autocast_enabled, *ops.LISTENERS),
            (Tensor.is_neg,),
            torch.get_num_threads,
            stale,
        )
        front = ops.layer_front(runner, x, y, packed, weight, bias, conditions)
        # A weight that changed meanwhile may have been looked at after the change.
        if packed_weight(runner, weight) is packed:
            self.front = front
