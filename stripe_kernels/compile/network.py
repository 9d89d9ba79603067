"""Network: a graph that runs as one flat list of calls."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from stripe_kernels import ops
from stripe_kernels.checks import check
from stripe_kernels.compile.layers import FusedConv2d
from stripe_kernels.compile.resident import Untranslatable, resident
from stripe_kernels.modules import StripeConv2d
from stripe_kernels.snapshots import packed_weight

_PROGRAMS_KEPT = 16  # input signatures a network remembers

Program = Callable[..., Any]


class Network(nn.Module):
    """An inference-only network; `body` is its torch.fx graph of torch's layers and FusedConv2d.

    The first call with a new input signature (sizes, strides, dtypes, threads) plans every layer for it and
    writes a flat program: kernels with their packed weights, bound methods of torch's layers, nothing else.
    Measured on ResNet-20 at batch 1, this takes a third of what the same layers cost as modules. Where torch
    has to see the operators (compilation, export, modes, subclasses, gradients of the input) `body` runs as
    it is.

    Calls may come from several threads. Weights are not meant to change; after writing to one, call
    `forget()`.
    """

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body = body.eval().requires_grad_(False)
        self.report: list[str] = []
        self.resident_from: int | None = 16  # the batch from which activations stay in lanes; None: never
        self._reset()
        self.training = False

    def _reset(self) -> None:
        self._programs: dict[Any, Program] = {}
        self._lock = threading.Lock()

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the network it was made from returns, in evaluation mode."""
        if named or not _runs_itself(inputs):
            return self.body(*inputs, **named)
        key = (torch.get_num_threads(), *((x.shape, x.stride(), x.dtype, x.device) for x in inputs))
        program = self._programs.get(key)
        if program is None:
            program = self._bind(key, inputs)
        with torch.no_grad():
            return program(*inputs)

    def _bind(self, key: Any, inputs: tuple[Tensor, ...]) -> Program:
        with self._lock:
            program = self._programs.get(key)
            if program is None:
                with torch.inference_mode():
                    program = self._resident(inputs) or _Writer(self.body).write(inputs)
                if len(self._programs) >= _PROGRAMS_KEPT:
                    self._programs.pop(next(iter(self._programs)))
                self._programs[key] = program
            return program

    def _resident(self, inputs: tuple[Tensor, ...]) -> Program | None:
        """The native program for batches that fill the lanes, where the graph has one; see resident.py."""
        if (
            self.resident_from is None
            or not inputs
            or inputs[0].dim() != 4
            or inputs[0].shape[0] < self.resident_from
        ):
            return None
        try:
            return resident(self.body, inputs, torch.get_num_threads())
        except (Untranslatable, ImportError) as reason:
            note = f"layer by layer at every batch size: {reason}"
            if note not in self.report:
                self.report.append(note)
            return None

    def forget(self) -> None:
        """Drops programs and packed weights: the next call plans and packs anew."""
        self._programs.clear()
        for module in self.modules():
            if isinstance(module, StripeConv2d):
                module.repack()
                module._op.forget()

    def memory(self, *inputs: Tensor) -> dict[str, int]:
        """Bytes a call on `inputs` needs: "weights" as stored, "activations" at their peak, inputs included.

        Kernels' scratch memory and packed copies of weights come on top.
        """
        watch = _Peak(self.body)
        with torch.inference_mode():
            watch.run(*inputs)
        tensors = [*self.parameters(), *self.buffers()]
        return {"weights": sum(t.numel() * t.element_size() for t in tensors), "activations": watch.peak}

    def train(self, mode: bool = True) -> Network:
        if mode:
            raise RuntimeError("an optimized network only runs: train the model it was made from")
        self.forget()
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> Network:
        self.forget()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_programs", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()


def _runs_itself(inputs: tuple[Any, ...]) -> bool:
    """Whether only the kernels are needed: plain tensors; no gradient, autocast, mode or compiler."""
    if not (ops._nobody_listens() and ops._plain(*inputs)):
        return False
    grad = torch.is_grad_enabled()
    return not any((grad and x.requires_grad) or torch.is_autocast_enabled(x.device.type) for x in inputs)


class _Peak(fx.Interpreter):
    """Runs a graph and notes the most bytes of activations alive at once; it frees them as programs do."""

    peak = 0

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        alive = [v for m, v in [*self.env.items(), (n, value)] if m.op != "get_attr"]
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in _tensors(alive))}
        self.peak = max(self.peak, sum(storages.values()))
        return value


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


class _Writer(fx.Interpreter):
    """Runs a graph once and writes what it did as one Python function of flat calls.

    Only names made here enter the source; everything called is bound through the function's globals.
    """

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__(body)
        self.bound: dict[str, Any] = {}
        self.lines: list[str] = []
        self.names: dict[fx.Node, str] = {}
        self.last_use: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(body.graph.nodes):
            for source in node.all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    self.last_use.setdefault(node, []).append(source)

    def write(self, inputs: tuple[Tensor, ...]) -> Program:
        self.run(*inputs)
        parameters = ", ".join(name for n, name in self.names.items() if n.op == "placeholder")
        source = "\n    ".join([f"def program({parameters}):", *self.lines])
        exec(compile(source, "<network>", "exec"), self.bound)
        program: Program = self.bound["program"]
        return program

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.names[n] = name = f"v{len(self.names)}"
        if n.op == "output":
            self.lines.append(f"return {self._argument(n.args[0])}")
            return value
        if n.op == "placeholder":
            return value
        if n.op == "get_attr":
            self.bound[name] = value
        else:
            self.lines.append(f"{name} = {self._call(n)}")
        dead = [self.names[s] for s in self.last_use.get(n, ()) if s.op not in ("get_attr", "output")]
        if not n.users:
            dead.append(name)
        if dead:  # frees activations as soon as Python's own frame would
            self.lines.append(" = ".join(dead) + " = None")
        return value

    def _call(self, n: fx.Node) -> str:
        if n.op == "call_method":
            receiver, *rest = n.args
            return f"{self._argument(receiver)}.{n.target}({self._arguments(rest, n.kwargs)})"
        if n.op == "call_function":
            return f"{self._bind('f', n.target)}({self._arguments(n.args, n.kwargs)})"
        layer = self.module.get_submodule(str(n.target))
        if isinstance(layer, StripeConv2d) and not layer._forward_hooks and not layer._forward_pre_hooks:
            return self._stripe_call(n, layer)
        hooked = layer._forward_hooks or layer._forward_pre_hooks
        function = layer if hooked else layer.forward
        return f"{self._bind('m', function)}({self._arguments(n.args, n.kwargs)})"

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
        residual = n.args[1] if len(n.args) > 1 else None
        values = {"bias": layer.bias, "residual": None if residual is None else self.env[residual]}  # type: ignore[index]
        check(x, layer.weight, layer._op, values)
        runner = layer._op.runner("fprop", tuple(x.shape), x)
        packed = self._bind("w", packed_weight(runner, layer.weight))
        bias = self._bind("b", layer.bias)
        activation = layer.activation if isinstance(layer, FusedConv2d) else "none"
        epilogue = f"{bias}, None, {self._argument(residual)}, {activation!r}"
        return f"{self._bind('k', runner)}({source}, {packed}, {epilogue})"

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
