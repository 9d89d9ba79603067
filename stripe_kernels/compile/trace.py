"""A model as a torch.fx graph whose leaves are torch's own modules and ours."""

from __future__ import annotations

import torch
from torch import fx, nn

from stripe_kernels.compile import vocabulary
from stripe_kernels.compile.graph import drop_assertions, norms_as_modules
from stripe_kernels.compile.network import Network
from stripe_kernels.compile.unwrap import clone


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in vocabulary.MODULE_NAMES


def trace(model: nn.Module) -> fx.GraphModule:
    """The graph of a copy of `model`, in evaluation mode; the input is not touched.

    Raises ValueError with torch.fx's reason for a model whose Python control flow depends on its input.
    """
    copied = clone(model).eval()
    if isinstance(copied, Network):
        return copied.body
    if isinstance(copied, fx.GraphModule):
        return copied
    with torch.inference_mode(False):
        tracer = _Tracer(param_shapes_constant=True)
        try:
            graph = tracer.trace(copied)
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
        return network
