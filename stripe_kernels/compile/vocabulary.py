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
    AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
    AvgPool1d AvgPool2d AvgPool3d BatchNorm1d BatchNorm2d BatchNorm3d CELU ChannelShuffle CircularPad1d
    CircularPad2d CircularPad3d ConstantPad1d ConstantPad2d ConstantPad3d Conv1d Conv2d Conv3d ConvTranspose1d
    ConvTranspose2d ConvTranspose3d Dropout Dropout1d Dropout2d Dropout3d ELU Embedding Flatten Fold GELU GLU
    GroupNorm GRU Hardshrink Hardsigmoid Hardswish Hardtanh Identity InstanceNorm1d InstanceNorm2d
    InstanceNorm3d LayerNorm LeakyReLU Linear LocalResponseNorm LogSigmoid LogSoftmax LPPool2d LSTM MaxPool1d
    MaxPool2d MaxPool3d MaxUnpool2d Mish PixelShuffle PixelUnshuffle PReLU ReflectionPad1d ReflectionPad2d
    ReflectionPad3d ReLU ReLU6 ReplicationPad1d ReplicationPad2d ReplicationPad3d RNN SELU Sigmoid SiLU Softmax
    Softmax2d Softplus Softsign Tanh Tanhshrink Threshold Unflatten Unfold Upsample UpsamplingBilinear2d
    UpsamplingNearest2d ZeroPad1d ZeroPad2d ZeroPad3d
"""

_FUNCTIONS: dict[Any, str] = {
    torch: """
        abs adaptive_avg_pool1d add addmm amax amin argmax argmin baddbmm bmm broadcast_to cat ceil
        channel_shuffle chunk clamp clip concat concatenate conv2d conv_transpose2d cos cumsum div einsum exp
        exp_ flatten flip floor floor_divide full_like gather hardshrink index_select log log_softmax logsumexp
        masked_fill matmul max maximum mean min minimum movedim mul narrow neg norm ones_like outer permute
        pixel_shuffle pixel_unshuffle pow prod reciprocal relu relu_ reshape roll round rsqrt sigmoid sigmoid_
        sign sin softmax sort split sqrt square squeeze stack std std_mean sub sum swapaxes tanh tanh_ tile topk
        transpose unbind unflatten unsqueeze var var_mean where zeros_like
    """,
    F: """
        adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d affine_grid avg_pool1d avg_pool2d
        avg_pool3d batch_norm celu conv1d conv2d conv3d conv_transpose1d conv_transpose2d dropout dropout2d elu
        elu_ embedding fold gelu glu grid_sample group_norm hardsigmoid hardswish hardtanh hardtanh_
        instance_norm interpolate layer_norm leaky_relu leaky_relu_ linear local_response_norm log_softmax
        logsigmoid lp_pool2d max_pool1d max_pool2d max_pool3d mish normalize one_hot pad pixel_shuffle
        pixel_unshuffle prelu relu relu6 scaled_dot_product_attention selu sigmoid silu softmax softplus
        softsign tanh threshold unfold upsample
    """,
    operator: """
        add and_ eq floordiv ge getitem gt iadd iand ifloordiv imod imul invert ior ipow isub itruediv le lt matmul
        mod mul ne neg or_ pow sub truediv
    """,
}

_METHODS = """
    abs abs_ add add_ addcmul amax amin argmax argmin baddbmm bfloat16 bmm bool ceil chunk clamp clamp_
    clamp_max clamp_max_ clamp_min clamp_min_ clip contiguous cumsum detach diagonal dim div div_ double exp
    exp_ expand expand_as flatten flip float floor gather ge gt half index_select int le lerp log log_
    log_softmax long lt masked_fill masked_fill_ matmul max mean min movedim mul mul_ narrow neg neg_ new_ones
    new_zeros norm numel permute pow pow_ prod reciprocal relu relu_ repeat reshape roll round rsqrt rsqrt_
    select sigmoid sigmoid_ sign size softmax sort split sqrt sqrt_ square square_ squeeze std sub sub_ sum
    swapaxes t tanh tanh_ tensor_split tile to topk transpose type_as unbind unflatten unfold unsqueeze var
    view view_as
"""
METHODS = frozenset(_METHODS.split())
# By the function getattr, of tensors and of what max, sort and topk return.
ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim", "T", "mT", "values", "indices"})

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
