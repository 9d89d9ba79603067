"""A model as a torch.fx graph whose leaves are torch's own modules and ours."""

from __future__ import annotations

import inspect
import operator
import os
import random
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from stripe_kernels.compile import vocabulary
from stripe_kernels.compile.effects import writes_in_place
from stripe_kernels.compile.graph import (
    DROPOUTS,
    attribute,
    drop_assertions,
    first_by_position,
    is_number,
    memory_of,
    norms_as_modules,
    parts_of,
)
from stripe_kernels.compile.network import Network
from stripe_kernels.compile.unwrap import clone

_OTHERS = ("<", *(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1])))
_CONTAINERS = nn.Sequential.__module__
_FRAME = re.compile(r'File "(.+?)", line (\d+), in (\S+)\n +(.*)')
WAY_OUT = (
    "freeze alone takes any network, and torch.save its state_dict; for optimize, save and export keep such lines "
    "outside of forward"
)


def _in_place(function: Callable[..., Any]) -> Any:
    def method(self: fx.Proxy, other: Any) -> Any:
        if is_number(self.node):
            return NotImplemented
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


class _Augmented:
    """`y += x` as what it is: Python makes `y = y + x` of it where a class has no word for it, and whoever else has the
    tensor then reads it as it was."""

    __iadd__, __isub__, __imul__ = map(_in_place, (operator.iadd, operator.isub, operator.imul))
    __itruediv__, __ifloordiv__ = map(_in_place, (operator.itruediv, operator.ifloordiv))
    __ipow__, __imod__ = map(_in_place, (operator.ipow, operator.imod))
    __iand__, __ior__, __ixor__ = map(_in_place, (operator.iand, operator.ior, operator.ixor))
    __ilshift__, __irshift__ = map(_in_place, (operator.ilshift, operator.irshift))

    def __getattr__(self, name: str) -> Any:
        return Attribute(self, name)  # type: ignore[arg-type]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            raise TypeError("a graph cannot hold what is assigned to a tensor's data")
        super().__setattr__(name, value)


class Proxy(_Augmented, fx.Proxy):
    """Of a tensor; of what chunk and split return, with their length."""

    def __len__(self) -> int:
        parts = parts_of(self.node)
        return int(super().__len__()) if parts is None else parts


class Attribute(_Augmented, fx.proxy.Attribute):
    """Of a tensor's attribute, as x.mT."""


class ParameterProxy(_Augmented, fx.proxy.ParameterProxy):
    """Of the model's own parameter."""


class _Tracer(fx.Tracer):
    record_stack_traces = True  # which line asked for an operation that a file cannot hold

    def path_of_module(self, mod: nn.Module) -> str:
        """Its name; one that forward makes as it goes, as `nn.Softmax(1)(x)`, gets a name if nothing but what it was
        made with decides what it does."""
        try:
            return super().path_of_module(mod)
        except NameError:
            if next(iter(mod.state_dict()), None) is not None or isinstance(mod, DROPOUTS):
                raise
        name = type(mod).__name__.lower()
        while hasattr(self.root, name):
            name += "_"
        self.root.add_module(name, mod)
        self.submodule_paths[mod] = name  # type: ignore[index]
        return name

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        found = super().getattr(attr, attr_val, parameter_proxy_cache)
        if type(found) is fx.proxy.ParameterProxy:
            return ParameterProxy(self, found.node, found.name, found.param)
        return found

    def iter(self, obj: Any) -> Iterator[Any]:
        parts = parts_of(obj.node)
        return super().iter(obj) if parts is None else (obj[i] for i in range(parts))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Those of torch that no file holds, attention for one, run as they are: their code is not for tracers.
        home = type(m).__module__
        return type(m) in vocabulary.MODULE_NAMES or (home.startswith("torch.nn.") and home != _CONTAINERS)


def _left_out(forward: Callable[..., Any], given: int | None) -> dict[str, Any]:
    """Parameters that a call leaves out, with their defaults: those beyond the first `given`. Where that is not known,
    those of None and bool, which `is None` and `if` cannot ask a symbolic value."""
    parameters = list(inspect.signature(forward).parameters.values())[given or 1 :]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    plain = (bool, int, float, str) if given else bool
    return {name: value for name, value in defaults.items() if value is None or isinstance(value, plain)}


def trace(model: nn.Module, given: int | None = None) -> fx.GraphModule:
    """The graph of a copy of `model`, in evaluation mode; the input is not touched.

    given: how many inputs it will be called with; the others keep their defaults for good.

    Raises ValueError with torch.fx's reason and the line of the model's code, where its Python control flow depends on
    its input, and where a call draws random numbers or reads what it changes in the model: that would be the same in
    every call of the graph.
    """
    copied = clone(model).eval()
    if isinstance(copied, Network):
        return copied.body
    if isinstance(copied, fx.GraphModule):
        return copied
    if type(copied) in vocabulary.MODULE_NAMES:
        copied = nn.Sequential(copied).eval()  # what is not to be looked into needs somebody who calls it
    with torch.inference_mode(False):
        tracer = _Tracer(param_shapes_constant=True)
        left_out = _left_out(copied.forward, given)
        dice, before = _dice(), _state(copied)
        try:
            graph = tracer.trace(copied, concrete_args=left_out)
        except (
            fx.proxy.TraceError,
            TypeError,
            AttributeError,
            RuntimeError,
            LookupError,
            NameError,
        ) as error:
            reason = str(error).partition(". ")[0].rstrip(".")
            raise ValueError(
                f"torch.fx cannot follow {type(copied).__name__}{_line_of(error.__traceback__)}: {reason}. What "
                f"depends on the values or sizes of the input has no fixed graph: {WAY_OUT}"
            ) from error
        for node in graph.nodes:
            node.type = None  # annotations that are still text would keep the graph from being pickled
        if dice != _dice():
            raise ValueError(f"{type(copied).__name__} draws random numbers in every call: {WAY_OUT}")
        network = fx.GraphModule(tracer.root, graph, type(model).__name__)
        _refuse_memory(network, before)
        first_by_position(network)
        norms_as_modules(network)
        drop_assertions(network)
        for node in network.graph.find_nodes(op="placeholder"):
            if node.target.rpartition("_")[0] in left_out and not node.users:
                network.graph.erase_node(node)
        network.recompile()
        return network


def _dice() -> tuple[Any, ...]:
    """The states of all generators of random numbers that a model may draw from."""
    _, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), np.asarray(keys).tolist(), rest


class _State(NamedTuple):
    """What a model has before it is called: numbers, by module and name; of tensors, the version and a copy."""

    numbers: dict[tuple[nn.Module, str], float]
    tensors: dict[Tensor, tuple[int, Tensor]]


def _state(model: nn.Module) -> _State:
    own = [(m, name, v) for m in model.modules() for name, v in (vars(m) | m._buffers).items()]
    numbers = {(m, name): v for m, name, v in own if isinstance(v, (int, float))}
    tensors = [*model.parameters(), *(v for _, _, v in own if isinstance(v, Tensor))]
    # A parameter's changes are in the graph; another tensor's happen as it is traced, by way of its `data` unversioned.
    copies = {t: (t._version, t if isinstance(t, nn.Parameter) else t.detach().clone()) for t in tensors}
    return _State(numbers, copies)


def _refuse_memory(network: fx.GraphModule, before: _State) -> None:
    """Raises ValueError where a call reads what it, or one before it, changed in the model."""
    name = type(network).__name__
    for (module, key), value in before.numbers.items():
        now = vars(module).get(key)
        if isinstance(now, (int, float)) and now != value and value == value:
            raise ValueError(f"{name} changes its {key} in every call: {WAY_OUT}")
    roots = network.graph.find_nodes(op="get_attr")
    memory = {n: memory_of(attribute(network, n.target)) for n in roots}
    for node in roots:
        tensor = attribute(network, str(node.target))
        if not isinstance(tensor, Tensor):
            continue
        version, copied = before.tensors.get(tensor, (None, None))
        changed = copied is not None and (
            version != tensor._version or copied.shape != tensor.shape or not torch.equal(copied, tensor)
        )
        names = [n for n in roots if memory[n] & memory[node]]
        written = {u for n in names for u in n.users if writes_in_place(u) and u.args[0] is n}
        read = any(u.users or u not in written for n in names for u in n.users)
        # A file keeps what is written to one tensor of the model's own from call to call, as the model does.
        kept = copied is not None and {n.target for n in names} == {node.target}
        if read and (changed or (written and not kept)):
            raise ValueError(f"{name} changes its {node.target} in every call{line_of(node)}: {WAY_OUT}")


def _line_of(raised: TracebackType | None) -> str:
    frames = traceback.extract_tb(raised)
    return _said((f.filename, f.lineno, f.name, f.line) for f in frames)


def line_of(node: fx.Node) -> str:
    """Where the model's code asked for a node, as in " at net.py:12, in forward: `code`"; nothing where unknown."""
    return _said(_FRAME.findall(node.stack_trace or ""))


def _said(frames: Iterable[tuple[object, ...]]) -> str:
    """The innermost line (file, number, function, code) that is neither torch's nor ours."""
    own = [frame for frame in frames if not str(frame[0]).startswith(_OTHERS)]
    return " at {}:{}, in {}: `{}`".format(*own[-1]) if own else ""
