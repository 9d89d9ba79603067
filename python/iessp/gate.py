"""The gate every method shares: a parametrization that multiplies each stripe of a convolution's weight.

    W' [K, C/g, R, S] = W * g[:, None],   g [K, R, S]

The layer keeps its class and its call; only where its weight comes from changes. A gate lives through three
phases:

    warm     g = 1, the network trains dense (statistics are already gathered)
    learn    g = what the method says, from its parameters and buffers alone: never from the input at hand
    settled  g = a fixed tensor, zero outside the final skeleton, ready to be merged into the weight

What the schedule changes (value, tau, theta) is a new tensor each time: it does so between a pass and its backward,
which in a compiled network reads the buffers themselves.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from iessp.network import Network, Site

Phase = Literal["warm", "learn", "settled"]


class StripeGate(nn.Module):
    """Base of all gates. Subclasses give `scores`, and `learned` where the gate is more than a mask."""

    options: ClassVar[dict[str, object]] = {}  # keyword options of the method and their defaults
    with_weights: ClassVar[bool] = False  # its parameters are trained as the weights are, not by Adam
    whole_filters: ClassVar[bool] = False  # the budget keeps or drops all stripes of a filter together
    exact: bool = False  # what lives follows the falling target, whatever the gate wants

    value: Tensor
    tau: Tensor

    def __init__(self, conv: nn.Conv2d, site: Site, network: Network):
        super().__init__()
        self.site, self.network = site, network
        self.phase: Phase = "warm"
        device = conv.weight.device
        self.register_buffer("value", torch.ones(site.stripe_shape, device=device))  # g, once settled
        self.register_buffer("tau", torch.ones((), device=device))

    @staticmethod
    def of(conv: nn.Module) -> StripeGate | None:
        """The gate on a convolution's weight, if there is one."""
        if not parametrize.is_parametrized(conv, "weight"):
            return None
        gate = cast(Any, conv).parametrizations.weight[0]
        return gate if isinstance(gate, StripeGate) else None

    @staticmethod
    def original(conv: nn.Module) -> nn.Parameter:
        """The parameter W under the gate, [K, C/g, R, S]."""
        return cast(Any, conv).parametrizations.weight.original

    def forward(self, weight: Tensor) -> Tensor:
        """W [K, C/g, R, S] -> W * g[:, None]."""
        if self.phase == "warm":
            return weight
        return weight * self.gate().to(weight.dtype).unsqueeze(1)

    def gate(self) -> Tensor:
        """g [K, R, S] of the present phase."""
        if self.phase == "warm":
            return torch.ones_like(self.value)
        return self.learned() if self.phase == "learn" else self.value

    def learned(self) -> Tensor:
        """g [K, R, S] while learning; here the mask that `remask` last made."""
        return self.value

    def soft(self) -> Tensor:
        """M [K, R, S] in 0..1, how much of each stripe the budget counts; differentiable where it learns."""
        return self.gate()

    def scores(self, weight: Tensor) -> Tensor:
        """[K, R, S]: a stripe with a higher score is kept before one with a lower score, across layers."""
        raise NotImplementedError

    def regularizer(self) -> Tensor | None:
        """A term of the method's own, scaled by its own option; None: the method uses the budget's loss."""
        return None

    def observe(self, conv: nn.Conv2d, args: tuple[Tensor, ...]) -> None:
        """Called before each forward pass of the convolution; args[0] is its input x [N, C, H, W]."""

    @torch.no_grad()
    def remask(self, skeleton: Tensor) -> None:
        """Change the stripes that live without ending the learning (methods that re-rank as they go)."""
        self.value = skeleton.to(self.value)

    @torch.no_grad()
    def settle(self, skeleton: Tensor) -> None:
        """Fix the gate for good: g = the learned value inside the skeleton, zero outside."""
        if skeleton.shape != self.value.shape or skeleton.dtype != torch.bool:
            raise ValueError(
                f"{self.site.name}: skeleton is {skeleton.dtype} {tuple(skeleton.shape)}, "
                f"needs bool {tuple(self.value.shape)}"
            )
        self.value = torch.where(skeleton.to(self.value.device), self.magnitude(), 0)
        self.phase = "settled"

    def magnitude(self) -> Tensor:
        """What a stripe is multiplied by when it lives, [K, R, S]."""
        return torch.ones_like(self.value)

    def live(self) -> Tensor:
        """bool [K, R, S]: the stripes the network sees now."""
        return self.gate().detach() != 0

    def wanted(self) -> Tensor:
        """bool [K, R, S]: the stripes the gate would let live if the budget did not hold on to more."""
        return self.live()

    def keep_above(self, score: float) -> None:
        """Let stripes live whose score is above this, even if the gate would not."""

    def get_extra_state(self) -> dict[str, str]:
        return {"phase": self.phase}

    def set_extra_state(self, state: dict[str, str]) -> None:
        self.phase = state["phase"]  # type: ignore[assignment]

    def extra_repr(self) -> str:
        return f"{self.site.name}, {self.phase}, {int(self.live().sum())} of {self.site.stripes} stripes live"


def above(scores: Tensor, theta: Tensor | float) -> Tensor:
    """bool [K, R, S]: what reaches the threshold, and the best stripe of the layer whatever it is."""
    best = F.one_hot(scores.flatten().argmax(), scores.numel()).bool().view_as(scores)
    return (scores >= theta) | best
