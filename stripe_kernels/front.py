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
Seen = tuple[Any, Any]  # the runner and the packed weight of a call


def front_after(
    seen: Seen | None, op: ops.StripeOp, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor
) -> tuple[Seen | None, Front | None]:
    """What to keep of the call y = conv(x, weight) + bias that came the long way: what it ran, and, if the one before
    it ran the same (`seen`), the short way for those that follow."""
    if torch.is_grad_enabled() or not x.is_cpu or x.dim() != 4 or weight.is_inference():
        return None, None
    if not (ops._nobody_listens() and ops._plain(x, weight, bias)) or torch._C._is_any_autocast_enabled():
        return None, None
    runner = ops._checked_runner(op, x, weight, bias, None, None, "none")
    packed, stale = packed_weight(runner, weight), (dropped(weight), op.forgotten)
    if seen is None or seen[0] is not runner or seen[1] is not packed:
        return (runner, packed), None
    conditions = (
        ops.PLAIN_TYPES,
        (torch.is_grad_enabled, torch._C._is_any_autocast_enabled, *ops.LISTENERS),
        (Tensor.is_neg,),
        torch.get_num_threads,
        stale,
    )
    front = ops.layer_front(runner, x, y, packed, weight, bias, conditions)
    # A weight that changed meanwhile may have been looked at after the change.
    return seen, front if packed_weight(runner, weight) is packed else None
