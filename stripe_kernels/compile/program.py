"""A graph as one flat Python function, in which layers that follow each other are one native call.

From Python to a kernel takes microseconds, of a small network at batch 1 a good part of its time (`python -m
bench.overhead` measures both). So runs of stripe layers and max pools become a list that native code walks, their
activations in one arena; whatever else a graph has is called between the lists as torch's modules and functions are,
max pools of GPUs by a kernel of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from stripe_kernels import backends, eager, registry
from stripe_kernels.checks import check
from stripe_kernels.compile.graph import OneLineInterpreter, averages_pixels, calls, is_hooked
from stripe_kernels.compile.layers import FusedConv2d
from stripe_kernels.geometry import IntPair, pair
from stripe_kernels.kept import Kept, kept_here
from stripe_kernels.modules import StripeConv2d
from stripe_kernels.snapshots import kept_bias, packed_weight

_LINEAR_IMAGES = 4  # up to which a linear layer's time is that of reading its weight


class Program(Protocol):
    """A network for one signature of inputs."""

    activations: int  # bytes, as Network.memory says
    packed: int | None  # bytes of the kernels' own copies of weights; None: as many as the weights have
    kept: tuple[Kept, ...]  # those copies on GPUs, to be met by the stream of every call
    # Another way to call it, where there is one: it sees by itself whether more than the kernels is needed, and returns
    # NotImplemented then.
    front: Callable[..., Any] | None

    def __call__(self, *inputs: Tensor) -> Any: ...


def write_program(
    body: fx.GraphModule, inputs: tuple[Tensor, ...], conditions: Any = None, threads: int | None = None
) -> Program:
    """The function of `inputs`' signature: sizes, strides, dtypes and torch's number of threads. Runs `body` once.

    conditions: of its front (backends/cpu_calls.py); None: it has none. threads: of its kernels, where it is not
    torch's number.
    """
    return _Writer(body, conditions, threads).write(inputs)


@dataclass
class _Call:
    """A node that a native list can take: what it reads and gives, as laid out when it was written."""

    node: fx.Node
    reads: dict[fx.Node, Tensor]
    gives: Tensor
    pitch: int | None  # of planes that it reads in place; 0: no matter; None: it wants them dense
    add: Callable[[Any, dict[fx.Node, int], int], None]  # (list, numbers of what it reads, of what it gives)


@dataclass(frozen=True)
class _Storage:
    address: int
    owner: str  # the node that made it; addresses are used again
    size: int


def _pitch(call: _Call, calls: list[_Call]) -> int:
    """Of the planes in which a call should leave its result for the others; 0: dense."""
    y = call.gives
    if y.dtype != torch.float32 or (y.shape[1] > 1 and y.stride(1) == 1) or 0 in y.shape:
        return 0
    wanted = [c.pitch for c in calls if c.node.args[0] is call.node]  # as a residual, any layout will do
    return 0 if None in wanted else max((p for p in wanted if p), default=0)


def _window(layer: nn.MaxPool2d) -> tuple[IntPair, ...]:
    """Kernel, stride, padding and dilation."""
    stride = layer.kernel_size if layer.stride is None else layer.stride
    return (
        pair(layer.kernel_size, "kernel_size", 1),
        pair(stride, "stride", 1),
        pair(layer.padding, "padding", 0),
        pair(layer.dilation, "dilation", 1),
    )


def _dense(t: Tensor, *shape: int) -> bool:
    """Whether native code may read it as float32 [shape] where it lies."""
    plain = eager.plain(t) and t.is_cpu and t.layout == torch.strided and t.dtype == torch.float32
    return plain and t.shape == shape and t.is_contiguous()


class _Writer(OneLineInterpreter):
    """Runs a graph once and writes what it did as one Python function of flat calls.

    Only names made here enter the source; everything called is bound through the function's globals.
    """

    def __init__(self, body: fx.GraphModule, conditions: Any = None, threads: int | None = None) -> None:
        super().__init__(body)
        self.conditions = conditions
        self.threads = threads or torch.get_num_threads()
        self.bound: dict[str, Any] = {}
        self.lines: list[str] = []
        self.names: dict[fx.Node, str] = {}
        self.pending: list[_Call] = []
        self.packed: dict[int, Tensor] = {}  # by id: the kernels' own copies of weights
        self.front: Callable[..., Any] | None = None  # where one list is the whole network
        self.peak = 0  # bytes of activations at once, inputs not counted
        self.held: dict[fx.Node, set[_Storage]] = {}
        self.last_use: dict[fx.Node, list[fx.Node]] = {}
        try:
            self.list_type: Any = type(backends.call_list(1))
        except ImportError:
            self.list_type = None
        seen: set[fx.Node] = set()
        self.nodes = list(body.graph.nodes)
        for node in reversed(self.nodes):
            for source in node.all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    self.last_use.setdefault(node, []).append(source)

    def write(self, inputs: tuple[Tensor, ...]) -> Program:
        self.run(*inputs)
        parameters = ", ".join(name for n, name in self.names.items() if n.op == "placeholder")
        source = "\n    ".join([f"def program({parameters}):", *self.lines])
        exec(compile(source, "<network>", "exec"), self.bound)
        facts: Any = self.bound["program"]
        # oneDNN's own have no address, but a size.
        facts.packed = sum(t.numel() * t.element_size() for t in self.packed.values())
        facts.activations, facts.kept = self.peak, kept_here(self.packed.values())
        facts.front = self.front
        program: Program = facts
        return program

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        call = self._native(n, value)
        if call is None and n.op not in ("placeholder", "get_attr"):
            self._flush()
        self._hold(n, value)
        if call is not None:
            self.pending.append(call)
            return value
        if n.op == "placeholder":
            self._name(n)
            return value
        if n.op == "get_attr":
            self.bound[self._name(n)] = value
            return value
        if n.op == "output":
            self.lines.append(f"return {self._argument(n.args[0])}")
            return value
        line = self._call(n, value)
        self.lines.append(f"{self._name(n)} = {line}")
        self._measure(set(self.held))
        self._free([n])
        return value

    def _name(self, n: fx.Node) -> str:
        self.names[n] = name = f"v{len(self.names)}"
        return name

    def _free(self, nodes: list[fx.Node]) -> None:
        """Drops what nobody reads after `nodes`, as soon as Python's own frame would."""
        dead = [s for n in nodes for s in self.last_use.get(n, ()) if s.op != "get_attr"]
        dead += [n for n in nodes if not n.users]
        for n in dead:
            self.held.pop(n, None)
        names = [self.names[n] for n in dead if n in self.names]
        if names:
            self.lines.append(" = ".join(names) + " = None")

    def _hold(self, n: fx.Node, value: Any) -> None:
        """Notes the memory a node's value keeps; a view keeps that of what it was made from."""
        known = {s.address: s for read in n.all_input_nodes for s in self.held.get(read, ())}
        owner = "caller" if n.op in ("placeholder", "get_attr") else n.name
        storages = [t.untyped_storage() for t in tree_leaves(value) if isinstance(t, Tensor)]
        self.held[n] = {
            known.get(s.data_ptr(), _Storage(s.data_ptr(), owner, s.nbytes())) for s in storages if s.nbytes()
        }

    def _measure(self, alive: set[fx.Node], arena: int = 0) -> None:
        storages = {s for n in alive for s in self.held[n] if s.owner != "caller"}
        self.peak = max(self.peak, arena + sum(s.size for s in storages))

    # -- native lists --

    def _native(self, n: fx.Node, value: Any) -> _Call | None:
        """The node as a call for a native list, if it is one."""
        if self.list_type is None or not isinstance(value, Tensor) or value.device.type != "cpu":
            return None
        if n.args and any(c.node is n.args[0] for c in self.pending):
            head = self._head(n, value)
            if head is not None:
                return head
        if n.op != "call_module" or n.kwargs:
            return None
        layer = self.module.get_submodule(str(n.target))
        if is_hooked(layer) or value.dim() != 4:
            return None
        reads = {a: self.env[a] for a in n.args if isinstance(a, fx.Node)}
        if not reads or not all(isinstance(t, Tensor) and t.dim() == 4 for t in reads.values()):
            return None
        source: Any = n.args[0]
        if type(layer) is nn.MaxPool2d and value.dtype == torch.float32:
            x = reads[source]
            pixels = x.shape[1] > 1 and x.stride(1) == 1 and value.stride(1) == 1
            rows = x.stride(3) == 1 and value.stride(3) == 1
            plain = not layer.return_indices and pair(layer.dilation, "dilation", 1) == (1, 1)
            if not plain or not (pixels or rows):
                return None
            kernel, stride, padding, _ = _window(layer)
            window = (*kernel, *stride, *padding)
            sizes = tuple(reads[source].shape), tuple(value.shape)
            return _Call(n, reads, value, 0, lambda c, at, y: c.max_pool(window, *sizes, at[source], y))
        if not isinstance(layer, StripeConv2d) or layer._explicit_pad is not None:
            return None
        runner, packed, bias, activation = self._kernel(layer, reads[source], self._residual(n))
        if not self.list_type.takes(runner):
            return None
        residual: Any = n.args[1] if len(n.args) > 1 else None
        own = None if bias is None else bias.detach().clone()  # a parameter's memory may move

        def add(c: Any, at: dict[fx.Node, int], y: int) -> None:
            other = None if residual is None else at[residual]
            c.fprop(runner, packed, own, activation, at[source], other, y)

        return _Call(n, reads, value, self.list_type.plane_pitch(runner), add)

    def _head(self, n: fx.Node, value: Tensor) -> _Call | None:
        """What stands behind the convolutions of a classifier, if the node before it is in the list."""
        source: Any = n.args[0]
        x = self.env[source]
        module = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None
        if is_hooked(module) or {x.dtype, value.dtype} != {torch.float32} or x.numel() == 0:
            return None
        size = (*x.shape, 1, 1)[:4]
        if type(module) is nn.Linear:
            weight, bias = module.weight, module.bias
            if (
                x.dim() != 2
                or x.stride(1) != 1
                or len(x) > _LINEAR_IMAGES
                or not _dense(weight, len(weight), x.shape[1])
            ):
                return None
            if bias is not None and not _dense(bias, len(weight)):
                return None
            return _Call(
                n, {source: x}, value, 0, lambda c, at, y: c.linear(weight, bias, len(x), at[source], y)
            )
        if x.dim() != 4 or x.stride(3) != 1:
            return None
        if averages_pixels(n):
            return _Call(n, {source: x}, value, 0, lambda c, at, y: c.average(size, at[source], y))
        if calls(n, functions=(torch.flatten,)) and n.args[1:] == (1,) and not n.kwargs:
            return _Call(n, {source: x}, value, 0, lambda c, at, y: c.flatten(size, at[source], y))
        return None

    def _flush(self) -> None:
        """Writes the pending calls as one line."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        inside = {c.node for c in pending}
        given = {n: t for c in pending for n, t in c.reads.items() if n not in inside}
        todo = backends.call_list(self.threads)
        at = {n: todo.given(t) for n, t in given.items()}
        leave = [c for c in pending if any(u not in inside for u in c.node.users)]
        at |= {c.node: todo.returned(c.gives) for c in leave}
        for c in pending:
            if c.node not in at:
                pitch = _pitch(c, pending)
                at[c.node] = todo.planes(c.gives, pitch) if pitch else todo.arena(c.gives)
            c.add(todo, at, at[c.node])
            for read in self.last_use.get(c.node, ()):
                todo.release(at[read])
            if not c.node.users:
                todo.release(at[c.node])
        arguments = ", ".join(self._argument(n) for n in given)
        results = ", ".join(self._name(c.node) for c in leave)
        whole = self.conditions is not None and self._whole(given, leave, inside)
        run = todo.finish(keep=whole)
        self.front = backends.guard(run, (), self.conditions, tuple(given.values()), ()) if whole else None
        line = f"{self._bind('k', run)}({arguments})"
        self.lines.append(f"{results}, = {line}" if results else line)
        self._measure(set(self.held) - (inside - {c.node for c in leave}), todo.arena_bytes)
        self._free([c.node for c in pending])

    def _whole(self, given: Iterable[fx.Node], leave: list[_Call], inside: set[fx.Node]) -> bool:
        """Whether a list goes from the network's inputs, in order, to its one output, with nothing beside it."""
        inputs = [n for n in self.nodes if n.op == "placeholder"]
        output = self.nodes[-1]
        everything = {*inputs, *inside, output} == set(self.nodes)
        return everything and list(given) == inputs and [c.node for c in leave] == [output.args[0]]

    # -- everything else --

    def _call(self, n: fx.Node, value: Any) -> str:
        if n.op == "call_method":
            receiver, *rest = n.args
            return f"{self._argument(receiver)}.{n.target}({self._arguments(rest, n.kwargs)})"
        if n.op == "call_function":
            return f"{self._bind('f', n.target)}({self._arguments(n.args, n.kwargs)})"
        layer = self.module.get_submodule(str(n.target))
        hooked = is_hooked(layer)
        if isinstance(layer, StripeConv2d) and not hooked:
            return self._stripe_call(n, layer)
        function = layer if hooked else self._max_pool(n, layer, value) or layer.forward
        return f"{self._bind('m', function)}({self._arguments(n.args, n.kwargs)})"

    def _max_pool(self, n: fx.Node, layer: nn.Module, value: Any) -> Callable[[Tensor], Tensor] | None:
        """A pool by a backend's kernel, where one takes such maps."""
        make = registry.provided("max_pool")
        if make is None or type(layer) is not nn.MaxPool2d or layer.return_indices or n.kwargs:
            return None
        x: Any = self.env[n.args[0]]  # type: ignore[index]
        window = _window(layer)
        return make(window, x, tuple(value.shape)) if make.takes(window, x) else None

    def _residual(self, n: fx.Node) -> Tensor | None:
        residual: Any = n.args[1] if len(n.args) > 1 else None
        return None if residual is None else self.env[residual]

    def _kernel(
        self, layer: StripeConv2d, x: Tensor, residual: Tensor | None
    ) -> tuple[Any, Any, Tensor | None, str]:
        """A layer's runner for x, its packed weight, bias and activation."""
        check(x, layer.weight, layer._op, {"bias": layer.bias, "residual": residual})
        runner = layer._op.runner("fprop", tuple(x.shape), x, self.threads)
        packed, bias = packed_weight(runner, layer.weight), kept_bias(runner, layer.bias)
        for t in tree_leaves(packed if bias is layer.bias else (packed, bias)):
            if isinstance(t, Tensor):
                self.packed[id(t)] = t
        activation = layer.activation if isinstance(layer, FusedConv2d) else "none"
        return runner, packed, bias, activation

    def _stripe_call(self, n: fx.Node, layer: StripeConv2d) -> str:
        """A kernel's runner with everything but x and the residual bound."""
        x: Tensor = self.env[n.args[0]]  # type: ignore[index]
        source = self._argument(n.args[0])
        if x.dim() != 4:
            return f"{self._bind('m', layer.forward)}({self._arguments(n.args, n.kwargs)})"
        if layer._explicit_pad is not None:
            pad = self._bind("c", (layer._explicit_pad, layer.padding_mode))
            source = f"{self._bind('f', F.pad)}({source}, *{pad})"
            x = F.pad(x, layer._explicit_pad, layer.padding_mode)
        runner, *values, activation = self._kernel(layer, x, self._residual(n))
        packed, bias = (self._bind("w", v) for v in values)
        residual = self._argument(n.args[1] if len(n.args) > 1 else None)
        return f"{self._bind('k', runner)}({source}, {packed}, {bias}, None, {residual}, {activation!r})"

    def _bind(self, prefix: str, value: Any) -> str:
        name = f"{prefix}{len(self.bound)}"
        self.bound[name] = value
        return name

    def _arguments(self, args: Any, kwargs: dict[str, Any]) -> str:
        named = [f"{key}={self._argument(v)}" for key, v in kwargs.items()]
        return ", ".join([*(self._argument(a) for a in args), *named])

    def _argument(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, (tuple, list)):
            inner = ", ".join(self._argument(v) for v in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if value else "()"
        if isinstance(value, slice):
            return f"slice({', '.join(self._argument(v) for v in (value.start, value.stop, value.step))})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {self._argument(v)}" for k, v in value.items()) + "}"
        if value is None or isinstance(value, (bool, int)):
            return repr(value)
        return self._bind("c", value)
