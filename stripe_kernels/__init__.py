"""Convolutions from live stripes only: what stripe-pruned networks need to become fast.

>>> from stripe_kernels import StripeConv2d, freeze, optimize
"""

from __future__ import annotations

from typing import Any

import stripe_kernels.interpreter  # noqa: F401 # isort: split
from stripe_kernels.compile import (
    Network,
    UnchangedWarning,
    example_input,
    explain,
    export_onnx,
    freeze,
    load,
    optimize,
    plain_state,
    save,
    to_dense,
    tune,
)
from stripe_kernels.functional import stripe_conv2d
from stripe_kernels.modules import StripeConv2d
from stripe_kernels.roof import Roof
from stripe_kernels.skeleton import FilterSkeleton
from stripe_kernels.version import __version__

__all__ = [
    "FilterSkeleton",
    "Network",
    "Roof",
    "StripeConv2d",
    "UnchangedWarning",
    "__version__",
    "diagnose",
    "example_input",
    "explain",
    "export_onnx",
    "freeze",
    "list_kernels",
    "load",
    "optimize",
    "plain_state",
    "save",
    "stripe_conv2d",
    "to_dense",
    "tune",
]


def diagnose(seconds: float = 10.0) -> dict[str, Any]:
    """What this machine has, which kernels run on it and why others do not, and a self-test: see diagnosis.py."""
    from stripe_kernels import diagnosis

    return diagnosis.diagnose(seconds)


def list_kernels() -> list[str]:
    """Names of the kernels there are; each can be forced with kernel=NAME, and then it runs or raises."""
    from stripe_kernels import backends, registry

    backends.load()
    return sorted(registry.kernels())
