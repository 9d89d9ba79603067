"""Folds batch norm into filters, and residual additions and activations into the operator's epilogue."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from stripe_kernels.compile.channels import NORMS, norm_affine
from stripe_kernels.compile.graph import calls, module_of, size_of
from stripe_kernels.compile.layers import Filter

_ACTIVATIONS: dict[str, tuple[Any, tuple[Any, ...], tuple[str, ...]]] = {
    "relu": (nn.ReLU, (F.relu, torch.relu), ("relu",)),
    "relu6": (nn.ReLU6, (F.relu6,), ()),
    "silu": (nn.SiLU, (F.silu,), ()),
    "hardswish": (nn.Hardswish, (F.hardswish,), ()),
}


def fold_norms(network: fx.GraphModule) -> list[str]:
    """Folds a batch norm into the filter whose output it alone reads; returns the norms' names."""
    folded = []
    for node in list(network.graph.nodes):
        norm = module_of(node)
        if not isinstance(norm, NORMS) or norm.running_mean is None:
            continue
        source = node.args[0]
        layer = module_of(source)
        rank = 2 if isinstance(layer, Filter) and layer.linear else 4
        if isinstance(layer, Filter) and len(source.users) == 1 and len(size_of(source) or ()) == rank:
            layer.scale(*norm_affine(norm))
            layer.had_bias = True
            node.replace_all_uses_with(source)
            network.graph.erase_node(node)
            folded.append(str(node.target))
    return folded


def fuse_epilogues(network: fx.GraphModule) -> dict[str, list[str]]:
    """Residual additions and activations become the filter's own; returns filter -> what it took.

    The graph must have sizes recorded.
    """
    fused: dict[str, list[str]] = {}
    for node in list(network.graph.nodes):
        if node.op != "call_module" and node.op != "call_function" and node.op != "call_method":
            continue
        name = activation_of(node)
        if name:
            source = node.args[0]
            layer = _open_layer(source)
            if layer is not None:
                layer.activation = name
                node.replace_all_uses_with(source)
                network.graph.erase_node(node)
                fused.setdefault(str(source.target), []).append(name)
        elif is_plain_sum(node) and node.args[0] is not node.args[1]:
            source = _last_filter(node)
            if source is not None:
                residual = node.args[1] if node.args[0] is source else node.args[0]
                with network.graph.inserting_before(node):
                    new = network.graph.call_module(str(source.target), (source.args[0], residual))
                new.meta.update(node.meta)
                node.replace_all_uses_with(new)
                network.graph.erase_node(node)
                network.graph.erase_node(source)
                fused.setdefault(str(new.target), []).append("residual")
    return fused


def _open_layer(node: Any) -> Filter | None:
    """The convolution a node calls, if its epilogue has room and nobody else reads what the node gives."""
    layer = module_of(node)
    if not isinstance(layer, Filter) or layer.linear or layer.activation != "none" or len(node.users) != 1:
        return None
    return layer if len(size_of(node) or ()) == 4 else None


def activation_of(node: fx.Node) -> str | None:
    """The epilogue's word for what a node computes, if there is one."""
    for name, (modules, functions, methods) in _ACTIVATIONS.items():
        if calls(node, modules, functions, methods):
            return name
    module = module_of(node)
    if type(module) is nn.Hardtanh and (module.min_val, module.max_val) == (0.0, 6.0):
        return "relu6"
    return None


def is_plain_sum(node: fx.Node) -> bool:
    """a + b of two tensors of one size and dtype."""
    if (
        not calls(node, functions=(operator.add, torch.add), methods=("add",))
        or node.kwargs
        or len(node.args) != 2
    ):
        return False
    a, b = node.args
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return False
    return size_of(a) is not None and size_of(a) == size_of(b) and a.meta["dtype"] == b.meta["dtype"]


def _last_filter(node: fx.Node) -> fx.Node | None:
    """The summand that is a convolution and can take the other as its residual; the later if both can."""
    candidates = [a for a in node.args if len(getattr(a, "args", ())) == 1 and _open_layer(a) is not None]
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    return max(candidates, key=order.__getitem__, default=None)  # type: ignore[return-value]
