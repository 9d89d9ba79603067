"""optimize: a whole network made compact, fused and tuned, and kept only if it is exact and not slower."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from stripe_kernels.compile.channels import PER_CHANNEL
from stripe_kernels.compile.effects import without_side_effects
from stripe_kernels.compile.exact import check_exact
from stripe_kernels.compile.freeze import UnchangedWarning
from stripe_kernels.compile.fuse import fold_norms, fuse_epilogues
from stripe_kernels.compile.graph import (
    drop_identities,
    module_of,
    own_modules,
    plain_reshapes,
    record_sizes,
    size_of,
)
from stripe_kernels.compile.layers import Filter, FusedConv2d
from stripe_kernels.compile.network import Network, as_inputs, report_of
from stripe_kernels.compile.race import CLEARLY, Ratio, race
from stripe_kernels.compile.shrink import shrink
from stripe_kernels.compile.trace import trace
from stripe_kernels.compile.tune import sample, tune
from stripe_kernels.compile.unwrap import clone
from stripe_kernels.modules import StripeConv2d

_RACE_SECONDS = 1.0
_SHORT = 5e-3  # seconds of a call for which one thread is tried in place of a team


def optimize(
    model: nn.Module,
    example_input: Tensor | tuple[Any, ...],
    *,
    folder: str | Path | None = None,
    cuda_graphs: bool = False,
) -> nn.Module:
    """A new, inference-only network that computes what `model` does in evaluation mode, in less time.

    Batch norms, residual additions and activations are folded into the convolutions before them; channels
    that carry nothing, or a constant, are dropped and the constants carried on exactly, borders included;
    every layer's kernel is chosen by measurement on `example_input`, dense included; the network runs as one
    flat list of calls. It takes other batch sizes and several threads at once.

    Its outputs are compared with the input model's, on `example_input` and on noise, both against the model in
    float64, its own casts included: largest and root mean square error at most twice the model's own, plus two units
    in the last place of the largest output. Integers and bools are those of the model or of float64, but for one in
    50,000: an argmax of two values that rounding alone tells apart falls either way. All else is equal. Its time is
    compared with the input model's in a race of interleaved runs, and must win it: the 95 % interval of the
    ratio lies below 1. Where either fails, or torch.fx cannot follow the model, the result is a copy of
    `model` with its stripe kernels tuned, and a warning says why. `.report` lists what was done; a model kept that has
    something else by this name keeps that too.
    folder and cuda_graphs: as in `tune`.

    >>> import torch
    >>> from torch import nn
    >>> from stripe_kernels import freeze, optimize
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> frozen = freeze(model, {"0": torch.rand(8, 3, 3) < 0.4})
    >>> fast = optimize(frozen, torch.randn(1, 3, 16, 16))  # doctest: +SKIP
    """
    example = tree_map(Tensor.clone, as_inputs(example_input, nested=True))  # a model may write to its inputs
    original = clone(model).eval().requires_grad_(False)
    if isinstance(original, Network):
        tune(original, example, folder=folder, cuda_graphs=cuda_graphs)
        return original
    if not all(isinstance(x, Tensor) for x in example):
        kinds = ", ".join(type(x).__name__ for x in example)
        return _keep(original, example, folder, f"it takes ({kinds}), and a rewritten network tensors alone")
    if not any(x.numel() for x in example):
        return _keep(
            original, example, folder, f"the example {list(example[0].shape)} holds no values to compare"
        )
    try:
        network = _fastest(original, example, folder, cuda_graphs)
        if torch.get_num_threads() > 1 and _is_short(network, example):
            network = _choose_threads(network, original, example, folder)
        check_exact(original, network, example)
    except ValueError as error:
        return _keep(original, example, folder, str(error))
    ratio = _race(network, original, example)
    if not ratio.faster:
        return _keep(
            original, example, folder, f"the rewritten network took {ratio} of its time, no clear gain"
        )
    network.report.append(f"{ratio.speed_up} as fast as the model it was made from")
    return network


def _fastest(
    model: nn.Module, example: tuple[Tensor, ...], folder: str | Path | None, cuda_graphs: bool
) -> Network:
    """The rewritten network with the kernels, program and layout that are fastest at torch's number of threads."""
    network = compact(model, example)
    tune(network, example, folder=folder, cuda_graphs=cuda_graphs)
    _choose_program(network, example)
    return _choose_layout(network, example, folder)


def compact(model: nn.Module, example: tuple[Tensor, ...]) -> Network:
    """The rewritten network, not yet tuned or compared: norms folded, channels dropped, epilogues fused.

    Raises ValueError where the model has no fixed graph.
    """
    body = trace(model, len(example))
    with torch.inference_mode(False), torch.no_grad():
        drop_identities(body)
        record_sizes(body, tuple(x.clone() for x in example))
        without_side_effects(body)
        plain_reshapes(body)
        filters = (nn.Conv2d, StripeConv2d, nn.Linear)
        own_modules(body, filters, Filter, finished=(FusedConv2d,))  # type: ignore[arg-type]
        own_modules(body, PER_CHANNEL, copy.deepcopy)
        folded = fold_norms(body)
        lost = shrink(body)
        fused = fuse_epilogues(body)
        finish(body)
    network = Network(body)
    network.inputs = [(tuple(x.shape), x.dtype) for x in example]
    network.report += [f"{name}: folded into the filter before it" for name in folded]
    network.report += [f"{name}: {kept} of {count} channels kept" for name, (count, kept) in lost.items()]
    network.report += [f"{name}: takes {', '.join(what)} into its epilogue" for name, what in fused.items()]
    return network


def finish(body: fx.GraphModule) -> None:
    """Every Filter becomes the layer that runs; calls of one module share a weight that stayed the same."""
    weights: dict[nn.Module, list[nn.Parameter]] = {}
    for node in body.graph.nodes:
        layer = module_of(node)
        if isinstance(layer, Filter):
            finished: Any = layer.finish()
            shared = weights.setdefault(layer.origin, [])
            equal = [w for w in shared if torch.equal(w, finished.weight)]
            if equal:
                finished.weight = equal[0]
            shared.append(finished.weight)
            body.add_submodule(str(node.target), finished)
    body.graph.eliminate_dead_code()
    body.delete_all_unused_submodules()
    body.graph.lint()
    body.recompile()


def _choose_program(network: Network, example: tuple[Tensor, ...]) -> None:
    """Activations that stay in lanes, in blocks of one or two vectors of images, against one call a layer."""
    if network.resident_from is None or example[0].dim() != 4 or len(example[0]) < network.resident_from:
        return
    wide = Network(network.body)
    wide.lane_vectors = 2  # weights are read half as often, activations fill more of the caches
    if _race(wide, network, example).faster:
        network.lane_vectors = 2
        network.forget()
    by_layer = Network(network.body)
    by_layer.resident_from = None
    if _race(network, by_layer, example).median < 1.0:
        network.report.append("activations stay in lanes between layers")
        network.resident_from = len(example[0])
    else:
        network.report.append("layer by layer: activations that stay in lanes were not faster")
        network.resident_from = None
        network.forget()


def _choose_layout(network: Network, example: tuple[Tensor, ...], folder: str | Path | None) -> Network:
    """The network with its maps in channels_last, where that is clearly faster than contiguous ones."""
    if not all(x.dim() == 4 and x.is_contiguous() for x in example):
        return network
    other = in_channels_last(network)
    try:
        tune(other, example, folder=folder)
    except RuntimeError:  # a view that contiguous maps alone have
        return network
    if _race(other, network, example).median > CLEARLY:
        return network
    other.report.append("maps are channels_last inside")
    return other


def _is_short(network: Network, example: tuple[Tensor, ...]) -> bool:
    """Whether a call takes so little time that a team may not be worth its meetings."""
    if not all(x.device.type == "cpu" for x in example):
        return False
    with torch.inference_mode():
        return min(sample(lambda: network(*example), 1, None) for _ in range(3)) < _SHORT


def _choose_threads(
    network: Network, model: nn.Module, example: tuple[Tensor, ...], folder: str | Path | None
) -> Network:
    """The network, or one made for a single thread where that is clearly faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = _fastest(model, example, folder, cuda_graphs=False)
    except ValueError:  # what stands is worth keeping
        return network
    finally:
        torch.set_num_threads(threads)
    alone.unbind()
    alone.alone_up_to = {threads: example[0].numel()}
    if _race(alone, network, example).median > CLEARLY:
        return network
    alone.report.append(f"on one thread: a team of {threads} was not faster")
    return alone


def in_channels_last(network: Network) -> Network:
    """A copy whose maps are channels_last inside and contiguous where they go out."""
    body = copy.deepcopy(network.body)

    def contiguous(result: fx.Node) -> fx.Node:
        return result if size_of(result) is None else body.graph.call_method("contiguous", (result,))

    for node in list(body.graph.nodes):
        if node.op == "placeholder":
            with body.graph.inserting_after(node):
                new = body.graph.call_method("contiguous", (node,))
            node.replace_all_uses_with(new)
            new.args, new.kwargs = (node,), {"memory_format": torch.channels_last}
        elif node.op == "output" or isinstance(node.target, type):  # or a class of what goes out
            with body.graph.inserting_before(node):
                node.args = fx.node.map_arg(node.args, contiguous)
                node.kwargs = fx.node.map_arg(node.kwargs, contiguous)
    body.recompile()
    other = Network(body)
    other.report, other.resident_from, other.inputs = list(network.report), None, network.inputs
    return other


def _keep(original: nn.Module, example: tuple[Any, ...], folder: str | Path | None, reason: str) -> nn.Module:
    """The model as it was given, its stripe layers tuned."""
    warnings.warn(f"optimize kept the network as it was: {reason}", UnchangedWarning, stacklevel=3)
    tune(original, example, folder=folder)
    if report_of(original) is not None:
        original.report = [f"kept as it was: {reason}"]  # type: ignore[assignment]
    return original


def _race(one: nn.Module, other: nn.Module, example: tuple[Tensor, ...]) -> Ratio:
    """Time of `one` over time of `other`."""
    with torch.inference_mode():
        return race(lambda: one(*example), lambda: other(*example), _RACE_SECONDS, example[0].device)
