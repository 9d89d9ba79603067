"""stripe_conv2d: validation and semantics of one convolution over live stripes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.weak import WeakTensorKeyDictionary

from stripe_kernels import ops
from stripe_kernels.geometry import as_int, pair, resolve_padding
from stripe_kernels.skeleton import FilterSkeleton
from stripe_kernels.stripe_op import StripeOp

_skeletons: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of other devices than the CPU


@lru_cache(maxsize=1024)
def _of_values(values: bytes, shape: tuple[int, ...]) -> FilterSkeleton:
    return FilterSkeleton(np.frombuffer(values, np.bool_).reshape(shape))


def as_skeleton(skeleton: Tensor | FilterSkeleton) -> FilterSkeleton:
    """A FilterSkeleton from a bool tensor [K, R, S] or as given. A tensor of a device, which has to be waited for, is
    read once per version; one of the CPU at every call, since numpy and .data change it without a mark."""
    if isinstance(skeleton, FilterSkeleton):
        return skeleton
    if not isinstance(skeleton, Tensor):
        raise TypeError(
            f"skeleton must be a bool tensor [K, R, S] or a FilterSkeleton, got {type(skeleton).__name__}"
        )
    if skeleton.dtype != torch.bool:
        raise TypeError(f"skeleton must be bool [K, R, S], got {skeleton.dtype} {list(skeleton.shape)}")
    if skeleton.is_meta:
        raise ValueError(
            f"skeleton {list(skeleton.shape)} is on meta and has no values: make it on the CPU, "
            'with device="cpu", where torch.device("meta") is the default'
        )
    if skeleton.is_cpu or skeleton.is_inference():
        values = skeleton.cpu().numpy()
        return FilterSkeleton(values) if is_compiling() else _of_values(values.tobytes(), values.shape)
    state = (skeleton.data_ptr(), skeleton._version)
    known, live = _skeletons.get(skeleton) or (None, None)
    if live is None or known != state:
        live = FilterSkeleton(skeleton.cpu().numpy())
        _skeletons[skeleton] = (state, live)
    return live


def stripe_conv2d(
    x: Tensor,  # [N, C, H, W] or [C, H, W]
    weight: Tensor,  # [A, C/groups]
    skeleton: Tensor | FilterSkeleton,  # bool [K, R, S], A live
    bias: Tensor | None = None,  # [K]
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    kernel: str = "auto",
) -> Tensor:  # [N, K, P, Q] or [K, P, Q]
    """Convolution with the live stripes of a filter; differentiable in x, weight and bias.

    Equals ``F.conv2d(x, torch.where(skeleton[:, None], dense, 0), bias, stride, padding, dilation, groups)``,
    where `weight` holds the live stripes of `dense`: row a belongs to the a-th entry of ``skeleton.nonzero()``.
    All tensors have one dtype (float32, bfloat16, float16, float64) and device; sums are float32 or wider.
    The output follows x's memory format as
    nn.Conv2d's does.

    kernel: "auto", or a name from ``list_kernels()``, which then runs or raises RuntimeError with the reason.

    Raises ValueError or TypeError for malformed arguments and RuntimeError for tensors that do not fit each other; the
    message has the sizes.

    >>> import torch
    >>> from stripe_kernels import stripe_conv2d
    >>> skeleton = torch.zeros(4, 3, 3, dtype=torch.bool)
    >>> skeleton[0, 1, 1] = skeleton[2, 0, 1] = skeleton[2, 1, 1] = True
    >>> y = stripe_conv2d(torch.randn(1, 8, 5, 5), torch.randn(3, 8), skeleton, padding=1)
    >>> y.shape, y[:, [1, 3]].abs().sum().item()
    (torch.Size([1, 4, 5, 5]), 0.0)
    """
    live = as_skeleton(skeleton)
    stride, dilation = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
    pads = resolve_padding(padding, live.shape[1:], stride, dilation)
    groups = as_int(groups, "groups")
    if groups < 1 or live.shape[0] % groups:
        raise ValueError(f"groups={groups} must be positive and divide K={live.shape[0]} filters")
    op = StripeOp.of(live.text, stride, pads, dilation, groups, kernel)
    return convolve(op, x, weight, bias)


def _autocasts(x: Tensor) -> bool:
    if not torch._C._is_any_autocast_enabled():  # one question instead of five, on every call
        return False
    device = x.device.type
    known = torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64


def convolve(
    op: StripeOp,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """fprop with torch's manners: [C, H, W] inputs, and autocast as F.conv2d does it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor [N, C, H, W] or [C, H, W], got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else str(x.layout)
        raise TypeError(
            f"x must be dense and strided, got {kind}: convert it with to_dense() or to_padded_tensor()"
        )
    if _autocasts(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        bias, scale, residual = (None if t is None else t.to(dtype) for t in (bias, scale, residual))
        with torch.autocast(x.device.type, enabled=False):
            return convolve(op, x.to(dtype), weight.to(dtype), bias, scale, residual, activation)
    if x.dim() == 3:
        one = None if residual is None else residual[None]
        return ops.fprop(op, x[None], weight, bias, scale, one, activation)[0]
    if x.dim() != 4:
        raise RuntimeError(f"x must be [N, C, H, W] or [C, H, W], got shape {list(x.shape)}")
    return ops.fprop(op, x, weight, bias, scale, residual, activation)
