"""Passes that put a traced graph into plain form, and the small questions other passes ask of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import _assert_is_none
from torch.utils._pytree import tree_leaves

_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_QUESTIONS = (
    getattr, operator.and_, operator.eq, operator.ge, operator.getitem, operator.gt, operator.le, operator.lt,
    operator.mod, operator.ne,
)  # fmt: skip
_INPUT_LATER = (torch.where, torch.searchsorted, torch.polygamma)  # whose first parameter is another
_ASSERTIONS = (torch._assert, _assert_is_none)
DROPOUTS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity,
)  # fmt: skip


def module_of(node: Any) -> nn.Module | None:
    """The module a call_module node calls."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return node.graph.owning_module.get_submodule(node.target)  # type: ignore[union-attr, arg-type]


def is_hooked(module: nn.Module | None) -> bool:
    """Whether the caller's own functions run before or after the module's."""
    return module is not None and bool(module._forward_hooks or module._forward_pre_hooks)


def calls(node: Any, modules: Any = (), functions: Iterable[Any] = (), methods: Iterable[str] = ()) -> bool:
    """Whether a node calls one of these modules (by class), functions or tensor methods."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_module":
        return bool(modules) and isinstance(module_of(node), modules)
    return (node.op == "call_function" and node.target in functions) or (
        node.op == "call_method" and str(node.target) in methods
    )


def averages_pixels(node: fx.Node) -> bool:
    """Whether a node takes the mean over H and W of a map [N, C, H, W]."""
    module = module_of(node)
    if module is not None:
        return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))
    if not calls(node, functions=(torch.mean,), methods=("mean",)):
        return False
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(dims, (tuple, list)) and sorted(v % 4 for v in dims) == [2, 3]


def size_of(node: Any) -> tuple[int, ...] | None:
    """The shape a tensor node had in the example run; None for what is no tensor."""
    return node.meta.get("size") if isinstance(node, fx.Node) else None


class OneLineInterpreter(fx.Interpreter):
    """What a layer says of an input that does not fit is enough: fx would add the node and advice on its own tools."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.extra_traceback = False


def record_sizes(network: fx.GraphModule, example: tuple[Tensor, ...]) -> Any:
    """Runs the graph once; every node learns its `size` and `dtype`, of which of its inputs it is a view, and whether
    its elements lie apart. Returns the outputs.

    Raises ValueError where chunk returns fewer parts than it was asked for.
    """

    class Recorder(OneLineInterpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            parts = parts_of(n)  # which is how many a loop over them was traced with
            if parts is not None and len(value) != parts:
                raise ValueError(
                    f"{n.name} returns {len(value)} parts, fewer than the {parts} it was asked for"
                )
            is_tensor = isinstance(value, Tensor)
            n.meta["size"] = tuple(value.shape) if is_tensor else None
            n.meta["dtype"] = value.dtype if is_tensor else None
            n.meta["distinct"] = is_tensor and _are_distinct(value)
            memory = memory_of(value)
            n.meta["views"] = [a for a in n.all_input_nodes if memory_of(self.env[a]) & memory]
            return value

    with torch.inference_mode():
        return Recorder(network).run(*example)


def memory_of(value: Any) -> set[int]:
    """Where the tensors in a value are stored."""
    tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor) and t.layout == torch.strided]
    return {t.untyped_storage().data_ptr() for t in tensors} - {0}


def _are_distinct(t: Tensor) -> bool:
    """Whether no two elements of a tensor lie at one place, as those of what expand and unfold return."""
    if t.layout != torch.strided:
        return False
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


def is_number(node: Any) -> bool:
    """Whether a node is made of sizes, as `x.shape[2] // 2`."""
    if not isinstance(node, fx.Node):
        return isinstance(node, (int, float))
    if calls(node, methods=("size",)):
        return len(node.args) + len(node.kwargs) > 1
    if calls(node, functions=(operator.getitem,)):
        return _are_sizes(node.args[0]) and not isinstance(node.args[1], slice)
    if calls(node, functions=(getattr,)):
        return node.args[1] == "ndim"
    of_numbers = node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator"
    return calls(node, methods=("dim", "numel", "item")) or (of_numbers and all(map(is_number, node.args)))


def _are_sizes(node: Any) -> bool:
    """x.shape, x.size(), x.shape[2:]."""
    if calls(node, functions=(operator.getitem,)):
        return _are_sizes(node.args[0]) and isinstance(node.args[1], slice)
    if calls(node, functions=(getattr,)):
        return bool(node.args[1] == "shape")
    return calls(node, methods=("size",)) and len(node.args) + len(node.kwargs) == 1


def parts_of(node: fx.Node) -> int | None:
    """How many tensors chunk or split returns, where its arguments say so."""
    if calls(node, functions=(torch.chunk,), methods=("chunk",)):
        count = node.args[1] if len(node.args) > 1 else node.kwargs.get("chunks")
        return count if isinstance(count, int) else None
    if calls(node, functions=(torch.split,), methods=("split",)):
        name = "split_size" if node.op == "call_method" else "split_size_or_sections"
        sizes = node.args[1] if len(node.args) > 1 else node.kwargs.get(name)
        return len(sizes) if isinstance(sizes, (tuple, list)) else None
    return None


def first_by_position(network: fx.GraphModule) -> None:
    """What a module or function calls `input`, or `tensors`, comes first, where the passes look for it."""
    for node in network.graph.nodes:
        rest = dict(node.kwargs)
        named = rest.keys() & {"input", "tensors"}
        called = node.op in ("call_module", "call_function") and node.target not in _INPUT_LATER
        if called and named and not node.args:
            node.args, node.kwargs = (rest.pop(named.pop()),), rest
    network.recompile()


def drop_assertions(network: fx.GraphModule) -> None:
    """Takes out assertions, which models of timm check their inputs with, and questions nobody reads."""
    for node in reversed(network.graph.nodes):
        unread = not node.users and (node.op == "get_attr" or calls(node, (), _QUESTIONS, ("size", "dim")))
        if unread or calls(node, functions=_ASSERTIONS):
            network.graph.erase_node(node)
    network.recompile()


def norms_as_modules(network: fx.GraphModule) -> None:
    """F.batch_norm of a module's own tensors in evaluation mode becomes nn.BatchNorm2d, which passes know."""
    for node in list(network.graph.nodes):
        if not calls(node, functions=(F.batch_norm,)):
            continue
        given = dict(zip(_BATCH_NORM, node.args, strict=False)) | dict(node.kwargs)
        x = given.pop("input")
        owned = {name: given[name] for name in _BATCH_NORM[1:5] if isinstance(given.get(name), fx.Node)}
        constant = all(n.op == "get_attr" for n in owned.values()) and "running_var" in owned
        if not constant or ("weight" in owned) != ("bias" in owned) or given.get("training"):
            continue
        tensors = {name: attribute(network, str(n.target)) for name, n in owned.items()}
        momentum, eps = given.get("momentum", 0.1), given.get("eps", 1e-5)
        with torch.device("meta"):
            norm = nn.BatchNorm2d(len(tensors["running_var"]), eps, momentum, affine="weight" in tensors)
        norm.num_batches_tracked = None
        for name, t in tensors.items():
            learned = name in ("weight", "bias") and not isinstance(
                t, nn.Parameter
            )  # a frozen norm has buffers
            setattr(norm, name, nn.Parameter(t, requires_grad=False) if learned else t)
        owner = str(owned["running_var"].target).rpartition(".")[0]
        name = f"{owner}.norm".lstrip(".")
        while _has(network, name):
            name += "_"
        network.add_submodule(name, norm.eval())
        with network.graph.inserting_before(node):
            new = network.graph.call_module(name, (x,))
        node.replace_all_uses_with(new)
        network.graph.erase_node(node)


def attribute(network: nn.Module, target: str) -> Any:
    owner, _, leaf = target.rpartition(".")
    return getattr(network.get_submodule(owner), leaf)


def _has(network: nn.Module, name: str) -> bool:
    return any(name == known for known, _ in network.named_modules())


def drop_identities(network: fx.GraphModule) -> None:
    """Takes out dropout and identities: in evaluation mode they return what they are given."""
    for node in list(network.graph.nodes):
        if calls(node, DROPOUTS, (F.dropout, F.dropout2d), ("detach",)):
            if node.kwargs.get("training"):
                continue
            node.replace_all_uses_with(node.args[0])
            network.graph.erase_node(node)


def own_modules(
    network: fx.GraphModule,
    layers: Any,
    make: Callable[[nn.Module], nn.Module],
    finished: Container[type] = (),
) -> None:
    """Gives every call of one of `layers` (classes) a module of its own, `make(module)`, free to differ.

    Layers of one of the `finished` classes stay as they are.
    """
    taken: set[str] = set()
    called = [(node, module_of(node)) for node in network.graph.nodes]
    for node, module in called:
        if isinstance(module, layers) and type(module) not in finished:
            name = str(node.target)
            while name in taken:
                name += "_"
            taken.add(name)
            network.add_submodule(name, make(module))
            node.target = name


def plain_reshapes(network: fx.GraphModule) -> None:
    """Any call that makes [N, C*H*W] of [N, C, H, W] becomes flatten(x, 1); [N, C, 1, 1] of [N, C] an index.

    Both then hold for any number of channels.
    """
    graph = network.graph
    for node in list(graph.nodes):
        if not calls(
            node, (nn.Flatten, nn.Unflatten), (torch.reshape, torch.flatten), ("view", "reshape", "flatten")
        ):
            continue
        before, after = size_of(node.args[0]), size_of(node)
        if not before or not after or before[0] != after[0]:
            continue
        with graph.inserting_before(node):
            if len(after) == 2 and _keeps_batch(node) and (len(before) > 2 or before == after):
                new = graph.call_function(torch.flatten, (node.args[0], 1))
            elif len(before) == 2 and after == (*before, 1, 1) and _keeps_batch(node):
                every = slice(None)
                new = graph.call_function(operator.getitem, (node.args[0], (every, every, None, None)))
            else:
                continue
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    graph.eliminate_dead_code()


def _keeps_batch(node: fx.Node) -> bool:
    """Whether dimension 0 stays the batch for every batch size, not only the example's."""
    module: Any = module_of(node)
    if module is not None:
        return bool((module.start_dim if isinstance(module, nn.Flatten) else module.dim) == 1)
    if node.target in (torch.flatten, "flatten"):
        return bool((node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)) == 1)
    sizes = node.args[1:] if len(node.args) > 1 else (node.kwargs.get("shape", ()),)
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    if not sizes:
        return False
    first, rest = sizes[0], sizes[1:]
    if first == -1:
        return all(isinstance(v, int) for v in rest)
    return isinstance(first, fx.Node) and _is_batch_size(first)


def _is_batch_size(node: fx.Node) -> bool:
    """x.size(0), x.shape[0] or x.size()[0] of some tensor x: all of a network's tensors share one batch."""
    if calls(node, methods=("size",)) and len(node.args) == 2:
        return bool(node.args[1] == 0)
    if not calls(node, functions=(operator.getitem,)) or node.args[1] != 0:
        return False
    source: Any = node.args[0]
    if calls(source, functions=(getattr,)):
        return bool(source.args[1] == "shape")
    return calls(source, methods=("size",)) and len(source.args) == 1
