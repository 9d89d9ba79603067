"""freeze: every convolution with dead stripes becomes a StripeConv2d."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stripe_kernels.compile.unwrap import clone, move_hooks, plain_names, replace_modules
from stripe_kernels.functional import as_skeleton
from stripe_kernels.modules import DTYPES, StripeConv2d, is_convolution
from stripe_kernels.skeleton import FilterSkeleton

Skeletons = Mapping[str, "Tensor | FilterSkeleton"]


class UnchangedWarning(UserWarning):
    """Of `freeze` and `optimize`: what they return is the model as it was."""


def freeze(model: nn.Module, skeletons: Skeletons | None = None) -> nn.Module:
    """A new model in which every nn.Conv2d with dead stripes is a StripeConv2d; the input is not touched.

    skeletons maps a convolution's name, as ``model.named_modules()`` gives it, to bool [K, R, S];
    convolutions not named stay as they are. None: a stripe is dead where its weights are all zero after masks
    of torch.nn.utils.prune, parametrizations and FilterSkeletons (of Pruning Filter in Filter) are applied. All
    are removed from the result, their effect baked into the weights; for checkpoints of such models see
    `plain_state`. Modules used twice stay shared; DataParallel, DistributedDataParallel, AveragedModel and
    torch.compile wrappers, at any depth, are taken off. A StripeConv2d holds live stripes alone, so code that reads
    a convolution's weight instead of calling it needs that one left out of `skeletons`. Warns where no stripe is
    dead, and the result is dense.

    Raises ValueError for a name the model does not have, a skeleton of another shape, or two skeletons for
    one shared module; TypeError for a named module that is no convolution, and for models that hide their
    modules.

    >>> import torch
    >>> from torch import nn
    >>> from stripe_kernels import freeze
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> freeze(model, {"0": torch.rand(8, 3, 3) < 0.4})[0]  # doctest: +ELLIPSIS
    StripeConv2d(3, 8, kernel_size=(3, 3), ..., density=0...)
    """
    copied = clone(model)
    with torch.inference_mode(False), torch.no_grad():
        if skeletons is None:
            convolutions = (m for m in copied.modules() if is_convolution(m))
            chosen = {m: _zeros_of(m) for m in convolutions if m.weight.dtype in DTYPES}
        else:
            chosen = _named(copied, skeletons, plain_names(model))
        layers: dict[nn.Module, nn.Module] = {}
        conv: Any
        weights: dict[tuple[nn.Parameter, FilterSkeleton], nn.Parameter] = {}
        for conv, live in chosen.items():
            if live.stripes == live.live.size:
                continue
            dense = conv.to_conv2d() if isinstance(conv, StripeConv2d) else conv
            layer = StripeConv2d.from_conv2d(dense, live)
            # Two layers that shared one weight keep sharing where they keep the same stripes of it.
            layer.weight = weights.setdefault((conv.weight, live), layer.weight)
            if conv.bias is not None:
                layer.bias = conv.bias
            move_hooks(conv, layer)
            layers[conv] = layer
        frozen = replace_modules(copied, layers)
    if skeletons is None and not any(isinstance(m, StripeConv2d) for m in frozen.modules()):
        warnings.warn(
            "freeze found no stripe weight[k, :, r, s] that is zero throughout: the network stays dense. Prune "
            "stripes first, or say which ones to keep: freeze(model, {name: bool [K, R, S]})",
            UnchangedWarning,
            stacklevel=2,
        )
    return frozen


def _zeros_of(conv: Any) -> FilterSkeleton:
    return as_skeleton((conv.weight != 0).any(1))


def _named(
    model: nn.Module, skeletons: Skeletons, names: Mapping[str, str]
) -> dict[nn.Module, FilterSkeleton]:
    """Skeletons by module; `names` are those of the caller's model -> those of this clone."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if not isinstance(skeletons, Mapping):
        raise TypeError(
            f"skeletons must map names of convolutions to bool [K, R, S], got {type(skeletons).__name__}"
        )
    chosen: dict[nn.Module, FilterSkeleton] = {}
    for given, skeleton in skeletons.items():
        module = modules.get(names.get(given, given))
        if module is None:
            convolutions = [n for n, m in modules.items() if isinstance(m, (nn.Conv2d, StripeConv2d))]
            near = difflib.get_close_matches(given, convolutions, n=3) or convolutions[:5]
            raise ValueError(
                f"the model has no module {given!r}; its convolutions are like {', '.join(near)}"
            )
        if not (is_convolution(module) or isinstance(module, StripeConv2d)):
            raise TypeError(
                f"{given!r} is a {type(module).__name__}, not an nn.Conv2d that stripes can be taken from"
            )
        live = as_skeleton(skeleton)
        expected = (module.out_channels, *module.kernel_size)
        if live.shape != expected:
            raise ValueError(
                f"skeleton of {given!r} is {list(live.shape)} but its filter has [K, R, S] = {list(expected)}"
            )
        if chosen.setdefault(module, live) != live:
            raise ValueError(f"{given!r} is a shared module and was given two different skeletons")
    return chosen
