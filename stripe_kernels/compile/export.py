"""Ways out: a plain torch model, and an ONNX file of standard operators.

torch.compile(fullgraph=True) and torch.export take frozen and optimized networks: the graph then holds the
operator stripe_kernels::fprop. For dynamic shapes export a Network's `body`, whose forward names its inputs.
The operator is registered from Python, so an AOTInductor package, which runs without Python, cannot call it;
export `to_dense(network)` instead: dense convolutions, but already compacted and fused.
"""

from __future__ import annotations

import logging
import operator
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from stripe_kernels.compile.graph import module_of
from stripe_kernels.compile.layers import FusedConv2d
from stripe_kernels.compile.network import Network, as_inputs
from stripe_kernels.compile.unwrap import clone, move_hooks, replace_modules
from stripe_kernels.epilogue import ACTIVATIONS
from stripe_kernels.modules import StripeConv2d


def to_dense(model: nn.Module) -> nn.Module:
    """A new model of torch's own layers, zeros for dead stripes; the input is not touched.

    A frozen model gives back nn.Conv2d in every place. An optimized network stays compacted: its channels,
    folded norms and constants are as they are, only its convolutions, sums and activations are torch's again.
    """
    copied = clone(model)
    with torch.inference_mode(False), torch.no_grad():
        for module in list(copied.modules()):
            if isinstance(module, fx.GraphModule):
                _split_fused(module)
        replaced: dict[nn.Module, nn.Module] = {}
        for module in copied.modules():
            if isinstance(module, Network):
                replaced[module] = module.body
            elif isinstance(module, StripeConv2d):
                replaced[module] = _dense(module)
        return replace_modules(copied, replaced)


def export_onnx(
    model: nn.Module, example_input: Tensor | tuple[Tensor, ...], path: str | os.PathLike[str]
) -> None:
    """Writes `model`, in evaluation mode, as ONNX with standard operators only; any batch size.

    The network is `to_dense(model)`: optimize first, and the file is compacted. Its weights are dense: what
    `save` writes is smaller and runs faster, this file runs anywhere. ImportError names the packages it
    needs.
    """
    inputs = as_inputs(example_input)
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"export_onnx needs the packages onnx and onnxscript: {error}") from error
    batch = torch.export.Dim("batch")
    with torch.no_grad(), _quiet():
        torch.onnx.export(
            to_dense(model).eval(), inputs, Path(path), dynamo=True, external_data=False, verbose=False,
            dynamic_shapes=tuple({0: batch} for _ in inputs),
        )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that it could also export from, and on torch's own future."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(before)


def _dense(layer: StripeConv2d) -> nn.Conv2d:
    conv = layer.to_conv2d()
    if layer.bias is not None:
        conv.bias = layer.bias
    move_hooks(layer, conv)
    return conv


def _split_fused(network: fx.GraphModule) -> None:
    """Residual additions and activations become nodes again, after plain convolutions."""
    graph = network.graph
    for node in list(graph.nodes):
        layer: Any = module_of(node)
        if not isinstance(layer, FusedConv2d):
            continue
        network.add_submodule(str(node.target), _dense(layer))
        x, *residual = node.args
        with graph.inserting_before(node):
            new = graph.call_module(str(node.target), (x,))
            if residual and residual[0] is not None:
                new = graph.call_function(operator.add, (new, residual[0]))
            if layer.activation != "none":
                new = graph.call_function(ACTIVATIONS[layer.activation], (new,))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    graph.lint()
    network.recompile()
