"""A graph without side effects: operations in place become ordinary ones, or the graph is refused."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from stripe_kernels.compile.graph import DROPOUTS, calls, module_of, size_of

# In-place operations and what they are without the side effect.
_NAMES = """
    abs add addcdiv addcmul celu ceil clamp clamp_max clamp_min clip div elu exp floor hardsigmoid hardswish
    hardtanh leaky_relu lerp log masked_fill mish mul neg pow reciprocal relu relu6 round rsqrt selu sigmoid
    silu sqrt square sub tanh threshold
"""
_IN_PLACE = _NAMES.split()
_METHODS_IN_PLACE = {name + "_": name for name in _IN_PLACE if hasattr(Tensor, name + "_")}
_FUNCTIONS_IN_PLACE: dict[Any, Callable[..., Any]] = {
    getattr(home, name + "_"): getattr(home, name)
    for home in (torch, F)
    for name in _IN_PLACE
    if hasattr(home, name) and hasattr(home, name + "_")
} | {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
}
# What may return another name of the same memory.
_VIEWS = """
    bfloat16 broadcast_to chunk contiguous detach diagonal double expand expand_as flatten float half hsplit
    moveaxis movedim narrow permute ravel reshape select split squeeze swapaxes swapdims t tensor_split to
    transpose type_as unbind unflatten unfold unsqueeze view view_as vsplit
"""
_VIEW_METHODS = frozenset(_VIEWS.split())
_VIEW_FUNCTIONS = {operator.getitem, F.dropout} | {
    getattr(torch, name) for name in _VIEW_METHODS if callable(getattr(torch, name, None))
}
_VIEW_ATTRIBUTES = ("T", "mT", "H", "mH", "data")


def without_side_effects(network: fx.GraphModule) -> None:
    """Makes in-place operations ordinary ones: later readers of the tensor they wrote read their result.

    The graph must have sizes recorded: `h += 1` of a number changes nothing for others that have it.

    Raises ValueError where the tensor is read later by another name, as a view or what it is a view of, and where
    somebody reads what an operation without such a counterpart wrote.
    """
    order = {node: i for i, node in enumerate(network.graph.nodes)}
    changes = {
        node: _out_of_place(node) for node in network.graph.nodes
    }  # all before any: modules are shared
    for node, change in changes.items():
        written: Any = node.args[0] if node.args else None
        if size_of(written) is not None and (change is not None or ends_in_place(node)):
            _refuse_state(node)
            later = [u for u in written.users if order[u] > order[node]]
            views = [u for u in written.users if order[u] < order[node] and _is_view(u)]
            others = [u for u in _readers_by_other_names(written, views) if order[u] > order[node]]
            if others or (later and change is None):
                who = f"views, which {others[0].name} reads" if others else f"a reader, {later[0].name}"
                raise ValueError(f"{node.name} writes {written.name} in place, which has {who}")
            for user in later:
                user.replace_input_with(written, node)
        if change is not None:
            change()
    network.graph.lint()


def _refuse_state(node: fx.Node) -> None:
    """Raises ValueError where a node writes to the model's own tensor and somebody reads that, in the next call too."""
    root: Any = node.args[0]
    while _is_view(root):
        root = root.args[0]
    if root.op == "get_attr":
        names = [n for n in node.graph.nodes if n.op == "get_attr" and n.target == root.target]
        if node.users or {u for n in names for u in n.users} - {node}:
            raise ValueError(f"{node.name} changes {root.target}, which the next call would read")


def ends_in_place(node: fx.Node) -> bool:
    """Whether a node calls what torch calls an operation in place."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function" and not str(getattr(node.target, "__module__", "")).endswith("operator"):
        name = str(getattr(node.target, "__name__", ""))
    else:
        return False
    return name.endswith("_") and not name.endswith("__")


def _readers_by_other_names(node: Any, views: list[fx.Node]) -> set[fx.Node]:
    """Who reads a node's memory through `views` of it, or as what it is a view of; not through other parts of that."""
    found: set[fx.Node] = set()

    def add_readers(one: fx.Node, but: fx.Node | None = None) -> None:
        for user in one.users:
            if user is not but and not (but and _apart(user, but)) and user not in found:
                found.add(user)
                if _is_view(user):
                    add_readers(user)

    for view in views:
        add_readers(view)
    while _is_view(node):
        part, node = node, node.args[0]
        add_readers(node, but=part)
    return found


def _apart(one: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes are parts of a tensor, or of what chunk gave, that have other numbers."""
    numbers = [n.args[1] if calls(n, functions=(operator.getitem,)) else None for n in (one, other)]
    a, b = numbers
    return isinstance(a, int) and isinstance(b, int) and a != b and (a < 0) == (b < 0)


def _is_view(node: fx.Node) -> bool:
    if calls(node, functions=(getattr,)):
        return node.args[1] in _VIEW_ATTRIBUTES
    return calls(node, (*DROPOUTS, nn.Flatten, nn.Unflatten), _VIEW_FUNCTIONS, _VIEW_METHODS)


def _out_of_place(node: fx.Node) -> Callable[[], None] | None:
    """What turns this node into its counterpart without side effect; None when it has none."""
    module = module_of(node)
    if module is not None and getattr(module, "inplace", False):
        return lambda: setattr(module, "inplace", False)
    if node.op == "call_method" and node.target in _METHODS_IN_PLACE:
        return lambda: setattr(node, "target", _METHODS_IN_PLACE[node.target])  # type: ignore[index]
    if node.op == "call_function" and node.target in _FUNCTIONS_IN_PLACE:
        return lambda: setattr(node, "target", _FUNCTIONS_IN_PLACE[node.target])
    if node.op == "call_function" and node.kwargs.get("inplace"):
        return lambda: setattr(node, "kwargs", {**node.kwargs, "inplace": False})
    return None
