"""plain_state: what other tools left in a checkpoint, as the state of the plain model.

torch.nn.utils.prune         NAME_orig, NAME_mask               NAME = NAME_orig * NAME_mask
Pruning Filter in Filter     weight, FilterSkeleton [K, R, S]   weight * FilterSkeleton[:, None]
  the same, broken up        weight [A, C, 1, 1], live stripes tap by tap, FilterSkeleton bool
NNCF                         a binary mask among its hooks      NAME * mask
gates of iessp, settled      weight under a parametrization     original * value[:, None], value [K, R, S]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_NNCF_MASK = re.compile(r"__nncf_hooks\.(?:pre|post)_hooks\.(.+)__\d+\.\d+\.binary_mask")
_GATE = re.compile(r"(.*\.)?parametrizations\.weight\.0\._extra_state")
_SKELETON = "FilterSkeleton"  # the name Pruning Filter in Filter gave it
_PREFIXES = ("module.", "_orig_mod.")


def plain_state(state: Mapping[str, Tensor], threshold: float = 0.0) -> dict[str, Tensor]:
    """A state_dict for the plain model, in which a pruned stripe is a stripe of zeros; `state` is not touched.

    Masks of torch.nn.utils.prune, of NNCF and of Pruning Filter in Filter and gates of iessp are multiplied into the
    weights they belong to, prefixes of DataParallel and torch.compile are taken off; every other entry stays as it is.
    threshold: a FilterSkeleton value of at most this magnitude is a dead stripe.

    Raises ValueError for a mask whose weight is missing or has another shape, and for gates that have not settled.

    >>> import torch
    >>> from stripe_kernels import plain_state
    >>> pruned = {"0.weight_orig": torch.ones(4, 2, 3, 3), "0.weight_mask": torch.zeros(4, 2, 3, 3)}
    >>> plain_state(pruned)["0.weight"].count_nonzero()
    tensor(0)
    """
    plain = dict(state)
    for name, value in state.items():
        if name.endswith("_mask") and (orig := name.removesuffix("_mask") + "_orig") in plain:
            plain[name.removesuffix("_mask")] = _masked(plain.pop(orig), plain.pop(name), name)
        elif found := _NNCF_MASK.fullmatch(name):
            weight = found[1].replace(":", ".")
            plain[weight] = _masked(_weight_of(plain, weight, name), plain.pop(name), name)
        elif name.split(".")[-1] == _SKELETON:
            weight = name.removesuffix(_SKELETON) + "weight"
            plain[weight] = _whole(_weight_of(plain, weight, name), value, threshold, name)
            del plain[name]
        elif isinstance(value, dict) and "phase" in value and (found := _GATE.fullmatch(name)):
            layer = found[1] or ""
            plain[f"{layer}weight"] = _gated(plain, f"{layer}parametrizations.weight.", value)
    for prefix in _PREFIXES * 2:  # of two wrappers, either outside
        if plain and all(name.startswith(prefix) for name in plain):
            plain = {name.removeprefix(prefix): value for name, value in plain.items()}
    return plain


def _weight_of(state: dict[str, Tensor], weight: str, mask: str) -> Tensor:
    if weight not in state:
        raise ValueError(f"{mask} belongs to {weight}, which the checkpoint does not have")
    return state[weight]


def _masked(weight: Tensor, mask: Tensor, name: str) -> Tensor:
    if mask.shape != weight.shape:
        raise ValueError(f"{name} is {list(mask.shape)} but its weight is {list(weight.shape)}")
    return torch.where(mask != 0, weight * mask, 0)  # a dead weight may be infinite


def _gated(state: dict[str, Tensor], prefix: str, extra: Any) -> Tensor:
    """The weight as its settled gate lets it through; takes what belongs to the gate out of `state`."""
    gate = {name.removeprefix(prefix): state.pop(name) for name in [*state] if name.startswith(prefix)}
    if others := [name for name in gate if name != "original" and not name.startswith("0.")]:
        raise ValueError(
            f"{prefix}{others[0]} belongs to a parametrization beside the gate: remove it before saving"
        )
    if extra["phase"] != "settled":
        raise ValueError(f"{prefix}0 is a gate that still learns what to keep: save what iessp.freeze gives")
    return torch.where(gate["0.value"][:, None] != 0, gate["original"] * gate["0.value"][:, None], 0)


def _whole(weight: Tensor, skeleton: Tensor, threshold: float, name: str) -> Tensor:
    """weight * skeleton [K, C, R, S], from a dense weight or from the live stripes alone."""
    k, r, s = skeleton.shape if skeleton.dim() == 3 else (0, 0, 0)
    live = skeleton if skeleton.dtype == torch.bool else skeleton.abs() > threshold
    if weight.dim() == 4 and weight.shape[::2] == (k, r) and weight.shape[3] == s:
        return torch.where(live[:, None], weight * skeleton[:, None], 0)
    if weight.dim() == 4 and weight.shape[0] == int(live.sum()) and weight.shape[2:] == (1, 1):
        dense = weight.new_zeros(r, s, k, weight.shape[1])
        dense[live.permute(1, 2, 0)] = weight[:, :, 0, 0]
        return dense.permute(2, 3, 0, 1).contiguous()
    raise ValueError(
        f"{name} is {list(skeleton.shape)} with {int(live.sum())} live stripes: its weight is {list(weight.shape)}, "
        f"not [K, C, R, S] = [{k}, C, {r}, {s}] or the live stripes [{int(live.sum())}, C, 1, 1]"
    )


def without_filter_skeleton(conv: nn.Module) -> nn.Conv2d | None:
    """nn.Conv2d for a convolution of Pruning Filter in Filter, dense or broken up; None for any other module.

    What counts as one: a subclass of nn.Conv2d with a parameter or buffer FilterSkeleton [K, R, S], which computes
    conv(x, weight * FilterSkeleton) on one image of noise.
    """
    skeleton = getattr(conv, _SKELETON, None)
    if not isinstance(conv, nn.Conv2d) or not isinstance(skeleton, Tensor) or skeleton.dim() != 3:
        return None
    state = {name: t.detach() for name, t in (*conv.named_parameters(), *conv.named_buffers())}
    settings: dict[str, Any] = {
        name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")
    }
    settings |= {"bias": conv.bias is not None, "device": conv.weight.device, "dtype": conv.weight.dtype}
    k, r, s = skeleton.shape
    plain = nn.Conv2d(conv.in_channels, k, (r, s), **settings)
    plain.load_state_dict(plain_state(state))
    side = 8 + 2 * max(skeleton.shape[1:]) * max(conv.dilation)
    noise = torch.arange(conv.in_channels * side * side).square().sin()  # torch's generator does not move
    x = noise.view(1, -1, side, side).to(conv.weight)
    theirs, ours = conv(x), plain(x)
    same = theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-3, atol=1e-5)
    return plain.train(conv.training) if same else None
