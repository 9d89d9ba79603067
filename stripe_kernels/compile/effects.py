"""A graph without side effects: operations in place become ordinary ones, or the graph is refused."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from stripe_kernels.compile.graph import attribute, calls, memory_of, module_of, size_of

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
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.ilshift: operator.lshift,
    operator.irshift: operator.rshift,
}
_DIVISIONS = ("chunk", "split", "tensor_split", "unbind")  # what returns parts of a tensor


def without_side_effects(network: fx.GraphModule) -> None:
    """Makes in-place operations ordinary ones: later readers of the tensor they wrote read their result.

    The graph must have been recorded: `h += 1` of a number changes nothing for others that have it, and what shares
    memory with what was seen in the example run.

    Raises ValueError where the tensor is read later by another name, as a view or what it is a view of, and where
    somebody reads what an operation without such a counterpart wrote; and for every `out=`.
    """
    order = {node: i for i, node in enumerate(network.graph.nodes)}
    # All before any: modules are shared.
    changes = {node: _out_of_place(node) for node in network.graph.nodes}
    for node, change in changes.items():
        written: Any = node.args[0] if node.args else None
        if isinstance(node.kwargs.get("out"), fx.Node):
            raise ValueError(f"{node.name} writes {node.kwargs['out']} in place, by `out=`")
        if _widens(node):
            change = None
        if size_of(written) is not None and (change is not None or ends_in_place(node)):
            _refuse_state(node)
            later = [u for u in written.users if order[u] > order[node]]
            views = [u for u in written.users if order[u] < order[node] and _is_view(u, written)]
            others = [u for u in _readers_by_other_names(written, views) if order[u] > order[node]]
            if others or (later and change is None):
                who = f"views, which {others[0].name} reads" if others else f"a reader, {later[0].name}"
                raise ValueError(f"{node.name} writes {written.name} in place, which has {who}")
            for user in later:
                user.replace_input_with(written, node)
                user.meta["views"] = [node if n is written else n for n in user.meta["views"]]
        if change is not None:
            change()
            node.meta["views"] = []
    network.graph.lint()


def _refuse_state(node: fx.Node) -> None:
    """Raises ValueError where a node writes to the model's own tensor and somebody reads that, in the next call too."""
    network: Any = node.graph.owning_module
    written: Any = node.args[0]
    for root in [n for n in (written, *_bases(written)) if n.op == "get_attr"]:
        memory = memory_of(attribute(network, str(root.target)))
        names = [
            n
            for n in node.graph.find_nodes(op="get_attr")
            if memory_of(attribute(network, n.target)) & memory
        ]
        if node.users or {u for n in names for u in n.users} - {node}:
            raise ValueError(f"{node.name} changes {root.target}, which the next call would read")


def _bases(node: fx.Node) -> list[fx.Node]:
    """What a node is a view of, and what that is a view of."""
    found: list[fx.Node] = []
    todo = [node]
    while todo:
        bases = [n for n in todo.pop().meta["views"] if n not in found]
        found += bases
        todo += bases
    return found


def writes_in_place(node: fx.Node) -> bool:
    """Whether a node calls what torch or Python calls an operation in place."""
    return ends_in_place(node) or calls(node, (), _FUNCTIONS_IN_PLACE) or bool(node.kwargs.get("inplace"))


def ends_in_place(node: fx.Node) -> bool:
    """Whether a node calls what torch calls an operation in place."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function" and not str(getattr(node.target, "__module__", "")).endswith("operator"):
        name = str(getattr(node.target, "__name__", ""))
    else:
        return False
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _widens(node: fx.Node) -> bool:
    """Whether an operand has a wider dtype than what is written: in place the result is cast to that."""
    if not node.args or size_of(node.args[0]) is None:
        return False
    first: Any = node.args[0]
    operands = [n for n in node.all_input_nodes if size_of(n) or (size_of(n) == () == size_of(first))]
    own = first.meta["dtype"]
    return any(torch.promote_types(own, n.meta["dtype"]) != own for n in operands)


def _readers_by_other_names(node: Any, views: list[fx.Node]) -> set[fx.Node]:
    """Who reads a node's memory through `views` of it, or as what it is a view of; not through other parts of that."""
    found: set[fx.Node] = set()

    def add_readers(one: fx.Node, but: fx.Node | None = None) -> None:
        for user in one.users:
            if user is not but and not (but and _apart(user, but)) and user not in found:
                found.add(user)
                if _is_view(user, one):
                    add_readers(user)

    for view in views:
        add_readers(view)
    for part in (node, *_bases(node)):
        for base in part.meta["views"]:
            add_readers(base, but=part)
    return found


def _apart(one: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes are parts of a tensor, or of what chunk gave, that have other numbers."""
    if not all(calls(n, functions=(operator.getitem,)) for n in (one, other)):
        return False
    whole: Any = one.args[0]
    if calls(whole, (), [getattr(torch, name) for name in _DIVISIONS], _DIVISIONS):
        whole = whole.args[0]
    a, b = one.args[1], other.args[1]
    numbers = isinstance(a, int) and isinstance(b, int) and a != b and (a < 0) == (b < 0)
    return numbers and bool(whole.meta["distinct"])


def _is_view(node: fx.Node, of: fx.Node) -> bool:
    return of in node.meta["views"]


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
