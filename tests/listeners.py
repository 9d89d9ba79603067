"""Who may listen to a call, and what a front therefore leaves to the long way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stripe_kernels import StripeConv2d


class Silent(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Counting(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


class Sub(Tensor):
    pass


@contextmanager
def other_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autocast() -> torch.autocast:
    return torch.autocast("cpu")


CONTEXTS = (Silent, Counting, other_threads, forward_ad.dual_level, autocast)

# Of a layer and an x that its front was made for: calls that the front is not for, with the result of layer(x).
OTHER_CALLS: dict[str, Callable[[StripeConv2d, Tensor], Tensor]] = {
    "other sizes": lambda n, x: n(x.repeat(2, 1, 1, 1))[:2],
    "other strides": lambda n, x: n(x.mT.contiguous().mT),
    "one image": lambda n, x: torch.stack([n(one) for one in x]),
    "negated": lambda n, x: n(torch._neg_view(-x)),
    "subclass": lambda n, x: n(x.as_subclass(Sub)).as_subclass(Tensor),
    "vmap": lambda n, x: torch.vmap(lambda one: n(one[None])[0])(x),
}


def at_once(work: Callable[[int], None], count: int) -> None:
    """work(0) to work(count - 1), each on a thread of its own."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
