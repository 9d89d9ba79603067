"""The methods IEM is compared with, under the same budget and loop."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from iessp.gate import StripeGate, above
from iessp.network import Network, Site


def _per_layer(scores: Tensor) -> Tensor:
    """Divide by the layer's rms: norms of different layers are not comparable under batch normalisation."""
    return scores / scores.square().mean().clamp_min(1e-30).sqrt()


class MagnitudeGate(StripeGate):
    """Stripes ranked by ||W[k, :, t]||_2 over the layer's rms, re-ranked while the budget falls (gradual
    magnitude pruning, Zhu & Gupta, arXiv 1710.01878, on stripes)."""

    def scores(self, weight: Tensor) -> Tensor:
        return _per_layer(weight.detach().float().norm(dim=1))


class RandomGate(StripeGate):
    """Stripes ranked by fixed random numbers, the same share of every layer in expectation; a run of a recipe gives its
    own seed where the option is not given."""

    options: ClassVar[dict[str, object]] = {"seed": 0}
    ranks: Tensor

    def __init__(self, conv: nn.Conv2d, site: Site, network: Network, seed: int = 0):
        super().__init__(conv, site, network)
        index = [other.name for other in network.sites].index(site.name)
        generator = torch.Generator().manual_seed(seed * 100_003 + index)
        ranks = torch.rand(site.stripe_shape, generator=generator)
        self.register_buffer("ranks", ranks.to(conv.weight.device))

    def scores(self, weight: Tensor) -> Tensor:
        return self.ranks


class L1FilterGate(StripeGate):
    """Whole filters ranked by the mean |w| over the layer's rms (Li et al., arXiv 1608.08710), re-ranked as
    the budget falls."""

    whole_filters = True

    def scores(self, weight: Tensor) -> Tensor:
        filters = weight.detach().float().abs().mean(dim=(1, 2, 3))
        return _per_layer(filters)[:, None, None].expand(self.site.stripe_shape)


class FilterSkeletonGate(StripeGate):
    """Pruning Filter in Filter (NeurIPS 2020, arXiv 2009.14410): W * I, loss + alpha sum |I|.

    Entries of I [K, R, S] below delta are dead; I is trained by the optimiser of the weights. alpha, delta
    and `decay`, the weight decay on I, are those of the authors' code, for 160 epochs; there the decay is the
    optimiser's and kills most entries. A short schedule needs a larger alpha. At the end the budget's cut
    takes the place of delta; with `exact`, ours, the falling target does from the start on.
    """

    options: ClassVar[dict[str, object]] = {"alpha": 1e-5, "delta": 0.01, "decay": 1e-4, "exact": False}
    with_weights = True

    def __init__(
        self,
        conv: nn.Conv2d,
        site: Site,
        network: Network,
        alpha: float = 1e-5,
        delta: float = 0.01,
        decay: float = 1e-4,
        exact: bool = False,
    ):
        super().__init__(conv, site, network)
        self.alpha, self.delta, self.decay, self.exact = alpha, delta, decay, exact
        self.bias = nn.Parameter(torch.ones(site.stripe_shape, device=conv.weight.device))

    def learned(self) -> Tensor:
        live = self.value != 0 if self.exact else self.bias.abs() > self.delta
        return torch.where(live, self.bias, 0)

    def keep_above(self, score: float) -> None:
        if self.exact:  # a mask, not a threshold: alpha and decay move all entries below one in a step
            self.remask(above(self.bias.detach().abs(), score))

    def regularizer(self) -> Tensor:
        return self.alpha * self.bias.abs().sum() + 0.5 * self.decay * self.bias.square().sum()

    def scores(self, weight: Tensor) -> Tensor:
        return self.bias.detach().abs()

    def magnitude(self) -> Tensor:
        return self.bias.detach()
