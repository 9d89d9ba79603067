"""Learn which stripes of a network's convolutions to keep: attach gates, train, freeze onto the stripe
kernels."""

from __future__ import annotations

import stripe_kernels  # noqa: F401 # isort: split -- refuses sub-interpreters, before torch is imported
from iessp.attach import (
    attach,
    copy_gates,
    detach,
    freeze,
    gate_parameters,
    gates,
    param_groups,
    settle,
    skeletons,
)
from iessp.budget import compacted_macs_kept, macs_kept
from iessp.loss import StripeLoss, penalty

__all__ = [
    "StripeLoss",
    "attach",
    "compacted_macs_kept",
    "copy_gates",
    "detach",
    "freeze",
    "gate_parameters",
    "gates",
    "macs_kept",
    "param_groups",
    "penalty",
    "settle",
    "skeletons",
]
