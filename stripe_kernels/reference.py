"""The oracle. Plain torch, shared with nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_conv2d(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C/groups, R, S]
    skeleton: Tensor,  # bool [K, R, S]
    bias: Tensor | None = None,  # [K]
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:  # [N, K, P, Q]
    """What every kernel must compute: a dead stripe's weight has no say, whatever its value."""
    return F.conv2d(x, torch.where(skeleton[:, None], weight, 0), bias, stride, padding, dilation, groups)


def scatter_stripes(values: Tensor, skeleton: Tensor) -> Tensor:
    """Packed values [A, C/groups] as a dense weight [K, C/groups, R, S] with zeros; differentiable."""
    dense = values.new_zeros(*skeleton.shape, values.shape[1])
    return dense.index_put(skeleton.nonzero(as_tuple=True), values).permute(0, 3, 1, 2)
