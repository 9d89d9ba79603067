"""Whether a call is plain eager: nothing of torch listens to it, and its tensors are ordinary ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN_TYPES = (Tensor, torch.nn.Parameter)
# They return something true while a dispatch or function mode, a functional transform or torch.jit's tracing is active.
LISTENERS = (
    torch._C._len_torch_dispatch_stack,
    torch._C._is_torch_function_mode_enabled,
    torch._C._functorch.peek_interpreter_stack,
    torch._C._get_tracing_state,
)


def nobody_listens() -> bool:
    """True when no compilation, no forward-mode derivative and none of `LISTENERS` is active."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    for active in LISTENERS:  # noqa: SIM110 (any() takes twice the time)
        if active():
            return False
    return True


def plain(*tensors: Tensor | None) -> bool:
    """True for ordinary tensors whose memory holds their values (those of a negated view are not)."""
    for t in tensors:
        if t is None:
            continue
        if type(t) not in PLAIN_TYPES or not (t.is_cpu or t.is_cuda) or t.is_neg():
            return False
        try:
            memory = t.data_ptr()
        except RuntimeError:  # of a transform that has ended, and sparse ones
            return False
        if not memory and t.numel():  # zero tensors and functionalized ones have no memory of their own
            return False
    return True
