"""The operators: three passes, trilinear in (x, weight, dy), each the derivative of the other two.

    stripe_kernels::fprop   y  = activation(conv(x, weight) * scale[k] + bias[k] + residual)
    stripe_kernels::dgrad   dx = conv transposed(dy, weight)
    stripe_kernels::wgrad   dw = the live stripes' correlation of x and dy

Schemas carry the skeleton as text, so every call is hashable, exportable and free of host reads of device tensors. `StripeOp`
holds one layer's settings and what was derived from them; `fprop` is the front every caller uses.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from stripe_kernels import backends
from stripe_kernels.epilogue import ACTIVATIONS
from stripe_kernels.geometry import ConvShape
from stripe_kernels.plan import Plan, make_plan
from stripe_kernels.registry import Pass, Problem
from stripe_kernels.skeleton import FilterSkeleton

_RUNNERS_KEPT = 64  # shapes a layer remembers

library = torch.library.Library("stripe_kernels", "DEF")
_GEOMETRY = "str skeleton, int[2] stride, int[4] padding, int[2] dilation, int groups, str kernel"
library.define(
    "fprop(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? residual, str activation, " + _GEOMETRY + ") -> Tensor"
)
library.define("dgrad(Tensor grad, Tensor weight, SymInt[2] input_size, " + _GEOMETRY + ") -> Tensor")
library.define("wgrad(Tensor grad, Tensor x, " + _GEOMETRY + ") -> Tensor")


class StripeOp:
    """One layer's settings: skeleton, stride, padding (top, left, bottom, right), dilation, groups and kernel name.

    Shapes seen so far keep their runner here; equal settings share one object (`StripeOp.of`).
    """

    def __init__(
        self,
        skeleton: str,
        stride: tuple[int, int],
        padding: tuple[int, int, int, int],
        dilation: tuple[int, int],
        groups: int,
        kernel: str,
    ) -> None:
        self.skeleton = FilterSkeleton.from_text(skeleton)
        self.arguments = (skeleton, stride, padding, dilation, groups, kernel)
        self.stride, self.padding, self.dilation, self.groups, self.kernel = stride, padding, dilation, groups, kernel
        self._runners: dict[Any, Any] = {}

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(*arguments: Any) -> StripeOp:
        return StripeOp(*arguments)

    def shape(self, n: int, c: int, h: int, w: int) -> ConvShape:
        k, r, s = self.skeleton.shape
        return ConvShape(n, c, h, w, k, r, s, self.stride, self.padding, self.dilation, self.groups)

    def problem(self, size: tuple[int, ...], dtype: torch.dtype, device: torch.device, channels_last: bool) -> Problem:
        shape = self.shape(*(int(v) for v in size))
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        return Problem(shape, self.skeleton, str(dtype)[6:], device.type, channels_last, threads)

    def plan(self, which: Pass, problem: Problem) -> Plan:
        backends.load()
        return make_plan(problem, which, self.kernel)

    def runner(self, which: Pass, size: tuple[int, ...], like: Tensor) -> Any:
        """The runner for an input of `size` [N, C, H, W] in the dtype, device and memory format of `like`."""
        key = (which, size, like.dtype, like.device, like.stride(), torch.get_num_threads())
        runner = self._runners.get(key)
        if runner is None:
            problem = self.problem(size, like.dtype, like.device, is_channels_last(like))
            runner = self.plan(which, problem).build()
            if len(self._runners) >= _RUNNERS_KEPT:
                self._runners.pop(next(iter(self._runners)))
            self._runners[key] = runner
        return runner

    def forget(self) -> None:
        """Drops the runners, so that the next call plans anew (after tuning)."""
        self._runners.clear()


def lane_network(threads: int) -> Any:
    """An empty native network on batch lanes (backends/cpu_network.py); ImportError where the extension is missing."""
    return backends.lane_network(threads)


def is_channels_last(t: Tensor) -> bool:
    """As torch decides the output format of a convolution: contiguous wins where both fit."""
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


# Packed weights of inference: weight -> ((storage, version), {runner: packed}).
_snapshots: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed_weight(runner: Any, weight: Tensor) -> Any:
    """The runner's form of a weight [A, C/groups], from a snapshot keyed by storage and version.

    Inference tensors have no version and must not be written in place.
    """
    state = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
    entry = _snapshots.get(weight)
    if entry is None or entry[0] != state:
        entry = (state, {})
        _snapshots[weight] = entry
    packed = entry[1].get(runner)
    if packed is None:
        if len(entry[1]) >= _RUNNERS_KEPT:
            entry[1].clear()
        packed = entry[1][runner] = runner.pack(weight)
    return packed


def _pack_for_operator(runner: Any, weight: Tensor) -> Any:
    """Below autograd nobody knows whether a gradient is wanted: a weight that could be trained is packed on every call, so
    that optimizers which write through .data are seen."""
    return runner.pack(weight) if weight.requires_grad else packed_weight(runner, weight)


def drop_snapshot(weight: Tensor) -> None:
    """Forgets packed copies of a weight that was changed behind torch's back (through .data)."""
    _snapshots.pop(weight, None)


def check(x: Tensor, weight: Tensor, op: StripeOp, extras: dict[str, Tensor | None]) -> ConvShape:
    """Validates one call and returns its shape; every message carries the sizes. Devices come first."""
    k, r, s = op.skeleton.shape
    for name, t in {"weight": weight, **extras}.items():
        if t is not None and t.device != x.device:
            raise RuntimeError(f"x is on {x.device} but {name} is on {t.device}")
        if t is not None and t.dtype != x.dtype:
            raise RuntimeError(f"x is {x.dtype} but {name} is {t.dtype}")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating point tensor, got {x.dtype}")
    if x.dim() != 4:
        raise RuntimeError(f"x must be [N, C, H, W], got shape {list(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] != op.skeleton.stripes:
        raise RuntimeError(
            f"weight must be [A, C/groups] with A={op.skeleton.stripes} live stripes of skeleton {[k, r, s]}, "
            f"got shape {list(weight.shape)}"
        )
    if x.shape[1] != weight.shape[1] * op.groups:
        raise RuntimeError(
            f"x has {x.shape[1]} channels but weight {list(weight.shape)} with groups={op.groups} reads "
            f"{weight.shape[1] * op.groups}: x is {list(x.shape)}"
        )
    shape = op.shape(*x.shape)
    for name in ("bias", "scale"):
        vector = extras.get(name)
        if vector is not None and tuple(vector.shape) != (k,):
            raise RuntimeError(f"{name} must have K={k} entries, got shape {list(vector.shape)}")
    residual = extras.get("residual")
    if residual is not None and tuple(residual.shape) != shape.output_size:
        raise RuntimeError(f"residual must be {list(shape.output_size)}, got shape {list(residual.shape)}")
    return shape


def _fprop(x, weight, bias, scale, residual, activation, *arguments):  # type: ignore[no-untyped-def]
    op = _op(arguments)
    check(x, weight, op, {"bias": bias, "scale": scale, "residual": residual})
    runner = op.runner("fprop", tuple(x.shape), x)
    return runner(x, _pack_for_operator(runner, weight), bias, scale, residual, _activation(activation))


def _dgrad(grad, weight, input_size, *arguments):  # type: ignore[no-untyped-def]
    op = _op(arguments)
    size = _check_grad(grad, weight.shape[1], (grad.shape[0], weight.shape[1] * op.groups, *input_size), op)
    runner = op.runner("dgrad", size, grad)
    return runner(grad, _pack_for_operator(runner, weight))


def _wgrad(grad, x, *arguments):  # type: ignore[no-untyped-def]
    op = _op(arguments)
    size = _check_grad(grad, x.shape[1] // op.groups, tuple(x.shape), op)
    return op.runner("wgrad", size, x)(grad, x)


def _check_grad(grad: Tensor, group_c: int, size: tuple[int, ...], op: StripeOp) -> tuple[int, ...]:
    expected = op.shape(*size).output_size
    if tuple(grad.shape) != expected:
        raise RuntimeError(f"grad must be {list(expected)} for an input of {list(size)}, got {list(grad.shape)}")
    return size


def _op(arguments: tuple[Any, ...]) -> StripeOp:
    skeleton, stride, padding, dilation, groups, kernel = arguments
    return StripeOp.of(skeleton, tuple(stride), tuple(padding), tuple(dilation), groups, kernel)


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return name


for _name, _implementation in (("fprop", _fprop), ("dgrad", _dgrad), ("wgrad", _wgrad)):
    library.impl(_name, _implementation, "CompositeExplicitAutograd")


def _like(t: Tensor, size: tuple[Any, ...]) -> Tensor:
    last = is_channels_last(t)
    return t.new_empty(size).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@torch.library.register_fake("stripe_kernels::fprop", lib=library)
def _fprop_fake(x, weight, bias, scale, residual, activation, *arguments):  # type: ignore[no-untyped-def]
    op = _op(arguments)
    return _like(x, check(x, weight, op, {"bias": bias, "scale": scale, "residual": residual}).output_size)


@torch.library.register_fake("stripe_kernels::dgrad", lib=library)
def _dgrad_fake(grad, weight, input_size, *arguments):  # type: ignore[no-untyped-def]
    return _like(grad, (grad.shape[0], weight.shape[1] * _op(arguments).groups, *input_size))


@torch.library.register_fake("stripe_kernels::wgrad", lib=library)
def _wgrad_fake(grad, x, *arguments):  # type: ignore[no-untyped-def]
    op = _op(arguments)
    return x.new_empty(op.skeleton.stripes, x.shape[1] // op.groups)


def _fprop_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, scale, residual, ctx.activation, *ctx.arguments = inputs
    ctx.save_for_backward(x, weight, bias, scale, residual)


def _fprop_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, bias, scale, residual = ctx.saved_tensors
    needs = ctx.needs_input_grad
    ops, arguments = torch.ops.stripe_kernels, ctx.arguments
    dscale = None
    if ctx.activation != "none" or needs[3]:
        # What the epilogue saw is computed again: cheaper than keeping it for every inference-shaped call.
        conv = ops.fprop(x, weight, None, None, None, "none", *arguments)
        if ctx.activation != "none":
            z = conv if scale is None else conv * scale[:, None, None]
            z = z if bias is None else z + bias[:, None, None]
            dy = dy * _activation_slope(z if residual is None else z + residual, ctx.activation)
        if needs[3]:
            dscale = (dy * conv).sum((0, 2, 3))
    dbias = dy.sum((0, 2, 3)) if needs[2] else None
    dresidual = dy if needs[4] else None
    dconv = dy if scale is None else dy * scale[:, None, None]
    dx = ops.dgrad(dconv, weight, x.shape[2:], *arguments) if needs[0] else None
    dw = ops.wgrad(dconv, x, *arguments) if needs[1] else None
    return dx, dw, dbias, dscale, dresidual, None, *[None] * len(arguments)


def _activation_slope(z: Tensor, activation: str) -> Tensor:
    """d activation / dz, as torch defines it at the kinks."""
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "relu6":
        return ((z > 0) & (z < 6)).to(z.dtype)
    if activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    inner = (z / 3 + 0.5).where((z > -3) & (z < 3), (z >= 3).to(z.dtype))
    return inner


def _dgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, _, *ctx.arguments = inputs
    ctx.save_for_backward(grad, weight)


def _dgrad_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    grad, weight = ctx.saved_tensors
    ops, arguments = torch.ops.stripe_kernels, ctx.arguments
    dgrad = ops.fprop(ddx, weight, None, None, None, "none", *arguments) if ctx.needs_input_grad[0] else None
    dweight = ops.wgrad(grad, ddx, *arguments) if ctx.needs_input_grad[1] else None
    return dgrad, dweight, None, *[None] * len(arguments)


def _wgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, *ctx.arguments = inputs
    ctx.save_for_backward(grad, x)


def _wgrad_backward(ctx: Any, ddw: Tensor) -> tuple[Any, ...]:
    grad, x = ctx.saved_tensors
    ops, arguments = torch.ops.stripe_kernels, ctx.arguments
    dgrad = ops.fprop(x, ddw, None, None, None, "none", *arguments) if ctx.needs_input_grad[0] else None
    dx = ops.dgrad(grad, ddw, x.shape[2:], *arguments) if ctx.needs_input_grad[1] else None
    return dgrad, dx, *[None] * len(arguments)


torch.library.register_autograd("stripe_kernels::fprop", _fprop_backward, setup_context=_fprop_setup, lib=library)
torch.library.register_autograd("stripe_kernels::dgrad", _dgrad_backward, setup_context=_dgrad_setup, lib=library)
torch.library.register_autograd("stripe_kernels::wgrad", _wgrad_backward, setup_context=_wgrad_setup, lib=library)


def _plain(x: Tensor, *others: Tensor | None) -> bool:
    """True when torch's machinery has nothing to do with this call: plain tensors, no mode, transform or gradient."""
    if type(x) is not Tensor or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._is_torch_function_mode_enabled():
        return False
    grad = torch.is_grad_enabled()
    for t in (x, *others):
        if t is not None and ((grad and t.requires_grad) or type(t) not in (Tensor, torch.nn.Parameter)):
            return False
    return x.device.type in ("cpu", "cuda")


def fprop(
    op: StripeOp,
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [A, C/groups]
    bias: Tensor | None = None,  # [K]
    scale: Tensor | None = None,  # [K]
    residual: Tensor | None = None,  # [N, K, P, Q]
    activation: str = "none",
) -> Tensor:  # [N, K, P, Q]
    """The front: straight to the kernel where nothing but the kernel is needed, through the dispatcher otherwise."""
    if not _plain(x, weight, bias, scale, residual):
        return torch.ops.stripe_kernels.fprop(x, weight, bias, scale, residual, activation, *op.arguments)
    key = ("fprop", tuple(x.shape), x.dtype, x.device, x.stride(), torch.get_num_threads())
    runner = op._runners.get(key)
    if runner is None or bias is not None or scale is not None or residual is not None:
        check(x, weight, op, {"bias": bias, "scale": scale, "residual": residual})
    if runner is None:
        runner = op.runner("fprop", tuple(x.shape), x)
    elif weight.dtype != x.dtype or weight.shape[0] != op.skeleton.stripes or weight.device != x.device:
        check(x, weight, op, {})
    return runner(x, packed_weight(runner, weight), bias, scale, residual, _activation(activation))
