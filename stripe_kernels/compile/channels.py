"""Which channels of a network carry nothing, found over the whole graph.

A channel of a tensor is *constant* when it has one value at every pixel of every image: a filter with no live
stripe gives its bias, and BN, activations, pooling and sums of constants keep it constant. It is *unneeded*
when no filter that matters reads it. Channels that pass through the same element-wise operations form one
*class*; a class can be dropped when each of its channels is constant or unneeded. This file only decides;
shrink.py edits the graph.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from stripe_kernels.compile.graph import calls, module_of, size_of
from stripe_kernels.compile.layers import Filter

NORMS = (nn.BatchNorm2d, nn.BatchNorm1d)
PER_CHANNEL = (*NORMS, nn.PReLU)  # layers with values of their own for every channel
_BORDERS = (
    nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d,
)  # fmt: skip
_POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.GELU, nn.LeakyReLU,
    nn.ELU, nn.Hardtanh, nn.Mish, nn.Softplus, nn.CELU, nn.SELU,
)  # fmt: skip
_POINTWISE_FUNCTIONS = frozenset({
    torch.relu, torch.sigmoid, torch.tanh, torch.clamp, torch.neg, torch.abs, torch.exp, operator.neg, F.relu,
    F.relu6, F.silu, F.hardswish, F.hardsigmoid, F.gelu, F.leaky_relu, F.elu, F.hardtanh, F.mish, F.softplus,
    F.sigmoid, F.tanh,
})  # fmt: skip
_POINTWISE_METHODS = frozenset({"relu", "sigmoid", "tanh", "clamp", "neg", "abs", "exp"})
_BINARY_FUNCTIONS = frozenset({
    operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul, torch.div,
    torch.maximum, torch.minimum,
})  # fmt: skip
_BINARY_METHODS = frozenset({"add", "sub", "mul", "div"})
_CONCATENATIONS = frozenset({torch.cat, torch.concat, torch.concatenate})
# Averages whose weights sum to one, and maxima: a constant map stays what it is.
_POOL_MODULES = (
    nn.MaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Upsample,
    nn.UpsamplingNearest2d,
)
_POOL_FUNCTIONS = frozenset({F.max_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate})
_MEANS = frozenset({torch.mean, torch.amax, torch.amin})
_PIXEL_DIMS = ({2, 3}, {-2, -1}, {2, -1}, {-2, 3})


@dataclass
class Role:
    """How a node treats channels: `kind`, the tensors whose channels it reads, what it does to a constant.

    pass   output channel i is made from channel i of every source; `constant` maps their values
    expand each source channel becomes `factor` features in a row (flatten)
    join   sources one after another (cat)
    filter a Filter that mixes channels
    fixed  anything else: all channels stay
    """

    kind: str
    sources: list[fx.Node]
    constant: Callable[..., Tensor] | None = None
    factor: int = 1


@dataclass
class Channels:
    """What is known about the channels of one tensor; `base` is its first channel's number in the graph."""

    role: Role
    base: int
    constant: Tensor  # float64 [C], NaN where the channel varies
    needed: Tensor = field(default_factory=lambda: torch.empty(0))  # bool [C]


def analyse(network: fx.GraphModule) -> tuple[dict[fx.Node, Channels], Tensor]:
    """Channels of every tensor with some, and a class number for every channel of the graph."""
    found: dict[fx.Node, Channels] = {}
    total = 0
    for node in network.graph.nodes:
        size = size_of(node)
        if size is None or len(size) < 2:
            continue
        role = _role(node, size)
        if any(source not in found for source in role.sources):
            role = Role("fixed", [])
        found[node] = Channels(role, total, _constants(node, role, size[1], found))
        total += size[1]
    for channels in found.values():
        channels.needed = torch.zeros(len(channels.constant), dtype=torch.bool)
    for node in reversed(list(network.graph.nodes)):
        _mark_needed(node, found)
    return found, _classes(found, total)


def droppable(found: dict[fx.Node, Channels], classes: Tensor) -> Tensor:
    """bool by class: every channel of it is constant or unneeded, and no node holds on to it."""
    stay = torch.zeros(len(classes), dtype=torch.bool)
    for node, channels in found.items():
        count = len(channels.constant)
        mine = classes[channels.base : channels.base + count]
        stay[mine[channels.constant.isnan() & channels.needed]] = True
        if _pinned(node, found):
            stay[mine] = True
    return ~stay


def _pinned(node: fx.Node, found: dict[fx.Node, Channels]) -> bool:
    """Whether a node's own channels, or those of its sources, must all stay: someone counts or mixes them."""
    if found[node].role.kind == "fixed":
        return True
    return any(_holds(user, node, found) for user in node.users)


def _holds(user: fx.Node, node: fx.Node, found: dict[fx.Node, Channels]) -> bool:
    if user in found and node in found[user].role.sources:
        return False
    if calls(user, methods=("size",)) and len(user.args) == 2:
        return user.args[1] in (1, 1 - len(size_of(node) or ()))
    if calls(user, functions=(getattr,)) or calls(user, methods=("size",)):
        return not all(_reads_pixels(reader) for reader in user.users)
    return True


def _reads_pixels(node: fx.Node) -> bool:
    """shape[0], shape[2], shape[2:], ...: not the number of channels."""
    if not calls(node, functions=(operator.getitem,)):
        return False
    index = node.args[1]
    if isinstance(index, slice):
        return (index.start or 0) >= 2 or index.start in (-2, -1)
    return index in (0, 2, 3, -1, -2)


def _role(node: fx.Node, size: tuple[int, ...]) -> Role:
    module = module_of(node)
    first = node.args[0] if node.args else None
    if isinstance(module, Filter) and isinstance(first, fx.Node):
        if len(size) != (2 if module.linear else 4) or (module.groups > 1 and not module.depthwise):
            return Role("fixed", [])
        return Role("pass" if module.depthwise else "filter", [first])
    if isinstance(module, NORMS) and module.running_mean is not None and isinstance(first, fx.Node):
        return Role("pass", [first], _norm(module))
    if isinstance(module, nn.PReLU) and isinstance(first, fx.Node):
        slope = module.weight.detach().cpu().double()
        return Role("pass", [first], lambda c: torch.where(c > 0, c, slope * c))
    if isinstance(first, fx.Node) and len(size) == 4 and (border := _border(node)) is not None:
        return Role("pass", [first], lambda c: torch.where((c == border) | math.isnan(border), c, math.nan))
    if calls(node, _POINTWISE_MODULES, _POINTWISE_FUNCTIONS, _POINTWISE_METHODS):
        return _elementwise(node, size)
    if calls(node, (), _BINARY_FUNCTIONS, _BINARY_METHODS):
        return _elementwise(node, size)
    if calls(node, (), _CONCATENATIONS) and (list(node.args[1:]) or [node.kwargs.get("dim", 0)]) == [1]:
        if isinstance(first, (tuple, list)):  # and not what a split returned
            return Role("join", list(first))
        return Role("fixed", [])
    if isinstance(first, fx.Node) and _is_pool(node, size_of(first)):
        return Role("pass", [first], lambda c: c)
    if calls(node, functions=(torch.flatten,)) and node.args[1:] == (1,):
        before = size_of(first)
        return Role("expand", [first], factor=size[1] // max(before[1], 1))  # type: ignore[list-item, index]
    if calls(node, functions=(operator.getitem,)) and node.args[1] == (slice(None), slice(None), None, None):
        return Role("pass", [first], lambda c: c)  # type: ignore[list-item]
    return Role("fixed", [])


def _border(node: fx.Node) -> float | None:
    """What a node puts around the maps: one value, NaN for values of the map; None where it pads no maps."""
    module: Any = module_of(node)
    if isinstance(module, _BORDERS):
        return float(getattr(module, "value", math.nan))
    if not calls(node, functions=(F.pad,)):
        return None
    given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | dict(node.kwargs)
    if not isinstance(given["pad"], (tuple, list)) or len(given["pad"]) > 4:
        return None
    value = given.get("value") or 0.0
    if given.get("mode", "constant") != "constant":
        return math.nan
    return float(value) if isinstance(value, (int, float)) else None


def _elementwise(node: fx.Node, size: tuple[int, ...]) -> Role:
    sources = [a for a in node.all_input_nodes if size_of(a) is not None]
    sizes = [size_of(s) or () for s in sources]
    if any(len(s) != len(size) or s[1] != size[1] for s in sizes):
        return Role("fixed", [])
    if len(sources) != len(node.all_input_nodes):
        return Role("fixed", [])

    def constant(*values: Tensor) -> Tensor:
        known = dict(zip(sources, (v[None] for v in values), strict=True))
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
        module = module_of(node)
        called: Any = module or node.target
        if node.op == "call_method":
            called, args = getattr(args[0], str(node.target)), args[1:]
        y: Tensor = called(*args, **kwargs)[0]
        return y

    return Role("pass", sources, constant)


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor]:
    factor, shift = norm_affine(module)
    return lambda c: c * factor + shift


def norm_affine(module: Any) -> tuple[Tensor, Tensor]:
    """factor, shift [C], float64 on the CPU, of a batch norm in evaluation mode: y = x * factor + shift."""
    tensors = (module.running_mean, module.running_var, module.weight, module.bias)
    mean, variance, weight, bias = (None if t is None else t.detach().cpu().double() for t in tensors)
    factor = (variance + module.eps).rsqrt() * (1.0 if weight is None else weight)
    return factor, (0.0 if bias is None else bias) - mean * factor


def _is_pool(node: fx.Node, size: tuple[int, ...] | None) -> bool:
    if size is None or len(size) != 4:
        return False
    if calls(node, _POOL_MODULES, _POOL_FUNCTIONS):
        module = module_of(node)
        return not (node.kwargs.get("return_indices") or getattr(module, "return_indices", False))
    if isinstance(module := module_of(node), nn.AvgPool2d):
        return module.padding in (0, (0, 0)) and module.divisor_override is None
    if calls(node, functions=(F.avg_pool2d,)):
        given = dict(zip(("kernel", "stride", "padding"), node.args[1:], strict=False)) | dict(node.kwargs)
        return given.get("padding", 0) in (0, (0, 0)) and given.get("divisor_override") is None
    if calls(node, functions=_MEANS, methods=("mean", "amax", "amin")):
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return isinstance(dims, (tuple, list)) and set(dims) in _PIXEL_DIMS
    return False


def _constants(node: fx.Node, role: Role, count: int, found: dict[fx.Node, Channels]) -> Tensor:
    unknown = torch.full((count,), float("nan"), dtype=torch.float64)
    if role.kind == "fixed":
        return unknown
    values = [found[source].constant for source in role.sources]
    if role.kind == "join":
        return torch.cat(values)
    if role.kind == "expand":
        return values[0].repeat_interleave(role.factor)
    if role.kind == "filter" or role.constant is None:
        return _filter_constants(module_of(node), values[0])  # type: ignore[arg-type]
    known = ~torch.stack(values).isnan().any(0)
    with torch.no_grad():
        value = role.constant(*values)
    return torch.where(known & value.isfinite(), value, unknown)


def _filter_constants(layer: Filter, x: Tensor) -> Tensor:
    """A filter's output is constant if it reads constants alone and none of them meets a border of zeros."""
    by_channel = layer.weight.sum((2, 3))  # [K, C] or, depthwise, [C, 1]
    reads = (layer.weight != 0).any(-1).any(-1)
    if layer.depthwise:
        by_channel, reads = torch.diag(by_channel[:, 0]), torch.diag(reads[:, 0])
    bad = x.isnan() | ((x != 0) if layer.zero_border else torch.zeros_like(x, dtype=torch.bool))
    varies = (reads & bad).any(1)
    value = layer.bias + by_channel @ x.nan_to_num(0.0)
    return value.masked_fill(varies, float("nan"))


def _mark_needed(node: fx.Node, found: dict[fx.Node, Channels]) -> None:
    """Tells the sources of a node which of their channels it needs."""
    channels = found.get(node)
    if channels is None or channels.role.kind == "fixed":
        for source in node.all_input_nodes:
            if source in found and _holds_values(node):
                found[source].needed[:] = True
        return
    role = channels.role
    wanted = channels.needed & channels.constant.isnan()
    if role.kind == "join":
        parts = torch.split(wanted, [len(found[s].constant) for s in role.sources])
        for source, part in zip(role.sources, parts, strict=True):
            found[source].needed |= part
    elif role.kind == "expand":
        found[role.sources[0]].needed |= wanted.view(-1, role.factor).any(1)
    elif role.kind == "filter":
        reads = (module_of(node).weight != 0).any(-1).any(-1)  # type: ignore[union-attr]
        found[role.sources[0]].needed |= (reads & wanted[:, None]).any(0)
    else:
        for source in role.sources:
            found[source].needed |= wanted


def _holds_values(node: fx.Node) -> bool:
    """Sizes are read without needing any value."""
    return not (calls(node, functions=(getattr,)) or calls(node, methods=("size", "dim")))


def _classes(found: dict[fx.Node, Channels], total: int) -> Tensor:
    """A class number for every channel: the smallest channel number it is tied to."""
    ties: list[tuple[Tensor, Tensor]] = []
    for channels in found.values():
        mine = channels.base + torch.arange(len(channels.constant))
        sources = [found[s].base + torch.arange(len(found[s].constant)) for s in channels.role.sources]
        if channels.role.kind == "pass":
            ties += [(mine, source) for source in sources]
        elif channels.role.kind == "join":
            ties.append((mine, torch.cat(sources)))
        elif channels.role.kind == "expand":
            ties.append((mine, sources[0].repeat_interleave(channels.role.factor)))
    classes = torch.arange(total)
    while True:
        before = classes.clone()
        for a, b in ties:
            classes.scatter_reduce_(0, a, classes[b], "amin")
            classes.scatter_reduce_(0, b, classes[a], "amin")
        classes = classes[classes]
        if torch.equal(before, classes):
            return classes
