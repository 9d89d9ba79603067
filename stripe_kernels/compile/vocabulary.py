"""What a saved graph may consist of: modules, functions and methods by name, and how each is written as JSON.

Nothing outside these tables is ever looked up or called when a file is read, so a file cannot name code to
run.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from stripe_kernels.compile.layers import FusedConv2d
from stripe_kernels.modules import StripeConv2d

_MODULES = """
    AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveMaxPool1d AdaptiveMaxPool2d AvgPool1d AvgPool2d
    BatchNorm1d BatchNorm2d CELU ChannelShuffle CircularPad1d CircularPad2d CircularPad3d ConstantPad1d
    ConstantPad2d ConstantPad3d Conv1d Conv2d ConvTranspose2d Dropout Dropout1d Dropout2d ELU Flatten
    Fold GELU GLU GroupNorm GRU Hardshrink Hardsigmoid Hardswish Hardtanh Identity InstanceNorm2d
    LayerNorm LeakyReLU Linear LocalResponseNorm LogSigmoid LogSoftmax LPPool2d LSTM MaxPool1d MaxPool2d
    Mish PixelShuffle PixelUnshuffle PReLU ReflectionPad1d ReflectionPad2d ReflectionPad3d ReLU ReLU6
    ReplicationPad1d ReplicationPad2d ReplicationPad3d RNN SELU Sigmoid SiLU Softmax Softmax2d Softplus
    Softsign Tanh Tanhshrink Threshold Unflatten Unfold Upsample UpsamplingBilinear2d UpsamplingNearest2d
    ZeroPad1d ZeroPad2d ZeroPad3d
"""

_FUNCTIONS: dict[Any, str] = {
    torch: """
        abs adaptive_avg_pool1d add addmm amax amin bmm cat channel_shuffle chunk clamp clip concat
        concatenate conv2d conv_transpose2d cos div einsum exp flatten flip floor_divide hardshrink log
        log_softmax logsumexp matmul max maximum mean min minimum movedim mul narrow neg norm permute
        pixel_shuffle pixel_unshuffle pow relu relu_ reshape roll rsqrt sigmoid sigmoid_ sin softmax split
        sqrt square squeeze stack std sub sum swapaxes tanh tanh_ transpose unbind unflatten unsqueeze var
        where
    """,
    F: """
        adaptive_avg_pool2d adaptive_max_pool2d avg_pool2d batch_norm celu conv2d conv_transpose2d dropout
        dropout2d elu fold gelu glu group_norm hardsigmoid hardswish hardtanh instance_norm interpolate
        layer_norm leaky_relu linear local_response_norm log_softmax logsigmoid lp_pool2d max_pool2d mish
        normalize pad pixel_shuffle pixel_unshuffle prelu relu relu6 scaled_dot_product_attention selu sigmoid
        silu softmax softplus softsign tanh threshold unfold upsample
    """,
    operator: """
        add and_ eq floordiv ge getitem gt iadd imul isub itruediv le lt matmul mod mul ne neg pow sub truediv
    """,
}

_METHODS = """
    abs add add_ amax amin bmm chunk clamp clamp_ contiguous detach dim div div_ double exp expand expand_as
    flatten float flip half log log_softmax masked_fill matmul max mean min movedim mul mul_ narrow neg
    new_zeros norm numel permute pow relu relu_ repeat reshape roll rsqrt select sigmoid sigmoid_ size
    softmax split sqrt square squeeze std sub sub_ sum swapaxes t tanh tanh_ to transpose type_as unbind
    unflatten unsqueeze var view view_as
"""
METHODS = frozenset(_METHODS.split())
ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim", "T", "mT"})  # of tensors, by the function getattr

_PREFIX = {torch: "torch", F: "F", operator: "operator"}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{_PREFIX[home]}.{name}": getattr(home, name)
    for home, names in _FUNCTIONS.items()
    for name in names.split()
} | {"getattr": getattr}
FUNCTION_NAMES: dict[Callable[..., Any], str] = {}
for _name, _function in FUNCTIONS.items():
    FUNCTION_NAMES.setdefault(_function, _name)

MODULES: dict[str, type[nn.Module]] = {name: getattr(nn, name) for name in _MODULES.split()}
MODULES |= {"StripeConv2d": StripeConv2d, "FusedConv2d": FusedConv2d}
MODULE_NAMES = {kind: name for name, kind in MODULES.items()}

# Recurrent layers sign with *args and **kwargs.
_RECURRENT = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
_ARGUMENTS = {nn.GRU: _RECURRENT, nn.LSTM: (*_RECURRENT, "proj_size"), nn.RNN: (*_RECURRENT, "nonlinearity")}


def module_config(module: nn.Module) -> dict[str, Any]:
    """The constructor's arguments, which torch's modules keep as attributes of the same name; no tensors."""
    config: dict[str, Any] = {}
    for name in _ARGUMENTS.get(type(module)) or inspect.signature(type(module)).parameters:
        if name in ("device", "dtype", "skeleton") or not hasattr(module, name):
            continue
        value = getattr(module, name)
        config[name] = value is not None and value is not False if name == "bias" else value
    if isinstance(module, nn.PReLU):
        config.pop("init")
    return config


def encode(value: Any) -> Any:
    """A graph argument as JSON. Raises TypeError for what a file does not carry."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, dict):
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(v) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": 1}
    for kind in ("dtype", "memory_format"):
        if isinstance(value, getattr(torch, kind)):
            return {kind: str(value).removeprefix("torch.")}
    raise TypeError(f"a file cannot hold the graph argument {value!r} of type {type(value).__name__}")


def decode(value: Any, nodes: dict[str, Any]) -> Any:
    """What `encode` wrote; ValueError for anything else. `nodes` are the values already defined."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [decode(v, nodes) for v in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"not a graph argument: {value!r}")
    kind, inner = next(iter(value.items()))
    if kind == "float":
        return float(inner)
    if kind == "node":
        if inner not in nodes:
            raise ValueError(f"the graph uses {inner!r} before it is defined")
        return nodes[inner]
    if kind == "tuple":
        return tuple(decode(v, nodes) for v in inner)
    if kind == "dict":
        return {decode(k, nodes): decode(v, nodes) for k, v in inner}
    if kind == "slice":
        return slice(*(decode(v, nodes) for v in inner))
    if kind == "ellipsis":
        return Ellipsis
    if kind in ("dtype", "memory_format"):
        found = getattr(torch, str(inner), None)
        if isinstance(found, getattr(torch, kind)):
            return found
    raise ValueError(f"not a graph argument: {value!r}")
