"""Drops the channels that channels.py found to carry nothing, and carries their constants on.

A dropped constant v of input channel j adds  sum_t v * weight[k, j, t]  to every output pixel of filter k.
Without a border of zeros that is one more bias. With one, taps that fall outside the image add nothing, so it
is no bias; then one constant channel i of the tensor stays, with value u, and takes the others' part exactly,
at any image size:

    weight'[k, i, t] = weight[k, i, t] + sum_j (v_j / u) * weight[k, j, t]

A stripe's channels live and die together, so the sum has a place in every stripe that needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from stripe_kernels.compile.channels import PER_CHANNEL, Channels, analyse, droppable
from stripe_kernels.compile.graph import module_of
from stripe_kernels.compile.layers import Filter


def shrink(network: fx.GraphModule) -> dict[str, tuple[int, int]]:
    """Edits the graph's Filters and norms; returns name -> (channels, channels kept) of what lost some.

    The graph must have sizes recorded; they are stale afterwards.
    """
    found, classes = analyse(network)
    drop = droppable(found, classes)
    for node, channels in found.items():
        mine = _class_of(channels, classes)
        if channels.role.kind == "filter":
            _keep_a_carrier(module_of(node), found[channels.role.sources[0]], classes, drop)  # type: ignore[arg-type]
        if drop[mine].all():
            drop[mine[0]] = False  # a tensor keeps at least one channel
    keeps = {node: ~drop[_class_of(channels, classes)] for node, channels in found.items()}
    lost: dict[str, tuple[int, int]] = {}
    for node, keep in keeps.items():
        if node.op == "call_module" and isinstance(module_of(node), (Filter, *PER_CHANNEL)):
            _edit(module_of(node), node, found, keeps)
            if not keep.all():
                lost[str(node.target)] = (len(keep), int(keep.sum()))
    return lost


def _class_of(channels: Channels, classes: Tensor) -> Tensor:
    return classes[channels.base : channels.base + len(channels.constant)]


def _keep_a_carrier(layer: Filter, source: Channels, classes: Tensor, drop: Tensor) -> None:
    """Keeps one constant channel where the constants to be dropped meet a border of zeros."""
    value, mine = source.constant, _class_of(source, classes)
    if not layer.zero_border:
        return
    read = (layer.weight != 0).any(-1).any(-1).any(0)
    nonzero = ~value.isnan() & (value != 0)
    dropped = drop[mine] & nonzero & read
    if dropped.any():
        # The largest divides the others, so that no ratio exceeds one; one that stays anyway serves if it is
        # not smaller.
        score = torch.where(nonzero & (dropped | ~drop[mine]), value.abs(), -1.0)
        drop[mine[score.argmax()]] = False


def _edit(layer: Any, node: fx.Node, found: dict[fx.Node, Channels], keeps: dict[fx.Node, Tensor]) -> None:
    keep = keeps[node]
    if isinstance(layer, PER_CHANNEL):
        for name in ("weight", "bias", "running_mean", "running_var"):
            t = getattr(layer, name, None)
            if t is not None and len(t) == len(keep):  # and not one slope for all
                kept = t.detach()[keep.to(t.device)]
                setattr(layer, name, nn.Parameter(kept) if isinstance(t, nn.Parameter) else kept)
        if isinstance(layer, nn.PReLU):
            layer.num_parameters = len(layer.weight)
        else:
            layer.num_features = int(keep.sum())
        return
    if found[node].role.kind == "filter":
        source = found[node].role.sources[0]
        _carry(layer, found[source].constant, keeps[source])
    if found[node].role.kind != "fixed":
        layer.weight, layer.bias = layer.weight[keep], layer.bias[keep]
        if layer.groups > 1:
            layer.groups = len(layer.weight)


def _carry(layer: Filter, value: Tensor, keep: Tensor) -> None:
    """Moves the dropped input channels' constants into the bias or the carrier, and drops the channels."""
    # Unneeded channels are read by no filter that matters.
    gone = torch.where(keep, 0.0, value.nan_to_num(0.0))
    if not layer.zero_border:
        layer.bias = layer.bias + layer.weight.sum((2, 3)) @ gone
    elif gone.any():
        known = torch.where(keep, value.nan_to_num(0.0), 0.0)
        carrier = int(known.abs().argmax())
        if known[carrier] != 0:
            layer.weight = layer.weight.clone()
            layer.weight[:, carrier] += torch.einsum("kcrs,c->krs", layer.weight, gone / known[carrier])
    layer.weight = layer.weight[:, keep]
