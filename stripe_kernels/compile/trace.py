"""A model as a torch.fx graph whose leaves are torch's own modules and ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from stripe_kernels.compile import vocabulary
from stripe_kernels.compile.graph import drop_assertions, norms_as_modules
from stripe_kernels.compile.network import Network
from stripe_kernels.compile.unwrap import clone


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in vocabulary.MODULE_NAMES


def _left_out(forward: Callable[..., Any], given: int | None) -> dict[str, Any]:
    """Parameters that a call leaves out, with their defaults: those beyond the first `given`. Where that is not known,
    those of None and bool, which `is None` and `if` cannot ask a symbolic value."""
    parameters = list(inspect.signature(forward).parameters.values())[given or 1 :]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    plain = (bool, int, float, str) if given else bool
    return {name: value for name, value in defaults.items() if value is None or isinstance(value, plain)}


def trace(model: nn.Module, given: int | None = None) -> fx.GraphModule:
    """The graph of a copy of `model`, in evaluation mode; the input is not touched.

    given: how many inputs it will be called with; the others have their defaults for good.
    given: how many inputs it will be called with; the others keep their defaults for good.

    Raises ValueError with torch.fx's reason for a model whose Python control flow depends on its input.
    """
    copied = clone(model).eval()
    if isinstance(copied, Network):
        return copied.body
    if isinstance(copied, fx.GraphModule):
        return copied
    with torch.inference_mode(False):
        tracer = _Tracer(param_shapes_constant=True)
        left_out = _left_out(copied.forward, given)
        try:
            graph = tracer.trace(copied, concrete_args=left_out)
        except (fx.proxy.TraceError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"torch.fx cannot follow {type(copied).__name__}: {error}. Control flow that depends on the "
                "input has no fixed graph"
            ) from error
        for node in graph.nodes:
            node.type = None  # annotations that are still text would keep the graph from being pickled
        network = fx.GraphModule(tracer.root, graph, type(model).__name__)
        norms_as_modules(network)
        drop_assertions(network)
        for node in network.graph.find_nodes(op="placeholder"):
            if node.target.rpartition("_")[0] in left_out and not node.users:
                network.graph.erase_node(node)
        network.recompile()
        return network
