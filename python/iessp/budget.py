"""The cut that meets a MAC budget exactly, from scores alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from iessp.network import Network


def macs_kept(network: Network, skeletons: dict[str, Tensor]) -> float:
    """Share of the convolutions' MACs that live stripes keep, 0..1; convolutions without a skeleton count in
    full.

    All input channels of a stripe count, dead ones included: see `compacted_macs_kept`.
    """
    kept = sum(
        site.stripe_macs * (int(skeletons[site.name].sum()) if site.name in skeletons else site.stripes)
        for site in network.sites
    )
    return kept / network.macs


def compacted_macs_kept(network: Network, skeletons: dict[str, Tensor]) -> float:
    """As `macs_kept`, once the input channels that no live filter makes are gone (their constants fold into
    biases).

    An input channel is gone only when every producer at a residual add lacks it. Grouped convolutions keep
    their channels.
    """
    kept = 0.0
    for site in network.sites:
        live = int(skeletons[site.name].sum()) if site.name in skeletons else site.stripes
        share = 1.0
        if site.producers and all(p in skeletons for p in site.producers):
            made = torch.stack([skeletons[p].flatten(1).any(1) for p in site.producers]).any(0)
            share = float(made.float().mean()) if len(made) == site.stripe_channels else 1.0
        kept += live * site.stripe_macs * share
    return kept / network.macs


def cut(
    network: Network, scores: dict[str, Tensor], budget: float, whole_filters: bool = False
) -> dict[str, Tensor]:
    """Keep the stripes of highest score that fit: name -> bool [K, R, S], with at most `budget` of the
    network's cost, which is its MACs unless the sites are priced otherwise.

    One threshold for all layers, found by sorting; below it, stripes that still fit are taken in order of
    score, so that the share kept is below `budget` by less than the cheapest stripe left out. The
    best stripe of every layer (filter, with `whole_filters`) is always kept. Raises ValueError when even
    those, with the convolutions outside `scores`, exceed the budget.
    """
    ranked = _rank(network, scores, budget, whole_filters)
    left = ranked.left
    for index in ranked.order[ranked.above :].tolist():
        if left < float(ranked.cost.min()):
            break
        if ranked.cost[index] <= left:
            ranked.keep[index] = True
            left -= float(ranked.cost[index])
    parts = ranked.keep.split([len(_units(v, whole_filters)) for v in ranked.scores.values()])
    return {
        name: _stripes(part, network[name].stripe_shape)
        for name, part in zip(ranked.scores, parts, strict=True)
    }


def threshold(network: Network, scores: dict[str, Tensor], budget: float) -> float:
    """The score above which (inclusive) stripes keep at most `budget` of the MACs: see `cut`."""
    ranked = _rank(network, scores, budget, whole_filters=False)
    if ranked.above:
        return float(ranked.value[ranked.order[ranked.above - 1]])
    if not len(ranked.order):
        return float(ranked.value.min())
    # Just above the best that is not kept: at infinity gates would close on those that are.
    return float(ranked.value[ranked.order[0]].float().nextafter(torch.tensor(math.inf)))


def out_of_reach(
    network: Network, names: Iterable[str], budget: float, whole_filters: bool = False
) -> str | None:
    """Why no cut of the convolutions `names` keeps so little, or None where one does: the other convolutions stay
    whole, and of every gated layer its best stripe (filter, with `whole_filters`)."""
    cuttable = set(names)
    fixed = [site for site in network.sites if site.name not in cuttable]
    least = sum(site.cost for site in fixed)
    for site in network.sites:
        if site.name in cuttable:
            least += site.cost / site.stripe_shape[0] if whole_filters else site.stripe_cost
    if least <= budget * network.cost:
        return None
    why = f"budget {budget:.4f} is out of reach: this network keeps at least {least / network.cost:.4f}"
    if not fixed:
        return why
    pointwise = [site for site in fixed if site.stripe_shape[1:] == (1, 1)]
    why += f", as {len(fixed)} convolutions without a gate are {sum(s.cost for s in fixed) / network.cost:.4f} of it"
    if pointwise:
        share = sum(site.cost for site in pointwise) / network.cost
        why += f"; {len(pointwise)} are 1x1 ({share:.4f}), which attach(..., pointwise=True), iessp prune --pointwise "
        why += "and iessp train --set pointwise=true gate too"
    return why


@dataclass
class _Ranked:
    """Units (stripes or filters) of all layers in a row, in the order of execution of their layers."""

    scores: dict[str, Tensor]
    value: Tensor  # score of each unit
    cost: Tensor  # of each unit
    keep: Tensor  # bool: the best of each layer, and what is above the threshold
    order: Tensor  # the other units, best first
    above: int  # how many of `order` are above the threshold
    left: float  # of the budget


def _rank(network: Network, scores: dict[str, Tensor], budget: float, whole_filters: bool) -> _Ranked:
    if not 0 < budget <= 1:
        raise ValueError(f"budget is a share of MACs in (0, 1], got {budget}")
    scores = {site.name: scores[site.name] for site in network.sites if site.name in scores}
    units = [_units(value, whole_filters) for value in scores.values()]
    sites = [network[name] for name in scores]
    cost = torch.cat([u.new_full(u.shape, s.cost / len(u)) for u, s in zip(units, sites, strict=True)])
    value = torch.cat(units)
    starts = torch.tensor([0, *(len(u) for u in units)])[:-1].cumsum(0)
    best = starts + torch.tensor([int(u.argmax()) for u in units])

    allowance = budget * network.cost - sum(site.cost for site in network.sites if site.name not in scores)
    allowance -= float(cost[best].sum())
    if reason := out_of_reach(network, scores, budget, whole_filters):
        raise ValueError(reason)
    keep = torch.zeros(len(value), dtype=torch.bool)
    keep[best] = True
    order = torch.argsort(value, descending=True, stable=True)
    order = order[~keep[order]]
    spent = cost[order].cumsum(0)
    above = int((spent <= allowance).sum())
    keep[order[:above]] = True
    return _Ranked(
        scores, value, cost, keep, order, above, allowance - (float(spent[above - 1]) if above else 0.0)
    )


def _units(scores: Tensor, whole_filters: bool) -> Tensor:
    """Scores of what is kept or dropped together: filters [K] or stripes [K*R*S], float64 on the CPU."""
    scores = scores.detach().double().cpu()
    if not torch.isfinite(scores).all():
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} are not all finite: the training has diverged"
        )
    return scores.amax(dim=(1, 2)) if whole_filters else scores.flatten()


def _stripes(kept: Tensor, shape: tuple[int, int, int]) -> Tensor:
    k, r, s = shape
    return kept.view(k, 1, 1).expand(k, r, s).clone() if len(kept) == k != k * r * s else kept.view(k, r, s)
