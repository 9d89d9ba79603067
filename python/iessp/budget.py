"""The cut that meets a MAC budget exactly, from scores alone."""

from __future__ import annotations

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
    network's MACs.

    One threshold for all layers, found by sorting; below it, stripes that still fit are taken in order of
    score, so that the share of MACs kept is below `budget` by less than the cheapest stripe left out. The
    best stripe of every layer (filter, with `whole_filters`) is always kept. Raises ValueError when even
    those, with the convolutions outside `scores`, exceed the budget.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget is a share of MACs in (0, 1], got {budget}")
    names = [site.name for site in network.sites if site.name in scores]
    units = {name: _units(scores[name], whole_filters) for name in names}
    cost_of = {name: network[name].stripes // len(units[name]) * network[name].stripe_macs for name in names}
    cost = torch.cat([torch.full((len(units[n]),), cost_of[n], dtype=torch.float64) for n in names])
    value = torch.cat([units[n] for n in names])
    best = torch.tensor([int(units[n].argmax()) for n in names])
    best += torch.tensor([0, *[len(units[n]) for n in names]])[:-1].cumsum(0)

    allowance = budget * network.macs - sum(site.macs for site in network.sites if site.name not in scores)
    allowance -= float(cost[best].sum())
    if allowance < 0:
        least = budget - allowance / network.macs
        raise ValueError(
            f"budget {budget:.4f} is out of reach: the least this network can keep is {least:.4f}"
        )
    keep = torch.zeros(len(value), dtype=torch.bool)
    keep[best] = True
    order = torch.argsort(value, descending=True, stable=True)
    order = order[~keep[order]]
    spent = cost[order].cumsum(0)
    above = int((spent <= allowance).sum())
    keep[order[:above]] = True
    left = allowance - (float(spent[above - 1]) if above else 0.0)
    for index in order[above:].tolist():
        if left < min(cost_of.values()):
            break
        if cost[index] <= left:
            keep[index] = True
            left -= float(cost[index])

    parts = keep.split([len(units[n]) for n in names])
    return {name: _stripes(part, network[name].stripe_shape) for name, part in zip(names, parts, strict=True)}


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
