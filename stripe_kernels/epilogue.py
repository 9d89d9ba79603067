"""What happens to an output value before it is stored: activation(conv * scale[k] + bias[k] + residual)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def apply_epilogue(
    y: Tensor,  # [N, K, P, Q]
    bias: Tensor | None,  # [K]
    scale: Tensor | None,  # [K]
    residual: Tensor | None,  # [N, K, P, Q]
    activation: str,
) -> Tensor:
    """The epilogue as separate torch calls, in y's dtype."""
    if scale is not None:
        y = y * scale[:, None, None]
    if bias is not None:
        y = y + bias[:, None, None]
    if residual is not None:
        y = y + residual
    activated: Tensor = ACTIVATIONS[activation](y)
    return activated
