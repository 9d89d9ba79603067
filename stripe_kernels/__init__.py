"""Convolutions from live stripes only: what stripe-pruned networks need to become fast.

    >>> from stripe_kernels import StripeConv2d, freeze, optimize
"""

from __future__ import annotations

from stripe_kernels.compile import freeze, load, save
from stripe_kernels.functional import stripe_conv2d
from stripe_kernels.modules import StripeConv2d
from stripe_kernels.skeleton import FilterSkeleton

__all__ = ["FilterSkeleton", "StripeConv2d", "freeze", "list_kernels", "load", "save", "stripe_conv2d"]
__version__ = "0.1.0"


def list_kernels() -> list[str]:
    """Names of the kernels that exist here; each can be forced with kernel=NAME, and then it runs or raises."""
    from stripe_kernels import backends, registry

    backends.load()
    return sorted(registry.kernels())
