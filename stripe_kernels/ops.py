"""The operators: three passes, trilinear in (x, weight, dy), each the derivative of the other two.

    stripe_kernels::fprop   y  = activation(conv(x, weight) * scale[k] + bias[k] + residual)
    stripe_kernels::dgrad   dx = conv transposed(dy, weight)
    stripe_kernels::wgrad   dw = the live stripes' correlation of x and dy

Schemas carry the skeleton as text: calls are hashable, exportable and free of host reads of device tensors.
`fprop`, `dgrad` and `wgrad` are the fronts that every caller uses: straight to the kernel where torch's machinery has
nothing to do; through one Function where it only has to record a gradient (the dispatcher's costs 80 us more); else by
the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from stripe_kernels.checks import check, check_alike, check_grad, check_weight
from stripe_kernels.eager import nobody_listens, plain
from stripe_kernels.epilogue import ACTIVATIONS
from stripe_kernels.snapshots import drop_snapshot, packed_weight
from stripe_kernels.stripe_op import StripeOp, is_channels_last, signature

library = torch.library.Library("stripe_kernels", "DEF")
# Plans look at strides: a compiler may not change those of an argument. (torch before 2.7 knows their order only.)
_TAGS = (getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),)
_GEOMETRY = "str skeleton, int[2] stride, int[4] padding, int[2] dilation, int groups, str kernel"
library.define(
    "fprop(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? residual, str activation, "
    + _GEOMETRY
    + ") -> Tensor",
    tags=_TAGS,
)
library.define(
    "dgrad(Tensor grad, Tensor weight, SymInt[2] input_size, " + _GEOMETRY + ") -> Tensor", tags=_TAGS
)
library.define("wgrad(Tensor grad, Tensor x, " + _GEOMETRY + ") -> Tensor", tags=_TAGS)


def _pack_for_operator(runner: Any, weight: Tensor) -> Any:
    """Below autograd nobody knows whether a gradient is wanted: a weight that could be trained is packed on
    every call, so that optimizers which write through .data are seen."""
    return runner.pack(weight) if weight.requires_grad else packed_weight(runner, weight)


def _fprop(x, weight, bias, scale, residual, activation, *arguments):  # type: ignore[no-untyped-def]
    op = StripeOp.of_operator(arguments)
    check(x, weight, op, {"bias": bias, "scale": scale, "residual": residual})
    runner = op.runner("fprop", tuple(x.shape), x)
    return runner(x, _pack_for_operator(runner, weight), bias, scale, residual, _activation(activation))


def _dgrad(grad, weight, input_size, *arguments):  # type: ignore[no-untyped-def]
    return _dgrad_of(StripeOp.of_operator(arguments), grad, weight, input_size)


def _dgrad_of(op: StripeOp, grad: Tensor, weight: Tensor, input_size: Any) -> Tensor:
    key = ("dgrad", tuple(input_size), *signature(grad), weight.shape, weight.dtype, weight.device)
    runner = op.checked.get(key)
    if runner is None:
        runner = op.remember(key, op.runner("dgrad", _check_dgrad(op, grad, weight, input_size), grad))
    return runner(grad, _pack_for_operator(runner, weight))  # type: ignore[no-any-return]


def _check_dgrad(op: StripeOp, grad: Tensor, weight: Tensor, input_size: Any) -> tuple[int, ...]:
    check_alike("grad", grad, {"weight": weight})
    check_weight(op, weight)
    if grad.dim() != 4 or len(input_size) != 2:
        raise RuntimeError(f"grad must be [N, K, P, Q], got {list(grad.shape)}, for input_size {input_size}")
    size = (grad.shape[0], weight.shape[1] * op.groups, *input_size)
    check_grad(op, grad, size)
    return size


def _wgrad(grad, x, *arguments):  # type: ignore[no-untyped-def]
    return _wgrad_of(StripeOp.of_operator(arguments), grad, x)


def _wgrad_of(op: StripeOp, grad: Tensor, x: Tensor) -> Tensor:
    key = ("wgrad", *signature(x), grad.shape, grad.dtype, grad.device)
    runner = op.checked.get(key)
    if runner is None:
        _check_wgrad(op, grad, x)
        runner = op.remember(key, op.runner("wgrad", tuple(x.shape), x))
    return runner(grad, x)  # type: ignore[no-any-return]


def _check_wgrad(op: StripeOp, grad: Tensor, x: Tensor) -> None:
    check_alike("grad", grad, {"x": x})
    if x.dim() != 4:
        raise RuntimeError(f"x must be [N, C, H, W], got shape {list(x.shape)}")
    check_grad(op, grad, tuple(x.shape))


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return name


for _name, _implementation in (("fprop", _fprop), ("dgrad", _dgrad), ("wgrad", _wgrad)):
    library.impl(_name, _implementation, "CompositeExplicitAutograd")


def _like(t: Tensor, size: tuple[Any, ...]) -> Tensor:
    memory_format = torch.channels_last if is_channels_last(t) else torch.contiguous_format
    return torch.empty(size, dtype=t.dtype, device=t.device, memory_format=memory_format)


@torch.library.register_fake("stripe_kernels::fprop", lib=library)
def _fprop_fake(x, weight, bias, scale, residual, activation, *arguments):  # type: ignore[no-untyped-def]
    op = StripeOp.of_operator(arguments)
    return _like(x, check(x, weight, op, {"bias": bias, "scale": scale, "residual": residual}).output_size)


@torch.library.register_fake("stripe_kernels::dgrad", lib=library)
def _dgrad_fake(grad, weight, input_size, *arguments):  # type: ignore[no-untyped-def]
    return _like(grad, _check_dgrad(StripeOp.of_operator(arguments), grad, weight, input_size))


@torch.library.register_fake("stripe_kernels::wgrad", lib=library)
def _wgrad_fake(grad, x, *arguments):  # type: ignore[no-untyped-def]
    op = StripeOp.of_operator(arguments)
    _check_wgrad(op, grad, x)
    return x.new_empty(op.skeleton.stripes, x.shape[1] // op.groups)


def _fprop_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, scale, residual, ctx.activation, *arguments = inputs
    ctx.op = StripeOp.of_operator(arguments)
    ctx.save_for_backward(x, weight, bias, scale, residual)


def _fprop_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return *_fprop_gradients(ctx, dy, *ctx.saved_tensors), None, *[None] * len(ctx.op.arguments)


def _fprop_gradients(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Of x, weight, bias, scale and residual."""
    # Asked once: the passes' fronts would ask again.
    short = not torch.is_grad_enabled() and nobody_listens() and plain(dy, x, weight, scale)
    passes = (_dgrad_of, _wgrad_of) if short else (dgrad, wgrad)
    needs, op = ctx.needs_input_grad, ctx.op
    dscale = None
    if ctx.activation != "none" or needs[3]:
        # What the epilogue saw is computed again: cheaper than keeping it for every inference-shaped call.
        conv = fprop(op, x, weight)
        if ctx.activation != "none":
            z = conv if scale is None else conv * scale[:, None, None]
            z = z if bias is None else z + bias[:, None, None]
            dy = dy * _activation_slope(z if residual is None else z + residual, ctx.activation)
        if needs[3]:
            dscale = (dy * conv).sum((0, 2, 3))
    dbias = dy.sum((0, 2, 3)) if needs[2] else None
    dresidual = dy if needs[4] else None
    dconv = dy if scale is None else dy * scale[:, None, None]
    dx = passes[0](op, dconv, weight, x.shape[2:]) if needs[0] else None
    dw = passes[1](op, dconv, x) if needs[1] else None
    if needs[1]:  # an optimizer comes next; those that are not torch's may write through .data
        drop_snapshot(weight)
    return dx, dw, dbias, dscale, dresidual


def _activation_slope(z: Tensor, activation: str) -> Tensor:
    """d activation / dz, as torch defines it at the kinks."""
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "relu6":
        return ((z > 0) & (z < 6)).to(z.dtype)
    if activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    return (z / 3 + 0.5).where((z > -3) & (z < 3), (z >= 3).to(z.dtype))


def _dgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, _, *arguments = inputs
    ctx.op = StripeOp.of_operator(arguments)
    ctx.save_for_backward(grad, weight)


def _dgrad_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    grad, weight = ctx.saved_tensors
    ddy = fprop(ctx.op, ddx, weight) if ctx.needs_input_grad[0] else None
    dw = wgrad(ctx.op, grad, ddx) if ctx.needs_input_grad[1] else None
    return ddy, dw, None, *[None] * len(ctx.op.arguments)


def _wgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, *arguments = inputs
    ctx.op = StripeOp.of_operator(arguments)
    ctx.save_for_backward(grad, x)


def _wgrad_backward(ctx: Any, ddw: Tensor) -> tuple[Any, ...]:
    grad, x = ctx.saved_tensors
    ddy = fprop(ctx.op, x, ddw) if ctx.needs_input_grad[0] else None
    dx = dgrad(ctx.op, grad, ddw, x.shape[2:]) if ctx.needs_input_grad[1] else None
    return ddy, dx, *[None] * len(ctx.op.arguments)


torch.library.register_autograd(
    "stripe_kernels::fprop", _fprop_backward, setup_context=_fprop_setup, lib=library
)
torch.library.register_autograd(
    "stripe_kernels::dgrad", _dgrad_backward, setup_context=_dgrad_setup, lib=library
)
torch.library.register_autograd(
    "stripe_kernels::wgrad", _wgrad_backward, setup_context=_wgrad_setup, lib=library
)


_NO_FORWARD_MODE = "stripe convolutions have no forward-mode derivative (jvp); use reverse mode"


def _no_jvp(*_: Any) -> None:
    raise RuntimeError(_NO_FORWARD_MODE)


def _transformable(name: str, setup: Any, backward: Any) -> Callable[..., Tensor]:
    """The operator for torch.func's transforms, which refuse what register_autograd made of the same derivatives."""
    operator = getattr(_operators, name)
    members = {"forward": operator, "setup_context": setup, "backward": backward, "jvp": _no_jvp}
    statics = {member: staticmethod(function) for member, function in members.items()}
    kind: Any = type(f"Stripe{name}", (torch.autograd.Function,), {"generate_vmap_rule": True, **statics})
    return kind.apply  # type: ignore[no-any-return]


_operators = torch.ops.stripe_kernels
_transformed = {
    "fprop": _transformable("fprop", _fprop_setup, _fprop_backward),
    "dgrad": _transformable("dgrad", _dgrad_setup, _dgrad_backward),
    "wgrad": _transformable("wgrad", _wgrad_setup, _wgrad_backward),
}


def _transforms() -> bool:
    """Whether torch.func transforms what is called, and has rules for a Function: functionalization has none, and
    needs none of the operator."""
    if is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return False
    kinds = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
    return torch._C._functorch.TransformType.Functionalize not in kinds


def _operator(name: str) -> Callable[..., Tensor]:
    """fprop, dgrad or wgrad by way of torch's dispatcher."""
    return _transformed[name] if _transforms() else getattr(_operators, name)


def _refuse_forward_mode(*tensors: Tensor | None) -> None:
    """The dispatcher would drop the tangents of an operator without a forward-mode formula, silently."""
    for t in tensors:
        if t is not None and forward_ad.unpack_dual(t).tangent is not None:
            raise RuntimeError(_NO_FORWARD_MODE)


def fprop(
    op: StripeOp,
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [A, C/groups]
    bias: Tensor | None = None,  # [K]
    scale: Tensor | None = None,  # [K]
    residual: Tensor | None = None,  # [N, K, P, Q]
    activation: str = "none",
) -> Tensor:  # [N, K, P, Q]
    """activation(conv(x, weight) * scale[k] + bias[k] + residual); differentiable. Errors have the sizes."""
    if forward_ad._current_level >= 0:
        _refuse_forward_mode(x, weight, bias, scale, residual)
    if not (nobody_listens() and plain(x, weight, bias, scale, residual)):
        return _operator("fprop")(x, weight, bias, scale, residual, activation, *op.arguments)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (scale is not None and scale.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        recorded: Tensor = record(x, weight, bias, scale, residual, activation, op, None)
        return recorded
    runner = checked_runner(op, x, weight, bias, scale, residual, activation)
    return runner(x, packed_weight(runner, weight), bias, scale, residual, activation)


def checked_runner(
    op: StripeOp,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Callable[..., Tensor]:
    """The runner of a call of fprop, which is checked once (StripeOp.checked)."""
    key = (
        "fprop", *signature(x), weight.shape, weight.dtype, weight.device,
        bias is not None and (bias.shape, bias.dtype, bias.device),
        scale is not None and (scale.shape, scale.dtype, scale.device),
        residual is not None and (residual.shape, residual.dtype, residual.device),
        activation,
    )  # fmt: skip
    runner = op.checked.get(key)
    if runner is None:
        check(x, weight, op, {"bias": bias, "scale": scale, "residual": residual})
        _activation(activation)
        runner = op.remember(key, op.runner("fprop", tuple(x.shape), x))
    return runner  # type: ignore[no-any-return]


class _Fprop(torch.autograd.Function):
    """fprop for plain tensors that need a gradient. step: a layer's native lists for a call like this, with a bias at
    most (front.py), or None. A weight that has no gradient is packed once, not in every list."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, scale, residual, ctx.activation, ctx.op, ctx.step = inputs
        ctx.save_for_backward(x, weight, bias, scale, residual)
        if ctx.step is not None and weight.requires_grad:
            return ctx.step.fprop(x, weight, bias)  # type: ignore[no-any-return]
        runner = checked_runner(ctx.op, x, weight, bias, scale, residual, ctx.activation)
        return runner(x, _pack_for_operator(runner, weight), bias, scale, residual, ctx.activation)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, *rest = ctx.saved_tensors  # once: hooks may unpack them
        x_too, weight_too, bias_too, *_ = ctx.needs_input_grad
        if ctx.step is not None and weight_too:
            found = ctx.step.gradients(dy, x, weight, x_too, bias_too)
            if found is not None:
                return *found, None, None, None, None, None
        return *_fprop_gradients(ctx, dy, x, weight, *rest), None, None, None


# Function.apply's own part takes 2.5 us and asks for functorch's transforms and wrappers, which are not here.
record = super(torch.autograd.Function, _Fprop).apply


def dgrad(op: StripeOp, grad: Tensor, weight: Tensor, input_size: Any) -> Tensor:
    """The gradient of fprop's x, [N, C, *input_size], from grad [N, K, P, Q]; differentiable."""
    if _needs_operator(grad, weight):
        return _operator("dgrad")(grad, weight, input_size, *op.arguments)
    return _dgrad_of(op, grad, weight, input_size)


def wgrad(op: StripeOp, grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of fprop's weight, [A, C/groups], from grad [N, K, P, Q]; differentiable."""
    return _operator("wgrad")(grad, x, *op.arguments) if _needs_operator(grad, x) else _wgrad_of(op, grad, x)


def _needs_operator(a: Tensor, b: Tensor) -> bool:
    return not (nobody_listens() and plain(a, b)) or (
        torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    )
