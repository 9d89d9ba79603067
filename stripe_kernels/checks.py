"""What one call of an operator must satisfy. Every message carries the sizes; devices come first."""

from __future__ import annotations

from math import prod

from torch import Tensor

from stripe_kernels.geometry import ConvShape
from stripe_kernels.stripe_op import StripeOp


def check(x: Tensor, weight: Tensor, op: StripeOp, extras: dict[str, Tensor | None]) -> ConvShape:
    """Validates one call of fprop and returns its shape."""
    k = op.skeleton.shape[0]
    check_alike("x", x, {"weight": weight, **extras})
    if x.dim() != 4:
        raise RuntimeError(f"x must be [N, C, H, W], got shape {list(x.shape)}")
    check_weight(op, weight)
    if x.shape[1] != weight.shape[1] * op.groups:
        raise RuntimeError(
            f"x has {x.shape[1]} channels but weight {list(weight.shape)} with groups={op.groups} reads "
            f"{weight.shape[1] * op.groups}: x is {list(x.shape)}"
        )
    shape = op.shape(*x.shape)
    # Sizes are symbols while torch.compile traces.
    if all(type(n) is int for n in shape.output_size) and prod(shape.output_size) >= 2**63:
        raise RuntimeError(
            f"the output {list(shape.output_size)} has more values than a tensor can hold: x is {list(x.shape)}, "
            f"padding {shape.padding}"
        )
    for name in ("bias", "scale"):
        vector = extras.get(name)
        if vector is not None and tuple(vector.shape) != (k,):
            raise RuntimeError(f"{name} must have K={k} entries, got shape {list(vector.shape)}")
    residual = extras.get("residual")
    if residual is not None and tuple(residual.shape) != shape.output_size:
        raise RuntimeError(f"residual must be {list(shape.output_size)}, got shape {list(residual.shape)}")
    return shape


def check_alike(name: str, t: Tensor, others: dict[str, Tensor | None]) -> None:
    for other_name, other in others.items():
        if other is not None and other.device != t.device:
            raise RuntimeError(f"{name} is on {t.device} but {other_name} is on {other.device}")
        if other is not None and other.dtype != t.dtype:
            raise RuntimeError(f"{name} is {t.dtype} but {other_name} is {other.dtype}")
    if not t.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {t.dtype}")


def check_weight(op: StripeOp, weight: Tensor) -> None:
    if weight.dim() != 2 or weight.shape[0] != op.skeleton.stripes:
        raise RuntimeError(
            f"weight must be [A, C/groups] with A={op.skeleton.stripes} live stripes of skeleton "
            f"{list(op.skeleton.shape)}, got shape {list(weight.shape)}"
        )


def check_grad(op: StripeOp, grad: Tensor, size: tuple[int, ...]) -> None:
    expected = op.shape(*size).output_size
    if tuple(grad.shape) != expected:
        raise RuntimeError(
            f"grad must be {list(expected)} for an input of {list(size)}, got {list(grad.shape)}"
        )
